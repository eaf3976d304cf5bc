"""A real Envoy with the shipped configuration weighs two gateways by the load that they report."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest

from deltawire import AsyncClient
from deltawire_server.fake_vllm import Chunks, FakeVllm, Script
from tests.polyglot.calls import MODEL, ask, chat_request, gateway
from tests.polyglot.programs import LIMIT, LOAD_CONFIG, run, tool
from tests.polyglot.proxy import by_load

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.polyglot

BUSY, IDLE = 90, 30
"""Streams that run at each gateway: many, because each new one counts too while it runs."""

NEW = 400
"""New streams of which the busy gateway is to get a quarter, give or take a tenth of that: ten.

Envoy draws no lots: of each four in turn, the busy gateway gets one. Only when the weights change, at most once a second,
does it begin in the middle of four, which is less than one each time, too many or too few.
"""


async def test_the_shipped_configuration_is_valid(tmp_path: Path) -> None:
    """As it is in the repository, by Envoy's own check."""
    checked = await run(tool("envoy"), "--mode", "validate", "-c", str(LOAD_CONFIG), home=tmp_path)
    assert checked.status == 0, checked.err


async def begin(client: AsyncClient, stack: contextlib.AsyncExitStack) -> None:
    """Begin a stream, which runs until the stack is left."""
    stream = await stack.enter_async_context(client.chat.stream("hi", model=MODEL))
    await anext(aiter(stream))


@contextlib.asynccontextmanager
async def streams(target: str, count: int) -> AsyncIterator[None]:
    """This many streams that run at a gateway."""
    async with AsyncClient(target, timeout=LIMIT) as client, contextlib.AsyncExitStack() as stack:
        await asyncio.gather(*(begin(client, stack) for _ in range(count)))
        yield


async def test_a_gateway_whose_calls_fail_gets_few(vllm: FakeVllm, tmp_path: Path) -> None:
    """Though nothing runs there, because it cannot reach its vLLM."""
    async with (
        FakeVllm() as other,
        gateway(vllm, tmp_path) as (_, first),
        gateway(other, tmp_path) as (_, second),
        by_load(tmp_path, first, second) as proxy,
    ):
        assert (await ask(first, chat_request())).answer  # it knows its model, so that it is the chat itself that fails
        await vllm.crash()
        async with asyncio.timeout(LIMIT):
            while (weights := await proxy.weights())[second] < 100 * weights[first]:
                await ask(proxy.target, chat_request())


async def test_new_streams_go_where_fewer_run(tmp_path: Path) -> None:
    """One gateway runs three times as many streams as the other, and gets a third of its new ones; none has ended before."""
    chunk = Chunks()
    waiting = Script.chunks((chunk.role(), chunk.text("begun"), asyncio.Event()))
    async with (
        FakeVllm(waiting) as vllm,
        FakeVllm(waiting) as other,
        gateway(vllm, tmp_path) as (_, first),
        gateway(other, tmp_path) as (_, second),
        by_load(tmp_path, first, second) as proxy,
        streams(first, BUSY),
        streams(second, IDLE),
        AsyncClient(proxy.target, timeout=LIMIT) as client,
    ):
        async with asyncio.timeout(LIMIT):
            # Envoy learns the load when a stream begins, and uses it once a second.
            while not 2.8 < (weights := await proxy.weights())[second] / weights[first] < 3.2:
                async with contextlib.AsyncExitStack() as stack:
                    await begin(client, stack)
        before = len(vllm.chats)
        for _ in range(NEW):
            async with contextlib.AsyncExitStack() as stack:
                await begin(client, stack)
        assert len(vllm.chats) - before == pytest.approx(NEW / 4, rel=0.1)
