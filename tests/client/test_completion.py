"""Events fold into the answer, and every way in which a stream can end comes to what the table says."""

from __future__ import annotations

import pickle
from typing import Any

import grpc
import pytest

from deltawire import (
    Accumulator,
    Answer,
    CallCancelledError,
    CallError,
    CallInfo,
    ChatMessage,
    CompletionGoneError,
    DeadlineExceededError,
    ErrorReason,
    ProtocolError,
    StopReason,
    StreamInterrupted,
    ToolCall,
    UnavailableError,
    UpstreamError,
    UpstreamIncompleteError,
    message_text,
)
from deltawire._completion import answer_of
from deltawire._failure import Failure
from deltawire.v1.chat_completion_pb2 import (
    Completed,
    CreateChatCompletionResponse,
    Started,
    StreamChatCompletionResponse,
    TokenLogprob,
)
from deltawire.v1.tool_pb2 import ToolCallDelta
from tests.client.scripted import (
    Event,
    call_failed,
    call_piece,
    called,
    calling,
    choice,
    completed,
    finished,
    heartbeat,
    notice,
    numbered,
    reasoning,
    saying,
    started,
    text,
    used,
)

CALL = ToolCall(call_id="call_1", tool_name="get_weather", arguments='{"city":"Oslo"}')
INFO = CallInfo("r1", (("x-request-id", "r1"),), (("a", "b"),))
STATUS = grpc.StatusCode


def fold(events: list[Event], failure: Failure | None = None) -> Answer:
    """What these events and this end come to."""
    accumulator = Accumulator()
    for event in events:
        accumulator.receive(event)
    return accumulator.finish(failure, INFO)


def fault(events: list[Event], failure: Failure | None = None) -> CallError:
    """The error that these events and this end come to."""
    with pytest.raises(CallError) as caught:
        fold(events, failure)
    return caught.value


def test_an_answer() -> None:
    """Everything that was said is on the answer, and what came beside it too."""
    answer = fold(saying("Hel", "lo"))
    assert (answer.text, answer.reasoning, answer.tool_calls) == ("Hello", "", ())
    assert answer.stop_reason == StopReason.STOP_REASON_END_OF_TURN
    assert not answer.tool_calls_executable
    assert (answer.completion_id, answer.model) == ("cmpl-1", "llama")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 5)
    assert answer.request_id == "r1"
    assert (answer.initial_metadata, answer.trailing_metadata) == (INFO.initial_metadata, INFO.trailing_metadata)
    assert answer.choices[0].engine_finish_reason == "stop"


def test_a_message_to_send_back() -> None:
    """The message is what `Completed` says, so that it goes into the history unchanged."""
    answer = fold(calling(CALL, said="Let me look."))
    assert answer.message == ChatMessage(assistant=answer.completed.choices[0].message)
    assert message_text(answer.message) == answer.text == "Let me look."
    assert answer.tool_calls == (CALL,)
    assert answer.tool_calls_executable
    assert answer.stop_reason == StopReason.STOP_REASON_END_OF_MESSAGE


def test_messages_that_were_left_out_are_put_together_from_the_deltas() -> None:
    """Text, reasoning, calls and failed calls, each choice for itself."""
    cut = Completed.Choice(index=0, stop_reason=StopReason.STOP_REASON_OUT_OF_TOKENS, engine_finish_reason="length")
    other = Completed.Choice(index=2, stop_reason=StopReason.STOP_REASON_END_OF_TURN)
    events = numbered(
        started(),
        reasoning("hm", 0),
        text("a", 0),
        text("x", 2),
        reasoning("m", 0),
        text("b", 0),
        called(CALL, 0),
        call_failed("get_weather", '{"ci', 1),
        finished(0, "OUT_OF_TOKENS"),
        finished(2),
        completed(cut, other, messages_omitted=True),
    )
    first, second = fold(events).choices
    assert (first.text, first.reasoning, first.tool_calls) == ("ab", "hmm", (CALL,))
    assert first.failed_tool_calls[0].failure.raw_arguments == '{"ci'
    assert (first.stop_reason, first.engine_finish_reason) == (StopReason.STOP_REASON_OUT_OF_TOKENS, "length")
    assert (second.index, second.text) == (2, "x")


