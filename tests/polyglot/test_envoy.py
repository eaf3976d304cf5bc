"""A real Envoy with the shipped configuration between the Python client and the gateways."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING

import grpc
import pytest

from deltawire import StreamInterrupted
from deltawire_server.fake_vllm import Chunks, FakeVllm, Script
from tests.polyglot.calls import Reply, ask, chat_request, gateway, gateway_process
from tests.polyglot.programs import ENVOY_CONFIG, LIMIT, run, tool
from tests.polyglot.proxy import envoy
from tests.support.recordings import TRANSCRIPTS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.polyglot.proxy import Envoy

pytestmark = pytest.mark.polyglot

MANY = 100
"""Calls after which each of two gateways has had one: Envoy draws lots where both are equally busy."""


@pytest.fixture
async def other() -> AsyncIterator[FakeVllm]:
    """The vLLM behind the second gateway."""
    async with FakeVllm() as vllm:
        yield vllm


async def streams_that_wait(
    proxy: Envoy, gate: asyncio.Event, wanted: FakeVllm, other: FakeVllm, others_gateway: str
) -> list[asyncio.Task[Reply]]:
    """Begin streams that stop in the middle until the gate opens, until the wanted vLLM has exactly one of them."""
    chunk = Chunks()
    script = Script.chunks((chunk.role(), chunk.text("begun"), gate, chunk.text(" and ended"), chunk.finish()))
    streams: list[asyncio.Task[Reply]] = []

    async def begin(target: str) -> None:
        began = asyncio.Event()
        streams.append(asyncio.create_task(ask(target, chat_request(), began=began)))
        await began.wait()

    async with asyncio.timeout(LIMIT):
        wanted.play(script)
        other.play(script)
        while not wanted.chats and len(streams) < MANY:
            await begin(proxy.target)
            if not wanted.chats:
                other.play(script)
        # The script that the other one has not played yet.
        await begin(others_gateway)
    assert len(wanted.chats) == 1
    return streams


async def test_the_shipped_configuration_is_valid(tmp_path: Path) -> None:
    """As it is in the repository, by Envoy's own check."""
    checked = await run(tool("envoy"), "--mode", "validate", "-c", str(ENVOY_CONFIG), home=tmp_path)
    assert checked.status == 0, checked.err


@pytest.mark.parametrize("recording", ["tool-text-before", "tool-two", "r-qwen3-tool", "text-unicode"])
async def test_the_events_are_the_same_through_envoy(
    vllm: FakeVllm, other: FakeVllm, tmp_path: Path, recording: str
) -> None:
    """By whichever of two gateways: Envoy adds, drops and reorders nothing, and both gateways get their share."""
    script = Script.recording(TRANSCRIPTS / f"{recording}.sse")
    chat = chat_request(recording)
    async with (
        gateway(vllm, tmp_path) as (_, first),
        gateway(other, tmp_path) as (_, second),
        envoy(tmp_path, first, second) as proxy,
    ):
        vllm.play(script)
        direct = await ask(first, chat)
        calls = 0
        while (len(vllm.chats) < 2 or not other.chats) and calls < MANY:
            calls += 1
            vllm.play(script)
            other.play(script)
            assert (await ask(proxy.target, chat)).answer == direct.answer
        assert len(vllm.chats) > 1
        assert other.chats
        assert len(vllm.chats) + len(other.chats) == 1 + calls
        assert await proxy.count("upstream_rq_retry") == 0


async def test_request_ids_go_through(vllm: FakeVllm, tmp_path: Path) -> None:
    """The caller's request id reaches vLLM and comes back in an error, with the gateway's reason beside it."""
    async with gateway(vllm, tmp_path) as (_, address), envoy(tmp_path, address) as proxy:
        await ask(proxy.target, chat_request(), request_id="mine-1")
        (request,) = vllm.chats
        assert request.headers["x-request-id"].startswith("mine-1-")
        vllm.play(Script.error(400, "no such thing", "BadRequestError"))
        failed = await ask(proxy.target, chat_request(), request_id="mine-2")
        assert failed.error is not None
        assert failed.error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert failed.error.reason == "UPSTREAM_REJECTED"
        assert failed.error.request_id == "mine-2"
        assert ("deltawire-reason", "UPSTREAM_REJECTED") in failed.error.trailing_metadata


