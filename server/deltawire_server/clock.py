"""Timeouts that are restarted for every token, on one timer of the event loop for each stream."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Clock:
    """Two timeouts of a stream, one for all of it and one between its events, on one timer of the event loop.

    To restart the timeout between events is cheap, because it does not reschedule the timer: one that fires too early is set again.

    Args:
        time_out: Called once, at the first deadline.

    Attributes:
        end_by: The deadline of the whole stream, on the loop's clock.
        allowed: The current timeout between events, in seconds.
    """

    def __init__(self, time_out: Callable[[], None]) -> None:
        self.end_by = float("inf")
        self.allowed = float("inf")
        self._quiet_until = float("inf")
        # None after `stop`: the reference cycle with the stream would otherwise last until a garbage collection, possibly for long.
        self._time_out: Callable[[], None] | None = time_out
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_over(self) -> bool:
        """Whether the stream's own deadline has passed."""
        return asyncio.get_running_loop().time() >= self.end_by

    def allow(self, seconds: float) -> None:
        """Start the timeout between events."""
        if self._time_out is None:
            return
        self.allowed = seconds
        self._quiet_until = asyncio.get_running_loop().time() + seconds
        if self._timer is None or self._timer.when() > self._quiet_until:
            self._set()

    def hasten(self, seconds: float) -> None:
        """Shorten the timeout between events, if it has more time left than this."""
        if asyncio.get_running_loop().time() + seconds < self._quiet_until:
            self.allow(seconds)

    def pause(self) -> None:
        """Suspend the timeout between events until the next `allow`."""
        self._quiet_until = float("inf")

    def check(self) -> None:
        """Call `time_out` if a deadline has passed, else set the timer."""
        self._timer = None
        if self._time_out is None:
            return
        if asyncio.get_running_loop().time() >= min(self.end_by, self._quiet_until):
            self._time_out()
        else:
            self._set()

    def stop(self) -> None:
        """Cancel both timeouts."""
        self._time_out = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        due = min(self.end_by, self._quiet_until)
        if due < float("inf"):
            self._timer = asyncio.get_running_loop().call_at(due, self.check)
