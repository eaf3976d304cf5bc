"""Ends that the caller asked for: what has come is the answer, and nothing is wrong with it."""

from __future__ import annotations

import pytest

from deltawire_server.sansio.events import (
    ChoiceFinished,
    Completed,
    FailureReason,
    FinishedChoice,
    Provenance,
    Started,
    StopReason,
    TextDelta,
    ToolCallFailed,
    Usage,
)
from tests.sansio.build import (
    DONE,
    FIRST_CALL,
    STARTED,
    calls,
    chunk,
    ending,
    entry,
    error,
    figures,
    part,
    reader,
    text,
)

SOFT = pytest.mark.parametrize("reason", [StopReason.CANCELLED, StopReason.TIME_LIMIT])


@SOFT
def test_what_has_come_is_the_answer(reason: StopReason) -> None:
    """The text so far, its figures as a lower bound, the reason it was stopped for, and no fault."""
    reading = reader()
    events = reading.receive(chunk(part({"content": "so far"}), usage=figures(7, 2)))
    events += reading.stop(reason)
    assert events == [
        STARTED,
        TextDelta(0, "so far"),
        *ending(reason, "", text="so far", usage=Usage(2, Provenance.LOWER_BOUND, 7)),
    ]
    assert reading.ended


@SOFT
def test_before_anything_came(reason: StopReason) -> None:
    """There is an answer all the same: each choice that was asked for is there, empty."""
    finished = [ChoiceFinished(index, reason, "") for index in range(2)]
    whole = tuple(FinishedChoice(index, "", "", (), (), reason, "", False) for index in range(2))
    assert reader(choice_count=2).stop(reason) == [
        Started("", ""),
        *finished,
        Completed(Usage(0, Provenance.ESTIMATED), whole),
    ]


def test_choices_that_have_ended_keep_their_end() -> None:
    """Only what the engine has not finished is cut; a choice of which nothing came is reported too."""
    reading = reader(choice_count=3)
    reading.receive(text("a", finish="stop") + text("b", choice=2))
    last = reading.stop(StopReason.CANCELLED)[-1]
    assert isinstance(last, Completed)
    assert [(choice.index, choice.text, choice.stop_reason) for choice in last.choices] == [
        (0, "a", StopReason.END_OF_TURN),
        (1, "", StopReason.CANCELLED),
        (2, "b", StopReason.CANCELLED),
    ]
    assert last.fault is None


def test_a_call_that_was_being_written_is_truncated() -> None:
    """Whatever it parses to: a stopped answer's last call is not whole."""
    reading = reader()
    reading.receive(calls(entry("{}", name="f")))
    failed, finished, _ = reading.stop(StopReason.CANCELLED)
    assert isinstance(failed, ToolCallFailed)
    assert (failed.call_id, failed.reason) == (FIRST_CALL, FailureReason.TRUNCATED)
    assert finished == ChoiceFinished(0, StopReason.CANCELLED, "")


@pytest.mark.parametrize("last", [DONE, error()])
def test_an_answer_that_has_ended_is_not_stopped(last: bytes) -> None:
    """Its own end was first; there are no more events."""
    reading = reader()
    reading.receive(text("a", finish="stop") + last)
    assert reading.stop(StopReason.CANCELLED) == []


def test_nothing_is_read_after_the_stop() -> None:
    """Data that is received after the end is not part of the answer."""
    reading = reader()
    reading.stop(StopReason.CANCELLED)
    assert reading.receive(text("late")) == []
    assert reading.finish() == []