def test_failed_calls_as_completed_tells_them() -> None:
    """They are not in the message, so that it can be sent back."""
    delta = call_failed("get_weather", '{"ci')
    end = choice(said="hi", reason="OUT_OF_TOKENS", failed_tool_calls=[delta.tool_call_delta])
    answer = fold(numbered(started(), text("hi"), delta, finished(reason="OUT_OF_TOKENS"), completed(end)))
    assert answer.failed_tool_calls == (delta.tool_call_delta,)
    assert answer.tool_calls == ()


def test_logprobs_come_in_order() -> None:
    """Those of text and reasoning, as they came."""
    a, b, c = (TokenLogprob(token=each, logprob=-1) for each in "abc")
    thought = reasoning("a")
    thought.reasoning_delta.logprobs.append(a)
    events = numbered(
        started(), thought, text("b", logprobs=[b]), text("", logprobs=[c]), finished(), completed(choice(said="b"))
    )
    assert fold(events).choices[0].logprobs == (a, b, c)


@pytest.mark.parametrize(
    ("fields", "stop", "token"),
    [({"matched_stop": "END"}, "END", None), ({"matched_token_id": 7}, None, 7), ({}, None, None)],
)
def test_what_made_the_engine_stop(fields: dict[str, Any], stop: str | None, token: int | None) -> None:
    """The last event says it, and so does a whole answer; a stream that breaks off before has its choice's own word."""
    ends = [started(), finished(reason="STOP_SEQUENCE", **fields)]
    stated = completed(choice(reason="STOP_SEQUENCE", **fields))
    whole = answer_of(CreateChatCompletionResponse(started=Started(), completed=stated.completed), INFO)
    with pytest.raises(StreamInterrupted) as broken_off:
        fold(numbered(*ends))
    for answer in (fold(numbered(*ends, stated)), whole, broken_off.value.answer):
        assert answer is not None
        only = answer.choices[0]
        assert (only.matched_stop, only.matched_token_id) == (stop, token)


def test_events_of_a_later_version_are_skipped() -> None:
    """They count in the sequence, wherever they come, and a verdict that is not known is no verdict."""
    unknown = StreamChatCompletionResponse()
    vague = StreamChatCompletionResponse(choice_index=0, tool_call_delta=ToolCallDelta(index=0))
    events = numbered(unknown, started(), text("hi"), vague, finished(), completed(choice(said="hi")))
    answer = fold(events)
    assert (answer.text, answer.tool_calls, answer.failed_tool_calls) == ("hi", (), ())


def test_heartbeats_before_the_beginning() -> None:
    """They count and begin nothing: a failure after them is what it says it is."""
    early = numbered(heartbeat(), heartbeat(), started(), text("hi"), finished(), completed(choice(said="hi")))
    assert fold(early).text == "hi"
    error = fault(early[:2], failed(STATUS.UNAVAILABLE))
    assert type(error) is UnavailableError
    assert error.answer is None
    assert type(fault(early[:2])) is StreamInterrupted


def test_a_soft_end_before_the_beginning_needs_started() -> None:
    """Also after heartbeats nothing but `started` may come first."""
    with pytest.raises(ProtocolError, match="completed came before started"):
        fold(numbered(heartbeat(), completed()))


def test_pieces_of_a_call_are_not_kept() -> None:
    """The verdict says it all; of a call without one nothing is left."""
    events = numbered(started(), call_piece(), call_piece(fragment='{"city":'), call_piece(fragment='"Oslo"}'))
    assert fault(events).answer.tool_calls == ()  # type: ignore[union-attr]
    end = completed(messages_omitted=True)
    answer = fold(numbered(*events, called(CALL), finished(reason="END_OF_MESSAGE"), end))
    assert (answer.tool_calls, answer.failed_tool_calls) == ((CALL,), ())


