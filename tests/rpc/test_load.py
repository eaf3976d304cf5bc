"""The load that calls report to load balancers."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire_server.fake_vllm import Chunks, Script
from deltawire_server.rpc.load import LOAD, LoadReport
from tests.support.gateway import WAIT, ask

if TYPE_CHECKING:
    from deltawire_server.fake_vllm import FakeVllm
    from tests.conftest import StartGateway
    from tests.support.gateway import Running

PLACES = 40
"""The places of the gateway."""


def reported(metadata: object) -> tuple[float, float] | None:
    """The utilization and the share of errors in a call's headers or trailers."""
    report = dict(metadata or ()).get(LOAD)  # type: ignore[call-overload]
    if report is None:
        return None
    found = re.fullmatch(r"TEXT application_utilization=(\d\.\d{6}),rps_fractional=1,eps=(\d\.\d{3})", report)
    assert found, report
    return float(found[1]), float(found[2])


async def until(gateway: Running, utilization: float, errors: float = 0.0) -> None:
    """Call until the gateway has measured this."""
    async with asyncio.timeout(WAIT):
        while True:
            call = gateway.chat.GetChatCompletion(chat_pb.GetChatCompletionRequest(completion_id="none"))
            with pytest.raises(aio.AioRpcError) as refused:
                await call
            assert refused.value.code() is grpc.StatusCode.NOT_FOUND
            if reported(refused.value.trailing_metadata()) == pytest.approx((utilization, errors), abs=1e-6):
                return
            await asyncio.sleep(0.05)


async def test_headers_and_trailers_have_the_utilization(vllm: FakeVllm, start_gateway: StartGateway) -> None:
    """That of the running completions, and never 0; in failed calls too."""
    gate = asyncio.Event()
    chunk = Chunks()
    vllm.play(*[Script.chunks((chunk.role(), chunk.text("begun"), gate, chunk.finish()))] * 4)
    async with start_gateway(server={"max_streams": PLACES}) as gateway:
        await until(gateway, 1 / PLACES)
        counted = {(count / PLACES, 0.0) for count in range(1, 5)}
        streams = [gateway.stream() for _ in range(4)]
        for stream in streams:
            # It is measured once a second, so that some of the streams may count already.
            assert reported(await stream.initial_metadata()) in counted
        await until(gateway, 4 / PLACES)
        gate.set()
        for stream in streams:
            assert [event async for event in stream]
            assert reported(await stream.trailing_metadata()) in counted
        await until(gateway, 1 / PLACES)
        call = gateway.chat.CreateChatCompletion(chat_pb.CreateChatCompletionRequest(chat=ask()))
        await call
        health = health_pb2_grpc.HealthStub(gateway.channel).Check(health_pb2.HealthCheckRequest())
        await health
        assert reported(await health.initial_metadata()) is reported(await health.trailing_metadata()) is None
        assert reported(await call.initial_metadata()) == reported(await call.trailing_metadata()) == (1 / PLACES, 0)


async def test_memory_counts_if_it_is_scarcer(start_gateway: StartGateway) -> None:
    """A few completions may use most of it."""
    async with start_gateway(server={"max_streams": PLACES}) as gateway:
        memory = gateway.gateway._worker.memory
        with memory.hold() as held:
            held.set(memory.limit // 2)
            await until(gateway, 0.5)
        await until(gateway, 1 / PLACES)


async def test_waiting_calls_count(vllm: FakeVllm, start_gateway: StartGateway) -> None:
    """A gateway whose calls wait for a place is busier than one that is just full."""
    vllm.play(*[Script.generated(tokens=1_000_000, tokens_per_second=1)] * 3)
    async with start_gateway(server={"max_streams": 2}, limits={"queue_size": 10}) as gateway:
        streams = [gateway.stream() for _ in range(3)]
        await until(gateway, 1.5)
        for stream in streams:
            stream.cancel()


async def test_none_if_the_operator_does_not_want_it(start_gateway: StartGateway) -> None:
    """Neither a successful nor a failed call reports."""
    async with start_gateway(server={"load_reports": False}) as gateway:
        call = gateway.chat.CreateChatCompletion(chat_pb.CreateChatCompletionRequest(chat=ask()))
        await call
        assert LOAD not in dict(await call.initial_metadata())
        assert LOAD not in dict(await call.trailing_metadata())
        with pytest.raises(aio.AioRpcError) as refused:
            await gateway.look_up("none")
        assert LOAD not in dict(refused.value.trailing_metadata())


def test_errors_are_a_share_of_the_calls() -> None:
    """Of those of the last interval that had some, and never above 1, even if streams fail that began before."""
    load = LoadReport()
    shares = []
    for calls, failed in ((0, 0), (4, 1), (0, 0), (1, 3), (2, 0)):
        load.calls, load.failed = calls, failed
        load.measure(0.5)
        shares.append(reported(load.metadata))
    assert shares == [(0.5, 0), (0.5, 0.25), (0.5, 0.25), (0.5, 1), (0.5, 0)]


async def test_failures_of_the_engine_are_errors(vllm: FakeVllm, start_gateway: StartGateway) -> None:
    """Those of callers are not: a completion that does not exist."""
    async with start_gateway(server={"max_streams": PLACES}) as gateway:
        await until(gateway, 1 / PLACES)
        await vllm.crash()
        async with asyncio.timeout(WAIT):
            while True:
                with pytest.raises(aio.AioRpcError) as failed:
                    await gateway.create()
                if reported(failed.value.trailing_metadata()) == (1 / PLACES, 1):
                    break
                await asyncio.sleep(0.02)
