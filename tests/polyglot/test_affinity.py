"""Two gateways behind a real Envoy with the shipped configuration: calls about a completion reach the gateway that has it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import grpc
import pytest

from deltawire import AsyncClient, CallError, CallInfo
from deltawire.v1.chat_completion_pb2 import COMPLETION_STATE_COMPLETED, StopReason
from deltawire_server.fake_vllm import FakeVllm, Script
from tests.polyglot.calls import (
    COMPLETIONS,
    MODEL,
    Reply,
    ask,
    begun,
    chat_request,
    gateway,
    gateway_process,
    one_attempt,
)
from tests.polyglot.programs import LIMIT
from tests.polyglot.proxy import envoy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from deltawire_server.app import Gateway
    from tests.polyglot.proxy import Envoy

pytestmark = pytest.mark.polyglot

Pair = tuple["Envoy", tuple["Gateway", str], tuple["Gateway", str]]

ENDLESS = Script.generated(tokens=1_000_000, tokens_per_second=20)


@pytest.fixture
async def gateways(vllm: FakeVllm, tmp_path: Path) -> AsyncIterator[Pair]:
    """An Envoy, and the two gateways behind it, which have a vLLM together."""
    # A drain that goes on while the test needs it; calls about completions are answered all the time.
    flags = ("--set", "server.drain_delay=30")
    async with (
        gateway(vllm, tmp_path, *flags) as first,
        gateway(vllm, tmp_path, *flags) as second,
        envoy(tmp_path, first[1], second[1]) as proxy,
    ):
        yield proxy, first, second


async def test_soft_cancels_by_generated_ids(vllm: FakeVllm, gateways: Pair) -> None:
    """The gateway made the id: each cancel reaches it at once, by the header that Envoy gave the stream."""
    proxy, *_ = gateways
    async with one_attempt(proxy.target) as client, contextlib.AsyncExitStack() as stack:
        vllm.play(*[ENDLESS] * COMPLETIONS)
        streams = [await stack.enter_async_context(client.chat.stream(chat_request())) for _ in range(COMPLETIONS)]
        await asyncio.gather(*map(begun, streams))
        assert {stream.completion_id[:5] for stream in streams} == {"cmpl-"}
        await asyncio.gather(*(stream.cancel_softly() for stream in streams))
        answers = await asyncio.gather(*(stream.final() for stream in streams))
        assert {answer.stop_reason for answer in answers} == {StopReason.STOP_REASON_CANCELLED}


async def test_other_clients_have_only_the_chosen_id(vllm: FakeVllm, gateways: Pair) -> None:
    """A program that has never seen the stream resumes it, looks it up and cancels it; both gateways have some."""
    proxy, *_ = gateways
    ids = [f"mine-{number}" for number in range(COMPLETIONS)]
    vllm.play(*[ENDLESS] * COMPLETIONS)
    async with one_attempt(proxy.target) as client:
        for completion_id in ids:
            async with client.chat.stream("hi", model=MODEL, retention=60, completion_id=completion_id) as stream:
                await begun(stream)
    found = set()
    async with one_attempt(proxy.target) as other:
        for completion_id in ids:
            info = CallInfo()
            assert (await other.chat.get(completion_id, info=info)).completion_id == completion_id
            found.add(dict(info.initial_metadata)["x-deltawire-gateway"])
            async with other.chat.resume(completion_id) as stream:
                await begun(stream)
                await other.chat.cancel(completion_id)
                assert (await stream.final()).stop_reason is StopReason.STOP_REASON_CANCELLED
    assert len(found) == 2
    assert len(vllm.chats) == COMPLETIONS


async def test_a_generated_id_without_its_stream_is_searched_for(vllm: FakeVllm, gateways: Pair) -> None:
    """Another program knows only the id: its client tries other routes until one leads to the gateway that has it."""
    proxy, *_ = gateways
    async with AsyncClient(proxy.target, timeout=LIMIT) as client, AsyncClient(proxy.target, timeout=LIMIT) as other:
        answers = [await client.chat.create("hi", model=MODEL) for _ in range(4)]
        for answer in answers:
            assert (await other.chat.get(answer.completion_id)).state == COMPLETION_STATE_COMPLETED
    assert len(vllm.chats) == len(answers)


async def test_a_gateway_that_shuts_down_answers_for_its_completions(vllm: FakeVllm, gateways: Pair) -> None:
    """Envoy sends it no new calls, but look-ups, resumes and soft cancels of its streams, and every stream ends whole."""
    proxy, (leaving, address), _ = gateways
    vllm.play(*[ENDLESS] * COMPLETIONS)
    async with one_attempt(proxy.target) as client, contextlib.AsyncExitStack() as stack:
        streams = [
            await stack.enter_async_context(client.chat.stream("hi", model=MODEL, retention=60))
            for _ in range(COMPLETIONS)
        ]
        await asyncio.gather(*map(begun, streams))
        drain = asyncio.create_task(leaving.drain())
        await proxy.until(address, "failed_active_health_check")
        for stream in streams:
            got = await client.chat.get(stream.completion_id)
            assert got.completion_id == stream.completion_id
            async with client.chat.resume(stream.completion_id) as again:
                await begun(again)
            await stream.cancel_softly()
            assert (await stream.final()).stop_reason is StopReason.STOP_REASON_CANCELLED
        assert not drain.done()
        drain.cancel()


async def test_refusals_of_the_registry_take_no_gateway_from_the_chats(vllm: FakeVllm, gateways: Pair) -> None:
    """However many registrations fail because a vLLM cannot be reached."""
    proxy, *_ = gateways
    async with one_attempt(proxy.target) as client:
        await client.chat.create("hi", model=MODEL)
        await vllm.crash()
        for number in range(48):
            with pytest.raises(CallError) as refused:
                await client.models.register(f"m-{number}", provider_id="vllm", provider_model_id="absent")
            assert refused.value.code is grpc.StatusCode.UNAVAILABLE
        await vllm.start_listening()
        assert await proxy.count("outlier_detection.ejections_enforced_total") == 0
        await client.chat.create("hi", model=MODEL)


async def test_a_gateway_dies_with_a_hundred_calls_waiting(vllm: FakeVllm, tmp_path: Path) -> None:
    """Kill -9: every call that had received nothing is retried on the other gateway, all of them at the same time."""
    async with (
        FakeVllm() as other,
        gateway_process(vllm, tmp_path) as (process, first),
        # Not in this process, whose event loop the calls keep busy: it would answer health checks too late.
        gateway_process(other, tmp_path) as (_, second),
        envoy(tmp_path, first, second) as proxy,
    ):
        vllm.sleep()
        waiting: list[asyncio.Task[Reply]] = []
        async with asyncio.timeout(LIMIT):
            while len(vllm.chats) < 100:
                waiting += [asyncio.create_task(ask(proxy.target, chat_request())) for _ in range(20)]
                await asyncio.sleep(0.2)  # the calls that the other gateway gets end meanwhile
            process.kill()
            replies = await asyncio.gather(*waiting)
        assert all(reply.answer for reply in replies)


async def test_a_caller_without_grpc_is_answered(vllm: FakeVllm, tmp_path: Path) -> None:
    """HTTP/1.1 gets a status and a sentence instead of a closed connection."""
    async with gateway(vllm, tmp_path) as (_, address), envoy(tmp_path, address) as proxy:
        host, port = proxy.target.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: gateway\r\ncontent-length: 2\r\n\r\n{}")
        async with asyncio.timeout(LIMIT):
            assert (await reader.readline()).startswith(b"HTTP/1.1 415")
            assert b"content-type application/grpc" in await reader.readuntil(b"HTTP/2.\n")
        writer.close()
