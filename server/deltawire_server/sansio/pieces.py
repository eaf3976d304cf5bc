"""Splits deltas whose message would exceed the default receive limit of gRPC clients, 4 MiB.

A text of `PIECE_CHARACTERS` takes at most 1 MiB in UTF-8, and its log-probabilities at most another 1 MiB, which leaves room for
ids and the envelope. `tool_calls.MAX_CALL_BYTES` limits the verdicts of tool calls; `Completed` omits its messages if it is too
large.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from deltawire_server.sansio.events import ReasoningDelta, TextDelta, TokenLogprob, ToolCallArguments

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from deltawire_server.sansio.events import Event

PIECE_CHARACTERS = 256 * 1024
"""Limit for the text or fragment of a delta. Only an engine that sends its whole answer at once exceeds it."""

_MAX_TOKEN_CHARACTERS = 1024
_TOKEN_OVERHEAD = 32  # upper limit of a token's message without its text and bytes, in bytes


def split(text: str) -> list[str]:
    """Split a text into pieces of at most `PIECE_CHARACTERS`; at least one piece."""
    if len(text) <= PIECE_CHARACTERS:
        return [text]
    return [text[start : start + PIECE_CHARACTERS] for start in range(0, len(text), PIECE_CHARACTERS)]


def divide(events: Iterable[Event]) -> Iterator[Event]:
    """Split the deltas that are too large. Their concatenation is unchanged."""
    for event in events:
        if isinstance(event, ToolCallArguments):
            for fragment in split(event.fragment):
                yield ToolCallArguments(event.choice, event.index, event.call_id, fragment)
        elif isinstance(event, TextDelta | ReasoningDelta):
            groups = _groups(event.logprobs)
            for text, tokens in itertools.zip_longest(split(event.text), groups):
                yield type(event)(event.choice, text or "", tokens or ())
        else:
            yield event


def logprobs_size(tokens: Sequence[TokenLogprob]) -> int:
    """Upper limit of the bytes of log-probabilities in a message; `PIECE_CHARACTERS` limits this too, separately."""
    size = 0
    for token in tokens:
        size += _TOKEN_OVERHEAD + len(token.token) + len(token.raw_bytes)
        for other in token.alternatives:
            size += _TOKEN_OVERHEAD + len(other.token) + len(other.raw_bytes)
    return size


def _groups(tokens: Sequence[TokenLogprob]) -> Iterator[tuple[TokenLogprob, ...]]:
    """The tokens in order, in groups that fit into a message."""
    group: list[TokenLogprob] = []
    size = 0
    for token in tokens:
        own = logprobs_size((token,))
        if own > PIECE_CHARACTERS:
            # No real token is that large. The text of the delta is still complete.
            token = TokenLogprob(
                token.token[:_MAX_TOKEN_CHARACTERS], token.logprob, token.raw_bytes[:_MAX_TOKEN_CHARACTERS]
            )
            own = logprobs_size((token,))
        if size + own > PIECE_CHARACTERS:
            yield tuple(group)
            group, size = [], 0
        group.append(token)
        size += own
    if group:
        yield tuple(group)
