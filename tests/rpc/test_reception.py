"""What is received of a call, and when: nothing before it is let in and has its place. Counted on the wire, in bytes."""

from __future__ import annotations

import asyncio
import functools
import time
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf import duration_pb2
from grpc import aio

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import model_registry_pb2
from deltawire_server import pacing
from deltawire_server.errors import GatewayError, Reason
from deltawire_server.fake_vllm import Chunks, FakeVllm, Script
from deltawire_server.rpc import reception, validate
from deltawire_server.rpc.reception import Reception
from tests.support.gateway import WAIT, ask, failure_of, kinds, read_badly, read_well, until
from tests.support.raw_http2 import WINDOW, RawClient, message, raw_client

if TYPE_CHECKING:
    from tests.conftest import StartGateway

CHUNKS = Chunks()
CREATE = "/deltawire.v1.ChatCompletion/CreateChatCompletion"
STREAM = "/deltawire.v1.ChatCompletion/StreamChatCompletion"
COUNT = "/deltawire.v1.ChatCompletion/CountTokens"
LIST = "/deltawire.v1.ModelRegistry/ListModels"
REGISTER = "/deltawire.v1.ModelRegistry/RegisterModel"
KEY = "a-key-that-only-tests-know"
ACCESS = {"keys": f"reader read {KEY}"}
READER = ("authorization", f"Bearer {KEY}")
LARGE = 19 * 1024 * 1024
BEGUN = message(bytes(WINDOW - 5), LARGE)
"""As much of a large request as a server takes before it asks for more."""

UNIMPLEMENTED, UNAUTHENTICATED, PERMISSION_DENIED, UNAVAILABLE, RESOURCE_EXHAUSTED = "12", "16", "7", "14", "8"


async def refused(client: RawClient, method: str, *headers: tuple[str, str]) -> str:
    """The status of a call with a large request, of which the server must not ask for a byte more than it has."""
    stream = client.call(method, *headers, body=BEGUN)
    code = await client.status(stream)
    assert client.window(stream) == 0
    return code


@pytest.mark.parametrize("method", [CREATE, STREAM, COUNT, LIST, REGISTER])
async def test_a_caller_without_a_key_is_refused_unreceived(start_gateway: StartGateway, method: str) -> None:
    """Whatever the method, with a wrong key too, and without the permission."""
    async with start_gateway(access=ACCESS) as gateway, raw_client(gateway.address) as client:
        assert await refused(client, method) == UNAUTHENTICATED
        assert await refused(client, method, ("authorization", "Bearer wrong-wrong-wrong")) == UNAUTHENTICATED
        if method != LIST:
            assert await refused(client, method, READER) == PERMISSION_DENIED


async def test_an_unknown_method_is_refused_unreceived(start_gateway: StartGateway) -> None:
    """Of our services and of others."""
    async with start_gateway() as gateway, raw_client(gateway.address) as client:
        for method in ("/deltawire.v1.ChatCompletion/Nope", "/nope.Nope/Nope"):
            assert await refused(client, method) == UNIMPLEMENTED


async def test_a_draining_gateway_refuses_unreceived(start_gateway: StartGateway) -> None:
    """On a connection from before."""
    async with start_gateway() as gateway, raw_client(gateway.address) as client:
        gateway.gateway._lifecycle._calls.refuse_new_calls()
        assert await refused(client, CREATE) == UNAVAILABLE


@pytest.mark.parametrize("method", [CREATE, COUNT])
async def test_a_full_gateway_refuses_unreceived(start_gateway: StartGateway, vllm: FakeVllm, method: str) -> None:
    """Before a place is free nothing is received; afterwards it is."""
    gate = asyncio.Event()
    vllm.play(Script.chunks([CHUNKS.role(), gate, CHUNKS.finish()]))
    async with start_gateway(server={"max_streams": 1}) as gateway, raw_client(gateway.address) as client:
        messages = aiter(gateway.stream())
        await anext(messages)
        assert await refused(client, method) == RESOURCE_EXHAUSTED
        gate.set()
        assert kinds([event async for event in messages])[-1] == "completed"
        stream = client.call(method, body=BEGUN)
        await client.until(lambda: client.window(stream) > 0)


