"""When an answer is whole: the phases of a reader, pair by pair, and what may come between a finish reason and the true end."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING

import pytest

from deltawire_server.errors import Reason
from deltawire_server.sansio.events import (
    ChoiceFinished,
    Completed,
    Event,
    FailureReason,
    Fault,
    Provenance,
    ReasoningDelta,
    Refused,
    StopReason,
    TextDelta,
    ToolCallFailed,
    ToolCallSucceeded,
)
from deltawire_server.sansio.phases import Ending, Input, Phase, TransitionError, next_phase
from deltawire_server.sansio.reader import CompletionReader, Limits
from tests.sansio.build import DONE, calls, chunk, data, end, entry, error, figures, part, read, reader, text
from tests.support import chop

if TYPE_CHECKING:
    from collections.abc import Callable

TIMEOUT = Fault(Reason.UPSTREAM_TIMEOUT, "silent")
ACCOUNT = chunk(usage=figures(7, 3))
FAULTS = [
    Fault(Reason.UPSTREAM_TIMEOUT, "silent"),
    Fault(Reason.UPSTREAM_INCOMPLETE, "reset"),
    Fault(Reason.UPSTREAM_MALFORMED, "bad framing"),
    Fault(Reason.DURATION_LIMIT_EXCEEDED, "too long"),
    Fault(Reason.DRAINING, "shutting down"),
]


def _completed(events: list[Event]) -> Completed:
    last = events[-1]
    assert isinstance(last, Completed)
    return last


# --- the table

TABLE = """
    CHOICES     OPEN        OPEN       TAIL       -
    FINISHED    -           TAIL       -          -
    ACCOUNT     WAITING     OPEN       WHOLE      -
    NOTHING     WAITING     OPEN       TAIL       -
    DONE        REFUSED     FAULTED    WHOLE      -
    BROKEN      REFUSED     FAULTED    FAULTED    -
    END         REFUSED     FAULTED    WHOLE      -
    FAULT       REFUSED     FAULTED    WHOLE      -
    STOP        STOPPED     STOPPED    WHOLE      -
