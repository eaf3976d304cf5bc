"""Where a completion is, and everything that can happen to it: the whole life of a completion as one table.

              ASKED           BEGUN               FINISHED
    QUEUED ──────────▶ ASKING ─────▶ STREAMING ─────────────▶ TAIL
       │                 │               │                      │
       └─────────────────┴───────────────┴──────────────────────┴──▶ ENDED   by ANSWER, FAULT, SOFT_END or CALLER

There is no way out of ENDED: an end is decided once, and what happens after it changes nothing.
"""

from __future__ import annotations

import enum
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


class State(enum.Enum):
    """Where a completion is."""

    QUEUED = enum.auto()
    """Its model is known; nothing has been sent."""
    ASKING = enum.auto()
    """Images are fetched, the request is sent, the first event is awaited."""
    STREAMING = enum.auto()
    """The engine generates."""
    TAIL = enum.auto()
    """Every choice has its finish reason; the usage and the end of the answer are awaited."""
    ENDED = enum.auto()
    """How it ended is known and does not change any more."""


class Cause(enum.Enum):
    """What happens to a completion. The first three lead on, the others end it."""

    ASKED = enum.auto()
    """The provider is asked."""
    BEGUN = enum.auto()
    """The engine's first event came."""
    FINISHED = enum.auto()
    """The last finish reason came."""
    ANSWER = enum.auto()
    """The answer is whole."""
    FAULT = enum.auto()
    """Something failed: the provider, this process, or a limit."""
    SOFT_END = enum.auto()
    """The caller wants no more, by CancelChatCompletion or its soft time limit: what came is the answer."""
    CALLER = enum.auto()
    """The caller left: a cancel, a deadline, a lost connection."""


TRANSITIONS: Mapping[tuple[State, Cause], State] = MappingProxyType(
    {
        (State.QUEUED, Cause.ASKED): State.ASKING,
        (State.QUEUED, Cause.FAULT): State.ENDED,
        (State.QUEUED, Cause.SOFT_END): State.ENDED,
        (State.QUEUED, Cause.CALLER): State.ENDED,
        (State.ASKING, Cause.BEGUN): State.STREAMING,
        (State.ASKING, Cause.FAULT): State.ENDED,
        (State.ASKING, Cause.SOFT_END): State.ENDED,
        (State.ASKING, Cause.CALLER): State.ENDED,
        (State.STREAMING, Cause.FINISHED): State.TAIL,
        (State.STREAMING, Cause.ANSWER): State.ENDED,
        (State.STREAMING, Cause.FAULT): State.ENDED,
        (State.STREAMING, Cause.SOFT_END): State.ENDED,
        (State.STREAMING, Cause.CALLER): State.ENDED,
        (State.TAIL, Cause.ANSWER): State.ENDED,
        (State.TAIL, Cause.FAULT): State.ENDED,
        (State.TAIL, Cause.CALLER): State.ENDED,
    }
)
"""Where each cause leads from each state. What is not here cannot happen: nothing is answered before it is asked, no soft end
cuts an answer whose choices have all finished (it is whole), and nothing follows an end."""


class IllegalTransitionError(RuntimeError):
    """A cause came in a state in which it cannot: a defect of this program, not of the engine or the caller."""


def advance(state: State, cause: Cause) -> State:
    """The state after a cause.

    Raises:
        IllegalTransitionError: The cause cannot come in this state.
    """
    try:
        return TRANSITIONS[state, cause]
    except KeyError:
        raise IllegalTransitionError(f"{cause.name} cannot come in state {state.name}") from None
