"""What every call goes through: who ends it, what is logged of it, and its request id."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import weakref
from typing import TYPE_CHECKING, Any, cast

import grpc
import pytest
from grpc import aio

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import model_registry_pb2
from deltawire_server.errors import CallerError, Reason
from deltawire_server.fake_vllm import Chunks, FakeVllm, Script, error_body
from deltawire_server.registry.registry import ModelRegistry
from deltawire_server.rpc.interceptors import CallInterceptor, call_context, call_record
from deltawire_server.upstream.base import CallContext
from tests.support.gateway import (
    Lines,
    Running,
    ask,
    failure_of,
    kinds,
    read_badly,
    read_well,
    taken_apart,
    until,
)

if TYPE_CHECKING:
    from tests.conftest import StartGateway

CHUNKS = Chunks()
NEVER_ENDING = Script.generated(tokens=100_000_000, chunks_per_write=50)
STREAM = "deltawire.v1.ChatCompletion/StreamChatCompletion"
SMALL_WINDOW = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024))
"""A caller that takes in little before it reads."""


def begun(*more: Any) -> Script:  # noqa: ANN401 (whatever a script takes)
    """An answer that has begun, and then waits for ever."""
    return Script.chunks([CHUNKS.role(), CHUNKS.text("a"), *more, asyncio.Event()])


async def test_the_callers_cancel_stops_the_provider(start_gateway: StartGateway, vllm: FakeVllm, lines: Lines) -> None:
    """In the middle of an answer; the place is free again, and the log has what was used."""
    vllm.play(begun())
    async with start_gateway(server={"max_streams": 1}) as gateway:
        call = gateway.stream()
        async for event in call:
            if event.HasField("text_delta"):
                break
        call.cancel()
        await vllm.chats[0].closed_early.wait()
        entry = await lines.find("call", code="CANCELLED")
        assert (entry["method"], entry["completion_tokens"], entry["usage"]) == (STREAM, 1, "ESTIMATED")
        assert vllm.running == 0
        await read_well(gateway.stream())


async def test_a_cancel_before_the_first_event_stops_the_provider(
    served: Running, vllm: FakeVllm, lines: Lines
) -> None:
    """While vLLM is still thinking."""
    vllm.play(Script.generated(headers_delay=3600))
    call = served.stream()
    reading = asyncio.create_task(read_badly(call))
    chat = await vllm.received()
    call.cancel()
    await chat.closed_early.wait()
    await lines.find("call", code="CANCELLED")
    await asyncio.wait([reading])
    assert call.cancelled()


@pytest.mark.parametrize("script", [begun(), Script.generated(first_delay=3600)], ids=["after", "before"])
async def test_the_callers_deadline_stops_the_provider(
    served: Running, vllm: FakeVllm, lines: Lines, script: Script
) -> None:
    """Before and after the first event; the log tells a deadline from a cancel."""
    vllm.play(script)
    call = served.stream(timeout=0.3)
    assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await vllm.chats[0].closed_early.wait()
    await lines.find("call", code="DEADLINE_EXCEEDED")
    assert vllm.running == 0


async def test_a_lost_caller_stops_the_provider(served: Running, vllm: FakeVllm, lines: Lines) -> None:
    """Its connection is gone."""
    vllm.play(begun())
    async with aio.insecure_channel(served.address) as channel:
        call = Running(served.gateway, channel).stream()
        assert kinds([await anext(aiter(call))]) == ["started"]
    await vllm.chats[0].closed_early.wait()
    await lines.find("call", code="CANCELLED")


async def test_cancelling_create_stops_the_provider(served: Running, vllm: FakeVllm, lines: Lines) -> None:
    """As it does a stream."""
    vllm.play(begun())
    task = asyncio.create_task(served.create())
    chat = await vllm.received()
    task.cancel()
    await chat.closed_early.wait()
    await lines.find("call", code="CANCELLED", method="deltawire.v1.ChatCompletion/CreateChatCompletion")


async def test_a_caller_that_does_not_read(start_gateway: StartGateway, vllm: FakeVllm, lines: Lines) -> None:
    """Loses its upstream; others are not touched by it; when it reads on at last, it is told why."""
    limits = {"queue_bytes": 1024, "slow_caller_timeout": 0.2}
    async with start_gateway(stream=limits, options=SMALL_WINDOW) as gateway:
        vllm.play(NEVER_ENDING)
        call = gateway.stream()
        chat = await vllm.received()
        async with aio.insecure_channel(gateway.address) as channel:
            other = Running(gateway.gateway, channel)
            while not chat.closed_early.is_set():
                await read_well(other.stream())
        entry = await lines.find("call", reason="SLOW_CALLER")
        assert entry["code"] == "RESOURCE_EXHAUSTED"
        events, failure = await read_badly(call)
    assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SLOW_CALLER")
    assert failure.metadata["limit_seconds"] == "0.2"
    assert [event.sequence for event in events] == list(range(len(events)))
    assert kinds(events)[0] == "started"


async def test_a_caller_that_does_not_read_the_end(start_gateway: StartGateway, vllm: FakeVllm, lines: Lines) -> None:
    """An answer larger than what the connection takes in: the place is free again all the same."""
    vllm.play(Script.chunks([CHUNKS.role(), *[CHUNKS.text("x" * 50_000)] * 10, CHUNKS.finish()]))
    async with start_gateway(
        server={"max_streams": 1}, stream={"queue_bytes": 2**24, "slow_caller_timeout": 0.2}, options=SMALL_WINDOW
    ) as gateway:
        call = gateway.stream()
        await lines.find("call", reason="SLOW_CALLER")
        await read_well(gateway.stream())
        _, failure = await read_badly(call)
    assert failure.reason == "SLOW_CALLER"


async def test_a_slow_caller_gets_all_in_fewer_messages(start_gateway: StartGateway, vllm: FakeVllm) -> None:
    """What it did not take in time is joined, and nothing is missing."""
    vllm.play(Script.generated(tokens=60_000, chunks_per_write=100))
    async with start_gateway(stream={"queue_bytes": 16 * 1024}, options=SMALL_WINDOW) as gateway:
        call = gateway.stream()
        await until(lambda: not all(connection.writable.is_set() for connection in vllm._connections))
        events = await read_well(call)
    completed = events[-1].completed
    assert completed.usage.completion_tokens == 60_000
    assert len(events) < 30_000
    assert completed.choices[0].message.text == "".join(event.text_delta.text for event in events)


@pytest.mark.parametrize(
    ("given", "adopted"),
    [
        ("mine", True),
        ("with spaces, and (signs)!", True),
        ("r" * 128, True),
        ("r" * 129, False),
        (None, False),
        ("", False),
    ],
)
async def test_request_ids(served: Running, vllm: FakeVllm, lines: Lines, given: str | None, adopted: bool) -> None:
    """A usable one is adopted, else one is generated; the same comes back, goes on to vLLM, and is logged."""
    metadata = () if given is None else (("x-request-id", given),)
    call = served.stream(metadata=metadata)
    used = dict(await call.initial_metadata())["x-request-id"]
    await read_well(call)
    if adopted:
        assert used == given
    else:
        assert re.fullmatch(r"[0-9a-f]{32}", str(used))
    assert vllm.chats[0].headers["x-request-id"].rpartition("-")[0] == used
    assert (await lines.find("call"))["request_id"] == used
    replaced = [entry for entry in lines.entries if entry["event"] == "request id replaced"]
    assert len(replaced) == (1 if given and not adopted else 0)


async def test_every_call_tells_its_request_id(served: Running) -> None:
    """Also those that answer with one message, whatever service they are of."""
    metadata = (("x-request-id", "mine"),)
    create = chat_pb.CreateChatCompletionRequest(chat=ask())
    calls: list[aio.UnaryUnaryCall[Any, Any]] = [
        served.chat.CreateChatCompletion(create, metadata=metadata),
        served.models.ListProviders(model_registry_pb2.ListProvidersRequest(), metadata=metadata),
    ]
    for call in calls:
        await call
        assert dict(await call.initial_metadata())["x-request-id"] == "mine"


async def test_a_minted_request_id_of_a_failure_is_in_the_trailers(served: Running) -> None:
    """Where there is no initial metadata."""
    failure = await failure_of(served.create(chat_pb.ChatRequest()))
    assert re.fullmatch(r"[0-9a-f]{32}", str(failure.trailers["x-request-id"]))


async def test_the_log_line_of_a_completion(served: Running, vllm: FakeVllm, lines: Lines) -> None:
    """One line says who asked for what and what came of it."""
    vllm.play(Script.generated(tokens=5))
    await read_well(served.stream(metadata=(("x-request-id", "mine"),)))
    entry = await lines.find("call")
    assert entry["level"] == "info"
    assert entry["peer"].startswith("ipv4:127.0.0.1:")
    assert "grpc-python" in entry["user_agent"]
    assert entry["completion_id"].startswith("cmpl-")
    assert entry["prompt_tokens"] > 0
    assert 0 < entry["seconds_to_first_event"] <= entry["seconds"]
    expected = {
        "method": STREAM,
        "code": "OK",
        "request_id": "mine",
        "model": "vllm/fake",
        "alias": "fake",
        "provider": "vllm",
        "attempts": 1,
        "completion_tokens": 5,
        "usage": "EXACT",
    }
    assert entry.items() >= expected.items()
    assert not entry.keys() & {"reason", "error"}


async def test_the_log_line_of_a_failure(served: Running, vllm: FakeVllm, lines: Lines) -> None:
    """Has its reason and message; and what was used until then, if there was anything."""
    vllm.play(Script.error(503, "busy"), Script.chunks([CHUNKS.role(), CHUNKS.text("a"), error_body(500, "oops", "E")]))
    for _ in range(2):
        await read_badly(served.stream())
    first = await lines.find("call", reason="UPSTREAM_UNAVAILABLE")
    second = await lines.find("call", reason="UPSTREAM_ERROR")
    assert (first["code"], first["seconds_to_first_event"], first["completion_tokens"]) == ("UNAVAILABLE", None, 0)
    assert "busy" in first["error"]
    assert (second["code"], second["completion_tokens"], second["usage"]) == ("ABORTED", 1, "ESTIMATED")
    assert {first["level"], second["level"]} == {"warning"}


async def test_the_log_line_of_another_call(served: Running, lines: Lines) -> None:
    """Every method of ours has one; health has none."""
    await served.models.ListProviders(model_registry_pb2.ListProvidersRequest())
    entry = await lines.find("call", method="deltawire.v1.ModelRegistry/ListProviders")
    assert entry["code"] == "OK"


async def test_anomalies_are_logged(served: Running, vllm: FakeVllm, lines: Lines) -> None:
    """The log has the repaired anomalies, for the operator of the provider."""
    vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.finish("because")]))
    events = await read_well(served.stream())
    entry = await lines.find("the provider's answer had anomalies")
    assert entry["anomalies"] == {"finish reason 'because'": 1}
    assert (entry["provider"], entry["completion_id"]) == ("vllm", events[0].started.completion_id)


async def test_no_token_in_any_line(start_gateway: StartGateway, vllm: FakeVllm, lines: Lines) -> None:
    """Neither the operator's nor the caller's, of calls that go well and of such that do not."""
    async with start_gateway(provider={"api_token": "operators-secret"}) as gateway:
        metadata = (("x-vllm-api-token", "callers-secret"), ("authorization", "Bearer gateway-secret"))
        vllm.play(Script.generated(), Script.error(401, "Unauthorized"), Script.error(401, "Unauthorized"))
        await read_well(gateway.stream(metadata=metadata))
        await read_badly(gateway.stream(metadata=metadata))
        await read_badly(gateway.stream())
    assert len([entry for entry in lines.entries if entry["event"] == "call"]) == 3
    assert "secret" not in lines.getvalue()


@pytest.mark.parametrize("rpc", ["stream", "create"])
async def test_a_defect(served: Running, lines: Lines, monkeypatch: pytest.MonkeyPatch, rpc: str) -> None:
    """The caller gets INTERNAL and the request id, the log the cause, and neither the other's."""

    async def defective(*_: object, **__: object) -> None:
        raise ZeroDivisionError("the secret cause")

    monkeypatch.setattr(ModelRegistry, "resolve", defective)
    metadata = (("x-request-id", "mine"),)
    if rpc == "stream":
        _, failure = await read_badly(served.stream(metadata=metadata))
    else:
        failure = await failure_of(served.create(metadata=metadata))
    assert (failure.code, failure.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert failure.metadata == {"request_id": "mine"}
    assert "cause" not in failure.message
    entry = await lines.find("call", request_id="mine")
    assert (entry["level"], entry["code"]) == ("error", "INTERNAL")
    assert "ZeroDivisionError: the secret cause" in entry["exception"]


async def test_a_defect_in_the_middle_of_an_answer(
    served: Running, vllm: FakeVllm, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream ends with INTERNAL and without `completed`, the provider stops, and the traceback is logged."""

    def defective(*_: object) -> None:
        raise ZeroDivisionError("the secret cause")

    monkeypatch.setattr("deltawire_server.rpc.convert._choice_finished", defective)
    vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("a"), CHUNKS.finish(), b"data: [DONE]\n\n", asyncio.Event()]))
    events, failure = await read_badly(served.stream())
    assert kinds(events) in (["started", "text_delta"], ["started"])
    assert failure.reason == "INTERNAL"
    await vllm.chats[0].closed_early.wait()
    assert "ZeroDivisionError" in (await lines.find("call"))["exception"]


async def test_an_unknown_method(served: Running) -> None:
    """Is grpc's own affair."""
    call: Any = served.channel.unary_unary("/deltawire.v1.ChatCompletion/Nope")
    with pytest.raises(aio.AioRpcError) as caught:
        await call(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_message_that_is_too_large(start_gateway: StartGateway) -> None:
    """The limit is a setting; grpc itself refuses what is above it."""
    async with start_gateway(server={"max_receive_bytes": 1024}) as gateway:
        with pytest.raises(aio.AioRpcError) as caught:
            await gateway.create(chat_pb.ChatRequest(model="m" * 2000))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_a_compressed_request(served: Running, compression: grpc.Compression) -> None:
    """It is refused by its headers, with the algorithm's name: gRPC never decompresses it."""
    request = chat_pb.CreateChatCompletionRequest(chat=ask("hi" * 1000))
    with pytest.raises(aio.AioRpcError, match=rf"'{compression.name.lower()}' is disabled") as caught:
        await served.chat.CreateChatCompletion(request, compression=compression)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_without_an_interceptor_there_is_a_record_all_the_same() -> None:
    """A service that is served by itself still knows its caller's token and request id."""

    class Context:
        def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
            return (("x-request-id", "mine"), ("x-vllm-api-token", "t"), ("some-bin", b"\0"))

    context: Any = Context()
    assert call_context(context) == CallContext("mine", "t")
    assert call_record(context).values == {}


async def test_draining_refuses_new_calls() -> None:
    """Those under way go on; idle is when the last has ended."""
    entered, release = asyncio.Event(), asyncio.Event()
    calls = CallInterceptor()

    async def answer(request: bytes, _: aio.ServicerContext[bytes, bytes]) -> bytes:
        entered.set()
        await release.wait()
        return request

    handler: Any = grpc.unary_unary_rpc_method_handler(cast("Any", answer))
    server = aio.server(interceptors=[calls])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("deltawire.v1.Test", {"Echo": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await calls.wait_idle()
    try:
        async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            echo: Any = channel.unary_unary("/deltawire.v1.Test/Echo")
            first = echo(b"first")
            await entered.wait()
            calls.refuse_new_calls()
            idle = asyncio.create_task(calls.wait_idle())
            with pytest.raises(aio.AioRpcError) as caught:
                await echo(b"second")
            failure = taken_apart(caught.value)
            assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
            assert (failure.retry_seconds, failure.initial) == (0.1, {})
            assert not idle.done()
            release.set()
            assert await first == b"first"
            await idle
    finally:
        await server.stop(None)


async def test_what_a_caller_sends_does_not_fill_the_log(served: Running, lines: Lines) -> None:
    """An error may quote the request; its line is short all the same."""
    await failure_of(served.create(ask(allowed_tools=["x" * 1_000_000])))
    line = await lines.find("call", code="INVALID_ARGUMENT")
    assert len(json.dumps(line)) < 8192


NOT_MESSAGES = {
    "not protobuf": b"\xff\xff\xff",
    "text that is not UTF-8": b"\x0a\x03\x0a\x01\xff",
    "cut off": b"\x0a\x7f",
}


@pytest.mark.parametrize("method", ["CreateChatCompletion", "StreamChatCompletion", "CountTokens"])
@pytest.mark.parametrize("data", NOT_MESSAGES.values(), ids=NOT_MESSAGES)
async def test_a_request_that_is_no_message(served: Running, lines: Lines, data: bytes, method: str) -> None:
    """INVALID_ARGUMENT with our reason, and one line in the log, without a traceback: clients in some languages can send these."""
    kind: Any = served.channel.unary_stream if method.startswith("Stream") else served.channel.unary_unary
    call = kind(f"/deltawire.v1.ChatCompletion/{method}")(data)
    with pytest.raises(aio.AioRpcError) as caught:
        await (call if method != "StreamChatCompletion" else anext(aiter(call)))
    failure = taken_apart(caught.value)
    assert (failure.code, failure.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert "UTF-8" in failure.message
    entry = await lines.find("call", reason="INVALID_REQUEST")
    assert entry["level"] == "info"
    assert "Traceback" not in lines.getvalue()


async def test_a_stream_that_is_asked_for_again_meets_itself(served: Running, vllm: FakeVllm) -> None:
    """A retry that nothing marks as one, with the same id and request, reads the same generation from its beginning."""
    gate = asyncio.Event()
    vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("whole"), gate, CHUNKS.finish()]))
    first = served.stream(ask(completion_id="again"))
    events = [await anext(aiter(first))]
    second = asyncio.create_task(read_well(served.stream(ask(completion_id="again"))))
    await asyncio.sleep(0.05)
    gate.set()
    events += [event async for event in first]
    assert [each.SerializeToString() for each in events] == [each.SerializeToString() for each in await second]
    assert len(vllm.chats) == 1


async def test_an_answer_that_is_asked_for_again_meets_itself(served: Running, vllm: FakeVllm) -> None:
    """The same for a whole answer; as a stream it would be another request."""
    gate = asyncio.Event()
    vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("whole"), gate, CHUNKS.finish()]))
    first = asyncio.create_task(served.create(ask(completion_id="again")))
    await vllm.received()
    second = asyncio.create_task(served.create(ask(completion_id="again")))
    await asyncio.sleep(0.05)
    assert (await read_badly(served.stream(ask(completion_id="again"))))[1].reason == "COMPLETION_ALREADY_EXISTS"
    gate.set()
    answers = await asyncio.gather(first, second)
    assert [answer.completed.choices[0].message.text for answer in answers] == ["whole"] * 2
    assert answers[0].started == answers[1].started
    assert len(vllm.chats) == 1