def test_what_is_told_beside_the_answer() -> None:
    """Usage replaces what was told before and is followed by the last account; notices stay in order."""
    events = numbered(started(), notice("a"), used(2), text("hi"), used(3), notice("b"), completed(choice(said="hi")))
    accumulator = Accumulator()
    seen = []
    for event in events:
        accumulator.receive(event)
        seen.append(accumulator.usage.completion_tokens)
    assert seen == [0, 0, 2, 2, 3, 3, 5]
    answer = accumulator.finish(None, INFO)
    assert [each.message for each in answer.notices] == ["a", "b"]
    assert answer.usage == events[-1].completed.usage


@pytest.mark.parametrize("after", [0, 6])
def test_from_the_middle(after: int) -> None:
    """The next event is the one after, `started` may be missing, and the id is the one that was asked for."""
    accumulator = Accumulator("mine", after)
    assert (accumulator.expected, accumulator.completion_id, accumulator.has_begun) == (after + 1, "mine", False)
    events = [text("b"), finished(), completed(choice(said="ab"))]
    for sequence, event in enumerate(events, after + 1):
        event.sequence = sequence
        accumulator.receive(event)
        assert accumulator.has_begun
    answer = accumulator.finish(None, INFO)
    assert (answer.text, answer.completion_id) == ("ab", "mine")
    with pytest.raises(ProtocolError, match=f"event {after + 1} was expected and 0 came"):
        Accumulator("mine", after).receive(text("a"))


def test_from_the_middle_and_nothing_came() -> None:
    """A failure is what it says it is; after an event, the stream was interrupted."""
    with pytest.raises(CompletionGoneError):
        Accumulator("mine", 3).finish(failed(STATUS.OUT_OF_RANGE, "COMPLETION_GONE"), INFO)
    accumulator = Accumulator("mine", 3)
    event = text("a")
    event.sequence = 4
    accumulator.receive(event)
    with pytest.raises(StreamInterrupted) as caught:
        accumulator.finish(failed(STATUS.OUT_OF_RANGE, "COMPLETION_GONE"), INFO)
    assert caught.value.answer is not None
    assert caught.value.answer.completion_id == "mine"


@pytest.mark.parametrize(
    ("events", "what"),
    [
        (saying("a")[:2] + saying("a")[3:], "event 2 was expected and 3 came"),
        ([*saying("a")[:2], saying("a")[1]], "event 2 was expected and 1 came"),
        (saying("a")[1:], "event 0 was expected and 1 came"),
        (numbered(text("a")), "text_delta came before started"),
        (numbered(started(), started()), "started came after started"),
        (numbered(started(), completed(), text("a")), "after the last one"),
    ],
)
def test_streams_that_break_the_rules(events: list[Event], what: str) -> None:
    """A gap, a repetition, a wrong order: such an answer cannot be trusted."""
    with pytest.raises(ProtocolError, match=what):
        fold(events)


def failed(code: grpc.StatusCode, reason: str = "") -> Failure:
    """A call that ended like this."""
    return Failure(code, "it failed", reason, request_id="r1")


FAULTED = numbered(
    started(),
    text("Hel"),
    finished(reason="UPSTREAM_INCOMPLETE"),
    completed(
        choice(said="Hel", reason="UPSTREAM_INCOMPLETE"),
        error=Completed.Error(code=10, reason=ErrorReason.ERROR_REASON_UPSTREAM_INCOMPLETE, message="it broke off"),
    ),
)


@pytest.mark.parametrize("end", [STATUS.UNAVAILABLE, STATUS.DEADLINE_EXCEEDED, STATUS.CANCELLED, STATUS.INTERNAL])
def test_a_whole_answer_stays_whole(end: grpc.StatusCode) -> None:
    """Once `Completed` is there, a lost status takes nothing away."""
    assert fold(saying("Hello"), failed(end)).text == "Hello"


