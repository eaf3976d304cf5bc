"""Retained streams with both clients, against a real gRPC server; what is next after an end is held by `test_resumption`."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc
import pytest

from deltawire import (
    Answer,
    AsyncClient,
    CallCancelledError,
    Client,
    CompletionAlreadyExistsError,
    CompletionGoneError,
    CompletionNotFoundError,
    DeadlineExceededError,
    DeltawireError,
    ProtocolError,
    StopReason,
    StreamInterrupted,
    UpstreamIncompleteError,
    UpstreamUnavailableError,
    user,
)
from deltawire._completion import elsewhere
from deltawire.v1.chat_completion_pb2 import (
    COMPLETION_STATE_RUNNING,
    CancelChatCompletionResponse,
    ChatRequest,
    Completed,
    ResumePoint,
)
from tests.client.scripted import (
    WAIT,
    Event,
    Fail,
    Gateway,
    Headers,
    Step,
    call_piece,
    called,
    choice,
    completed,
    finished,
    heartbeat,
    notice,
    numbered,
    saying,
    started,
    text,
    used,
)
from tests.client.test_completion import CALL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from deltawire import AsyncChatStream, ChatStream

STATUS = grpc.StatusCode
TIMEOUT = 10
EVENTS = saying("Hel", "lo ", "you")
LOST = Fail(STATUS.INTERNAL, trailers=())
MISSING = Fail(STATUS.NOT_FOUND, "COMPLETION_NOT_FOUND", metadata={"completion_id": "mine"})
GONE = Fail(STATUS.OUT_OF_RANGE, "COMPLETION_GONE")
EXISTS = Fail(STATUS.ALREADY_EXISTS, "COMPLETION_ALREADY_EXISTS")

# What was read, and what it came to.
Outcome: TypeAlias = tuple[list[Event], "Answer | DeltawireError", "ChatStream | AsyncChatStream"]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next call is made at once."""
    monkeypatch.setattr(elsewhere, "MAX_PAUSE", 0.0)


