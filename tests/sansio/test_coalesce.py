"""Joining what waits: point 3 of the contract."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from deltawire_server.sansio.coalesce import EVENT_BYTES, Coalescer, weight
from deltawire_server.sansio.events import (
    Alternative,
    ChoiceFinished,
    Completed,
    FailureReason,
    FinishedChoice,
    Heartbeat,
    Provenance,
    ReasoningDelta,
    Refused,
    Started,
    StopReason,
    StreamEvent,
    TextDelta,
    TokenLogprob,
    ToolCallArguments,
    ToolCallFailed,
    ToolCallStarted,
    ToolCallSucceeded,
    Usage,
)
from deltawire_server.sansio.pieces import PIECE_CHARACTERS, logprobs_size
from tests.support import recordings

if TYPE_CHECKING:
    from collections.abc import Iterable

TOKEN = TokenLogprob("a", -1.0, b"a", (Alternative("b", -2.0, b"b"), Alternative("c", -3.0, b"c")))


def _joined(*events: StreamEvent) -> list[StreamEvent]:
    coalescer = Coalescer()
    coalescer.receive(events)
    return coalescer.take()


def test_neighbouring_texts_of_a_choice_are_joined() -> None:
    """Three that wait are one."""
    assert _joined(TextDelta(0, "a"), TextDelta(0, "b"), TextDelta(0, "c")) == [TextDelta(0, "abc")]


def test_neighbouring_reasoning_of_a_choice_is_joined() -> None:
    """And stays reasoning."""
    assert _joined(ReasoningDelta(1, "a"), ReasoningDelta(1, "b")) == [ReasoningDelta(1, "ab")]


def test_neighbouring_pieces_of_a_call_are_joined() -> None:
    """Under the call's id."""
    pieces = [ToolCallArguments(1, 2, "c", fragment) for fragment in ["{", '"x"', ":1}"]]
    assert _joined(*pieces) == [ToolCallArguments(1, 2, "c", '{"x":1}')]


def test_what_waited_in_several_reads_is_joined_too() -> None:
    """What counts is that it waits, not when it came."""
    coalescer = Coalescer()
    coalescer.receive([TextDelta(0, "a")])
    coalescer.receive([])
    coalescer.receive([TextDelta(0, "b")])
    assert len(coalescer) == 2
    assert coalescer.take() == [TextDelta(0, "ab")]


def test_never_across_a_kind() -> None:
    """Text, reasoning, text stays three."""
    events: list[StreamEvent] = [TextDelta(0, "a"), ReasoningDelta(0, "b"), TextDelta(0, "c")]
    assert _joined(*events) == events


def test_never_across_a_choice() -> None:
    """Texts of two choices in turn stay as they are."""
    events: list[StreamEvent] = [
        TextDelta(0, "a"),
        TextDelta(1, "b"),
        TextDelta(0, "c"),
        ReasoningDelta(0, "d"),
        ReasoningDelta(1, "e"),
    ]
    assert _joined(*events) == events


def test_never_across_a_call() -> None:
    """Pieces of two calls, or of calls of the same index in two choices, stay apart."""
    events: list[StreamEvent] = [
        ToolCallArguments(0, 0, "a", "1"),
        ToolCallArguments(0, 1, "b", "2"),
        ToolCallArguments(0, 0, "a", "3"),
        ToolCallArguments(1, 0, "c", "4"),
    ]
    assert _joined(*events) == events