def test_a_fault_with_its_status() -> None:
    """The status and its details come first: they say the most."""
    error = fault(FAULTED, failed(STATUS.ABORTED, "UPSTREAM_ERROR"))
    assert type(error) is UpstreamError
    assert error.message == "it failed"


@pytest.mark.parametrize("end", [None, failed(STATUS.UNKNOWN), failed(STATUS.UNAVAILABLE)])
def test_a_fault_whose_status_was_lost(end: Failure | None) -> None:
    """A proxy may turn it into OK or into something of its own; `Completed.error` is what happened."""
    error = fault(FAULTED, end)
    assert type(error) is UpstreamIncompleteError
    assert (error.code, error.message, error.request_id) == (STATUS.ABORTED, "it broke off", "r1")


def test_a_fault_keeps_what_came() -> None:
    """Text, stop reason and usage are on the error."""
    answer = fault(FAULTED).answer
    assert answer is not None
    assert (answer.text, answer.usage.completion_tokens) == ("Hel", 5)
    assert answer.stop_reason == StopReason.STOP_REASON_UPSTREAM_INCOMPLETE


@pytest.mark.parametrize("end", [None, *(failed(each) for each in STATUS if each.value[0] not in {0, 1, 4})])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_stream_that_breaks_off(end: Failure | None, count: int) -> None:
    """Whatever the status, OK above all: without `Completed` there is no answer."""
    error = fault(saying("Hel", "lo")[:count], end)
    assert type(error) is StreamInterrupted
    assert error.code is (STATUS.UNKNOWN if end is None else end.code)
    assert error.request_id == "r1"
    assert error.answer is not None
    assert error.answer.text == "Hello"[: 3 * (count - 1)]
    assert error.answer.stop_reason == StopReason.STOP_REASON_UNSPECIFIED


def test_a_stream_without_any_event() -> None:
    """OK and nothing is no answer; a failure before the first event is what it says it is."""
    assert type(fault([])) is StreamInterrupted
    error = fault([], failed(STATUS.UNAVAILABLE))
    assert type(error) is UnavailableError
    assert error.answer is None


@pytest.mark.parametrize(
    ("code", "kind"), [(STATUS.CANCELLED, CallCancelledError), (STATUS.DEADLINE_EXCEEDED, DeadlineExceededError)]
)
@pytest.mark.parametrize("count", [0, 2])
def test_the_callers_own_ends(code: grpc.StatusCode, kind: type[CallError], count: int) -> None:
    """They are what they are, before the first event and after it, and keep what came."""
    error = fault(saying("Hello")[:count], failed(code))
    assert type(error) is kind
    assert (error.answer.text if error.answer else None) == ("Hello" if count else None)


def test_what_ended_is_told_of_a_broken_stream() -> None:
    """A choice that ended before the stream broke keeps its stop reason."""
    error = fault(saying("Hello")[:3])
    assert error.answer is not None
    assert error.answer.stop_reason == StopReason.STOP_REASON_END_OF_TURN


def test_answers_that_came_whole() -> None:
    """What a call with one answer gives is the same object, log-probabilities included."""
    token = TokenLogprob(token="hi", logprob=-1)
    done = completed(choice(0, "hi", logprobs=[token]), choice(1, "ho", thought="hm")).completed
    answer = answer_of(CreateChatCompletionResponse(started=Started(completion_id="cmpl-2"), completed=done), INFO)
    assert (answer.text, answer.completion_id, answer.request_id) == ("hi", "cmpl-2", "r1")
    assert answer.choices[0].logprobs == (token,)
    assert (answer.choices[1].text, answer.choices[1].reasoning) == ("ho", "hm")


def test_an_answer_of_nothing_is_none() -> None:
    """A gateway that answers without a choice broke the rules."""
    with pytest.raises(ProtocolError, match="no choice") as caught:
        answer_of(CreateChatCompletionResponse(), INFO)
    assert caught.value.request_id == "r1"


def test_answers_travel_between_processes() -> None:
    """With the error that has them, too."""
    error = fault(FAULTED)
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 -- our own bytes
    assert copy.answer == error.answer
