"""Joining what waits: point 3 of the contract."""

from __future__ import annotations

import itertools
import tracemalloc
from sys import getsizeof
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltawire_server.sansio.coalesce import EVENT_BYTES, Coalescer, weight
from deltawire_server.sansio.events import (
    Alternative,
    ChoiceFinished,
    Completed,
    FailureReason,
    FinishedChoice,
    Notice,
    NoticeKind,
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
    from collections.abc import Callable, Iterable, Sequence

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
        assert [weight(event) - EVENT_BYTES - getsizeof("") for event in _joined(*[delta] * 5)] == [
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


def _token(number: int, alternatives: int = 0) -> TokenLogprob:
    """A token whose text, bytes and number are objects of their own, as a decoder makes them."""
    text = f"token {number}"
    others = tuple(Alternative(f"other {number} {other}", -number / 3, b"%d" % number) for other in range(alternatives))
    return TokenLogprob(text, -number / 7, text.encode(), others)


def _call(number: int) -> Sequence[StreamEvent]:
    call_id, name = f"call_{number}", f"tool_{number}"
    return (
        ToolCallStarted(0, number, call_id, name),
        ToolCallArguments(0, number, call_id, f'{{"city": {number}}}'),
        ToolCallSucceeded(0, number, call_id, name, f'{{"city":  {number}}}'),
        ToolCallFailed(0, number, call_id, name, FailureReason.TRUNCATED, f"cut at {number}", f'{{"city":   {number}'),
    )


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda number: [TextDelta(0, f"{number:4}")], id="tokens"),
        pytest.param(lambda number: [TextDelta(0, f"{number:4}\N{WHITE SMILING FACE}")], id="tokens beyond ASCII"),
        pytest.param(lambda number: [TextDelta(0, f"{number:4}\N{GRINNING FACE}")], id="tokens of emoji"),
        pytest.param(lambda number: [ReasoningDelta(0, f"{number:1000}")], id="long texts"),
        pytest.param(lambda number: [ToolCallArguments(0, 0, "c", f"{number:4}")], id="fragments"),
        pytest.param(lambda number: [TextDelta(0, f"{number:4}", (_token(number),))], id="log-probabilities"),
        pytest.param(lambda number: [TextDelta(0, f"{number:4}", (_token(number, 20),))], id="20 alternatives"),
        pytest.param(_call, id="tool calls"),
        pytest.param(lambda number: [Notice(NoticeKind.ANOTHER_REPLICA, f"{number:1000}")], id="notices"),
        pytest.param(lambda number: [_completed(f"{number:100}", _token(number, 2))], id="whole answers"),
    ],
)
def test_the_weight_is_memory(make: Callable[[int], Sequence[StreamEvent]]) -> None:
    """What events weigh is between what was allocated for them and one and a half times that, whatever they hold."""
    coalescer = Coalescer()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for number in range(1000, 3000):
            coalescer.receive(make(number))
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 1.0 <= coalescer.size / (after - before) <= 1.5
    coalescer.take()
    assert coalescer.size == 0


def _completed(text: str, token: TokenLogprob) -> Completed:
    choice = FinishedChoice(0, text, "", (), (), StopReason.END_OF_TURN, "stop", False, None, (token,))
    return Completed(Usage(1, Provenance.EXACT), (choice,))


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
