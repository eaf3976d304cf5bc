"""A bounded queue of events between the reader of an answer and the call that writes it. Merges queued deltas."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from deltawire_server.sansio.coalesce import Coalescer
from deltawire_server.sansio.events import ReasoningDelta, TextDelta, ToolCallArguments

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from deltawire_server.completions.adaptive import AdaptiveDelay
    from deltawire_server.sansio.events import StreamEvent

_PIECES = (TextDelta, ReasoningDelta, ToolCallArguments)
"""The events that can be merged, so that a delay makes sense."""


class EventBuffer:
    """A queue for one producer, the reader of an answer, and one consumer, the caller. Bounded by bytes.

    Args:
        limit: Size in bytes at which it is `full`.
        delay: Seconds for which deltas may be delayed to merge more of them; `None` to delay them under load only. Any other event
            is returned at once, with all events before it.
        adaptive: The delay under load, which the first deltas do not have; `None` for none.

    Attributes:
        joined: How many deltas were sent with an earlier one.
        on_room: Called when the queued events were taken and it had been `full`; `None` for nothing.
    """

    def __init__(self, limit: int, delay: float | None = 0.0, adaptive: AdaptiveDelay | None = None) -> None:
        self._limit = limit
        self._delay = delay
        self._adaptive = adaptive
        self._waiting = Coalescer()
        self._closed = False
        self._due = False  # whether the queued events are to be taken now
        self._had_pieces = False
        self._timer: asyncio.TimerHandle | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.joined = 0
        self.on_room: Callable[[], None] | None = None

    @property
    def size(self) -> int:
        """Memory of the queued events, in bytes."""
        return self._waiting.size

    @property
    def full(self) -> bool:
        """Whether the limit is reached, so that the reader must stop until `on_room`."""
        return self._waiting.size >= self._limit

    def put(self, events: Sequence[StreamEvent]) -> None:
        """Queue events. Never blocks; check `full` afterwards."""
        self._waiting.receive(events)
        if self._due or not self._waiting:
            return
        if self.full or not all(isinstance(event, _PIECES) for event in events):
            self._release()
        elif self._timer is None:
            seconds = self._seconds()
            if seconds:
                self._timer = asyncio.get_running_loop().call_later(seconds, self._release)
            else:
                self._release()

    def close(self) -> None:
        """Mark the end. Queued events can still be taken."""
        self._closed = True
        self._release()

    async def take(self) -> list[StreamEvent]:
        """Remove and return all queued events that are due, merged; waits while there are none. An empty list is the end.

        A cancelled call removes nothing.
        """
        while not self._due:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._due = self._closed
        was_full, queued = self.full, len(self._waiting)
        events = self._waiting.take()
        self.joined += queued - len(events)
        if was_full and self.on_room is not None:
            self.on_room()
        return events

    def _seconds(self) -> float:
        """How long the deltas that were just queued may be delayed."""
        if self._delay is not None:
            return self._delay
        if self._adaptive is None or not self._had_pieces:
            self._had_pieces = True
            return 0.0
        return self._adaptive.seconds

    def _release(self) -> None:
        self._due = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
