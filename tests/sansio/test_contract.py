"""The contract of a stream, point by point; usage and merging have their own files."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltawire.v1 import chat_completion_pb2, tool_pb2
from deltawire_server.errors import Reason
from deltawire_server.sansio.events import (
    Alternative,
    ChoiceFinished,
    Completed,
    Event,
    FailureReason,
    Fault,
    Provenance,
    ReasoningDelta,
    Refused,
    Started,
    StopReason,
    TextDelta,
    TokenLogprob,
    ToolCallArguments,
    ToolCallFailed,
    ToolCallStarted,
    ToolCallSucceeded,
)
from deltawire_server.sansio.phases import Phase
from deltawire_server.sansio.reader import STOP_REASONS, Limits
from tests.sansio.build import (
    DONE,
    STARTED,
    Json,
    calls,
    chunk,
    data,
    end,
    entry,
    error,
    figures,
    part,
    read,
    reader,
    text,
)
from tests.support import chop
from tests.support.tool_call_events import check_calls

ROLE = chunk(part({"role": "assistant", "content": ""}))
COMMENT = b": keep-alive\n\n"


def _fault(events: list[Event]) -> Fault | None:
    """What the answer ended with."""
    last = events[-1]
    assert isinstance(last, Completed)
    return last.fault


def _finished(events: list[Event]) -> list[ChoiceFinished]:
    return [event for event in events if isinstance(event, ChoiceFinished)]


# --- 1. `Started` first, and only once the engine has really begun


def test_1_no_event_before_the_first_choice() -> None:
    """Comments, an empty chunk and a usage chunk return no event; the first choice returns `Started`, even without output."""
    reading = reader()
    for piece in [COMMENT, b"\n\n", chunk(), chunk(usage=figures(7, 0)), b"event: x\n\n"]:
        assert reading.receive(piece) == []
        assert reading.phase is Phase.WAITING
    assert reading.receive(ROLE) == [STARTED]
    assert reading.phase is Phase.OPEN


def test_1_started_comes_once() -> None:
    """`Started` has the id and model of the first chunk, even if later chunks differ."""
    first = data({"id": "1", "model": "a", "choices": [part()]})
    second = data({"id": "2", "model": "b", "choices": [part({"content": "x"}, finish="stop")]})
    events = read(first, second, DONE)
    assert [event for event in events if isinstance(event, Started)] == [Started("1", "a")]


REFUSALS = {
    "an error event": ([error("no", code=400, kind="BadRequestError")], Fault(Reason.UPSTREAM_ERROR, "no", 400, "BadRequestError")),
    "an error event after comments": ([COMMENT, error("no")], Fault(Reason.UPSTREAM_ERROR, "no", 500, "InternalServerError")),
    "an error that blames a field": (
        [data({"error": {"message": "no", "type": "T", "param": "logprobs", "code": 400}})],
        Fault(Reason.UPSTREAM_ERROR, "no", 400, "T", "logprobs"),
    ),
    "an error that blames something odd": (
        [data({"error": {"message": "no", "param": ["a"], "code": None}})], Fault(Reason.UPSTREAM_ERROR, "no"),
    ),
    "an error with a code in words": (
        [data({"error": {"message": "no", "code": "503"}})], Fault(Reason.UPSTREAM_ERROR, "no", 503),
    ),
    "an error with a word for a code": (
        [data({"error": {"message": "no", "code": "overloaded"}})], Fault(Reason.UPSTREAM_ERROR, "no"),
    ),
    "an error with a code of 5000 digits": (
        [data({"error": {"message": "no", "code": "1" * 5000}})], Fault(Reason.UPSTREAM_ERROR, "no"),
    ),
    "an error that is a string": ([data({"error": "Unauthorized"})], Fault(Reason.UPSTREAM_ERROR, "Unauthorized")),
    "an error without words": ([data({"error": {}})], Fault(Reason.UPSTREAM_ERROR, "the provider reported an error")),
    "an error in the older shape": (
        [data({"object": "error", "message": "no", "type": "T", "code": 400})], Fault(Reason.UPSTREAM_ERROR, "no", 400, "T"),
    ),
    "[DONE] at once": ([DONE], Fault(Reason.UPSTREAM_MALFORMED, "the stream ended without a choice")),
    "[DONE] after usage": (
        [chunk(usage=figures(7, 0)), DONE], Fault(Reason.UPSTREAM_MALFORMED, "the stream ended without a choice"),
    ),
    "nothing": ([], Fault(Reason.UPSTREAM_UNAVAILABLE, "the provider closed the connection before it answered")),
    "only comments": (
        [COMMENT], Fault(Reason.UPSTREAM_UNAVAILABLE, "the provider closed the connection before it answered"),
    ),
    "half an event": (
        [ROLE[:-5]], Fault(Reason.UPSTREAM_UNAVAILABLE, "the provider closed the connection before it answered"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("pieces", "fault"), REFUSALS.values(), ids=REFUSALS.keys())
def test_1_a_failure_before_the_first_choice_is_refused(pieces: list[bytes], fault: Fault) -> None:
    """`Refused` is the only event, so that the failure can be sent in trailers only and the call can be retried."""
    assert read(*pieces, ROLE if fault.reason is not Reason.UPSTREAM_UNAVAILABLE else b"") == [Refused(fault)]


@pytest.mark.parametrize("payload", [b"data: <html>\n\n", b'data: {"ping":1}\n\n', b"data: []\n\n"])
def test_1_an_invalid_payload_is_refused(payload: bytes) -> None:
    """A payload that is not a chunk is UPSTREAM_MALFORMED."""
    [refused] = read(payload)
    assert isinstance(refused, Refused)
    assert refused.fault.reason is Reason.UPSTREAM_MALFORMED


def test_1_a_timeout_before_the_first_choice_is_refused() -> None:
    """The fault that is passed to `finish` is the reason."""
    reading = reader()
    fault = Fault(Reason.UPSTREAM_TIMEOUT, "no first event")
    assert reading.finish(fault) == [Refused(fault)]
    assert reading.ended


# --- 2. Text is never reordered, lost or sent twice


def test_2_the_order_within_a_chunk() -> None:
    """Within a chunk the order is reasoning, text, tool calls, first of the first choice."""
    everything: Json = {"content": "t", "reasoning": "r", "tool_calls": [entry("{}", call_id="c", name="f")]}
    body = chunk(part(everything, finish="stop"), part({"content": "u"}, choice=1, finish="stop"))
    assert read(body, DONE, choice_count=2, incremental=True)[:-2] == [
        STARTED,
        ReasoningDelta(0, "r"),
        TextDelta(0, "t"),
        ToolCallStarted(0, 0, "c", "f"),
        ToolCallArguments(0, 0, "c", "{}"),
        TextDelta(1, "u"),
        ToolCallSucceeded(0, 0, "c", "f", "{}"),
        ChoiceFinished(0, StopReason.END_OF_MESSAGE, "stop", True),
    ]


def test_2_text_after_the_finish_is_not_lost() -> None:
    """Output after a finish reason is returned and is in `Completed`."""
    events = read(text("a", finish="stop"), text("b"), chunk(part({"reasoning": "c"})), DONE)
    assert [event.text for event in events if isinstance(event, TextDelta | ReasoningDelta)] == ["a", "b", "c"]
    assert isinstance(events[-1], Completed)
    assert (events[-1].choices[0].text, events[-1].choices[0].reasoning) == ("ab", "c")


def test_2_both_names_of_reasoning_are_read_once() -> None:
    """Reasoning under its new and its old name in one chunk is returned once."""
    events = read(chunk(part({"reasoning": "a", "reasoning_content": "a"}, finish="stop")), DONE)
    assert events[:2] == [STARTED, ReasoningDelta(0, "a")]
    assert len(events) == 4


def _logprobs(*tokens: str) -> Json:
    return {
        "content": [
            {
                "token": token,
                "logprob": -1.5,
                "bytes": list(token.encode()),
                "top_logprobs": [{"token": "x", "logprob": -2}],
            }
            for token in tokens
        ]
    }


def _tokens(*tokens: str) -> tuple[TokenLogprob, ...]:
    return tuple(TokenLogprob(token, -1.5, token.encode(), (Alternative("x", -2.0),)) for token in tokens)


@pytest.mark.parametrize(
    ("delta", "expected"),
    [
        ({"content": "t"}, [TextDelta(0, "t", _tokens("a", "é"))]),
        ({"reasoning": "r"}, [ReasoningDelta(0, "r", _tokens("a", "é"))]),
        ({"content": "t", "reasoning": "r"}, [ReasoningDelta(0, "r", _tokens("a", "é")), TextDelta(0, "t")]),
        ({"tool_calls": [entry("{", name="f")]}, [TextDelta(0, "", _tokens("a", "é"))]),
        ({}, [TextDelta(0, "", _tokens("a", "é"))]),
        (None, [TextDelta(0, "", _tokens("a", "é"))]),
    ],
    ids=["text", "reasoning", "both", "a call", "nothing", "null"],
)
def test_2_logprobs_are_sent_once(delta: Json | None, expected: list[Event]) -> None:
    """The first delta of a chunk has its log-probabilities, or an empty text; `Completed` repeats them only on request."""
    body = data({"id": "up", "model": "m", "choices": [{"index": 0, "delta": delta, "logprobs": _logprobs("a", "é")}]})
    for keep in (False, True):
        reading = reader(keep_logprobs=keep)
        assert reading.receive(body) == [STARTED, *expected]
        last = reading.finish()[-1]
        assert isinstance(last, Completed)
        assert last.choices[0].logprobs == (_tokens("a", "é") if keep else ())


def test_2_logprobs_without_entries_are_none() -> None:
    """A null or empty list of log-probabilities returns no event."""
    nothing: list[Json] = [{"content": None}, {"content": []}, {}]
    for logprobs in nothing:
        assert read(chunk(part({}, logprobs=logprobs), part({}, finish="stop")), DONE)[:-2] == [STARTED]


def test_2_a_token_without_bytes_has_none() -> None:
    """Bytes and alternatives may be null or missing."""
    logprobs: Json = {
        "content": [{"token": "a", "logprob": -1, "bytes": None, "top_logprobs": None}, {"token": "b", "logprob": 0}]
    }
    assert read(text("ab", logprobs=logprobs))[1] == TextDelta(
        0, "ab", (TokenLogprob("a", -1.0), TokenLogprob("b", 0.0))
    )


# --- 4. A call: started, in progress, then one verdict, at the choice's end


def test_4_verdicts_come_at_the_true_end_by_index() -> None:
    """The verdict on a call is returned at the true end of the answer."""
    reading = reader(incremental=True)
    reading.receive(calls(entry("{}", index=1, call_id="b", name="g")))
    assert not any(
        isinstance(event, ToolCallSucceeded)
        for event in reading.receive(calls(entry("{}", index=0, call_id="a", name="f")))
    )
    last = {"content": "t", "reasoning": "r", "tool_calls": [entry("", index=0)]}
    assert reading.receive(chunk(part(last, finish="tool_calls"))) == [ReasoningDelta(0, "r"), TextDelta(0, "t")]
    assert reading.receive(DONE)[:-1] == [
        ToolCallSucceeded(0, 0, "a", "f", "{}"),
        ToolCallSucceeded(0, 1, "b", "g", "{}"),
        ChoiceFinished(0, StopReason.END_OF_MESSAGE, "tool_calls", True),
    ]


def test_4_assembled_calls_have_only_verdicts() -> None:
    """Fragments are returned only with `incremental`."""
    body = [calls(entry("{", call_id="a", name="f")), calls(entry("}")), end("tool_calls"), DONE]
    pieces = [
        event for event in read(*body, incremental=True) if isinstance(event, ToolCallStarted | ToolCallArguments)
    ]
    assert len(pieces) == 3
    assert read(*body) == [event for event in read(*body, incremental=True) if event not in pieces]


def test_4_a_call_without_arguments_is_started() -> None:
    """A call without fragments has a STARTED event and a verdict."""
    events = read(calls(entry(call_id="a", name="f")), end("tool_calls"), DONE, incremental=True)
    assert events[1:3] == [ToolCallStarted(0, 0, "a", "f"), ToolCallSucceeded(0, 0, "a", "f", "{}")]


# --- 5. A failed call has its reason, its position and its raw text


@pytest.mark.parametrize(
    ("tool", "arguments", "finish", "reason", "offset"),
    [
        (None, "x", "length", FailureReason.MISSING_NAME, 0),
        ("nuke", "x", "length", FailureReason.UNKNOWN_TOOL, 0),
        ("f", "x", "length", FailureReason.TRUNCATED, 0),
        ("f", '{"é": x', "stop", FailureReason.MALFORMED_JSON, 7),
        ("f", "[1]", "stop", FailureReason.NOT_AN_OBJECT, None),
    ],
)
def test_5_the_first_reason_that_applies(
    tool: str | None, arguments: str, finish: str, reason: FailureReason, offset: int | None
) -> None:
    """A failed call has the first reason that applies, a message, an offset and the raw text, and is in `Completed`."""
    events = read(calls(entry(arguments, call_id="a", name=tool)), end(finish), DONE)
    [failed] = [event for event in events if isinstance(event, ToolCallFailed)]
    assert (failed.reason, failed.raw_arguments, failed.byte_offset) == (reason, arguments, offset)
    assert failed.message
    assert isinstance(events[-1], Completed)
    assert events[-1].choices[0].failed_tool_calls == (failed,)
    assert events[-1].choices[0].tool_calls == ()


def _no(_: str) -> tuple[str, str]:
    """A check that always fails."""
    return "/a/0", "is wrong"


@pytest.mark.parametrize(
    ("tool", "arguments", "finish", "reason"),
    [
        (None, "{}", "stop", FailureReason.MISSING_NAME),
        ("nuke", "{}", "stop", FailureReason.UNKNOWN_TOOL),
        ("f", "{}", "length", FailureReason.TRUNCATED),
        ("f", "{", "stop", FailureReason.MALFORMED_JSON),
        ("f", "[]", "stop", FailureReason.NOT_AN_OBJECT),
        ("f", "{}", "stop", FailureReason.SCHEMA_MISMATCH),
    ],
)
def test_5_the_schema_is_checked_last(tool: str | None, arguments: str, finish: str, reason: FailureReason) -> None:
    """Only a complete call of an offered tool is checked against its schema; only a mismatch has a path."""
    events = read(calls(entry(arguments, call_id="a", name=tool)), end(finish), DONE, checks={"f": _no, "nuke": _no})
    [failed] = [event for event in events if isinstance(event, ToolCallFailed)]
    assert failed.reason is reason
    assert failed.raw_arguments == arguments
    mismatch = reason is FailureReason.SCHEMA_MISMATCH
    assert failed.instance_path == ("/a/0" if mismatch else None)
    if mismatch:
        assert (failed.message, failed.byte_offset) == ("is wrong", None)


def test_5_each_tool_has_its_own_check() -> None:
    """A check gets the returned arguments, "{}" for none; tools without a check accept any object."""
    seen: list[str] = []

    def note(arguments: str) -> None:
        seen.append(arguments)

    body = [
        calls(entry('{"a": 1}', index=0, call_id="a", name="f")),
        calls(entry("", index=1, call_id="b", name="f")),
        calls(entry("{}", index=2, call_id="c", name="g")),
        end("stop"),
        DONE,
    ]
    events = read(*body, checks={"f": note})
    assert seen == ['{"a": 1}', "{}"]
    assert sum(isinstance(event, ToolCallSucceeded) for event in events) == 3
    assert _finished(events)[0].tool_calls_executable


def test_5_one_mismatch_makes_the_turn_not_executable() -> None:
    """If one call does not follow its schema, no call of the turn may be executed."""
    body = [
        calls(entry("{}", index=0, call_id="a", name="f")),
        calls(entry("{}", index=1, call_id="b", name="g")),
        end("tool_calls"),
        DONE,
    ]
    events = read(*body, checks={"g": _no})
    assert _finished(events) == [ChoiceFinished(0, StopReason.END_OF_MESSAGE, "tool_calls")]
    last = events[-1]
    assert isinstance(last, Completed)
    assert [call.call_id for call in last.choices[0].tool_calls] == ["a"]
    assert [call.call_id for call in last.choices[0].failed_tool_calls] == ["b"]


def test_5_an_exception_of_a_check_is_raised() -> None:
    """An exception of a check reaches the caller of the reader and gives no verdict."""

    def broken(_: str) -> None:
        raise ZeroDivisionError

    reading = reader(checks={"f": broken})
    reading.receive(calls(entry("{}", call_id="a", name="f"), finish="stop"))
    with pytest.raises(ZeroDivisionError):
        reading.receive(DONE)


# --- 6. In a turn that was cut off, the current call is truncated, and no call may be executed

_TWO_CALLS = [
    calls(entry("{}", index=0, call_id="a", name="f")),
    calls(entry("{}", index=1, call_id="b", name="g")),
]
TIMEOUT = Fault(Reason.UPSTREAM_TIMEOUT, "silent")
TIME_LIMIT = Fault(Reason.DURATION_LIMIT_EXCEEDED, "too long")
CUTS: dict[str, tuple[list[bytes], Fault | None, StopReason]] = {
    "length": ([end("length"), DONE], None, StopReason.OUT_OF_TOKENS),
    "content_filter": ([end("content_filter"), DONE], None, StopReason.CONTENT_FILTER),
    "repetition": ([end("repetition"), DONE], None, StopReason.REPETITION),
    "abort": ([end("abort"), DONE], None, StopReason.UPSTREAM_INCOMPLETE),
    "error": ([end("error"), DONE], None, StopReason.ERROR),
    "an error event": ([error(), DONE], None, StopReason.ERROR),
    "nonsense": ([b"data: x\n\n"], None, StopReason.ERROR),
    "[DONE] without a finish reason": ([DONE], None, StopReason.UPSTREAM_INCOMPLETE),
    "the body's end": ([], None, StopReason.UPSTREAM_INCOMPLETE),
    "a silence": ([], TIMEOUT, StopReason.ERROR),
    "a time limit": ([], TIME_LIMIT, StopReason.TIME_LIMIT),
    "a caller that does not read": ([], Fault(Reason.SLOW_CALLER, "slow"), StopReason.ERROR),
}


@pytest.mark.parametrize(("pieces", "given_up", "reason"), CUTS.values(), ids=CUTS.keys())
def test_6_a_cut_turn(pieces: list[bytes], given_up: Fault | None, reason: StopReason) -> None:
    """The earlier call has succeeded, the current one is TRUNCATED even if it parses, and neither may be executed."""
    reading = reader()
    events = [event for piece in [*_TWO_CALLS, *pieces] for event in reading.receive(piece)]
    events += reading.finish(given_up)
    verdicts = [event for event in events if isinstance(event, ToolCallSucceeded | ToolCallFailed)]
    assert verdicts[0] == ToolCallSucceeded(0, 0, "a", "f", "{}")
    assert isinstance(verdicts[1], ToolCallFailed)
    assert verdicts[1].reason is FailureReason.TRUNCATED
    [finished] = _finished(events)
    assert finished.stop_reason is reason
    assert not finished.tool_calls_executable
    assert isinstance(events[-1], Completed)
    assert not events[-1].choices[0].tool_calls_executable


@pytest.mark.parametrize("word", ["stop", "tool_calls"])
def test_6_executable_only_if_all_succeeded(word: str) -> None:
    """The calls of a turn that ended by itself may be executed if none of them failed."""
    bad = calls(entry("[", index=2, call_id="c", name="f"))
    assert [
        _finished(read(*body, end(word), DONE))[0].tool_calls_executable
        for body in ([], _TWO_CALLS, [*_TWO_CALLS, bad])
    ] == [
        False,
        True,
        False,
    ]


def test_6_an_unknown_finish_reason_is_not_executable() -> None:
    """With an unknown finish reason, calls get normal verdicts, but may not be executed."""
    events = read(*_TWO_CALLS, end("whim"), DONE)
    assert sum(isinstance(event, ToolCallSucceeded) for event in events) == 2
    assert _finished(events) == [ChoiceFinished(0, StopReason.END_OF_TURN, "whim")]


def test_6_choices_have_their_own_verdicts() -> None:
    """A choice that was cut off does not affect the calls of another choice."""
    both = [calls(entry("{}", call_id=call_id, name="f"), choice=choice) for choice, call_id in enumerate("ab")]
    events = read(*both, end("length", choice=1), end("tool_calls", choice=0), DONE, choice_count=2)
    assert _finished(events) == [
        ChoiceFinished(0, StopReason.END_OF_MESSAGE, "tool_calls", True),
        ChoiceFinished(1, StopReason.OUT_OF_TOKENS, "length"),
    ]


# --- 7. One `ChoiceFinished` per choice; one `Completed`, last

STOPS = {
    "stop": StopReason.END_OF_TURN,
    "tool_calls": StopReason.END_OF_TURN,
    "length": StopReason.OUT_OF_TOKENS,
    "content_filter": StopReason.CONTENT_FILTER,
    "repetition": StopReason.REPETITION,
    "abort": StopReason.UPSTREAM_INCOMPLETE,
    "error": StopReason.ERROR,
}
OWN_ENDS = ["stop", "tool_calls", "length", "content_filter", "repetition", "whim"]


@pytest.mark.parametrize(("word", "reason"), STOPS.items())
def test_7_stop_reasons(word: str, reason: StopReason) -> None:
    """Each finish reason has its stop reason, and is returned too."""
    assert _finished(read(text("a"), end(word), DONE)) == [ChoiceFinished(0, reason, word)]


def test_7_a_finish_without_a_delta() -> None:
    """A chunk with only a finish reason may have a null delta."""
    finish = {"index": 0, "delta": None, "finish_reason": "stop"}
    assert _finished(read(text("a"), chunk(finish), DONE)) == [ChoiceFinished(0, StopReason.END_OF_TURN, "stop")]


def test_7_every_finish_reason_is_tested() -> None:
    """The tested finish reasons are those of the table."""
    assert STOP_REASONS == STOPS


@pytest.mark.parametrize("word", OWN_ENDS)
def test_7_a_normal_end_is_not_a_fault(word: str) -> None:
    """An answer that the model or a limit ended has no fault."""
    assert _fault(read(text("a"), end(word), DONE)) is None


def test_7_an_aborted_answer_is_a_fault() -> None:
    """An aborted answer has a fault, although every choice has a finish reason."""
    assert _fault(read(text("a"), end("abort"), DONE)) == Fault(
        Reason.UPSTREAM_ABORTED, "the provider aborted the request"
    )


def test_7_the_finish_reason_error_is_a_fault() -> None:
    """The finish reason "error" is a fault."""
    fault = Fault(Reason.UPSTREAM_ERROR, "the provider ended the answer with an error")
    assert _fault(read(text("a"), end("error"), DONE)) == fault


def test_7_stop_sequences_are_the_callers() -> None:
    """Only a stop text or token of the caller is STOP_SEQUENCE, and only in an answer without calls."""

    def finished(matched: str | int | None, *before: bytes, word: str = "stop") -> ChoiceFinished:
        events = read(*before, end(word, stop_reason=matched), DONE, stop=["END", "7"], stop_token_ids=[5])
        return _finished(events)[0]

    assert finished("END") == ChoiceFinished(0, StopReason.STOP_SEQUENCE, "stop", matched_stop="END")
    assert finished(5) == ChoiceFinished(0, StopReason.STOP_SEQUENCE, "stop", matched_stop=5)
    assert finished("other") == ChoiceFinished(0, StopReason.END_OF_TURN, "stop", matched_stop="other")
    assert finished(7) == ChoiceFinished(0, StopReason.END_OF_TURN, "stop", matched_stop=7)
    assert finished(None) == ChoiceFinished(0, StopReason.END_OF_TURN, "stop")
    assert finished("END", word="length") == ChoiceFinished(0, StopReason.OUT_OF_TOKENS, "length", matched_stop="END")
    call = calls(entry("{}", call_id="a", name="f"))
    assert finished("END", call) == ChoiceFinished(0, StopReason.END_OF_MESSAGE, "stop", True, "END")


def test_7_nothing_after_the_end() -> None:
    """An ended answer returns no events, even if `finish` is called several times."""
    reading = reader()
    reading.receive(text("a", finish="stop") + DONE + text("b") + error())
    assert reading.ended
    assert reading.event_count == 2
    assert reading.receive(text("c") + DONE) == []
    assert reading.finish() == []
    assert reading.finish(TIMEOUT) == []


def test_7_choices_end_by_index() -> None:
    """Choices end in the order of their indexes, which is also the order of `Completed`."""
    events = read(text("b", choice=2), text("a", choice=0), end("stop", choice=1), error(), choice_count=3)
    assert [event.choice for event in _finished(events)] == [0, 1, 2]
    assert isinstance(events[-1], Completed)
    assert [choice.index for choice in events[-1].choices] == [0, 1, 2]
    assert [choice.stop_reason for choice in events[-1].choices] == [
        StopReason.ERROR,
        StopReason.END_OF_TURN,
        StopReason.ERROR,
    ]


def test_7_a_fault_after_the_finish_reason_keeps_the_stop_reason() -> None:
    """A choice keeps its stop reason; the answer has the fault."""
    events = read(text("a", finish="stop"), error())
    assert _finished(events) == [ChoiceFinished(0, StopReason.END_OF_TURN, "stop")]
    assert _fault(events) == Fault(Reason.UPSTREAM_ERROR, "broken", 500, "InternalServerError")


@pytest.mark.parametrize("choice", [-1, 2])
def test_7_an_unrequested_choice_is_a_fault(choice: int) -> None:
    """An answer with an unrequested choice is malformed; the events before it are returned."""
    events = read(text("a"), text("b", choice=choice), choice_count=2)
    assert events[:2] == [STARTED, TextDelta(0, "a")]
    message = f"choice {choice} came in an answer of 2"
    assert _fault(events) == Fault(Reason.UPSTREAM_MALFORMED, message)


# --- 8. Without a finish reason for every choice it is never a success


@pytest.mark.parametrize("last", [[], [DONE]], ids=["end of the body", "[DONE]"])
@pytest.mark.parametrize(
    ("pieces", "choice_count", "missing"),
    [
        ([ROLE], 1, "1 of 1"),
        ([text("a")], 1, "1 of 1"),
        ([text("a", finish="stop")], 2, "1 of 2"),
        ([text("a", finish="stop"), text("b", choice=1)], 2, "1 of 2"),
        ([text("a", finish="abort")], 3, "2 of 3"),
    ],
)
def test_8_incomplete(pieces: list[bytes], choice_count: int, missing: str, last: list[bytes]) -> None:
    """Neither the end of the body nor `[DONE]` completes an answer; a missing choice counts as unfinished."""
    message = f"the stream ended without a finish reason for {missing} choices"
    assert _fault(read(*pieces, *last, choice_count=choice_count)) == Fault(Reason.UPSTREAM_INCOMPLETE, message)


def test_8_complete_without_done() -> None:
    """If every choice has a finish reason, a body without `[DONE]`, or with a truncated last event, is complete."""
    assert _fault(read(text("a", finish="stop"))) is None
    assert _fault(read(text("a", finish="stop"), chunk(usage=figures(1, 1))[:-1])) is None


# --- limits


@pytest.mark.parametrize(
    ("limits", "message", "verdict_count"),
    [
        (Limits(max_event_bytes=300), "an event is larger than 300 bytes", 0),
        (Limits(max_calls=1), "the answer has more than 1 tool calls", 1),
        (Limits(max_call_bytes=100), "tool call 1 is larger than 100 bytes", 2),
    ],
    ids=["event", "calls", "call"],
)
def test_exceeding_a_limit_ends_the_answer(limits: Limits, message: str, verdict_count: int) -> None:
    """Exceeding a limit is a fault; earlier events of the same read and the same chunk are returned."""
    body = b"".join(
        [
            text("a"),
            calls(
                entry("{}", index=0, call_id="a", name="f"),
                entry("x" * 300, index=1, call_id="b", name="g"),
                content="b",
            ),
            end("stop"),
            DONE,
        ]
    )
    events = read(body, limits=limits, incremental=True)
    assert _fault(events) == Fault(Reason.UPSTREAM_MALFORMED, message)
    assert events[:2] == [STARTED, TextDelta(0, "a")]
    begun = [event for event in events if isinstance(event, ToolCallStarted)]
    verdicts = [event for event in events if isinstance(event, ToolCallSucceeded | ToolCallFailed)]
    assert [(event.index, event.call_id) for event in begun] == [(event.index, event.call_id) for event in verdicts]
    assert len(verdicts) == verdict_count
    for pieces in [chop.byte_by_byte(body), *chop.at_random(body)]:
        assert read(*pieces, limits=limits, incremental=True) == events


def test_limits_do_not_apply_after_done() -> None:
    """Data after `[DONE]` is not read, whether it is received in the same read or in another."""
    body = text("a", finish="stop") + DONE + b"data: " + b"x" * 500
    events = read(body, limits=Limits(max_event_bytes=300))
    assert _fault(events) is None
    assert read(*chop.byte_by_byte(body), limits=Limits(max_event_bytes=300)) == events


# --- anomalies, for the log


def test_anomalies_are_counted() -> None:
    """Anomalies that do not change the answer are counted by name."""
    reading = reader()
    for piece in [
        chunk(),
        calls(entry("{}", call_id="a", name="f")),
        end("stop"),
        end("stop"),
        end("whim"),
        DONE,
        error(),
        b"data:\n\n",
        DONE,
    ]:
        reading.receive(piece)
    assert reading.anomalies == {
        "chunk without choices or usage": 1,
        "finish reason 'whim'": 1,
        "second finish reason": 1,
        "event after the end": 2,
    }
    assert reading.event_count == 6


# --- the proto's numbers


def test_reasons_have_the_numbers_of_the_proto() -> None:
    """Each reason has the same number and name in the proto, because it is converted by its number."""
    for ours, theirs, prefix in [
        (StopReason, chat_completion_pb2.StopReason, "STOP_REASON_"),
        (Provenance, chat_completion_pb2.UsageProvenance, "USAGE_PROVENANCE_"),
        (FailureReason, tool_pb2.ToolCallFailureReason, "TOOL_CALL_FAILURE_REASON_"),
    ]:
        for member in ours:
            assert theirs.Value(prefix + member.name) == member.value


# --- any stream at all, cut in any way

_PIECES = st.sampled_from(
    [
        *[
            ROLE,
            COMMENT,
            chunk(),
            chunk(usage=figures(7, 3)),
            DONE,
            error(),
            b"data: x\n\n",
            b"data: cut",
            b"\n\n",
            b"\r\n\r\n",
        ],
        *[text("aé"), text("b", choice=1), text("c", finish="stop"), text("", finish="length"), text("d", choice=2)],
        *[chunk(part({"reasoning": "r", "content": "t"}), part({"content": "u"}, choice=1), usage=figures(7, 2))],
        *[
            calls(entry("{", call_id="a", name="f")),
            calls(entry("}")),
            calls(entry("[", index=None)),
            calls(entry(name="g")),
        ],
        *[calls(entry("{}", index=1, call_id="a", name="f"), choice=1), end("tool_calls"), end("stop", choice=1)],
        *[end("abort"), end("whim", choice=1), calls(entry("}"), finish="tool_calls", content="w")],
        *[
            b"data: [DONE] \n\n",
            b"data:\n\n",
            b"data: \n\n",
            data({"detail": "no"}),
            chunk(usage={"prompt_tokens": -1}),
        ],
        *[text("x").replace(b"x", half) for half in (b"\\ud83d", b"\\ude00", b"\\ude00y\\ud83d", b"\xf0\x9f")],
        *[calls(entry("x")).replace(b"x", half) for half in (b"\\ud83d", b"\\ude00")],
        text("v", choice=1, logprobs={"content": [None, {"token": "v", "logprob": "x"}]}),
        chunk(part({"content": [{"type": "text", "text": "p"}], "tool_calls": {"id": "n", "arguments": {"k": 1}}})),
        *[calls(entry("}", call_id="new")), calls(entry("", call_id="newer"))],
    ]
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(_PIECES, max_size=10),
    st.lists(st.integers(0, 1500), max_size=6),
    st.booleans(),
    st.sampled_from([None, TIMEOUT]),
)
def test_any_stream_keeps_the_contract(
    pieces: list[bytes], cuts: list[int], incremental: bool, given_up: Fault | None
) -> None:
    """No stream raises; the order of events, the ends, the concatenated texts and the verdicts are correct for every split."""
    body = b"".join(pieces)
    read_events = []
    for way in ([body], chop.at(body, cuts)):
        reading = reader(choice_count=2, incremental=incremental)
        events = [event for piece in way for event in reading.receive(piece)]
        events += reading.finish(given_up)
        assert reading.ended
        assert reading.receive(body) == []
        read_events.append(events)
    events = read_events[0]
    assert read_events[1] == events
    msgspec.json.encode(events)  # every text is Unicode
    check_calls(events, incremental=incremental)
    last = events[-1]
    if isinstance(last, Refused):
        assert len(events) == 1
        return
    assert isinstance(last, Completed)
    assert isinstance(events[0], Started)
    assert not [event for event in events[1:-1] if isinstance(event, Started | Completed | Refused)]
    finished = _finished(events)
    assert sorted(event.choice for event in finished) == [choice.index for choice in last.choices]
    assert (last.fault is None) <= (len(finished) == 2 and all(event.engine_finish_reason for event in finished))
    for choice in last.choices:
        own = [event for event in events[1:-1] if getattr(event, "choice", None) == choice.index]
        assert "".join(event.text for event in own if isinstance(event, TextDelta)) == choice.text
        assert "".join(event.text for event in own if isinstance(event, ReasoningDelta)) == choice.reasoning
        verdicts = [event for event in own if isinstance(event, ToolCallSucceeded | ToolCallFailed)]
        assert [call for call in verdicts if isinstance(call, ToolCallSucceeded)] == list(choice.tool_calls)
        assert [call for call in verdicts if isinstance(call, ToolCallFailed)] == list(choice.failed_tool_calls)
        assert [call.index for call in verdicts] == sorted({call.index for call in verdicts})
        end_at = next(place for place, event in enumerate(own) if isinstance(event, ChoiceFinished))
        judged_at = next((place for place, event in enumerate(own) if event in verdicts), end_at)
        between = own[judged_at:end_at]
        assert all(isinstance(event, ToolCallStarted | ToolCallSucceeded | ToolCallFailed) for event in between)
        assert not [event for event in own[end_at:] if isinstance(event, ToolCallSucceeded | ToolCallFailed)]
        finish = own[end_at]
        assert isinstance(finish, ChoiceFinished)
        assert finish == ChoiceFinished(
            choice.index,
            choice.stop_reason,
            choice.engine_finish_reason,
            choice.tool_calls_executable,
            choice.matched_stop,
        )
        if choice.tool_calls_executable:
            assert last.fault is None
            assert choice.engine_finish_reason in {"stop", "tool_calls"}
            assert choice.tool_calls
            assert not choice.failed_tool_calls
    ids = [event.call_id for event in events if isinstance(event, ToolCallSucceeded | ToolCallFailed)]
    assert len(set(ids)) == len(ids)


def test_a_repeated_name_does_not_count_toward_the_size() -> None:
    """A name that is repeated with every fragment counts once."""
    pieces = [calls(entry(piece, call_id="c", name="get_weather")) for piece in ('{"a', '": ', '"b"}')]
    limits = Limits(max_call_bytes=len("get_weather" * 2 + '{"a": "b"}'))
    events = read(*pieces, end("tool_calls"), DONE, limits=limits)
    assert _fault(events) is None
    assert any(isinstance(event, ToolCallSucceeded) for event in events)


def test_an_empty_finish_reason_is_ignored() -> None:
    """An empty finish reason does not end the choice."""
    events = read(text("a", finish=""), text("b", finish="stop"), DONE)
    assert [event.engine_finish_reason for event in events if isinstance(event, ChoiceFinished)] == ["stop"]


def test_null_means_missing() -> None:
    """A chunk whose id, model, object and choice index are null is valid."""
    nulls = data({"id": None, "model": None, "object": None, "choices": [{"index": None, "delta": {"content": "a"}}]})
    events = read(nulls, end("stop"), DONE)
    assert events[:2] == [Started("", ""), TextDelta(0, "a")]
    assert _fault(events) is None
