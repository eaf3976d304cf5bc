"""Admission control: limits the number of completions that the process runs at once, with a bounded, fair queue.

    wait ──▶ a place, at once or in turn        at the end of the call or of its completion: release ──▶ the next caller's turn
       └──▶ TOO_MANY_STREAMS: the queue is full, or the time is up

A call takes a place before its request is received, so that `max_streams` also limits how many requests are received, parsed
and validated at once. The call then hands its place over to the completion, which may outlive the call.

A place goes to the caller that has the fewest of them; of several, to the one that has waited for its turn longest. The calls of
one caller wait in order. If the queue is full, the caller with the most calls in it loses its last one to a caller with fewer. So a
caller that sends many calls delays only its own.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict, deque
from typing import TYPE_CHECKING, Self

from deltawire_server.errors import GatewayError, Reason
from deltawire_server.limits import UNCOUNTED, Share, Use
from deltawire_server.metrics.table import QUEUE_SECONDS
from deltawire_server.upstream.failures import RETRY_SECONDS

if TYPE_CHECKING:
    from types import TracebackType

_SMOOTHING = 0.1
"""The weight of the last interval between two places in their mean."""

_Waiter = asyncio.Future[None]


class Admission:
    """The places of one process.

    Args:
        limit: The number of places, at least 1.
        queue_size: The number of calls that may wait; 0 refuses calls at once.
        queue_timeout: Seconds that a call may wait.

    Attributes:
        active: The number of places that are taken.
        queued: The number of calls that wait.
        queue_size: As above, for calls from now on.
        queue_timeout: As above, for calls from now on.
    """

    def __init__(self, limit: int, queue_size: int = 0, queue_timeout: float = 10.0) -> None:
        self._limit = limit
        self.queue_size = queue_size
        self.queue_timeout = queue_timeout
        self.active = 0
        self.queued = 0
        self._running: Counter[str] = Counter()  # the places that are taken, by caller
        self._waiting: OrderedDict[str, deque[_Waiter]] = OrderedDict()  # by caller, in the order of their turns
        self._closed: GatewayError | None = None
        # The mean interval between two places while calls wait; `None` until it is known.
        self._interval: float | None = None
        self._last_turn = 0.0

    def place(self) -> Place:
        """A place that is not taken yet. Call `take` or `wait`, and `release` at the end."""
        return Place(self)

    def enter(self, share: Share) -> None:
        """Take one place now.

        Args:
            share: The caller.

        Raises:
            GatewayError: TOO_MANY_STREAMS: all places are taken. The caller may retry after the error's `retry_after`.
        """
        if self.active >= self._limit or self.queued:
            raise self._full()
        self._enter(share.key)

    async def wait(self, share: Share, deadline: float | None) -> float:
        """Take one place, now or when it is this caller's turn. Cancellation leaves the queue.

        Args:
            share: The caller.
            deadline: Seconds until the call's deadline; `None` without one.

        Returns:
            The seconds that it waited.

        Raises:
            GatewayError: TOO_MANY_STREAMS: the queue is full, the time is up, or the deadline will pass first. The caller may
                retry after the error's `retry_after`. CALLER_LIMIT_EXCEEDED: too many calls of this caller wait. The error of
                `close`.
        """
        if self.active < self._limit and not self.queued:
            self._enter(share.key)
            return 0.0
        waiter = self._join(share, deadline)
        began = time.monotonic()
        timer = asyncio.get_running_loop().call_later(self.queue_timeout, self._refuse, waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled() and waiter.exception() is None:
                self.leave(share)  # it was this call's turn in the same moment
            raise
        finally:
            timer.cancel()
            self._remove(share.key, waiter)
            waited = time.monotonic() - began
            QUEUE_SECONDS.observe(waited)
        return waited

    def leave(self, share: Share) -> None:
        """Release one place of a caller; the next caller gets it."""
        self.active -= 1
        self._running[share.key] -= 1
        if not self._running[share.key]:
            del self._running[share.key]
        if share.key in self._waiting:
            # As for a caller with one call at a time, which waits again only now.
            self._waiting.move_to_end(share.key)
        while self._waiting and self.active < self._limit:
            key = min(self._waiting, key=self._running.__getitem__)
            waiters = self._waiting[key]
            waiter = waiters[0]
            self._remove(key, waiter)
            if waiters:
                self._waiting.move_to_end(key)
            if waiter.done():
                continue  # canceled or refused in this iteration of the event loop: its task has not run since
            self._enter(key)
            self._measure()
            waiter.set_result(None)

    def close(self, error: GatewayError) -> None:
        """Refuse the calls that wait, and those that would."""
        self._closed = error
        for waiters in tuple(self._waiting.values()):
            for waiter in tuple(waiters):
                self._refuse(waiter)

    def _enter(self, key: str) -> None:
        self.active += 1
        self._running[key] += 1

    def _join(self, share: Share, deadline: float | None) -> _Waiter:
        """Add a call to the queue."""
        if self._closed is not None:
            raise self._closed.again()
        own = self._waiting.get(share.key, ())
        if share.limits.queued and len(own) >= share.limits.queued:
            raise share.exceeded("queued")
        # Each caller gets one place before this one gets its next.
        ahead = sum(min(len(waiters), len(own) + 1) for waiters in self._waiting.values())
        expected = (self._interval or 0.0) * ahead
        if not self.queue_size or (deadline is not None and expected > deadline):
            raise self._full(expected)
        if self.queued >= self.queue_size:
            longest = max(self._waiting.values(), key=len)
            if len(longest) <= len(own) + 1:
                raise self._full(expected)
            self._refuse(longest[-1])
            self._remove(next(key for key, waiters in self._waiting.items() if waiters is longest), longest[-1])
        waiter: _Waiter = asyncio.get_running_loop().create_future()
        if not self.queued:
            self._last_turn = time.monotonic()
        self._waiting.setdefault(share.key, deque()).append(waiter)
        self.queued += 1
        return waiter

    def _remove(self, key: str, waiter: _Waiter) -> None:
        """Remove a call from the queue; no effect if it was removed."""
        waiters = self._waiting.get(key)
        if waiters is None or waiter not in waiters:
            return
        waiters.remove(waiter)
        self.queued -= 1
        if not waiters:
            del self._waiting[key]

    def _refuse(self, waiter: _Waiter) -> None:
        if not waiter.done():
            waiter.set_exception(self._full() if self._closed is None else self._closed.again())

    def _measure(self) -> None:
        now = time.monotonic()
        interval, self._last_turn = now - self._last_turn, now
        mean = interval if self._interval is None else self._interval
        self._interval = mean + _SMOOTHING * (interval - mean)

    def _full(self, expected: float = 0.0) -> GatewayError:
        waiting = f", and {self.queued} more calls wait" if self.queued else ""
        return GatewayError(
            Reason.TOO_MANY_STREAMS,
            f"this gateway already serves {self._limit} completions, which is its limit{waiting}: retry later",
            metadata={"limit": str(self._limit)},
            retry_after=max(RETRY_SECONDS, expected),
        )


class Place:
    """One place, taken or not. Leaving its `with` block releases it.

    Args:
        admission: The limit that it counts against.

    Attributes:
        waited: Seconds that it waited in the queue.
    """

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._share = UNCOUNTED
        self._taken = False
        self.waited = 0.0

    @property
    def taken(self) -> bool:
        """Whether it is taken."""
        return self._taken

    async def wait(self, share: Share, deadline: float | None = None) -> None:
        """Take the place, now or in turn; no effect if it is taken.

        Args:
            share: The caller, whose streams this counts among.
            deadline: Seconds until the call's deadline; `None` without one.

        Raises:
            GatewayError: CALLER_LIMIT_EXCEEDED: the caller has too many. Otherwise as `Admission.wait`.
        """
        if self._taken:
            return
        share.take(Use.STREAMS)
        try:
            self.waited = await self._admission.wait(share, deadline)
        except BaseException:
            share.give_back(Use.STREAMS)
            raise
        self._share, self._taken = share, True

    def take(self) -> None:
        """Take the place now, for no caller; no effect if it is taken.

        Raises:
            GatewayError: TOO_MANY_STREAMS, as `Admission.enter`.
        """
        if not self._taken:
            self._admission.enter(self._share)
            self._share.add(Use.STREAMS, 1)
            self._taken = True

    def release(self) -> None:
        """Release the place; no effect if it is not taken."""
        if self._taken:
            self._taken = False
            self._share.give_back(Use.STREAMS)
            self._admission.leave(self._share)

    def hand_over(self) -> Place:
        """Take the place if it is not taken, and move it to another owner. The new owner must release the returned `Place`.

        Raises:
            GatewayError: TOO_MANY_STREAMS, as `Admission.enter`.
        """
        self.take()
        other = Place(self._admission)
        other._share, other.waited = self._share, self.waited
        self._taken, other._taken = False, True
        return other

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
