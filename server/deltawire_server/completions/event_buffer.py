"""A bounded queue of events between the task that reads an answer and the call that writes it. Merges queued deltas."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from deltawire_server.sansio.coalesce import Coalescer
from deltawire_server.sansio.events import ReasoningDelta, TextDelta, ToolCallArguments

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deltawire_server.sansio.events import StreamEvent

_PIECES = (TextDelta, ReasoningDelta, ToolCallArguments)
"""The events that can be merged, so that a delay makes sense."""


class EventBuffer:
    """A queue for one producer, the reader task, and one consumer, the caller. Bounded by bytes.

    Args:
        limit: Size in bytes at which it is `full`.
        delay: Seconds for which deltas may be delayed to merge more of them. Any other event is returned at once, with all events
            before it.
    """

    def __init__(self, limit: int, delay: float = 0.0) -> None:
        self._limit = limit
        self._delay = delay
        self._due = 0.0  # when the delay of the queued events ends, on the loop's clock
        self._waiting = Coalescer()
        self._closed = False
        self._something = asyncio.Event()
        self._pressing = asyncio.Event()
        self._room = asyncio.Event()

    @property
    def size(self) -> int:
        """Memory of the queued events, in bytes."""
        return self._waiting.size

    @property
    def full(self) -> bool:
        """Whether the limit is reached, so that the reader task must `await room()` before it continues."""
        return self._waiting.size >= self._limit

    def put(self, events: Sequence[StreamEvent]) -> None:
        """Queue events. Never blocks; check `full` afterwards."""
        if self._delay and not self._waiting:
            self._due = asyncio.get_running_loop().time() + self._delay
        self._waiting.receive(events)
        if self._delay and (self.full or not all(isinstance(event, _PIECES) for event in events)):
            self._pressing.set()
        self._something.set()

    def close(self) -> None:
        """Mark the end. Queued events can still be taken."""
        self._closed = True
        self._pressing.set()
        self._something.set()

    async def take(self) -> list[StreamEvent]:
        """Remove and return all queued events, merged; waits while there are none. An empty list is the end.

        A cancelled call removes nothing.
        """
        while not self._waiting and not self._closed:
            self._something.clear()
            await self._something.wait()
        if self._delay and not self._pressing.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(self._due):
                    await self._pressing.wait()
        if not self._closed:
            self._pressing.clear()
        events = self._waiting.take()
        self._room.set()
        return events

    async def room(self) -> None:
        """Wait until the queued events are taken."""
        self._room.clear()
        await self._room.wait()