def test_no_merged_delta_is_too_large() -> None:
    """At the limit another begins; put together they say the same."""
    half = "x" * (PIECE_CHARACTERS // 2)
    for delta in (TextDelta(0, half), ReasoningDelta(0, half), ToolCallArguments(0, 0, "c", half)):
        assert [weight(event) - EVENT_BYTES for event in _joined(*[delta] * 5)] == [
            PIECE_CHARACTERS, PIECE_CHARACTERS, PIECE_CHARACTERS // 2
        ]  # fmt: skip
        small = type(delta)(0, "y") if not isinstance(delta, ToolCallArguments) else ToolCallArguments(0, 0, "c", "y")
        assert _joined(delta, delta, small) == [*_joined(delta, delta), small]


def test_log_probabilities_count_towards_the_limit() -> None:
    """Their entries are put one after the other until they fill a delta."""
    large = TokenLogprob("x" * 1000, -1.0, b"x" * 1000)
    joined = _joined(*[TextDelta(0, "x", (large,))] * 300)
    assert [token for event in joined if isinstance(event, TextDelta) for token in event.logprobs] == [large] * 300
    assert len(joined) == 3
    assert all(logprobs_size(event.logprobs) <= PIECE_CHARACTERS for event in joined if isinstance(event, TextDelta))


def test_never_across_another_event() -> None:
    """Whatever stands between two deltas keeps its place, and none of the others is ever joined."""
    verdict = ToolCallSucceeded(0, 0, "a", "f", "{}")
    failed = ToolCallFailed(0, 1, "b", "f", FailureReason.TRUNCATED, "m", "{")
    finished = ChoiceFinished(0, StopReason.END_OF_MESSAGE, "stop")
    others: list[StreamEvent] = [Started("u", "m"), ToolCallStarted(0, 0, "a", "f"), verdict, failed, finished]
    for other in others:
        events: list[StreamEvent] = [TextDelta(0, "a"), other, other, TextDelta(0, "b")]
        assert _joined(*events) == events


def test_logprobs_are_kept_entry_by_entry() -> None:
    """They are put one after the other in order, also where only some deltas have them."""
    first, second, third = (TokenLogprob(token, -1.0) for token in "abc")
    assert _joined(
        TextDelta(0, "a", (first,)), TextDelta(0, "x"), TextDelta(0, "", (second,)), TextDelta(0, "c", (third,))
    ) == [TextDelta(0, "axc", (first, second, third))]
    assert _joined(ReasoningDelta(0, "a"), ReasoningDelta(0, "b", (second,))) == [ReasoningDelta(0, "ab", (second,))]


def test_nothing_is_held_back() -> None:
    """A take gives all there is, one event as it came, and the next take begins anew."""
    coalescer = Coalescer()
    assert coalescer.take() == []
    delta = TextDelta(0, "a")
    coalescer.receive([delta])
    [taken] = coalescer.take()
    assert taken is delta
    assert (len(coalescer), coalescer.size, coalescer.take()) == (0, 0, [])
    coalescer.receive([TextDelta(0, "b")])
    assert coalescer.take() == [TextDelta(0, "b")]


def test_the_weight_grows_with_what_waits() -> None:
    """Each event weighs something, and each text, fragment, argument and log-probability more the larger it is."""
    usage = Usage(1, Provenance.EXACT)
    whole = FinishedChoice(0, "x" * 20, "y" * 10, (), (), StopReason.END_OF_TURN, "stop", False)
    succeeded, failed = (
        ToolCallSucceeded(0, 0, "a", "f", "x" * 13),
        ToolCallFailed(0, 0, "a", "f", FailureReason.TRUNCATED, "m", "x" * 14),
    )
    with_calls = FinishedChoice(
        0, "x" * 5, "", (succeeded,), (failed,), StopReason.END_OF_MESSAGE, "stop", False, None, (TOKEN,)
    )
    weights: list[tuple[StreamEvent, int]] = [
        (Started("u", "m"), 0),
        (TextDelta(0, "x" * 10), 10),
        (ReasoningDelta(0, "x" * 11), 11),
        (TextDelta(0, "x", (TOKEN, TOKEN)), 1 + 2 * 3 * EVENT_BYTES),
        (ToolCallStarted(0, 0, "a", "f"), 0),
        (ToolCallArguments(0, 0, "a", "x" * 12), 12),
        (succeeded, 13),
        (failed, 14),
        (ChoiceFinished(0, StopReason.END_OF_TURN, "stop"), 0),
        (Completed(usage, (whole, whole)), 2 * (EVENT_BYTES + 30)),
        (Completed(usage, (with_calls,)), EVENT_BYTES + 5 + EVENT_BYTES + 13 + EVENT_BYTES + 14 + 3 * EVENT_BYTES),
        (Heartbeat(), 0),
    ]
    coalescer = Coalescer()
    expected = 0
    for event, more in weights:
        coalescer.receive([event])
        expected += EVENT_BYTES + more
        assert coalescer.size == expected
    coalescer.take()
    assert coalescer.size == 0
    coalescer.receive([event for event, _ in weights])
    assert coalescer.size == expected


# --- folding: what a receiver adds up to

_TOKENS = st.lists(st.sampled_from([TOKEN, TokenLogprob("d", -4.0)]), max_size=2).map(tuple)
_CHOICES = st.integers(0, 1)
_EVENTS: st.SearchStrategy[StreamEvent] = st.one_of(
    st.builds(TextDelta, _CHOICES, st.text("ab", max_size=2), _TOKENS),
    st.builds(ReasoningDelta, _CHOICES, st.text("ab", max_size=2), _TOKENS),
    st.builds(ToolCallArguments, _CHOICES, _CHOICES, st.just("c"), st.text("{}", max_size=2)),
    st.builds(ToolCallStarted, _CHOICES, _CHOICES, st.just("c"), st.just("f")),
    st.builds(ChoiceFinished, _CHOICES, st.just(StopReason.END_OF_TURN), st.just("stop")),
)


def _letters(events: Iterable[StreamEvent]) -> list[object]:
    """Every character, token and other event, one by one and in order: what joining must not change."""
    letters: list[object] = []
    for event in events:
        if isinstance(event, TextDelta | ReasoningDelta):
            letters += [(type(event), event.choice, letter) for letter in event.text]
        elif isinstance(event, ToolCallArguments):
            letters += [(event.choice, event.index, event.call_id, letter) for letter in event.fragment]
        else:
            letters.append(event)
    return letters


def _tokens(events: Iterable[StreamEvent]) -> list[tuple[type, int, TokenLogprob]]:
    return [
        (type(event), event.choice, token)
        for event in events
        if isinstance(event, TextDelta | ReasoningDelta)
        for token in event.logprobs
    ]


def _kind(event: StreamEvent) -> object:
    """What two neighbours must share to be joined; `None` if the event is never joined."""
    if isinstance(event, TextDelta | ReasoningDelta):
        return type(event), event.choice
    if isinstance(event, ToolCallArguments):
        return event.choice, event.index
    return None


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(_EVENTS, max_size=12), st.sets(st.integers(0, 12)))
def test_folding_the_joined_gives_the_same(events: list[StreamEvent], takes: set[int]) -> None:
    """Whenever it is taken, the letters, the tokens and the other events are the same in order, and no neighbours are left."""
    coalescer = Coalescer()
    taken: list[StreamEvent] = []
    for position, event in enumerate(events):
        coalescer.receive([event])
        if position in takes:
            taken += coalescer.take()
    taken += coalescer.take()
    assert _letters(taken) == _letters(events)
    assert _tokens(taken) == _tokens(events)
    once = _joined(*events)
    assert not [1 for one, other in itertools.pairwise(once) if _kind(one) is not None and _kind(one) == _kind(other)]


def test_recordings_fold_to_the_same() -> None:
    """What a real vLLM sent, joined as a whole, says the same in fewer events; a refusal stays what it is."""
    for name in recordings.names():
        events = recordings.load(name).read()
        joined = _joined(*events)
        assert _letters(joined) == _letters(events)
        assert _tokens(joined) == _tokens(events)
        assert len(joined) <= len(events)
        assert isinstance(events[0], Refused) == isinstance(joined[0], Refused)