"""
"""The expected transitions, written from the description of the phases: the rows are inputs, the columns phases."""

EXPECTED = {
    (phase, Input[name]): target
    for name, *targets in (line.split() for line in TABLE.splitlines() if line)
    for phase, target in zip(Phase, targets, strict=True)
}

BEFORE: dict[Phase, bytes] = {
    Phase.WAITING: b"",
    Phase.OPEN: text("a"),
    Phase.TAIL: text("a", finish="stop"),
    Phase.ENDED: text("a", finish="stop") + DONE,
}
HAPPENS: dict[Input, Callable[[CompletionReader], list[Event]]] = {
    Input.CHOICES: lambda reading: reading.receive(text("b")),
    Input.FINISHED: lambda reading: reading.receive(text("b", finish="stop")),
    Input.ACCOUNT: lambda reading: reading.receive(ACCOUNT),
    Input.NOTHING: lambda reading: reading.receive(chunk()),
    Input.DONE: lambda reading: reading.receive(DONE),
    Input.BROKEN: lambda reading: reading.receive(error()),
    Input.END: lambda reading: reading.finish(),
    Input.FAULT: lambda reading: reading.finish(TIMEOUT),
    Input.STOP: lambda reading: reading.stop(StopReason.CANCELLED),
}


@pytest.mark.parametrize(("phase", "what"), list(itertools.product(Phase, Input)), ids=lambda value: value.name)
def test_transitions(phase: Phase, what: Input) -> None:
    """Each input leads to the expected phase or ending, or is impossible and changes nothing."""
    reading = reader()
    reading.receive(BEFORE[phase])
    assert reading.phase is phase
    expected = EXPECTED[phase, what]
    if expected == "-":
        with pytest.raises(TransitionError, match=f"{what.name} is impossible in phase {phase.name}"):
            reading._advance(what, [])
        assert reading.phase is phase
        return
    target = next_phase(phase, what)
    assert target.name == expected
    events = HAPPENS[what](reading)
    if isinstance(target, Phase):
        assert reading.phase is target
        assert not any(isinstance(event, Completed | Refused) for event in events)
        return
    assert reading.ended
    assert not reading.in_tail
    if target is Ending.REFUSED:
        assert isinstance(events[0], Refused)
        assert len(events) == 1
    else:
        assert (_completed(events).fault is not None) == (target is Ending.FAULTED)
        cut = StopReason.CANCELLED if target is Ending.STOPPED else None
        assert (_completed(events).choices[0].stop_reason is cut) == (target is Ending.STOPPED)


@pytest.mark.parametrize("what", Input, ids=lambda value: value.name)
def test_inputs_after_the_end_are_ignored(what: Input) -> None:
    """After the end, each input returns no events."""
    reading = reader()
    reading.receive(BEFORE[Phase.ENDED])
    assert HAPPENS[what](reading) == []
    assert reading.ended


def test_the_tail_begins_with_the_last_finish_reason_that_is_missing() -> None:
    """Every choice that was asked for needs one; a second one for the same choice does not count for another."""
    reading = reader(choice_count=2)
    seen = []
    for piece in [
        text("a", finish="stop"),
        end("stop"),
        text("b", choice=1),
        ACCOUNT,
        end("stop", choice=1),
        text("c"),
    ]:
        reading.receive(piece)
        seen.append(reading.in_tail)
    assert seen == [False, False, False, False, True, True]
    assert reading.receive(ACCOUNT)
    assert not reading.in_tail


# --- output between the finish reason and the true end

ENDS = {"[DONE]": [DONE], "the account": [ACCOUNT], "both": [ACCOUNT, DONE], "the body's end": []}


@pytest.mark.parametrize("last", ENDS.values(), ids=ENDS.keys())
@pytest.mark.parametrize("incremental", [False, True])
def test_output_after_the_finish_reason_is_part_of_the_choice(last: list[bytes], incremental: bool) -> None:
    """Text, reasoning and arguments complete it; its end comes after all of them, however the bytes are cut."""
    body = b"".join(
        [
            calls(entry(call_id="a", name="f"), content="Bon", finish="tool_calls"),
            calls(entry('{"x":')),
            text("jour"),
            chunk(part({"reasoning": "Hm"})),
            calls(entry("1}")),
            *last,
        ]
    )
    events = read(body, incremental=incremental)
    call = ToolCallSucceeded(0, 0, "a", "f", '{"x":1}')
    assert events[-3:-1] == [call, ChoiceFinished(0, StopReason.END_OF_MESSAGE, "tool_calls", True)]
    [choice] = _completed(events).choices
    assert (choice.text, choice.reasoning, choice.tool_calls) == ("Bonjour", "Hm", (call,))
    assert choice.tool_calls_executable
    assert _completed(events).fault is None
    for pieces in [chop.byte_by_byte(body), *chop.at_random(body, ways=5)]:
        assert read(*pieces, incremental=incremental) == events


def test_a_finish_reason_on_every_calls_chunk_loses_no_call() -> None:
    """As a proxy sends it: both calls are there, and executable together."""
    events = read(
        calls(entry("{}", index=0, call_id="a", name="f"), finish="tool_calls"),
        calls(entry("{}", index=1, call_id="b", name="g"), finish="tool_calls"),
        DONE,
    )
    [choice] = _completed(events).choices
    assert [call.call_id for call in choice.tool_calls] == ["a", "b"]
    assert choice.tool_calls_executable


def test_the_last_finish_reason_counts() -> None:
    """With the stop reason beside it; a different one is an anomaly, a repeated one is not."""
    reading = reader(stop=["END"])
    reading.receive(text("a", finish="length") + end("stop", stop_reason="x") + end("stop", stop_reason="END"))
    finished, _ = reading.receive(DONE)
    assert finished == ChoiceFinished(0, StopReason.STOP_SEQUENCE, "stop", matched_stop="END")
    assert reading.anomalies == {"second finish reason": 1}


@pytest.mark.parametrize(("word", "reason"), [("abort", Reason.UPSTREAM_ABORTED), ("error", Reason.UPSTREAM_ERROR)])
def test_an_engine_that_failed_and_then_finished_has_finished(word: str, reason: Reason) -> None:
    """Only the last word decides, here as well; as the last word it is a fault whatever ends the answer."""
    assert _completed(read(text("a", finish=word), end("stop"), DONE)).fault is None
    ways: list[Callable[[CompletionReader], list[Event]]] = [
        lambda reading: reading.receive(DONE),
        lambda reading: reading.finish(TIMEOUT),
        lambda reading: reading.stop(StopReason.CANCELLED),
    ]
    for way in ways:
        reading = reader()
        reading.receive(text("a", finish="stop") + end(word))
        fault = _completed(way(reading)).fault
        assert fault is not None
        assert fault.reason is reason


# --- an end without the true end


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_in_the_tail_nothing_of_the_transport_is_a_fault(fault: Fault | None) -> None:
    """The answer is whole, and its usage what is known without the final account."""
    reading = reader()
    reading.receive(calls(entry("{}", call_id="a", name="f")))
    reading.receive(chunk(part({}, finish="stop"), usage=figures(7, 2)))
    completed = _completed(reading.finish(fault))
    assert completed.fault is None
    assert completed.usage.provenance is Provenance.LOWER_BOUND
    assert completed.choices[0].tool_calls_executable


def test_a_stop_in_the_tail_changes_nothing() -> None:
    """The answer was whole before it; without figures its usage is estimated."""
    reading = reader()
    reading.receive(calls(entry("{}", call_id="a", name="f"), finish="tool_calls"))
    completed = _completed(reading.stop(StopReason.CANCELLED))
    assert completed.choices[0].stop_reason is StopReason.END_OF_MESSAGE
    assert completed.choices[0].tool_calls_executable
    assert completed.usage.provenance is Provenance.ESTIMATED


@pytest.mark.parametrize("how", ["fault", "stop"])
def test_a_call_that_goes_on_after_the_finish_reason_needs_the_true_end(how: str) -> None:
    """Without it nothing says that its arguments are complete: `{}` for arguments that were still to come is never executed."""
    reading = reader()
    reading.receive(calls(entry("{}", call_id="a", name="f"), finish="tool_calls"))
    reading.receive(calls(entry(index=1, call_id="b", name="g")))
    events = reading.finish(TIMEOUT) if how == "fault" else reading.stop(StopReason.CANCELLED)
    completed = _completed(events)
    assert completed.fault is None
    assert [call.reason for call in completed.choices[0].failed_tool_calls] == [FailureReason.TRUNCATED]
    assert not completed.choices[0].tool_calls_executable


# --- faults, and what may be executed


@pytest.mark.parametrize(
    "bad",
    [error(), b"data: x\n\n", b"data: " + b"x" * 500 + b"\n\n", text("b", choice=1)],
    ids=["error", "nonsense", "size", "choice"],
)
def test_after_a_fault_nothing_is_executable(bad: bytes) -> None:
    """Also where it comes after the finish reason; the verdict on the call itself stays."""
    events = read(
        calls(entry("{}", call_id="a", name="f"), finish="tool_calls"), bad, limits=Limits(max_event_bytes=400)
    )
    assert [event for event in events if isinstance(event, ChoiceFinished)] == [
        ChoiceFinished(0, StopReason.END_OF_MESSAGE, "tool_calls", False)
    ]
    [choice] = _completed(events).choices
    assert not choice.tool_calls_executable
    assert len(choice.tool_calls) == 1
    assert _completed(events).fault is not None


def test_a_fault_in_one_choice_leaves_none_executable() -> None:
    """An answer that is incomplete is to be asked for again, whole."""
    events = read(calls(entry("{}", call_id="a", name="f"), finish="tool_calls"), text("b", choice=1), choice_count=2)
    assert not any(choice.tool_calls_executable for choice in _completed(events).choices)


def test_a_soft_end_leaves_executable_what_ended_by_itself() -> None:
    """The choices that it cut are not, the one that had ended is."""
    reading = reader(choice_count=2)
    reading.receive(calls(entry("{}", call_id="a", name="f"), finish="tool_calls"))
    reading.receive(calls(entry("{}", call_id="b", name="f"), choice=1))
    whole = _completed(reading.stop(StopReason.CANCELLED)).choices
    assert [choice.tool_calls_executable for choice in whole] == [True, False]


# --- after the true end


@pytest.mark.parametrize("last", [DONE, ACCOUNT], ids=["[DONE]", "account"])
@pytest.mark.parametrize(
    ("late", "count"),
    [
        (text("b"), 1),
        (error() + DONE, 2),
        (b"data: x\n\n", 1),
        (b"data: " + b"x" * 500 + b"\n\n" + text("b"), 1),
        (ACCOUNT, 1),
        (b": comment\n\ndata:\n\ndata: \n\n", 0),
        (b"data: cut", 0),
    ],
    ids=["text", "error", "nonsense", "size", "account", "nothing", "cut"],
)
def test_what_comes_after_the_true_end_is_counted(last: bytes, late: bytes, count: int) -> None:
    """Nothing of it is a fault, whether it comes in the same read or later."""
    body = text("a", finish="stop") + last + (DONE if last is ACCOUNT else b"") + late
    for pieces in [[body], chop.byte_by_byte(body)]:
        reading = reader(limits=Limits(max_event_bytes=400))
        events = [event for piece in pieces for event in reading.receive(piece)]
        events += reading.finish(TIMEOUT)
        assert _completed(events).fault is None
        assert _completed(events).choices[0].text == "a"
        assert reading.anomalies == ({"event after the end": count} if count else {})


def test_done_after_an_account_is_expected_once() -> None:
    """A second one is an anomaly."""
    reading = reader()
    reading.receive(text("a", finish="stop") + ACCOUNT + DONE)
    assert reading.anomalies == {}
    reading.receive(DONE)
    assert reading.anomalies == {"event after the end": 1}


def test_after_a_fault_or_a_stop_nothing_is_counted() -> None:
    """What was on its way is not the engine's mistake."""
    ways: list[Callable[[CompletionReader], list[Event]]] = [
        lambda reading: reading.receive(error()),
        lambda reading: reading.stop(StopReason.CANCELLED),
    ]
    for way in ways:
        reading = reader()
        reading.receive(text("a"))
        way(reading)
        assert reading.receive(text("b") + DONE) == []
        assert reading.anomalies == {}


