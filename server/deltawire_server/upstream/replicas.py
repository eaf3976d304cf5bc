"""Which of a provider's replicas to ask: servers alike, of which any may answer. No I/O, only the choice.

A chat goes to the replica with the fewest streams, counted here: other gateways' streams are not seen. One that could not
be reached, or had no room, is set aside for a while, so that calls do not wait for it again and again; it is still asked
when no other is left, as it may be back.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

ASIDE_SECONDS = 5.0
"""How long one that failed is set aside: as long as connecting may take, so that a dead one costs few calls their time."""


@dataclass(slots=True, eq=False)
class Replica:
    """One server of a provider.

    Attributes:
        root: Where its paths begin, without a slash at the end.
        streams: How many calls are with it now.
        well_from: Until this time of the clock it is set aside.
        last_chosen: Higher than that of those that were chosen before.
        failures: How often it was set aside.
    """

    root: str
    streams: int = 0
    well_from: float = float("-inf")
    last_chosen: int = 0
    failures: int = 0

    @property
    def base_url(self) -> str:
        """Its address for people, and for chat and listings."""
        return f"{self.root}/v1"

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """Count a call, while entered."""
        self.streams += 1
        try:
            yield
        finally:
            self.streams -= 1


class Replicas:
    """A provider's replicas.

    Args:
        roots: Where each one's paths begin; at least one.
        clock: Seconds that never go back.
    """

    def __init__(self, roots: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self.all = tuple(Replica(root) for root in roots)
        self._clock = clock
        self._chosen = 0

    def by_load(self) -> Iterator[Replica]:
        """Each replica once, the best first; which is best is judged anew every time the next one is asked for.

        Those not set aside come first, of these those with the fewest streams, and among equals the one that was chosen
        least recently. Count the call, by `Replica.stream`, before waiting for anything.
        """
        left = list(self.all)
        while left:
            now = self._clock()
            best = min(left, key=lambda replica: (now < replica.well_from, replica.streams, replica.last_chosen))
            left.remove(best)
            self._chosen += 1
            best.last_chosen = self._chosen
            yield best

    def in_order(self) -> tuple[Replica, ...]:
        """All in the operator's order, but those set aside last: for what should come from the same one each time."""
        now = self._clock()
        return tuple(sorted(self.all, key=lambda replica: now < replica.well_from))

    def failed(self, replica: Replica) -> None:
        """Set a replica aside for `ASIDE_SECONDS`."""
        replica.well_from = self._clock() + ASIDE_SECONDS
        replica.failures += 1

    def answered(self, replica: Replica) -> None:
        """Take a replica that answers back at once."""
        replica.well_from = float("-inf")