async def test_an_attempt_that_was_lost_before_it_began(served: Running, vllm: FakeVllm) -> None:
    """The later attempt takes its place when its connection goes: one generation, and the engine is not asked again."""
    gate = asyncio.Event()
    vllm.play(Script.chunks([gate, CHUNKS.role(), CHUNKS.text("whole"), CHUNKS.finish()]))
    request = ask(completion_id="lost")
    first = served.stream(request)
    await vllm.received()
    second = asyncio.create_task(read_well(served.stream(request)))
    await asyncio.sleep(0.05)
    first.cancel()
    await asyncio.sleep(0.05)
    gate.set()
    assert kinds(await second)[-1] == "completed"
    assert len(vllm.chats) == 1


async def test_a_call_of_the_callers_own_id_ends_with_its_caller(served: Running, vllm: FakeVllm) -> None:
    """As one without: nothing is retained, the engine stops, the look-up says why, and the id can be used again."""
    vllm.play(NEVER_ENDING)
    call = served.stream(ask(completion_id="mine"))
    await anext(aiter(call))
    under_way = await served.look_up("mine")
    assert not under_way.HasField("last_sequence")
    assert not under_way.HasField("expire_time")
    assert (await read_badly(served.resume("mine")))[1].reason == "COMPLETION_GONE"
    call.cancel()
    await vllm.chats[0].closed_early.wait()
    state = await served.look_up("mine")
    assert (state.state, state.error.code) == (chat_pb.COMPLETION_STATE_FAILED, grpc.StatusCode.CANCELLED.value[0])
    await read_well(served.stream(ask(completion_id="mine")))


