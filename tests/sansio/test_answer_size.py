"""What a reader holds of an answer: bounded, whatever comes, and counted as the memory that it takes."""

from __future__ import annotations

import tracemalloc

import pytest

from deltawire_server.errors import Reason
from deltawire_server.sansio.events import (
    Completed,
    Event,
    ReasoningDelta,
    TextDelta,
    ToolCallFailed,
    ToolCallSucceeded,
)
from deltawire_server.sansio.reader import Limits
from tests.sansio.build import DONE, calls, chunk, end, entry, part, reader, text

LOGPROBS = {
    "content": [
        {
            "token": "a",
            "logprob": -1.0,
            "bytes": [97],
            "top_logprobs": [{"token": "b", "logprob": -2.0, "bytes": [98]}] * 5,
        }
    ]
}


def _last(events: list[Event]) -> Completed:
    last = events[-1]
    assert isinstance(last, Completed)
    return last


@pytest.mark.parametrize("character", ["x", "é", "日", "😀"])
@pytest.mark.parametrize("field", ["content", "reasoning"])
def test_a_long_text_is_sent_and_forgotten(character: str, field: str) -> None:
    """Every piece of it is an event; above the limit the last one does not repeat it, and no memory is taken for it."""
    reading, other = (reader(limits=Limits(max_completed_bytes=10_000)) for _ in range(2))
    piece = chunk(part({field: character * 100}))
    for _ in range(200):
        other.receive(piece)  # what measures coverage takes memory for each line that runs for the first time
    tracemalloc.start()
    try:
        said = 0
        most = 0
        for _ in range(2000):
            events = reading.receive(piece)
            said += sum(len(event.text) for event in events if isinstance(event, TextDelta | ReasoningDelta))
            assert reading.held <= 4 * 10_100
            most = max(most, reading.held)
        events = []
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert said == 200_000
    assert most >= 10_000
    assert reading.held == 0
    assert kept < 20_000
    last = _last(reading.receive(end("stop") + DONE))
    assert last.messages_omitted
    assert (last.choices[0].text, last.choices[0].reasoning, last.fault) == ("", "", None)


def test_an_answer_at_the_limit_is_repeated() -> None:
    """With its verdicts and texts, which count together."""
    arguments = '{"x": "' + "y" * 91 + '"}'
    for limit, omitted in [(200, False), (199, True)]:
        reading = reader(limits=Limits(max_completed_bytes=limit))
        events = reading.receive(text("z" * 100) + calls(entry(arguments, call_id="c", name="get_weather")))
        events += reading.receive(end("tool_calls") + DONE)
        last = _last(events)
        assert len(arguments) == 100
        assert last.messages_omitted is omitted
        assert (last.choices[0].text, len(last.choices[0].tool_calls)) == (("", 0) if omitted else ("z" * 100, 1))
        assert last.choices[0].tool_calls_executable
        assert [event.arguments for event in events if isinstance(event, ToolCallSucceeded)] == [arguments]


@pytest.mark.parametrize("logprobs", [False, True])
def test_an_answer_that_is_sent_at_once_must_fit(logprobs: bool) -> None:
    """Else it is broken off with a reason that says what to do, and nothing of it is kept."""
    reading = reader(keep_logprobs=True, limits=Limits(max_whole_bytes=10_000))
    piece = text("a", logprobs=LOGPROBS) if logprobs else text("a" * 100)
    events: list[Event] = []
    while not reading.ended:
        events += reading.receive(piece)
        assert reading.held <= 60_000
    last = _last(events)
    assert last.fault is not None
    assert last.fault.reason is Reason.ANSWER_TOO_LARGE
    assert last.fault.message == "the answer has more than 10000 bytes, too many for one message: stream it"
    assert last.messages_omitted
    assert (last.choices[0].text, last.choices[0].logprobs, reading.held) == ("", (), 0)


def test_the_log_probabilities_of_a_stream_are_not_kept() -> None:
    """However many there are."""
    reading = reader()
    for _ in range(1000):
        reading.receive(text("a", logprobs=LOGPROBS))
    assert reading.held == 1000


@pytest.mark.parametrize("choices", [1, 8])
def test_the_arguments_of_all_calls_are_bounded_together(choices: int) -> None:
    """Over all choices, in memory; each call gets its verdict, and the answer a fault."""
    reading = reader(choice_count=choices, limits=Limits(max_held_bytes=100_000))
    events: list[Event] = []
    number = 0
    while not reading.ended:
        events += reading.receive(
            calls(entry("é" * 1000, index=number // choices, call_id=str(number), name="f"), choice=number % choices)
        )
        number += 1
    assert number == 100_000 // (4 * 1000 + 64) + 1
    last = _last(events)
    assert last.fault is not None
    assert last.fault.reason is Reason.ANSWER_TOO_LARGE
    assert last.fault.message.startswith("the answer takes more than 100000 bytes of memory")
    assert len([event for event in events if isinstance(event, ToolCallFailed)]) == number
    assert last.messages_omitted