@pytest.mark.parametrize("method", ["chat_request", "count_request"])
async def test_a_full_gateway_validates_nothing(
    start_gateway: StartGateway, vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Not even of a stream, which is received since it may resume a completion."""
    gate = asyncio.Event()
    vllm.play(Script.chunks([CHUNKS.role(), gate, CHUNKS.finish()]))
    async with start_gateway(server={"max_streams": 1}) as gateway:
        messages = aiter(gateway.stream())
        await anext(messages)
        validated: list[object] = []
        monkeypatch.setattr(validate, method, lambda *request: validated.append(request))
        assert (await failure_of(gateway.create(chat_pb.ChatRequest()))).reason == "TOO_MANY_STREAMS"
        _, failure = await read_badly(gateway.stream(chat_pb.ChatRequest()))
        assert failure.reason == "TOO_MANY_STREAMS"
        count = chat_pb.CountTokensRequest(chat=chat_pb.ChatRequest())
        assert (await failure_of(gateway.chat.CountTokens(count))).reason == "TOO_MANY_STREAMS"
        assert not validated
        gate.set()
        assert kinds([event async for event in messages])[-1] == "completed"


async def test_a_full_gateway_resumes_and_joins(start_gateway: StartGateway, vllm: FakeVllm) -> None:
    """Neither is a new completion, and neither takes a place; a new one with another id is refused."""
    gate = asyncio.Event()
    vllm.play(Script.chunks([CHUNKS.role(), gate, CHUNKS.text("whole"), CHUNKS.finish()]))
    async with start_gateway(server={"max_streams": 1}) as gateway:
        options = chat_pb.StreamOptions(retention=duration_pb2.Duration(seconds=60))
        calls = [aiter(gateway.stream(ask(completion_id="c"), options=options)) for _ in range(2)]
        begun = [await anext(call) for call in calls]
        calls.append(aiter(gateway.resume("c")))
        begun.append(await anext(calls[-1]))
        assert kinds(begun) == ["started"] * 3
        _, failure = await read_badly(gateway.stream(ask(completion_id="d"), options=options))
        assert failure.reason == "TOO_MANY_STREAMS"
        assert gateway.gateway._worker.active == 1
        gate.set()
        for call in calls:
            assert kinds([event async for event in call])[-1] == "completed"
        await until(lambda: gateway.gateway._worker.active == 0)
        await read_well(gateway.stream())


@pytest.mark.parametrize("method", [CREATE, STREAM, COUNT, LIST])
async def test_a_refused_request_leaves_its_place(start_gateway: StartGateway, method: str) -> None:
    """Refused when parsed or validated, empty, or canceled while it is received."""
    async with start_gateway() as gateway, raw_client(gateway.address) as client:
        for body in (message(b"\xff\xff"), message(b""), b""):
            await client.status(client.call(method, body=body, end=True))
        stream = client.call(method, body=BEGUN)
        await client.until(lambda: client.window(stream) > 0)
        client.connection.reset_stream(stream)
        client.flush()
        await until(lambda: gateway.gateway._worker.active == 0)


async def test_a_call_without_a_request(start_gateway: StartGateway) -> None:
    """UNIMPLEMENTED, which is gRPC's code for a wrong number of requests."""
    async with start_gateway() as gateway:
        for method in (CREATE, STREAM, LIST):
            call: Any = gateway.channel.stream_stream(method)
            with pytest.raises(aio.AioRpcError) as caught:
                _ = [each async for each in call(iter(()))]
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
            assert dict(caught.value.trailing_metadata() or ())["deltawire-reason"] == "INVALID_REQUEST"


async def test_a_second_request_is_never_received(start_gateway: StartGateway) -> None:
    """The first is answered."""
    async with start_gateway() as gateway, raw_client(gateway.address) as client:
        stream = client.call(LIST, body=message(b"") + message(bytes(50_000), LARGE))
        assert await client.status(stream) == "0"
        assert client.window(stream) <= WINDOW


async def test_a_request_above_the_limit_is_refused_by_its_header(start_gateway: StartGateway) -> None:
    """The size in its header is enough: gRPC itself refuses it it receives the message."""
    async with start_gateway(server={"max_receive_bytes": 1 << 20}) as gateway, raw_client(gateway.address) as client:
        assert await refused(client, CREATE) == RESOURCE_EXHAUSTED


async def test_requests_take_turns(start_gateway: StartGateway) -> None:
    """Beyond `max_receiving` nothing is received; a request that does not arrive gives its turn back."""
    server = {"max_receiving": 1, "receive_timeout": 0.5}
    async with start_gateway(server=server) as gateway, raw_client(gateway.address) as client:
        stuck = client.call(LIST, body=BEGUN)
        await client.until(lambda: client.window(stuck) > 0)
        waits = client.call(LIST, body=BEGUN)
        assert await client.status(stuck) == "4"
        assert client.headers(stuck)["deltawire-reason"] == "DURATION_LIMIT_EXCEEDED"
        assert await client.status(waits) in (RESOURCE_EXHAUSTED, "4")
        await gateway.models.ListProviders(model_registry_pb2.ListProvidersRequest())


async def test_a_caller_takes_no_turns_of_others(start_gateway: StartGateway) -> None:
    """However many of its requests do not arrive, on however many connections."""
    keys = {"alice": "the-key-of-alice-is-this", "bob": "the-key-of-bob-is-this-one"}
    access = {"keys": "\n".join(f"{name} read {key}" for name, key in keys.items())}
    server = {"max_receiving": 8, "receive_timeout": 30}
    async with start_gateway(server=server, access=access) as gateway:
        mine = ("authorization", f"Bearer {keys['alice']}")
        async with raw_client(gateway.address) as one, raw_client(gateway.address) as two:
            begun = message(bytes(100), LARGE)
            stuck = [client.call(LIST, mine, body=begun) for client in (one, two) for _ in range(20)]
            two.flush()

            def asked_for() -> int:
                """The calls of the first connection whose request the gateway reads: it has let them send more."""
                return sum(one.window(each) > WINDOW for each in stuck[:20])

            await one.until(asked_for)
            await until(lambda: gateway.gateway._calls._active == len(stuck))
            metadata = (("authorization", f"Bearer {keys['bob']}"),)
            async with asyncio.timeout(WAIT):
                await gateway.models.ListProviders(model_registry_pb2.ListProvidersRequest(), metadata=metadata)
            assert asked_for() <= 2


async def test_a_request_without_a_turn() -> None:
    """Nothing of it is read."""
    reception = Reception(1, 0.02)
    reads = 0

    class Context:
        async def read(self) -> object:
            nonlocal reads
            reads += 1
            return await asyncio.get_running_loop().create_future()

    async def check(_: bytes) -> None:
        raise AssertionError("nothing was read")

    context: Any = Context()
    await reception._turns.acquire()
    with pytest.raises(GatewayError) as caught:
        await reception.receive(context, check, "alice")
    assert (caught.value.reason, reads) == (Reason.TOO_MANY_STREAMS, 0)
    reception._turns.release()
    for reads_before in range(2):  # each gives its turn back
        assert reads == reads_before
        with pytest.raises(GatewayError) as caught:
            await reception.receive(context, check, "alice")
        assert caught.value.reason is Reason.DURATION_LIMIT_EXCEEDED


class Context:
    """A call whose request arrives when the test sets `arrived`."""

    def __init__(self) -> None:
        self.arrived: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.copied: list[bytes] = []

    async def read(self) -> bytes:
        """As gRPC's: it goes on when the request is there, and copies it."""
        data = await self.arrived
        self.copied.append(data)
        return data


class _Slow(Context):
    """A call whose request takes long to copy."""

    async def read(self) -> bytes:
        """Block the event loop for longer than a short step."""
        data = await self.arrived
        time.sleep(0.02)  # noqa: ASYNC251 (as gRPC does)
        return data


async def _checked(_: bytes) -> None:
    pass


@pytest.mark.parametrize("quick", [0.0, 60.0], ids=["slow", "quick"])
async def test_large_requests_are_copied_one_at_a_time(monkeypatch: pytest.MonkeyPatch, quick: float) -> None:
    """Those that took their time to arrive may be large: while long work is in progress, they wait for their turn."""
    monkeypatch.setattr(reception, "QUICK_SECONDS", quick)
    context: Any = Context()
    receiving = asyncio.create_task(Reception().receive(context, _checked, "me"))
    await asyncio.sleep(0.01)
    steps: list[int] = []
    for step in range(20):
        pacing.call_in_turn(functools.partial(steps.append, step))
    context.arrived.set_result(b"data")
    assert await receiving == b"data"
    assert (len(steps) == 20) == (quick == 0.0)


async def test_small_requests_do_not_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under load every request takes its time to arrive."""
    monkeypatch.setattr(reception, "QUICK_SECONDS", 0.0)
    reading: Any = Reception()
    contexts: list[Any] = [Context() for _ in range(50)]
    receiving = [asyncio.create_task(reading.receive(context, _checked, str(id(context)))) for context in contexts]
    await asyncio.sleep(0.01)
    for context in contexts:
        context.arrived.set_result(b"data")
    for _ in range(10):  # iterations of the event loop
        await asyncio.sleep(0)
    assert all(each.done() for each in receiving)


async def test_a_large_request_is_followed_by_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one is copied at once, because its size is not known before; the next one waits."""
    monkeypatch.setattr(reception, "QUICK_SECONDS", 0.0)
    first: Any = _Slow()
    second: Any = Context()
    receiving = [asyncio.create_task(Reception().receive(each, _checked, "me")) for each in (first, second)]
    await asyncio.sleep(0.01)
    first.arrived.set_result(b"large")
    second.arrived.set_result(b"data")
    await receiving[0]
    assert pacing.is_busy()
    assert not second.copied
    assert await receiving[1] == b"data"


async def test_a_failed_read_fails_the_call() -> None:
    """GRPC's own exceptions pass, and so does a cancel by gRPC."""
    context: Any = Context()
    receiving = asyncio.create_task(Reception().receive(context, _checked, "me"))
    await asyncio.sleep(0.01)
    context.arrived.set_exception(aio.UsageError("the call has ended"))
    with pytest.raises(aio.UsageError, match="has ended"):
        await receiving
