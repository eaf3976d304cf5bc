"""Load balancing over the replicas of a provider. No I/O, only the choice.

A call goes to the replica with the fewest streams of this gateway. By that rule alone, a replica that fails fast would receive
most calls, because it always has the fewest streams. So a replica that fails is ejected:

    AVAILABLE ──eject──▶ EJECTED ──time expires──▶ PROBATION ──an answer──▶ RETURNING ──RAMP_SECONDS──▶ AVAILABLE
                            ▲                           │                        │
                            └───────── eject, for twice as long as before ───────┘

EJECTED: it receives no calls. PROBATION: it receives one call at a time, so that a replica that still fails costs one call.
RETURNING: its share grows with time to that of the others. The only available replica is never ejected; if it fails, the
replica that was ejected first enters PROBATION at once.
"""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from deltawire_server.errors import Reason

EJECT_SECONDS = 5.0
"""Duration of the first ejection: the same as the connect timeout, so that a dead replica delays few calls."""

MAX_EJECT_SECONDS = 60.0
"""Limit of the duration, which each failure after a return doubles. A repaired replica is used again within a minute."""

RAMP_SECONDS = 30.0
"""From the first answer after an ejection until the replica has its full share and its next ejection is a first one."""

MIN_SHARE = 0.1
"""The initial share of a replica that returns."""

_NEVER = float("-inf")
_MAX_LEVEL = 16


class State(enum.Enum):
    """The state of a replica; see the module."""

    AVAILABLE = enum.auto()
    RETURNING = enum.auto()
    PROBATION = enum.auto()
    EJECTED = enum.auto()


_AWAY = frozenset({State.EJECTED, State.PROBATION})


@dataclass(slots=True, eq=False)
class Replica:
    """One server of a provider.

    Attributes:
        root: The prefix of its paths, without a trailing slash.
        clock: A monotonic clock in seconds.
        streams: Number of calls that it processes now.
        failures: Number of its failures that eject: after each, another process may be running.
        turn: Grows with each call that it receives, more for a smaller share.
        last_failure: The reason of its last failure that ejects; `None` without one.
        last_failure_time: When that happened, as Unix time in seconds; `None` without one.
    """

    root: str
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)
    streams: int = 0
    failures: int = 0
    turn: float = 0.0
    last_failure: Reason | None = None
    last_failure_time: float | None = None
    _ejections: int = 0  # the total
    _level: int = 0  # ejections since it was last AVAILABLE
    _ejected_at: float = _NEVER
    _ejected_until: float = _NEVER
    _answered_at: float | None = None  # since the last ejection

    @property
    def base_url(self) -> str:
        """Its address in logs and listings; the prefix of `/chat/completions` and `/models`."""
        return f"{self.root}/v1"

    @property
    def state(self) -> State:
        """The current state."""
        now = self.clock()
        if not self._level:
            return State.AVAILABLE
        if now < self._ejected_until:
            return State.EJECTED
        if self._answered_at is None:
            return State.PROBATION
        return State.RETURNING if now < self._answered_at + RAMP_SECONDS else State.AVAILABLE

    @property
    def ejected_for(self) -> float | None:
        """Seconds until its ejection expires; `None` if it is not EJECTED."""
        return self._ejected_until - self.clock() if self.state is State.EJECTED else None

    @property
    def share(self) -> float:
        """Its share relative to AVAILABLE replicas: 1, or from 0.1 to 1 while RETURNING."""
        if self.state is not State.RETURNING or self._answered_at is None:
            return 1.0
        return MIN_SHARE + (1 - MIN_SHARE) * (self.clock() - self._answered_at) / RAMP_SECONDS


class Attempt:
    """One call at one replica, which counts as its stream until `end`; see `Replicas.attempt`."""

    def __init__(self, replica: Replica, replicas: Replicas) -> None:
        self.replica = replica
        self._replicas = replicas
        self._ejections = replica._ejections
        self._counts = True
        replica.streams += 1

    def end(self) -> None:
        """The call has ended at this replica."""
        self.replica.streams -= self._counts
        self._counts = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def answered(self) -> None:
        """Record that the replica answered: with a first event, or with a rejection of the request."""
        replica = self.replica
        if self._current and replica.state in _AWAY:
            replica._answered_at = replica._ejected_until = replica.clock()

    def failed(self, reason: Reason) -> float:
        """Record a failure of the replica, and eject it.

        Args:
            reason: The reason of the failure.

        Returns:
            The duration of the ejection in seconds; 0 if there is none because it is ejected already, the call was sent
            before its last ejection, or no other replica is available.
        """
        replica = self.replica
        replica.failures += 1
        replica.last_failure, replica.last_failure_time = reason, time.time()
        if not self._current:
            return 0.0
        if replica.state is State.EJECTED:
            replica._ejected_at = (
                replica.clock()
            )  # so that the next call without a better choice goes to another replica
            return 0.0
        return self._replicas._eject(replica)

    @property
    def _current(self) -> bool:
        """Whether the replica was not ejected since the start of this attempt."""
        return self._ejections == self.replica._ejections


class Replicas:
    """A provider's replicas. At any time, at least one of them is AVAILABLE or RETURNING.

    Args:
        roots: The prefix of the paths of each replica; at least one.
        clock: A monotonic clock in seconds.
    """

    def __init__(self, roots: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self.all = tuple(Replica(root, clock) for root in roots)
        self._turn = 0.0

    def choose(self, tried: Sequence[Replica] = ()) -> Replica:
        """The best replica for a call; begin an `attempt` with it before any `await`.

        A replica in PROBATION without a call comes first; then AVAILABLE and RETURNING ones, by streams per share; then the one
        that was ejected least recently. Equal ones take turns.

        Args:
            tried: The replicas that the call was already sent to; must not be all of them.
        """
        best = min((replica for replica in self.all if replica not in tried), key=_rank)
        # Not only from its own last turn: a replica that returns must not receive all calls until it has caught up.
        self._turn = max(self._turn, best.turn)
        best.turn = self._turn + 1 / best.share
        return best

    def attempt(self, replica: Replica) -> Attempt:
        """Begin a call at a replica. Report its result with the methods of the `Attempt`, and `end` it, or use it in a `with`."""
        if replica.state is State.AVAILABLE:
            replica._level = 0  # fully recovered, so the next ejection is a first one
        return Attempt(replica, self)

    def in_order(self) -> tuple[Replica, ...]:
        """All replicas in the operator's order, ejected ones last: for requests that should go to the same one each time."""
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