async def test_a_failure_before_the_first_event_is_retried_on_the_other_gateway(
    vllm: FakeVllm, other: FakeVllm, tmp_path: Path
) -> None:
    """One gateway's vLLM answers 503 to everything: no caller notices, and each failure is one retry of Envoy's.

    The client makes one attempt only, so it is Envoy that tries again; every call is answered by the other gateway.
    """
    async with (
        gateway(vllm, tmp_path) as (_, first),
        gateway(other, tmp_path) as (_, second),
        envoy(tmp_path, first, second) as proxy,
    ):
        vllm.play(*[Script.error(503, "the engine is loading", "ServiceUnavailableError")] * MANY)
        calls = 0
        while len(vllm.chats) < 2 and calls < MANY:
            calls += 1
            assert (await ask(proxy.target, chat_request())).answer
        assert len(vllm.chats) == 2
        assert len(other.chats) == calls
        assert await proxy.count("upstream_rq_retry") == 2
        assert await proxy.count("upstream_rq_retry_success") == 2


async def test_a_vllm_that_refuses_takes_its_gateway_out_for_a_while(
    vllm: FakeVllm, other: FakeVllm, tmp_path: Path
) -> None:
    """One gateway cannot reach its vLLM: every call is answered by the other, and Envoy ejects the first after five.

    Its health stays SERVING, because the process is healthy; Envoy ejects it because of its failures.
    """
    async with (
        gateway(vllm, tmp_path) as (_, first),
        gateway(other, tmp_path) as (_, second),
        envoy(tmp_path, first, second) as proxy,
    ):
        # Both know their models by now, so that it is the chat itself that is refused.
        assert (await ask(first, chat_request())).answer
        await vllm.crash()
        calls = 0
        while not await proxy.count("outlier_detection.ejections_enforced_total") and calls < MANY:
            calls += 1
            assert (await ask(proxy.target, chat_request())).answer
        assert len(vllm.chats) == 1
        assert len(other.chats) == calls
        assert await proxy.count("upstream_rq_retry") == 5
        assert await proxy.count("outlier_detection.ejections_enforced_consecutive_gateway_failure") == 1
        assert (await proxy.health())[first] == {"failed_outlier_check": True}
        assert (await ask(proxy.target, chat_request())).answer
        assert await proxy.count("upstream_rq_retry") == 5


async def test_a_single_gateway_is_never_taken_out(vllm: FakeVllm, tmp_path: Path) -> None:
    """However often its vLLM fails: callers get the gateway's own status and reason, and it goes on when vLLM does."""
    async with gateway(vllm, tmp_path) as (_, address), envoy(tmp_path, address) as proxy:
        assert (await ask(proxy.target, chat_request())).answer
        await vllm.crash()
        for _ in range(10):
            failed = await ask(proxy.target, chat_request())
            assert failed.events == []
            assert failed.error is not None
            assert failed.error.code is grpc.StatusCode.UNAVAILABLE
            assert failed.error.reason == "UPSTREAM_UNAVAILABLE"
        assert await proxy.count("upstream_rq_retry") == 10
        await vllm.start_listening()
        assert (await ask(proxy.target, chat_request())).answer


async def test_a_fault_in_the_middle_is_told_and_never_retried(vllm: FakeVllm, other: FakeVllm, tmp_path: Path) -> None:
    """What was said, `Completed` with the error, and the status ABORTED with the reason: all of it through Envoy."""
    chunk = Chunks()
    script = Script.chunks([chunk.role(), chunk.text("half an"), chunk.text(" ans")], after=3, end="cut")
    vllm.play(script)
    other.play(script)
    async with (
        gateway(vllm, tmp_path) as (_, first),
        gateway(other, tmp_path) as (_, second),
        envoy(tmp_path, first, second) as proxy,
    ):
        reply = await ask(proxy.target, chat_request())
        assert len(vllm.chats) + len(other.chats) == 1
        assert await proxy.count("upstream_rq_retry") == 0
    assert reply.events[0].WhichOneof("event") == "started"
    assert "".join(event.text_delta.text for event in reply.events) == "half an ans"
    assert reply.events[-1].completed.error.code == grpc.StatusCode.ABORTED.value[0]
    assert reply.error is not None
    assert reply.error.code is grpc.StatusCode.ABORTED
    assert reply.error.reason == "UPSTREAM_INCOMPLETE"
    assert ("deltawire-reason", "UPSTREAM_INCOMPLETE") in reply.error.trailing_metadata


