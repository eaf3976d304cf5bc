"""The states of a completion, the causes of transitions, and the table of transitions.

              ASKED           BEGUN               FINISHED
    QUEUED ──────────▶ ASKING ─────▶ STREAMING ─────────────▶ TAIL
       │                 │               │                      │
       └─────────────────┴───────────────┴──────────────────────┴──▶ ENDED   by ANSWER, FAULT, SOFT_END or CALLER

ENDED is final.
"""

from __future__ import annotations

import enum
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


class State(enum.Enum):
    """The state of a completion."""

    QUEUED = enum.auto()
    """Its model is resolved; the request was not sent."""
    ASKING = enum.auto()
    """Images are fetched, the request is sent, and the first event was not received."""
    STREAMING = enum.auto()
    """The engine generates."""
    TAIL = enum.auto()
    """Every choice has a finish reason; the usage and the true end were not received."""
    ENDED = enum.auto()
    """It has ended; its outcome is final."""


class Cause(enum.Enum):
    """The cause of a transition. The first three are progress, the others end the completion."""

    ASKED = enum.auto()
    """The request to the provider begins."""
    BEGUN = enum.auto()
    """The engine's first event was received."""
    FINISHED = enum.auto()
    """The last finish reason was received."""
    ANSWER = enum.auto()
    """The answer is complete."""
    FAULT = enum.auto()
    """An error of the provider or the gateway, or an exceeded limit."""
    SOFT_END = enum.auto()
    """CancelChatCompletion, or the caller's soft time limit: the answer ends without a fault."""
    CALLER = enum.auto()
    """The caller's RPC ended: a cancel, a deadline, a lost connection."""


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
"""The next state for each state and cause. Other pairs are impossible: there is no answer before the request, an end by the caller
in TAIL gives a complete answer, and nothing follows ENDED."""


class IllegalTransitionError(RuntimeError):
    """A cause that is impossible in the current state: a bug of the gateway, not of the engine or the caller."""


def advance(state: State, cause: Cause) -> State:
    """The state after a cause.

    Raises:
        IllegalTransitionError: The cause is impossible in this state.
    """
    try:
        return TRANSITIONS[state, cause]
    except KeyError:
        raise IllegalTransitionError(f"{cause.name} is impossible in state {state.name}") from None
