"""Merges queued deltas: adjacent deltas of the same kind and choice become one if the caller is slower than the engine.

The cost of a gRPC message hardly depends on its size, so fewer messages save work under load. Merging adds no delay: `take`
returns all queued events, and the writer calls it as soon as its last write is done. At low load the queue is empty, and every
token is sent in its own message.

Texts, reasoning, and the argument fragments of one call are merged; never across another event, so the order stays, and never
into a delta of more than `PIECE_CHARACTERS`, so every message stays below a client's receive limit.
"""

from __future__ import annotations

from sys import getsizeof
from typing import TYPE_CHECKING

from msgspec.structs import astuple

from deltawire_server.sansio.events import (
    Completed,
    FinishedChoice,
    ReasoningDelta,
    StreamEvent,
    TextDelta,
    TokenLogprob,
    ToolCallArguments,
)
from deltawire_server.sansio.pieces import PIECE_CHARACTERS, logprobs_size

if TYPE_CHECKING:
    from collections.abc import Sequence

EVENT_BYTES = 64
"""Memory of an event without its texts: the object and its slot in a list."""

_TOKEN_BYTES = 80
"""Memory of a token's log-probability without its text and bytes: the object, its slot in a tuple, and the float."""

_TUPLE_BYTES = 48

_TEXTS = (TextDelta, ReasoningDelta)
"""A tuple, because `isinstance` with a union is slower and runs for every token."""


class Coalescer:
    """A queue that merges deltas.

    `size` is the memory of the queued events in bytes; the caller may bound it.
    """

    def __init__(self) -> None:
        self._events: list[StreamEvent] = []
        self.size = 0

    def __len__(self) -> int:
        """Number of queued events, before merging."""
        return len(self._events)

    def receive(self, events: Sequence[StreamEvent]) -> None:
        """Queue events."""
        self._events.extend(events)
        self.size += sum(map(weight, events))

    def take(self) -> list[StreamEvent]:
        """Remove and return all queued events, with deltas merged. Write them in order, then call this again."""
        waiting, self._events, self.size = self._events, [], 0
        if len(waiting) < 2:
            return waiting
        joined: list[StreamEvent] = []
        position = 0
        while position < len(waiting):
            first = waiting[position]
            end = position + 1
            if isinstance(first, _TEXTS):
                kind, choice = type(first), first.choice
                run: list[TextDelta | ReasoningDelta] = [first]
                size = _piece_size(first)
                while end < len(waiting) and isinstance(other := waiting[end], kind) and other.choice == choice:
                    size += _piece_size(other)
                    if size > PIECE_CHARACTERS:
                        break
                    run.append(other)
                    end += 1
                joined.append(first if len(run) == 1 else _join_texts(run))
            elif isinstance(first, ToolCallArguments):
                fragments = [first.fragment]
                size = len(first.fragment)
                while (
                    end < len(waiting)
                    and isinstance(piece := waiting[end], ToolCallArguments)
                    and (piece.choice, piece.index) == (first.choice, first.index)
                ):
                    size += len(piece.fragment)
                    if size > PIECE_CHARACTERS:
                        break
                    fragments.append(piece.fragment)
                    end += 1
                joined.append(ToolCallArguments(first.choice, first.index, first.call_id, "".join(fragments)))
            else:
                joined.append(first)
            position = end
        return joined


def _piece_size(delta: TextDelta | ReasoningDelta) -> int:
    return len(delta.text) + logprobs_size(delta.logprobs) if delta.logprobs else len(delta.text)


def _join_texts(run: list[TextDelta | ReasoningDelta]) -> TextDelta | ReasoningDelta:
    """Merge deltas of the same kind and choice."""
    text = "".join([delta.text for delta in run])
    logprobs: tuple[TokenLogprob, ...] = ()
    if any(delta.logprobs for delta in run):
        logprobs = tuple(token for delta in run for token in delta.logprobs)
    return type(run[0])(run[0].choice, text, logprobs)


def weight(event: StreamEvent) -> int:
    """Memory of an event in a list, in bytes.

    The allocator also rounds each object up to a multiple of 16 bytes; this does not include that.
    """
    if type(event) is TextDelta and not event.logprobs:  # the most frequent event, one per token
        return EVENT_BYTES + getsizeof(event.text)
    if isinstance(event, _TEXTS):
        return EVENT_BYTES + getsizeof(event.text) + logprobs_weight(event.logprobs)
    if isinstance(event, ToolCallArguments):
        return EVENT_BYTES + getsizeof(event.fragment)
    if isinstance(event, Completed):
        return EVENT_BYTES + sum(map(_choice_weight, event.choices))
    return EVENT_BYTES + sum(getsizeof(value) for value in astuple(event) if isinstance(value, str))


def logprobs_weight(logprobs: Sequence[TokenLogprob]) -> int:
    """Memory of the log-probabilities of tokens, in bytes."""
    size = _TUPLE_BYTES if logprobs else 0
    for token in logprobs:
        size += _TOKEN_BYTES + getsizeof(token.token) + getsizeof(token.raw_bytes)
        if token.alternatives:
            size += _TUPLE_BYTES
            for other in token.alternatives:
                size += _TOKEN_BYTES + getsizeof(other.token) + getsizeof(other.raw_bytes)
    return size


def _choice_weight(choice: FinishedChoice) -> int:
    calls = sum(map(weight, choice.tool_calls)) + sum(map(weight, choice.failed_tool_calls))
    texts = getsizeof(choice.text) + getsizeof(choice.reasoning)
    return 3 * EVENT_BYTES + texts + calls + logprobs_weight(choice.logprobs)