# --- harmless forms


@pytest.mark.parametrize("empty", [b"data:\n\n", b"data: \n\n", b"data\n\n", b"data: \t \n\n", b"data:\n\n" * 1000])
def test_events_without_data_count_as_nothing(empty: bytes) -> None:
    """Neither as the first event, nor as output, nor as an event at all."""
    reading = reader()
    events = [
        event
        for piece in [empty, text("a"), empty, end("stop"), empty, ACCOUNT, empty, DONE]
        for event in reading.receive(piece)
    ]
    assert events == read(text("a"), end("stop"), ACCOUNT, DONE)
    assert reading.event_count == 3
    assert reading.anomalies == {}
    [refused] = read(empty)
    assert isinstance(refused, Refused)
    assert refused.fault.reason is Reason.UPSTREAM_UNAVAILABLE


def test_done_with_white_space_is_the_end() -> None:
    """On both sides, and after CRLF."""
    for done in [b"data: [DONE] \n\n", b"data:  [DONE]\t\n\n", b"data: [DONE]\r\n\r\n"]:
        reading = reader()
        reading.receive(text("a", finish="stop") + done)
        assert reading.ended


@pytest.mark.parametrize("rest", [b"", b"\n", b"\r", b"\r\n"])
def test_the_last_event_may_lack_its_blank_line(rest: bytes) -> None:
    """What is there to its end counts, whatever ends the body: an account, `[DONE]`, output, an error."""

    def finish(*pieces: bytes) -> Completed:
        reading = reader()
        events = [event for piece in pieces[:-1] for event in reading.receive(piece)]
        events += reading.receive(pieces[-1].removesuffix(b"\n\n") + rest)
        return _completed(events + reading.finish(TIMEOUT))

    whole = text("a", finish="stop")
    assert finish(whole, ACCOUNT).usage.provenance is Provenance.EXACT
    assert finish(whole, DONE).fault is None
    assert finish(text("a"), end("stop")).fault is None
    assert finish(text("a"), text("b")).choices[0].text == "ab"
    assert finish(whole, error()).fault == Fault(Reason.UPSTREAM_ERROR, "broken", 500, "InternalServerError")


