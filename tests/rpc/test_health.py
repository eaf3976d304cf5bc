"""The health service and reflection, which callers without a key reach: what they keep and receive."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from deltawire_server.rpc import health, reception, reflection
from tests.support.gateway import until
from tests.support.raw_http2 import message, raw_client

if TYPE_CHECKING:
    from tests.conftest import StartGateway
    from tests.support.gateway import Lines, Running

KEY = "a-key-that-only-tests-know"
ACCESS = {"keys": f"reader read {KEY}"}
CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
REFLECT = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
LARGE = 8 * 1024 * 1024


def watch(gateway: Running, service: str = "") -> Any:  # noqa: ANN401 (a call)
    """Watch a service."""
    return health_pb2_grpc.HealthStub(gateway.channel).Watch(health_pb2.HealthCheckRequest(service=service))


async def code_of(call: Any) -> grpc.StatusCode:  # noqa: ANN401 (a call)
    """The status code with which a watch fails at once."""
    with pytest.raises(aio.AioRpcError) as caught:
        await call.read()
    code: grpc.StatusCode = caught.value.code()
    return code


def counted(gateway: Running) -> int:
    """How many watches there are."""
    return gateway.gateway._lifecycle._health._watches.total()


@pytest.mark.parametrize("service", ["nope", "x" * 30_000])
@pytest.mark.usefixtures("late_requests")
async def test_a_watch_of_what_there_is_not(served: Running, service: str) -> None:
    """NOT_FOUND at once, nothing is kept, and the name is not repeated."""
    call = watch(served, service)
    assert await code_of(call) is grpc.StatusCode.NOT_FOUND
    assert len(await call.details()) < 300
    assert counted(served) == 0


@pytest.mark.parametrize(("method", "code"), [(CHECK, "0"), (WATCH, "14")])
async def test_a_name_that_does_not_come_at_once_is_not_awaited(served: Running, method: str, code: str) -> None:
    """The process is what is answered for: each of its services has the same health. A watch must be begun again."""
    async with raw_client(served.address) as client:
        stream = client.call(method, body=message(bytes(60_000), LARGE))
        assert await client.status(stream) == code
    await until(lambda: not reception._readings)


@pytest.mark.parametrize("method", [CHECK, WATCH])
@pytest.mark.usefixtures("late_requests")
async def test_what_is_no_request(served: Running, method: str) -> None:
    """INVALID_ARGUMENT, or UNIMPLEMENTED if there is none."""
    async with raw_client(served.address) as client:
        assert await client.status(client.call(method, body=message(b"\xff"), end=True)) == "3"
        assert await client.status(client.call(method, end=True)) == "12"


@pytest.mark.usefixtures("late_requests")
async def test_watches_of_a_connection_are_bounded(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """RESOURCE_EXHAUSTED above; one that ends makes room."""
    monkeypatch.setattr(health, "MAX_CONNECTION_WATCHES", 2)
    first, second = watch(served), watch(served)
    for call in (first, second):
        await call.read()
    assert await code_of(watch(served)) is grpc.StatusCode.RESOURCE_EXHAUSTED
    first.cancel()
    await until(lambda: counted(served) == 1)
    assert (await watch(served).read()).status == health.SERVING


@pytest.mark.usefixtures("late_requests")
async def test_watches_in_all_are_bounded(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all connections."""
    monkeypatch.setattr(health, "MAX_WATCHES", 1)
    await watch(served).read()
    async with aio.insecure_channel(served.address, (("grpc.use_local_subchannel_pool", 1),)) as channel:
        call: Any = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert await code_of(call) is grpc.StatusCode.RESOURCE_EXHAUSTED


def reflect(gateway: Running, requests: int, *, key: bool = False) -> Any:  # noqa: ANN401 (a call)
    """List the services so many times in one call."""
    call: Any = gateway.channel.stream_stream(
        REFLECT,
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    metadata = (("authorization", f"Bearer {KEY}"),) if key else ()
    return call(iter([reflection_pb2.ServerReflectionRequest(list_services="")] * requests), metadata=metadata)


async def test_reflection_without_a_key_answers_one_request(
    start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one, and where none is needed, it answers all."""
    # On a loaded machine even a small request takes longer than a millisecond to arrive.
    monkeypatch.setattr(reception, "ARRIVAL_SECONDS", 0.2)
    async with start_gateway(access=ACCESS) as gateway:
        assert len([each async for each in reflect(gateway, 3, key=True)]) == 3
        assert len([each async for each in reflect(gateway, 3)]) == 1
        async with raw_client(gateway.address) as client:
            stream = client.call(REFLECT, body=message(bytes(60_000), LARGE))
            assert await client.status(stream) == "16"
            wrong = client.call(REFLECT, body=message(b"\xff"), end=True)
            assert await client.status(wrong) == "3"
            large = client.call(REFLECT, body=message(bytes(5000)), end=True)
            assert await client.status(large) == "3"
    async with start_gateway() as gateway:
        assert len([each async for each in reflect(gateway, 3)]) == 3


async def test_calls_of_reflection_are_bounded(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """RESOURCE_EXHAUSTED above."""
    monkeypatch.setattr(reflection, "MAX_CALLS", 0)
    assert await code_of(reflect(served, 1)) is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_log_lines(start_gateway: StartGateway, lines: Lines) -> None:
    """At level debug: a check every few seconds of every balancer is no news."""
    async with start_gateway() as gateway:
        await health_pb2_grpc.HealthStub(gateway.channel).Check(health_pb2.HealthCheckRequest())
        _ = [each async for each in reflect(gateway, 1)]
        for method in (CHECK, REFLECT):
            line = await lines.find("call", method=method.removeprefix("/"))
            assert (line["level"], line["code"]) == ("debug", "OK")