async def test_a_burst(served: Running) -> None:
    """More calls at once than grpc keeps waiting by default: each is answered by us."""
    request = model_registry_pb2.ListProvidersRequest()
    calls = [served.models.ListProviders(request) for _ in range(1500)]
    answers = await asyncio.gather(*calls)
    assert all(answer.providers for answer in answers)


class Received:
    """A request to which a weak reference can be made."""


@pytest.mark.parametrize("reason", [Reason.INVALID_REQUEST, None])
async def test_a_failed_call_leaves_nothing_for_the_garbage_collector(reason: Reason | None, lines: Lines) -> None:
    """Its request is freed when it ends, as tracebacks would prevent: they refer to frames, and those to the failure."""
    received: list[weakref.ref[Received]] = []

    def parse(_: bytes) -> Received:
        request = Received()
        received.append(weakref.ref(request))
        return request

    async def fail(request: Received, _: aio.ServicerContext[bytes, bytes]) -> bytes:
        raise ZeroDivisionError if reason is None else CallerError(reason, str(request))

    make: Any = grpc.unary_unary_rpc_method_handler
    handlers = {"Fail": make(fail, request_deserializer=parse)}
    server = aio.server(interceptors=[CallInterceptor()])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("deltawire.v1.Test", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    gc.collect()
    gc.disable()
    try:
        async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call: Any = channel.unary_unary("/deltawire.v1.Test/Fail")
            await failure_of(call(b"a"))
            await lines.find("call", method="deltawire.v1.Test/Fail")
            await until(lambda: received[0]() is None)
    finally:
        gc.enable()
        await server.stop(None)