def test_an_event_that_is_cut_off_is_no_event() -> None:
    """It is the ordinary end of an incomplete answer, and of a whole one if that has its finish reason."""
    incomplete = Fault(Reason.UPSTREAM_INCOMPLETE, "the stream ended without a finish reason for 1 of 1 choices")
    for cut in range(1, len(text("b")) - 3):
        assert _completed(read(text("a") + text("b")[:cut])).fault == incomplete
        assert _completed(read(text("a", finish="stop") + text("b")[:cut])).fault is None


def test_a_last_event_of_several_lines() -> None:
    """It is joined as any other."""
    assert _completed(read(text("a", finish="stop"), b'data: {"choices":[],\ndata: "usage":{}}')).fault is None


def test_a_detail_in_the_place_of_a_chunk_is_an_error() -> None:
    """Its words reach the caller, before the answer begins and after."""
    detail = data({"detail": "no such route", "status": 404})
    assert read(detail) == [Refused(Fault(Reason.UPSTREAM_ERROR, "no such route", 404))]
    assert _completed(read(text("a"), detail)).fault == Fault(Reason.UPSTREAM_ERROR, "no such route", 404)


# --- text that is not Unicode


def test_halves_are_joined_by_choice_and_kind() -> None:
    """Text and reasoning of two choices, all cut at once; what never gets its other half is U+FFFD, before the end."""
    high, low = "\ud83d", "\ude00"
    reading = reader(choice_count=2)
    events = reading.receive(
        chunk_of(0, content="a" + high, reasoning=high) + chunk_of(1, content=high, reasoning="r" + high)
    )
    assert [event.text for event in events if isinstance(event, TextDelta | ReasoningDelta)] == ["a", "r"]
    events = reading.receive(chunk_of(1, content=low + "b") + chunk_of(0, content="é", reasoning=low))
    assert [event.text for event in events if isinstance(event, TextDelta | ReasoningDelta)] == ["😀b", "😀", "\ufffdé"]
    last = reading.receive(chunk_of(0, content="x" + high) + end("stop") + end("stop", choice=1) + DONE)
    assert last[:-1] == [
        TextDelta(0, "x"),
        TextDelta(0, "\ufffd"),
        ChoiceFinished(0, StopReason.END_OF_TURN, "stop"),
        ReasoningDelta(1, "\ufffd"),
        ChoiceFinished(1, StopReason.END_OF_TURN, "stop"),
    ]
    assert [(choice.text, choice.reasoning) for choice in _completed(last).choices] == [
        ("a\ufffdéx\ufffd", "😀"),
        ("😀b", "r\ufffd"),
    ]
    assert reading.anomalies == {"broken character": 3}


