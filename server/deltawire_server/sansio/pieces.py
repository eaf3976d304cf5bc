"""The size of what is sent: no delta is so large that its message would exceed what a gRPC client receives by default.

That limit is 4 MiB. A text of `PIECE_CHARACTERS` takes at most 1 MiB in UTF-8, and the log-probabilities beside it at most
another, so a message stays below it with room for ids and the envelope. Verdicts of tool calls are bounded by
`tool_calls.MAX_CALL_BYTES`, and `Completed` by leaving out its messages.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from deltawire_server.sansio.events import ReasoningDelta, TextDelta, TokenLogprob, ToolCallArguments

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from deltawire_server.sansio.events import Event

PIECE_CHARACTERS = 256 * 1024
"""Of one delta's text or fragment. No token comes near it: only an engine that sends its answer at once does."""

_MAX_TOKEN_CHARACTERS = 1024
_TOKEN_OVERHEAD = 32  # bytes of a token's message beside its text and bytes, and more than that


def split(text: str) -> list[str]:
    """A text in pieces of at most `PIECE_CHARACTERS`, at least one."""
    if len(text) <= PIECE_CHARACTERS:
        return [text]
    return [text[start : start + PIECE_CHARACTERS] for start in range(0, len(text), PIECE_CHARACTERS)]


def divide(events: Iterable[Event]) -> Iterator[Event]:
    """The same events, with deltas that are too large divided; put together they say the same."""
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
    """How much of `PIECE_CHARACTERS` the log-probabilities of a delta take, which may have as many of their own."""
    size = 0
    for token in tokens:
        size += _TOKEN_OVERHEAD + len(token.token) + len(token.raw_bytes)
        for other in token.alternatives:
            size += _TOKEN_OVERHEAD + len(other.token) + len(other.raw_bytes)
    return size


def _groups(tokens: Sequence[TokenLogprob]) -> Iterator[tuple[TokenLogprob, ...]]:
    """The tokens in order, in groups that each fit into a message."""
    group: list[TokenLogprob] = []
    size = 0
    for token in tokens:
        own = logprobs_size((token,))
        if own > PIECE_CHARACTERS:
            # Not a token's size; the text beside it is complete all the same.
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
