"""The upstream by itself: each step does to a plain socket what it says."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from tests.faults.upstream import Close, Flood, Gate, Plan, Reset, Send, Stall, Step, Upstream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

REQUEST = b"POST /v1/chat/completions HTTP/1.1\r\nx-request-id: one-2\r\ncontent-length: 2\r\n\r\n{}"

Connection = tuple[Plan, asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def _asked(*steps: Step) -> AsyncIterator[Connection]:
    """A connection with one request that these steps answer."""
    async with Upstream() as upstream, asyncio.timeout(10):
        plan = upstream.plans["one"] = Plan(steps)
        reader, writer = await asyncio.open_connection("127.0.0.1", upstream.port)
        writer.write(REQUEST)
        try:
            yield plan, reader, writer
        finally:
            writer.close()
        await plan.settled.wait()


async def test_a_connection_serves_one_request_after_the_other() -> None:
    """Until a step ends it."""
    async with _asked(Send(b"ab"), Send(b"cdef", size=1)) as (plan, reader, writer):
        assert await reader.readexactly(6) == b"abcdef"
        await plan.settled.wait()
        writer.write(REQUEST)
        assert await reader.readexactly(6) == b"abcdef"
        assert (plan.requests, plan.sent, plan.peer_closed) == (2, 12, False)


async def test_close_and_reset() -> None:
    """FIN is an end; RST an error, and what was sent before it has arrived."""
    async with _asked(Send(b"ab"), Close()) as (_, reader, _writer):
        assert await reader.read() == b"ab"
    async with _asked(Send(b"ab"), Reset()) as (_, reader, _writer):
        assert await reader.readexactly(2) == b"ab"
        with pytest.raises(ConnectionResetError):
            await reader.read()


@pytest.mark.parametrize("step", [Stall(), Gate(), Flood(b"x", limit=1)])
async def test_a_step_that_waits_ends_when_the_peer_closes(step: Step) -> None:
    """And the plan says so."""
    async with _asked(step) as (plan, _reader, writer):
        await plan.asked.wait()
        writer.close()
        await plan.settled.wait()
        assert plan.peer_closed


async def test_a_gate_opens() -> None:
    """What follows comes after it was set."""
    async with _asked(Send(b"a"), Gate(), Send(b"b")) as (plan, reader, _writer):
        assert await reader.readexactly(1) == b"a"
        await plan.at_gate.wait()
        plan.gate.set()
        assert await reader.readexactly(1) == b"b"
        assert not plan.peer_closed


async def test_a_flood_is_counted_and_ends() -> None:
    """At its limit, or when the peer closes."""
    async with _asked(Flood(b"x" * 1000, limit=5000)) as (plan, reader, _writer):
        assert len(await reader.readexactly(5000)) == 5000
        assert plan.sent == 5000
    async with _asked(Flood(b"x" * 65536, limit=10**12)) as (plan, reader, writer):
        await reader.readexactly(1_000_000)
        writer.transport.abort()
        await plan.settled.wait()
        assert plan.sent < 10**9


async def test_it_refuses() -> None:
    """Once it does not listen."""
    async with Upstream() as upstream:
        await upstream.refuse()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", upstream.port)