def chunk_of(choice: int, **delta: str) -> bytes:
    """A chunk whose text may hold halves of characters, as escapes."""
    payload = {"id": "up", "model": "m", "choices": [{"index": choice, "delta": delta}]}
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


def test_broken_bytes_do_not_end_an_answer() -> None:
    """A character that was cut between two events is two replacements."""
    reading = reader()
    reading.receive(text("a").replace(b'"a"', b'"\xf0\x9f"') + text("b").replace(b'"b"', b'"\x98\x80"'))
    completed = _completed(reading.receive(end("stop") + DONE))
    assert (completed.fault, completed.choices[0].text) == (None, "\ufffd\ufffd\ufffd")
    assert reading.anomalies == {"broken character": 2}


# --- long words


def test_a_long_finish_reason_is_cut() -> None:
    """At a character, in the event, in `Completed` and in the log."""
    reading = reader()
    reading.receive(text("a", finish="é" * 1000))
    finished, completed = reading.receive(DONE)
    assert isinstance(finished, ChoiceFinished)
    assert finished.engine_finish_reason == "é" * 128
    assert isinstance(completed, Completed)
    assert completed.choices[0].engine_finish_reason == "é" * 128
    assert list(reading.anomalies) == [f"finish reason {'é' * 128!r}"]


def test_a_long_stop_text_is_not_repeated() -> None:
    """That it was the caller's is known all the same."""
    stop = "x" * 5000
    reading = reader(stop=[stop])
    reading.receive(text("a", finish="stop", stop_reason=stop))
    assert reading.receive(DONE)[0] == ChoiceFinished(0, StopReason.STOP_SEQUENCE, "stop")
    assert reading.anomalies == {"stop reason too long": 1}


def test_failed_calls_of_a_faulted_answer_are_reported() -> None:
    """What the model wrote is there."""
    [failed] = [
        event
        for event in read(calls(entry('{"a', call_id="a", name="f"), finish="stop"), error())
        if isinstance(event, ToolCallFailed)
    ]
    assert failed.raw_arguments == '{"a'