@pytest.fixture
def pausing(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The next call would not be made in a test's time; set once a stream waits for it."""
    monkeypatch.setattr(elsewhere, "MIN_PAUSE", 1000.0)
    monkeypatch.setattr(elsewhere, "MAX_PAUSE", 1000.0)
    waits = threading.Event()

    def note(_: logging.LogRecord) -> bool:
        waits.set()
        return True

    logger = logging.getLogger("deltawire")
    logger.addFilter(note)
    yield waits
    logger.removeFilter(note)


@pytest.fixture(params=["blocking", "asyncio"])
def read(request: pytest.FixtureRequest, gateway: Gateway) -> Callable[..., Outcome]:
    """Read a stream to its end, by either client: `read(**arguments)`, or `read("id", 4)` to resume."""

    def blocking(*resumed: Any, **arguments: Any) -> Outcome:  # noqa: ANN401
        events: list[Event] = []
        with Client(gateway.target) as client:
            chat = client.chat
            with chat.resume(*resumed, **arguments) if resumed else chat.stream("hi", **arguments) as stream:
                try:
                    events.extend(stream)
                    return events, stream.final(), stream
                except DeltawireError as error:
                    return events, error, stream

    def asynchronous(*resumed: Any, **arguments: Any) -> Outcome:  # noqa: ANN401
        async def run() -> Outcome:
            events: list[Event] = []
            async with AsyncClient(gateway.target) as client:
                chat = client.chat
                async with chat.resume(*resumed, **arguments) if resumed else chat.stream("hi", **arguments) as stream:
                    try:
                        async for event in stream:
                            events.append(event)  # noqa: PERF401 -- what came before an error is kept
                        return events, await stream.final(), stream
                    except DeltawireError as error:
                        return events, error, stream

        return asyncio.run(run())

    return blocking if request.param == "blocking" else asynchronous


Read: TypeAlias = "Callable[..., Outcome]"


def play(gateway: Gateway, *scripts: list[Step]) -> None:
    """Add the scripts of the next calls."""
    for script in scripts:
        gateway.will(*script)


def asked(gateway: Gateway) -> list[int | str | None]:
    """What each call of a stream asked for: "chat", or the event to go on after; None for all of them."""
    calls = [call.request for call in gateway.calls if call.method == "StreamChatCompletion"]
    return [
        "chat"
        if call.HasField("chat")
        else call.resume.last_sequence
        if call.resume.HasField("last_sequence")
        else None
        for call in calls
    ]


@pytest.mark.parametrize("index", range(len(EVENTS)))
def test_killed_after_every_event(gateway: Gateway, read: Read, index: int) -> None:
    """Each event is seen once, the answer is whole, and all calls are the same to the gateway's log."""
    play(gateway, [*EVENTS[:index], LOST], EVENTS[index:])
    events, answer, stream = read(retention=60, model="llama", request_id="r1", metadata=[("traceparent", "00-1")])
    assert events == EVENTS
    assert isinstance(answer, Answer)
    assert (answer.text, answer.request_id, stream.resumed) == ("Hello you", "r1", 1)
    assert asked(gateway) == ["chat", index - 1 if index else None]
    first, second = gateway.calls
    assert second.request.resume.completion_id == first.request.chat.completion_id
    assert first.request.chat.completion_id.startswith("own-")
    assert not second.request.HasField("options")
    for name in ("x-request-id", "traceparent"):
        assert first.metadata[name] == second.metadata[name]


@pytest.mark.parametrize(
    "end",
    [
        None,
        *(Fail(code, trailers=()) for code in STATUS if code.name in {"UNAVAILABLE", "UNKNOWN", "CANCELLED"}),
        Fail(STATUS.DEADLINE_EXCEEDED, trailers=()),
        Fail(STATUS.ABORTED, "DRAINING"),
        Fail(STATUS.RESOURCE_EXHAUSTED, "SLOW_CALLER"),
    ],
    ids=lambda end: "OK" if end is None else end.reason or end.code.name,
)
def test_every_way_to_lose_a_connection(gateway: Gateway, read: Read, end: Fail | None) -> None:
    """A status of OK without the last event too, and a cancel that nobody here asked for."""
    play(gateway, [*EVENTS[:2], *([] if end is None else [end])], EVENTS[2:])
    events, answer, _ = read(retention=60, model="llama")
    assert events == EVENTS
    assert isinstance(answer, Answer)


def test_lost_again_and_again(gateway: Gateway, read: Read, caplog: pytest.LogCaptureFixture) -> None:
    """After each event, and twice without any; each time it is said in the log."""
    scripts: list[list[Step]] = [[event, LOST] for event in EVENTS[:-1]]
    play(gateway, *scripts, [LOST], [LOST], [EVENTS[-1]])
    events, answer, stream = read(retention=60, model="llama", completion_id="mine")
    assert events == EVENTS
    assert isinstance(answer, Answer)
    assert (answer.text, stream.resumed) == ("Hello you", len(gateway.calls) - 1)
    last = EVENTS[-2].sequence
    assert asked(gateway) == ["chat", *range(last), last, last, last]
    warnings = [record.getMessage() for record in caplog.records if record.name == "deltawire"]
    assert len(warnings) == stream.resumed
    # The scripted gateway names it so.
    assert warnings[0] == "stream cmpl-1 broke off and goes on in 0.0 s: INTERNAL: it failed"


def test_what_comes_twice_is_told_once(gateway: Gateway, read: Read) -> None:
    """A gateway that replays more than was asked for."""
    play(gateway, [*EVENTS[:3], LOST], EVENTS)
    events, answer, _ = read(retention=60, model="llama")
    assert events == EVENTS
    assert isinstance(answer, Answer)
    assert answer.text == "Hello you"


def test_a_gap_after_a_lost_connection(gateway: Gateway, read: Read) -> None:
    """What is missing will not come: the answer cannot be trusted, and the call is ended."""
    play(gateway, [*EVENTS[:2], LOST], [*EVENTS[3:], WAIT])
    events, error, _ = read(retention=60, model="llama")
    assert events == EVENTS[:2]
    assert isinstance(error, ProtocolError)
    assert "event 2 was expected and 3 came" in str(error)
    assert gateway.last.ended.wait(TIMEOUT)


def test_what_comes_twice_in_one_call_breaks_the_rules(gateway: Gateway, read: Read) -> None:
    """Only what was replayed may have come before."""
    play(gateway, [*EVENTS[:2], EVENTS[1]])
    _, error, _ = read(retention=60, model="llama")
    assert isinstance(error, ProtocolError)


def test_a_whole_answer_is_whole(gateway: Gateway, read: Read) -> None:
    """After `completed` nothing is resumed, whatever the status; a fault that it tells is raised."""
    play(gateway, [*EVENTS, LOST])
    _, answer, stream = read(retention=60, model="llama")
    assert isinstance(answer, Answer)
    faulted = saying("Hel")
    faulted[-1].completed.error.CopyFrom(Completed.Error(code=10, reason=15, message="gone"))  # type: ignore[arg-type]
    play(gateway, [*faulted, LOST])
    _, error, stream = read(retention=60, model="llama")
    assert isinstance(error, UpstreamIncompleteError)
    assert (stream.resumed, len(gateway.calls)) == (0, 2)


@pytest.mark.parametrize(
    ("end", "calls"),
    [(GONE, 1), (MISSING, 9), (Fail(STATUS.FAILED_PRECONDITION, "WRONG_REPLICA"), 9)],
    ids=lambda each: each.reason if isinstance(each, Fail) else str(each),
)
def test_an_answer_that_is_gone(gateway: Gateway, read: Read, end: Fail, calls: int) -> None:
    """It is interrupted: the error says why it could not go on, and has what came.

    What another process may have is looked for on eight more connections.
    """
    play(gateway, [*EVENTS[:2], LOST], *[[end]] * calls)
    events, error, _ = read(retention=60, model="llama")
    assert events == EVENTS[:2]
    assert type(error) is StreamInterrupted
    assert (error.code, error.reason) == (end.code, end.reason)
    assert len(gateway.calls) == 1 + calls
    assert isinstance(error.__cause__, grpc.RpcError)
    assert error.answer is not None
    assert error.answer.text == "Hel"


def test_a_start_that_was_lost(gateway: Gateway, read: Read) -> None:
    """There is no such completion, so it is asked again, with the same id; heartbeats are no beginning."""
    alive = numbered(heartbeat(), heartbeat())
    play(gateway, [*alive, LOST], [MISSING], [LOST], [MISSING], EVENTS)
    events, answer, stream = read(retention=60, model="llama", heartbeat_interval=1, early_heartbeats=True)
    assert events == [*alive, *EVENTS]
    assert isinstance(answer, Answer)
    assert (answer.text, stream.resumed) == ("Hello you", 4)
    assert asked(gateway) == ["chat", 1, "chat", None, "chat"]
    chats = [call.request for call in gateway.calls if call.request.HasField("chat")]
    assert chats == [chats[0]] * 3


def test_a_start_that_is_lost_for_good(gateway: Gateway, read: Read) -> None:
    """Four times, as gRPC does it; then the last error."""
    play(gateway, *([LOST], [MISSING]) * 4)
    events, error, _ = read(retention=60, model="llama")
    assert events == []
    assert type(error) is CompletionNotFoundError
    assert asked(gateway) == ["chat", None] * 4


def test_a_start_whose_beginning_was_lost(gateway: Gateway, read: Read) -> None:
    """GRPC itself tried again, and the gateway has the first one already: it is read from its first event."""
    play(gateway, [Fail(STATUS.UNAVAILABLE, trailers=())], [EXISTS], EVENTS)
    events, answer, _ = read(retention=60, model="llama")
    assert events == EVENTS
    assert isinstance(answer, Answer)
    assert asked(gateway) == ["chat", "chat", None]


def test_an_id_of_somebody_else(gateway: Gateway, read: Read) -> None:
    """What was asked there is not read here."""
    play(gateway, [EXISTS])
    _, error, _ = read(retention=60, model="llama", completion_id="mine")
    assert type(error) is CompletionAlreadyExistsError
    assert len(gateway.calls) == 1


def test_a_failure_of_the_completion_itself(gateway: Gateway, read: Read) -> None:
    """It is the error of its reason, and nothing is tried beyond what gRPC does."""
    play(gateway, *[[Fail(STATUS.UNAVAILABLE, "UPSTREAM_UNAVAILABLE")]] * 4)
    _, error, stream = read(retention=60, model="llama")
    assert type(error) is UpstreamUnavailableError
    assert (stream.resumed, len(gateway.calls)) == (0, 4)


def test_how_long_it_resumes(gateway: Gateway, read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing new would come in time, it is interrupted as ever."""
    monkeypatch.setattr(elsewhere, "MAX_PAUSE", 1000.0)
    monkeypatch.setattr(elsewhere, "MIN_PAUSE", 1000.0)
    play(gateway, [*EVENTS[:2], LOST])
    _, error, _ = read(retention=60, model="llama")
    assert type(error) is StreamInterrupted
    assert error.code is STATUS.INTERNAL
    assert error.answer is not None


@pytest.mark.parametrize(
    "end", [[], [LOST], [Fail(STATUS.DEADLINE_EXCEEDED, trailers=())]], ids=["OK", "lost", "gRPC's"]
)
def test_a_timeout(gateway: Gateway, client: Client, end: list[Step]) -> None:
    """One for all calls: once it has passed there is no other, and what came is kept."""
    gateway.will(*EVENTS[:2], *end)
    with client.chat.stream("hi", model="llama", retention=60, timeout=60) as stream:
        assert [next(stream), next(stream)] == EVENTS[:2]
        stream._deadline = time.monotonic()
        with pytest.raises(DeadlineExceededError) as caught:
            stream.final()
    assert caught.value.code is STATUS.DEADLINE_EXCEEDED
    assert caught.value.answer is not None
    assert caught.value.answer.text == "Hel"
    assert len(gateway.calls) == 1


@pytest.mark.usefixtures("pausing")
def test_a_timeout_ends_a_pause(gateway: Gateway, client: Client) -> None:
    """It is not waited for longer than there is time."""
    gateway.will(*EVENTS[:2])
    with client.chat.stream("hi", model="llama", retention=3000, timeout=60) as stream:
        assert [next(stream), next(stream)] == EVENTS[:2]
        pause = stream._end(None)
    assert pause is not None
    assert 0 < pause <= 60


def test_the_timeout_of_a_later_call(gateway: Gateway, read: Read) -> None:
    """It is what the earlier ones have left."""
    play(gateway, [*EVENTS[:2], LOST], [WAIT])
    _, error, stream = read(retention=60, model="llama", timeout=2)
    assert type(error) is DeadlineExceededError
    assert (error.answer is not None, stream.resumed) == (True, 1)


def test_resuming_another_stream(gateway: Gateway, read: Read) -> None:
    """From its first event, it is as if it had been asked here; lost connections are resumed."""
    play(gateway, [*EVENTS[:2], LOST], EVENTS[2:])
    events, answer, stream = read("mine")
    assert events == EVENTS
    assert isinstance(answer, Answer)
    assert (answer.text, stream.completion_id, stream.resumed) == ("Hello you", "cmpl-1", 1)
    assert gateway.calls[0].request.resume == ResumePoint(completion_id="mine")


def test_resuming_from_the_middle(gateway: Gateway, read: Read) -> None:
    """The answer is what `completed` says of it; what is left out there is only what came here."""
    play(gateway, [EVENTS[2], LOST], EVENTS[3:])
    events, answer, stream = read("mine", 1)
    assert events == EVENTS[2:]
    assert isinstance(answer, Answer)
    assert (answer.text, answer.completion_id, stream.completion_id) == ("Hello you", "mine", "mine")
    assert asked(gateway) == [1, 2]
    omitted = numbered(started(), text("a"), text("b"), finished(), completed(choice(), messages_omitted=True))
    play(gateway, omitted[2:])
    _, answer, _ = read("mine", 1)
    assert isinstance(answer, Answer)
    assert (answer.text, answer.completed.messages_omitted) == ("b", True)


@pytest.mark.parametrize(
    ("end", "kind"), [(MISSING, CompletionNotFoundError), (GONE, CompletionGoneError)], ids=["missing", "gone"]
)
@pytest.mark.parametrize("after", [None, 4])
def test_nothing_to_resume(
    gateway: Gateway, read: Read, end: Fail, kind: type[DeltawireError], after: int | None
) -> None:
    """The error says what there is not, and nothing is tried again."""
    play(gateway, [end])
    _, error, _ = read("mine", after)
    assert type(error) is kind
    assert len(gateway.calls) == 1


def test_a_start_in_the_middle_of_heartbeats(gateway: Gateway, read: Read) -> None:
    """`started` may follow heartbeats; nothing but the last event twice is wrong."""
    events = numbered(heartbeat(), started(), text("hi"), finished(), completed(choice(said="hi")))
    play(gateway, events[1:])
    seen, answer, _ = read("mine", 0)
    assert seen == events[1:]
    assert isinstance(answer, Answer)
    assert answer.completion_id == "cmpl-1"


def test_everything_that_is_told(gateway: Gateway, read: Read) -> None:
    """Pieces of calls, usage, notices and heartbeats are events like others, and are kept where they belong."""
    events = numbered(
        started(), notice("another one answers"), call_piece(), heartbeat(), call_piece(fragment='{"city":'),
        used(4), call_piece(fragment='"Oslo"}'), called(CALL), finished(reason="END_OF_MESSAGE"),
        completed(choice(reason="END_OF_MESSAGE", calls=[CALL])),
    )  # fmt: skip
    play(gateway, [*events[:5], LOST], [*events[5:7], LOST], events[7:])
    seen, answer, stream = read(model="llama", retention=60, usage_updates=True, incremental_tool_calls=True)
    assert seen == events
    assert isinstance(answer, Answer)
    assert answer.tool_calls == (CALL,)
    assert [each.message for each in answer.notices] == ["another one answers"]
    assert stream.notices == answer.notices
    assert stream.usage == answer.usage == events[-1].completed.usage


def test_usage_of_what_broke_off(gateway: Gateway, read: Read) -> None:
    """It is what was told last."""
    play(gateway, [*numbered(started(), text("Hel"), used(4)), LOST])
    _, error, stream = read(model="llama", usage_updates=True)
    assert isinstance(error, StreamInterrupted)
    assert error.answer is not None
    assert error.answer.usage.completion_tokens == stream.usage.completion_tokens == 4


def test_without_retention_nothing_goes_on(gateway: Gateway, read: Read) -> None:
    """And no id is made up."""
    play(gateway, [*EVENTS[:2], LOST])
    _, error, stream = read(model="llama")
    assert isinstance(error, StreamInterrupted)
    assert (len(gateway.calls), stream.resumed, gateway.last.request.chat.completion_id) == (1, 0, "")


def test_a_request_is_not_changed(gateway: Gateway, client: Client) -> None:
    """The made-up id is the stream's own: the same request can be asked again."""
    request = ChatRequest(model="llama", messages=[user("hi")])
    for _ in range(2):
        gateway.will(*EVENTS)
        with client.chat.stream(request, retention=60) as stream:
            stream.final()
    assert request.completion_id == ""
    first, second = gateway.calls
    assert first.request.chat.completion_id != second.request.chat.completion_id


def test_each_call_has_its_own_headers(gateway: Gateway, client: Client) -> None:
    """The stream shows those of the last one."""
    gateway.will(Headers((("x-replica", "a"),)), *EVENTS[:2], LOST)
    gateway.will(Headers((("x-replica", "b"),)), *EVENTS[2:])
    with client.chat.stream("hi", model="llama", retention=60) as stream:
        next(stream)
        assert ("x-replica", "a") in stream.initial_metadata
        answer = stream.final()
    assert ("x-replica", "b") in answer.initial_metadata


def softly(gateway: Gateway) -> list[Event]:
    """A stream that ends when somebody cancels it softly: its events."""
    end = completed(choice(said="Hel", reason="CANCELLED"))
    events = numbered(started(), text("Hel"), finished(reason="CANCELLED"), end)
    gateway.will(*events[:2], WAIT, *events[2:])
    gateway.will(gateway.stop_waiting, CancelChatCompletionResponse(state=COMPLETION_STATE_RUNNING))
    return events


def test_a_soft_cancel(gateway: Gateway, client: Client) -> None:
    """Reading on gives the normal end, and the cancel belongs to the same request."""
    softly(gateway)
    with client.chat.stream("hi", model="llama", request_id="r1", timeout=60) as stream:
        assert stream.completion_id == ""
        assert next(stream.text) == "Hel"
        assert stream.cancel_softly().state == COMPLETION_STATE_RUNNING
        answer = stream.final()
    assert (answer.text, answer.stop_reason) == ("Hel", StopReason.STOP_REASON_CANCELLED)
    assert gateway.last.request.completion_id == "cmpl-1"
    assert gateway.last.metadata["x-request-id"] == "r1"


async def test_a_soft_cancel_with_asyncio(gateway: Gateway, async_client: AsyncClient) -> None:
    """The same, awaited."""
    softly(gateway)
    async with async_client.chat.stream("hi", model="llama") as stream:
        assert await anext(stream.text) == "Hel"
        assert (await stream.cancel_softly()).state == COMPLETION_STATE_RUNNING
        assert (await stream.final()).stop_reason == StopReason.STOP_REASON_CANCELLED
    assert gateway.last.request.completion_id == "cmpl-1"


def test_a_soft_cancel_needs_an_id(gateway: Gateway, client: Client) -> None:
    """Before `started` the caller's own will do; without any, nothing is called."""
    gateway.will(WAIT)
    gateway.will(CancelChatCompletionResponse())
    with client.chat.stream("hi", model="llama", completion_id="mine") as stream:
        gateway_has(gateway, 1)
        stream.cancel_softly()
    assert gateway.last.request.completion_id == "mine"
    gateway.will(WAIT)
    with client.chat.stream("hi", model="llama") as stream, pytest.raises(RuntimeError, match="before `started`"):
        stream.cancel_softly()
    assert [call.method for call in gateway.calls].count("CancelChatCompletion") == 1


def gateway_has(gateway: Gateway, count: int) -> None:
    """Wait until so many calls have arrived."""
    waiting = threading.Event()
    for _ in range(TIMEOUT * 100):
        if len(gateway.calls) >= count:
            return
        waiting.wait(0.01)
    pytest.fail("the call did not arrive")


def test_cancelled_while_it_pauses(gateway: Gateway, client: Client, pausing: threading.Event) -> None:
    """Another thread ends it at once; no further call is made."""
    gateway.will(*EVENTS[:2], LOST)
    with client.chat.stream("hi", model="llama", retention=3000) as stream, ThreadPoolExecutor(1) as pool:
        reader = pool.submit(stream.final)
        assert pausing.wait(TIMEOUT)
        stream.cancel()
        with pytest.raises(CallCancelledError) as caught:
            reader.result(TIMEOUT)
    assert caught.value.answer is not None
    assert caught.value.answer.text == "Hel"
    assert len(gateway.calls) == 1


def test_closed_while_it_pauses(gateway: Gateway, pausing: threading.Event) -> None:
    """Closing the client ends it too."""
    gateway.will(*EVENTS[:2], LOST)
    with Client(gateway.target) as client, ThreadPoolExecutor(1) as pool:
        stream = client.chat.stream("hi", model="llama", retention=3000)
        reader = pool.submit(stream.final)
        assert pausing.wait(TIMEOUT)
        client.close()
        with pytest.raises(CallCancelledError):
            reader.result(TIMEOUT)


def test_cancelled_while_the_next_call_is_made(gateway: Gateway, client: Client) -> None:
    """The one who cancels may see the old call: the new one is ended as well."""
    gateway.will(*EVENTS[:2], LOST)
    gateway.will(WAIT)
    stream = client.chat.stream("hi", model="llama", retention=60)
    call = stream._call

    def slowly() -> Any:  # noqa: ANN401
        made = call()
        gateway_has(gateway, 2)
        stream.cancel()
        return made

    stream._call = slowly  # type: ignore[method-assign]
    with pytest.raises(CallCancelledError):
        stream.final()
    assert gateway.last.ended.wait(TIMEOUT)


async def test_cancelling_the_task_while_it_pauses(
    gateway: Gateway, async_client: AsyncClient, pausing: threading.Event
) -> None:
    """The cancellation goes on as asyncio wants it, and no further call is made."""
    gateway.will(*EVENTS[:2], LOST)
    stream = async_client.chat.stream("hi", model="llama", retention=3000)
    reader = asyncio.create_task(stream.final())
    assert await asyncio.to_thread(pausing.wait, TIMEOUT)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    with pytest.raises(CallCancelledError):
        await stream.final()
    assert len(gateway.calls) == 1


async def test_another_task_may_cancel_while_it_pauses(
    gateway: Gateway, async_client: AsyncClient, pausing: threading.Event
) -> None:
    """And so does closing the client; who reads gets the error, and is not cancelled itself."""
    for end in ("cancel", "close"):
        pausing.clear()
        gateway.will(*EVENTS[:2], LOST)
        stream = async_client.chat.stream("hi", model="llama", retention=3000)
        reader = asyncio.create_task(stream.final())
        assert await asyncio.to_thread(pausing.wait, TIMEOUT)
        if end == "cancel":
            stream.cancel()
        else:
            await async_client.close()
        with pytest.raises(CallCancelledError):
            await reader
    assert len(gateway.calls) == 2


def test_a_channel_of_your_own_closed_between_calls(gateway: Gateway) -> None:
    """There is no next call: the stream ends as cancelled."""
    gateway.will(*EVENTS[:2], LOST)
    channel = grpc.insecure_channel(gateway.target)
    stream = Client(channel=channel).chat.stream("hi", model="llama", retention=60)
    assert [next(stream), next(stream)] == EVENTS[:2]
    begin = stream._begin
    stream._begin = lambda: (channel.close(), begin())[1]  # type: ignore[method-assign]
    with pytest.raises(CallCancelledError):
        stream.final()
    assert len(gateway.calls) == 1


async def test_an_asynchronous_channel_of_your_own_closed_between_calls(gateway: Gateway) -> None:
    """The same, while it pauses."""
    gateway.will(*EVENTS[:2], LOST)
    channel = grpc.aio.insecure_channel(gateway.target)
    stream = AsyncClient(channel=channel).chat.stream("hi", model="llama", retention=60)
    assert [await anext(stream), await anext(stream)] == EVENTS[:2]
    go_on = stream._go_on

    async def closing(failed: Any) -> None:  # noqa: ANN401
        await channel.close()
        await go_on(failed)

    stream._go_on = closing  # type: ignore[method-assign]
    with pytest.raises(CallCancelledError):
        await stream.final()
    assert len(gateway.calls) == 1


def test_leaving_the_block_leaves_the_stream(gateway: Gateway, client: Client) -> None:
    """The call ends, generation is not ended: it can be taken up again, after what was read."""
    gateway.will(*EVENTS[:3], WAIT)
    with client.chat.stream("hi", model="llama", retention=60, completion_id="mine") as stream:
        assert stream.last_sequence is None
        read = [next(stream), next(stream)]
    assert stream.last_sequence == 1
    assert gateway.last.ended.wait(TIMEOUT)
    gateway.will(*EVENTS[2:])
    with client.chat.resume("mine", stream.last_sequence) as stream:
        assert read + list(stream) == EVENTS
    assert [call.method for call in gateway.calls] == ["StreamChatCompletion"] * 2


def test_after_the_last_event_there_is_only_the_end(read: Callable[..., Outcome], gateway: Gateway) -> None:
    """Nothing is left to read, and that is no broken connection: one call, and an answer with nothing in it."""
    gateway.will()
    events, answer, stream = read("mine", 4)
    assert events == []
    assert isinstance(answer, Answer)
    assert answer.text == ""
    assert not answer.completed.choices
    assert (stream.resumed, len(gateway.calls)) == (0, 1)
