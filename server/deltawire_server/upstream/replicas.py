"""Which of a provider's replicas to ask: servers of which any may answer. No I/O, only the choice.

A chat goes to the replica with the fewest streams, counted here: other gateways' streams are not seen. By that alone a
replica that fails fast would get most calls, since it always has the fewest. So a replica that fails is ejected:

    AVAILABLE ──eject──▶ EJECTED ──its time is over──▶ PROBATION ──an answer──▶ RETURNING ──RAMP_SECONDS──▶ AVAILABLE
                            ▲                              │                        │
                            └────────── eject, for twice as long as before ─────────┘

EJECTED: it gets no calls. PROBATION: one call at a time, so that a replica that still fails costs one call. RETURNING: its
share grows with time to that of the others. The only replica that is available is never ejected; if it fails, the
one that was ejected first is put on probation at once.
"""

from __future__ import annotations

import contextlib
import enum
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

EJECT_SECONDS = 5.0
"""How long a replica is ejected for its first failure: as long as connecting may take, so that a dead one delays few calls."""

MAX_EJECT_SECONDS = 60.0
"""How long at most: each failure after a return doubles the time. A replica that is repaired is found within a minute."""

RAMP_SECONDS = 30.0
"""From the first answer after an ejection until the replica has its full share, and its next ejection is short again."""

MIN_SHARE = 0.1
"""The share with which a replica returns."""

_NEVER = float("-inf")
_MAX_LEVEL = 16


class State(enum.Enum):
    """How far a replica is from its full share; see the module."""

    AVAILABLE = enum.auto()
    RETURNING = enum.auto()
    PROBATION = enum.auto()
    EJECTED = enum.auto()


_AWAY = frozenset({State.EJECTED, State.PROBATION})


@dataclass(slots=True, eq=False)
class Replica:
    """One server of a provider.

    Attributes:
        root: Where its paths begin, without a slash at the end.
        clock: Seconds that never go back.
        streams: How many calls are with it now.
        failures: How often it has failed in a way that ejects: after each it may be another process that answers.
        turn: Grows with each call that it gets, by more the smaller its share is.
    """

    root: str
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)
    streams: int = 0
    failures: int = 0
    turn: float = 0.0
    _ejections: int = 0  # all there were
    _level: int = 0  # ejections since it was last AVAILABLE
    _ejected_at: float = _NEVER
    _ejected_until: float = _NEVER
    _answered_at: float | None = None  # since the last ejection

    @property
    def base_url(self) -> str:
        """Its address for people, and for chat and listings."""
        return f"{self.root}/v1"

    @property
    def state(self) -> State:
        """Where it is now."""
        now = self.clock()
        if not self._level:
            return State.AVAILABLE
        if now < self._ejected_until:
            return State.EJECTED
        if self._answered_at is None:
            return State.PROBATION
        return State.RETURNING if now < self._answered_at + RAMP_SECONDS else State.AVAILABLE

    @property
    def share(self) -> float:
        """Its share, relative to that of the available ones: 1, or from 0.1 to 1 while it is RETURNING."""
        if self.state is not State.RETURNING or self._answered_at is None:
            return 1.0
        return MIN_SHARE + (1 - MIN_SHARE) * (self.clock() - self._answered_at) / RAMP_SECONDS


class Attempt:
    """One call at one replica; see `Replicas.attempt`."""

    def __init__(self, replica: Replica, replicas: Replicas) -> None:
        self.replica = replica
        self._replicas = replicas
        self._ejections = replica._ejections

    def answered(self) -> None:
        """The replica answered: with a first event, or with an error that blames the request."""
        replica = self.replica
        if self._current and replica.state in _AWAY:
            replica._answered_at = replica._ejected_until = replica.clock()

    def failed(self) -> float:
        """The replica failed in a way that ejects it.

        Returns:
            For how many seconds this ejected it; 0 if it did not: it is ejected already, the call went to it before its last
            ejection, or no other replica is available.
        """
        replica = self.replica
        replica.failures += 1
        if not self._current:
            return 0.0
        if replica.state is State.EJECTED:
            replica._ejected_at = replica.clock()  # the next call that has no better choice tries another one
            return 0.0
        return self._replicas._eject(replica)

    @property
    def _current(self) -> bool:
        """Whether the replica was not ejected since the call went to it."""
        return self._ejections == self.replica._ejections


class Replicas:
    """A provider's replicas. At any time at least one of them is available or returning.

    Args:
        roots: Where each one's paths begin; at least one.
        clock: Seconds that never go back.
    """

    def __init__(self, roots: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self.all = tuple(Replica(root, clock) for root in roots)
        self._turn = 0.0

    def choose(self, asked: Sequence[Replica] = ()) -> Replica:
        """The best replica for a call; take it with `attempt` before awaiting anything.

        One on probation without a call comes first; then, by streams per share, those that are available or returning; if
        there are none but those in `asked`, the one that was ejected least recently. Equals take turns.

        Args:
            asked: Those that the call has asked already, not all there are.
        """
        best = min((replica for replica in self.all if replica not in asked), key=_rank)
        # Not from its own last turn alone: one that was away for long must not get all calls until it has caught up.
        self._turn = max(self._turn, best.turn)
        best.turn = self._turn + 1 / best.share
        return best

    @contextlib.contextmanager
    def attempt(self, replica: Replica) -> Iterator[Attempt]:
        """Count a call at a replica, while entered; say how it went by the methods of what this yields."""
        if replica.state is State.AVAILABLE:
            replica._level = 0  # it has answered for long enough: a later ejection is a first one
        replica.streams += 1
        try:
            yield Attempt(replica, self)
        finally:
            replica.streams -= 1

    def in_order(self) -> tuple[Replica, ...]:
        """All in the operator's order, but the ejected ones last: for what should come from the same one each time."""
        return tuple(sorted(self.all, key=lambda replica: replica.state is State.EJECTED))

    def _eject(self, replica: Replica) -> float:
        now = replica.clock()
        others = [other for other in self.all if other is not replica]
        if all(other.state in _AWAY for other in others):
            if others:
                first = min(others, key=lambda other: other._ejected_at)
                first._ejected_until = min(first._ejected_until, now)
            return 0.0
        seconds = min(EJECT_SECONDS * (1 << replica._level), MAX_EJECT_SECONDS)
        replica._level = min(replica._level + 1, _MAX_LEVEL)
        replica._ejections += 1
        replica._ejected_at = now
        replica._ejected_until = now + seconds
        replica._answered_at = None
        return seconds


def _rank(replica: Replica) -> tuple[int, float, float]:
    match replica.state:
        case State.PROBATION if not replica.streams:
            return (0, 0.0, replica.turn)
        case State.AVAILABLE | State.RETURNING:
            return (1, replica.streams / replica.share, replica.turn)
        case _:
            return (2, replica._ejected_at, replica.turn)