async def test_a_cancel_reaches_the_engine_through_envoy(vllm: FakeVllm, tmp_path: Path) -> None:
    """The caller hangs up in the middle of an endless answer: vLLM's request is closed, nothing runs on."""
    vllm.play(Script.generated(tokens=1_000_000, tokens_per_second=50))
    async with gateway(vllm, tmp_path) as (_, address), envoy(tmp_path, address) as proxy:
        asking = asyncio.create_task(ask(proxy.target, chat_request()))
        async with asyncio.timeout(LIMIT):
            request = await vllm.received()
            assert vllm.running == 1
            asking.cancel()
            await asyncio.wait([asking])
            await request.closed_early.wait()
        assert vllm.running == 0


async def test_a_draining_gateway_gets_no_new_calls_and_ends_its_streams(
    vllm: FakeVllm, other: FakeVllm, tmp_path: Path
) -> None:
    """A rolling restart: the stream that runs on the old gateway ends whole, and all new calls go to the other one."""
    gate = asyncio.Event()
    async with (
        gateway(vllm, tmp_path) as (leaving, first),
        gateway(other, tmp_path) as (_, second),
        envoy(tmp_path, first, second) as proxy,
    ):
        streams = await streams_that_wait(proxy, gate, vllm, other, second)
        drain = asyncio.create_task(leaving.drain())
        await proxy.until(first, "failed_active_health_check")
        before = len(other.chats)
        new = [asyncio.create_task(ask(proxy.target, chat_request())) for _ in range(20)]
        async with asyncio.timeout(LIMIT):
            await other.received(before + len(new))
            assert len(vllm.chats) == 1
            assert not drain.done()
            gate.set()
            for reply in await asyncio.gather(*streams):
                assert "".join(event.text_delta.text for event in reply.events) == "begun and ended"
                assert reply.answer[-1]["completed"]
            for reply in await asyncio.gather(*new):
                assert reply.answer
            await drain
        assert len(vllm.chats) == 1
        assert await proxy.count("upstream_rq_retry") == 0
        # Even after the port is closed.
        assert (await ask(proxy.target, chat_request())).answer


async def test_a_gateway_that_is_late_stays(vllm: FakeVllm, tmp_path: Path) -> None:
    """It misses a health check because it is busy: calls wait for it instead of failing, as they would without any gateway."""
    async with gateway_process(vllm, tmp_path) as (process, address), envoy(tmp_path, address) as proxy:
        missed = await proxy.count("health_check.failure")
        process.send_signal(signal.SIGSTOP)
        try:
            async with asyncio.timeout(LIMIT):
                while await proxy.count("health_check.failure") == missed:  # noqa: ASYNC110 -- Envoy can only be asked
                    await asyncio.sleep(0.02)
                asking = asyncio.create_task(ask(proxy.target, chat_request()))
                while not (await proxy.count("upstream_rq_active") or asking.done()):  # noqa: ASYNC110 -- the same
                    await asyncio.sleep(0.02)
        finally:
            process.send_signal(signal.SIGCONT)
        assert (await asking).answer


async def test_a_gateway_that_dies(vllm: FakeVllm, other: FakeVllm, tmp_path: Path) -> None:
    """Kill -9: a caller who has had nothing yet is served by the other gateway; one with a partial answer gets an error."""
    gate = asyncio.Event()
    async with (
        gateway_process(vllm, tmp_path) as (process, first),
        gateway(other, tmp_path) as (_, second),
        envoy(tmp_path, first, second) as proxy,
    ):
        streams = await streams_that_wait(proxy, gate, vllm, other, second)
        vllm.sleep()
        waiting: list[asyncio.Task[Reply]] = []
        async with asyncio.timeout(LIMIT):
            while len(vllm.chats) < 2 and len(waiting) < MANY:
                waiting.append(asyncio.create_task(ask(proxy.target, chat_request())))
                hung = asyncio.create_task(vllm.received(2))
                await asyncio.wait([hung, waiting[-1]], return_when=asyncio.FIRST_COMPLETED)
                hung.cancel()
            assert len(vllm.chats) == 2
            process.kill()
            for reply in await asyncio.gather(*waiting):
                assert reply.answer
            assert await proxy.count("upstream_rq_retry_success") == 1
            gate.set()
            replies = await asyncio.gather(*streams)
        (broken,) = [reply for reply in replies if reply.error]
        assert isinstance(broken.error, StreamInterrupted)
        assert "".join(event.text_delta.text for event in broken.events) == "begun"
        assert all(reply.answer for reply in replies if reply is not broken)
