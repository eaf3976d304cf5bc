"""Cancel, look-up and resume over the wire: streams that outlive their callers, and what is told of those that do not."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import error_reason_pb2
from deltawire_server.fake_vllm import Chunks, FakeVllm, Script
from tests.support.gateway import (
    WAIT,
    Events,
    Lines,
    Running,
    StreamCall,
    ask,
    failure_of,
    kinds,
    read,
    read_badly,
    read_well,
    text_of,
    until,
)

if TYPE_CHECKING:
    from tests.conftest import StartGateway

CHUNKS = Chunks()
HOUR = Duration(seconds=3600)
KEPT = chat_pb.StreamOptions(retention=Duration(seconds=60))
TEXT = "".join(f"{number} " for number in range(12))
RUNNING, ENDED, FAILED = (
    chat_pb.COMPLETION_STATE_RUNNING,
    chat_pb.COMPLETION_STATE_COMPLETED,
    chat_pb.COMPLETION_STATE_FAILED,
)


def counting(*gates: asyncio.Event) -> Script:
    """An answer of twelve words; each gate is waited for after four more of them."""
    pieces: list[object] = [CHUNKS.role()]
    for number in range(12):
        pieces.append(CHUNKS.text(f"{number} "))
        if number % 4 == 3 and number // 4 < len(gates):
            pieces.append(gates[number // 4])
    return Script.chunks([*pieces, CHUNKS.finish()])  # type: ignore[list-item]


async def read_until(call: StreamCall, text: str) -> Events:
    """Messages of a stream until that much text has come; the stream is left as it is."""
    events: Events = []
    async with asyncio.timeout(WAIT):
        async for event in call:
            events.append(event)
            if text_of(events) == text:
                return events
    raise AssertionError("the stream ended before")


def whole(*parts: Events) -> None:
    """Hold what several calls read of one stream to it: no number twice or missing, and the whole text."""
    events = [event for part in parts for event in part]
    assert [event.sequence for event in events] == list(range(len(events)))
    assert kinds(events)[0] == "started"
    assert kinds(events)[-1] == "completed"
    assert text_of(events) == TEXT == events[-1].completed.choices[0].message.text


# --- Resume


@pytest.mark.parametrize("end", ["cancel", "deadline"])
async def test_a_caller_that_goes_leaves_the_engine_at_work(served: Running, vllm: FakeVllm, end: str) -> None:
    """However it goes; another call reads on where it was, live, to the end."""
    gate = asyncio.Event()
    vllm.play(counting(gate))
    call = served.stream(ask(completion_id="c"), options=KEPT, timeout=0.5 if end == "deadline" else None)
    first = await read_until(call, "0 1 2 3 ")
    if end == "cancel":
        call.cancel()
    await asyncio.wait([asyncio.ensure_future(call.code())])
    await until(lambda: served.gateway._lifecycle._calls._active == 0)  # type: ignore[attr-defined]
    assert vllm.running == 1
    assert not vllm.chats[0].closed_early.is_set()
    second = asyncio.create_task(read_well(served.resume("c", first[-1].sequence)))
    gate.set()
    whole(first, await second)
    assert len(vllm.chats) == 1


async def test_a_replay_is_the_same_to_the_bit(served: Running, vllm: FakeVllm) -> None:
    """From every place; after the last message nothing is left but the status."""
    vllm.play(counting())
    chat = ask(completion_id="c", sampling=chat_pb.Sampling(logit_bias=dict.fromkeys(range(20), 1.0)))
    events = await read_well(served.stream(chat, options=KEPT))
    whole(events)
    for after in [None, *range(len(events))]:
        again = await read_well(served.resume("c", after))
        assert [e.SerializeToString() for e in again] == [
            e.SerializeToString() for e in events[0 if after is None else after + 1 :]
        ]


async def test_a_fault_is_replayed_too(served: Running, vllm: FakeVllm) -> None:
    """Its last message and its status."""
    vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("a")], end="cut"))
    first, failure = await read_badly(served.stream(ask(completion_id="c"), options=KEPT))
    again, same = await read_badly(served.resume("c"))
    assert again == first
    assert kinds(again)[-1] == "completed"
    assert (same.code, same.reason, same.message) == (failure.code, failure.reason, failure.message)
    assert same.reason == "UPSTREAM_INCOMPLETE"
    state = await served.look_up("c")
    assert (state.state, state.error) == (FAILED, first[-1].completed.error)
    assert state.completed == first[-1].completed


async def test_two_may_read_at_once(served: Running, vllm: FakeVllm) -> None:
    """Each everything."""
    gate = asyncio.Event()
    vllm.play(counting(gate))
    call = served.stream(ask(completion_id="c"), options=KEPT)
    first = await read_until(call, "0 1 2 3 ")
    second = asyncio.create_task(read_well(served.resume("c")))
    gate.set()
    whole(first, [event async for event in call])
    whole(await second)


async def test_the_options_of_a_stream_are_settled_when_it_begins(served: Running) -> None:
    """A resume that brings some is refused, and names them."""
    start = chat_pb.ResumePoint(completion_id="c")
    request = chat_pb.StreamChatCompletionRequest(resume=start, options=chat_pb.StreamOptions(usage_updates=True))
    _, failure = await read_badly(served.chat.StreamChatCompletion(request))
    assert (failure.reason, failure.fields) == ("INVALID_REQUEST", ["options"])


async def test_an_answer_that_did_not_begin_leaves_nothing(served: Running, vllm: FakeVllm) -> None:
    """The failure comes as it does without retention, before everything else; the same request can be sent again."""
    vllm.play(Script.error(503, "busy"), counting())
    events, failure = await read_badly(served.stream(ask(completion_id="c"), options=KEPT))
    assert (events, failure.initial, failure.reason) == ([], {}, "UPSTREAM_UNAVAILABLE")
    _, gone = await read_badly(served.resume("c"))
    assert gone.reason == "COMPLETION_GONE"
    whole(await read_well(served.stream(ask(completion_id="c"), options=KEPT)))


async def test_a_model_that_is_not_there(served: Running) -> None:
    """Fails before anything is kept."""
    _, failure = await read_badly(served.stream(ask(model="other", completion_id="c"), options=KEPT))
    assert failure.reason == "MODEL_NOT_FOUND"
    assert (await served.look_up("c")).state == FAILED


async def test_an_id_that_is_taken(served: Running, vllm: FakeVllm) -> None:
    """With another request, options and kind of call included: while it is generated, and as long as it is retained."""
    gate = asyncio.Event()
    vllm.play(counting(gate))
    call = served.stream(ask(completion_id="c"), options=KEPT)
    first = await read_until(call, "0 1 2 3 ")
    for again in (
        served.stream(ask("other", completion_id="c"), options=KEPT),
        served.stream(ask(completion_id="c")),
    ):
        _, failure = await read_badly(again)
        assert (failure.code, failure.reason) == (grpc.StatusCode.ALREADY_EXISTS, "COMPLETION_ALREADY_EXISTS")
        assert failure.metadata["completion_id"] == "c"
    failure = await failure_of(served.create(ask(completion_id="c")))
    assert failure.reason == "COMPLETION_ALREADY_EXISTS"
    gate.set()
    whole(first, [event async for event in call])
    _, failure = await read_badly(served.stream(ask(completion_id="c")))
    assert failure.reason == "COMPLETION_ALREADY_EXISTS"


async def test_places_that_cannot_be_had(start_gateway: StartGateway, vllm: FakeVllm) -> None:
    """What never was is NOT_FOUND; what was dropped, or has not come yet, is OUT_OF_RANGE."""
    words = [CHUNKS.text("x" * 100) for _ in range(200)]
    vllm.play(Script.chunks([CHUNKS.role(), *words, CHUNKS.finish()]))
    async with start_gateway(retention={"max_stream_bytes": 8192}) as gateway:
        _, failure = await read_badly(gateway.resume("c"))
        assert (failure.code, failure.reason) == (grpc.StatusCode.NOT_FOUND, "COMPLETION_NOT_FOUND")
        call = gateway.stream(ask(completion_id="c"), options=KEPT)
        await anext(call.__aiter__())
        call.cancel()
        await until(lambda: gateway.gateway._worker.active == 0)
        state = await gateway.look_up("c")
        _, failure = await read_badly(gateway.resume("c"))
        assert (failure.code, failure.reason) == (grpc.StatusCode.OUT_OF_RANGE, "COMPLETION_GONE")
        first = int(failure.metadata["first_sequence"])
        rest = await read_well(gateway.resume("c", first - 1))
        assert [event.sequence for event in rest] == list(range(first, state.last_sequence + 1))
        _, failure = await read_badly(gateway.resume("c", state.last_sequence + 1))
        assert failure.reason == "COMPLETION_GONE"
        _, failure = await read_badly(gateway.resume("cmpl-" + "0" * 32 + "-" + "0" * 8))
        assert (failure.code, failure.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "WRONG_REPLICA")


async def test_a_stream_that_nobody_comes_back_to(served: Running, vllm: FakeVllm, lines: Lines) -> None:
    """Is stopped when its time has passed, and forgotten; what it has cost is known."""
    vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("a"), asyncio.Event()]))
    options = chat_pb.StreamOptions(retention=Duration(seconds=1))
    call = served.stream(ask(completion_id="c"), options=options)
    await read_until(call, "a")
    call.cancel()
    await vllm.chats[0].closed_early.wait()
    line = await lines.find("completion ended", completion_id="c")
    assert (line["usage"], line["reason"]) == ("ESTIMATED", None)
    state = await served.look_up("c")
    assert (state.state, state.HasField("completed"), state.HasField("expire_time")) == (ENDED, False, False)
    _, failure = await read_badly(served.resume("c"))
    assert failure.reason == "COMPLETION_GONE"


async def test_retention_can_be_limited(start_gateway: StartGateway) -> None:
    """By the operator, down to none; the violation names the field and the limit."""
    async with start_gateway(retention={"max_retention": 30}) as gateway:
        _, failure = await read_badly(gateway.stream(options=KEPT))
        assert (failure.reason, failure.fields) == ("INVALID_REQUEST", ["options.retention"])
        assert "30" in failure.message
    async with start_gateway(retention={"max_retention": 0}) as gateway:
        _, failure = await read_badly(gateway.stream(options=KEPT))
        assert failure.fields == ["options.retention"]


async def test_a_reader_that_does_not_read(start_gateway: StartGateway, vllm: FakeVllm) -> None:
    """Loses its call, not its stream: SLOW_CALLER, and another call has it all."""
    words = [CHUNKS.text("x" * 1000) for _ in range(2000)]
    vllm.play(Script.chunks([CHUNKS.role(), *words, CHUNKS.finish()], chunks_per_write=50))
    options = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024))
    async with start_gateway(stream={"slow_caller_timeout": 0.2}, options=options) as gateway:
        call = gateway.stream(ask(completion_id="c"), options=KEPT)
        await anext(call.__aiter__())
        await until(lambda: gateway.gateway._lifecycle._calls._active == 0)  # type: ignore[attr-defined]
        _, failure = await read(call)
        assert failure is not None
        assert failure.reason == "SLOW_CALLER"
        assert text_of(await read_well(gateway.resume("c"))) == "x" * 2_000_000


async def test_a_process_that_stops_ends_its_retained_streams(start_gateway: StartGateway, vllm: FakeVllm) -> None:
    """Those that nobody reads too: nothing is generated for nobody."""
    vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("a"), asyncio.Event()]))
    async with start_gateway() as gateway:
        call = gateway.stream(ask(completion_id="c"), options=KEPT)
        await read_until(call, "a")
        call.cancel()
    await vllm.chats[0].closed_early.wait()


# --- Cancel


@pytest.mark.parametrize("options", [None, KEPT])
async def test_a_soft_cancel(served: Running, vllm: FakeVllm, options: chat_pb.StreamOptions | None) -> None:
    """The stream ends normally, with what has come; the answer to the cancel says what it met. A second changes nothing."""
    vllm.play(counting(asyncio.Event()))
    call = served.stream(ask(completion_id="c"), options=options)
    first = await read_until(call, "0 1 2 3 ")
    response = await served.cancel("c")
    assert response.state == RUNNING
    assert response.usage.completion_tokens == 4
    rest = [event async for event in call]
    assert await call.code() is grpc.StatusCode.OK
    assert kinds(rest) == ["choice_finished", "completed"]
    choice = rest[-1].completed.choices[0]
    assert choice.stop_reason == chat_pb.STOP_REASON_CANCELLED
    assert choice.message.text == text_of(first)
    assert rest[-1].completed.usage.provenance != chat_pb.USAGE_PROVENANCE_EXACT
    assert not rest[-1].completed.HasField("error")
    await vllm.chats[0].closed_early.wait()
    again = await served.cancel("c")
    assert (again.state, again.usage) == (ENDED, rest[-1].completed.usage)


async def test_a_soft_cancel_of_a_whole_answer(served: Running, vllm: FakeVllm) -> None:
    """Create too answers with what has come."""
    vllm.play(counting(asyncio.Event()))
    creating = asyncio.ensure_future(served.create(ask(completion_id="c")))
    await until(lambda: served.gateway._worker.active == 1)
    while (await served.look_up("c")).usage.completion_tokens < 4:  # noqa: ASYNC110 (nothing announces it)
        await asyncio.sleep(0.005)
    await served.cancel("c")
    response = await creating
    assert response.completed.choices[0].stop_reason == chat_pb.STOP_REASON_CANCELLED
    assert response.completed.choices[0].message.text == "0 1 2 3 "
    assert response.started.completion_id == "c"


async def test_a_soft_time_limit(served: Running, vllm: FakeVllm) -> None:
    """OK, the text so far, TIME_LIMIT."""
    vllm.play(counting(asyncio.Event()))
    events = await read_well(served.stream(ask(soft_time_limit=Duration(nanos=300_000_000))))
    choice = events[-1].completed.choices[0]
    assert (choice.stop_reason, choice.message.text) == (chat_pb.STOP_REASON_TIME_LIMIT, "0 1 2 3 ")


@pytest.mark.parametrize("completion_id", ["", "a b", "ö", "x" * 129])
async def test_ids_that_can_be_nobodys(served: Running, completion_id: str) -> None:
    """Are refused where they are given."""
    for call in (served.cancel(completion_id), served.look_up(completion_id)):
        failure = await failure_of(call)
        assert (failure.reason, failure.fields) == ("INVALID_REQUEST", ["completion_id"])
    _, failure = await read_badly(served.resume(completion_id))
    assert (failure.reason, failure.fields) == ("INVALID_REQUEST", ["resume.completion_id"])


# --- Look-up


async def test_states_of_a_retained_completion(served: Running, vllm: FakeVllm) -> None:
    """Under way, read and not read, and ended: with the result, for as long as it is kept."""
    gate = asyncio.Event()
    vllm.play(counting(gate))
    call = served.stream(ask(completion_id="c"), options=KEPT)
    first = await read_until(call, "0 1 2 3 ")
    state = await served.look_up("c")
    assert (state.completion_id, state.state, state.started) == ("c", RUNNING, first[0].started)
    assert state.last_sequence == first[-1].sequence
    assert not state.HasField("expire_time")
    assert not state.HasField("completed")
    call.cancel()
    await until(lambda: served.gateway._lifecycle._calls._active == 0)  # type: ignore[attr-defined]
    assert (await served.look_up("c")).HasField("expire_time")
    gate.set()
    await until(lambda: served.gateway._worker.active == 0)
    state = await served.look_up("c")
    rest = await read_well(served.resume("c", first[-1].sequence))
    whole(first, rest)
    assert state.state == ENDED
    assert state.completed == rest[-1].completed
    assert state.usage == rest[-1].completed.usage
    assert not state.HasField("error")


async def test_states_of_one_that_is_not_retained(served: Running, vllm: FakeVllm) -> None:
    """What it cost and how it ended, without the result, also if its caller gave it up."""
    await read_well(served.stream(ask(completion_id="c")))
    state = await served.look_up("c")
    assert (state.state, state.usage.provenance) == (ENDED, chat_pb.USAGE_PROVENANCE_EXACT)
    assert state.started.completion_id == "c"
    assert not state.HasField("completed")
    assert not state.HasField("last_sequence")
    for timeout, code in ((None, grpc.StatusCode.CANCELLED), (0.3, grpc.StatusCode.DEADLINE_EXCEEDED)):
        vllm.play(counting(asyncio.Event()))
        call = served.stream(ask(completion_id="d"), timeout=timeout)
        await read_until(call, "0 1 2 3 ")
        if timeout is None:
            call.cancel()
        await asyncio.wait([asyncio.ensure_future(call.code())])
        await until(lambda: served.gateway._worker.active == 0)
        state = await served.look_up("d")
        assert (state.state, state.error.code) == (FAILED, code.value[0])
        assert state.error.reason == error_reason_pb2.ERROR_REASON_UNSPECIFIED
        assert state.usage.completion_tokens == 4
    _, failure = await read_badly(served.resume("d"))
    assert (failure.code, failure.reason) == (grpc.StatusCode.OUT_OF_RANGE, "COMPLETION_GONE")


async def test_another_callers_completion_is_none(start_gateway: StartGateway, vllm: FakeVllm) -> None:
    """To look at, cancel or resume; nor can anybody tell that there is one by asking for its id."""
    keys = "a call k-aaaaaaaaaaaaaaaa; b call k-bbbbbbbbbbbbbbbb"
    mine, yours = ((("authorization", f"Bearer k-{letter * 16}"),) for letter in "ab")
    vllm.play(counting(asyncio.Event()), counting())
    async with start_gateway(access={"keys": keys}) as gateway:
        call = gateway.stream(ask(completion_id="c"), options=KEPT, metadata=mine)
        await read_until(call, "0 1 2 3 ")
        _, failure = await read_badly(gateway.resume("c", metadata=yours))
        assert (failure.code, failure.reason) == (grpc.StatusCode.NOT_FOUND, "COMPLETION_NOT_FOUND")
        assert (await failure_of(gateway.look_up("c", metadata=yours))).reason == "COMPLETION_NOT_FOUND"
        request = chat_pb.CancelChatCompletionRequest(completion_id="c")
        cancel = gateway.chat.CancelChatCompletion
        assert (await failure_of(cancel(request, metadata=yours))).reason == "COMPLETION_NOT_FOUND"
        whole(await read_well(gateway.stream(ask(completion_id="c"), options=KEPT, metadata=yours)))
        assert (await gateway.look_up("c", metadata=mine)).state == RUNNING
        assert (await cancel(request, metadata=mine)).state == RUNNING


async def test_a_stream_is_kept_for_a_second_at_least(served: Running) -> None:
    """Less would be over before anybody had begun to read."""
    options = chat_pb.StreamOptions(retention=Duration(nanos=999_999_999))
    _, failure = await read_badly(served.stream(options=options))
    assert failure.fields == ["options.retention"]
    assert "from 1 to 600 seconds" in failure.message
