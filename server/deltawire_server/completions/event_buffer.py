"""Between the task that reads an answer and the call that writes it: events wait here, bounded, and are joined."""

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
"""What can be joined with more of its kind, so that it makes sense to hold it back."""


class EventBuffer:
    """Where the reader task puts events and the caller takes them: one of each, bounded by bytes.

    Args:
        limit: Bytes that may wait before `full`.
        delay: Seconds that pieces may be held back so that more can be joined with them; anything else is given at once, and
            with it all that came before.
    """

    def __init__(self, limit: int, delay: float = 0.0) -> None:
        self._limit = limit
        self._delay = delay
        self._due = 0.0  # on the loop's clock, when what waits must not be held back any longer
        self._waiting = Coalescer()
        self._closed = False
        self._something = asyncio.Event()
        self._pressing = asyncio.Event()
        self._room = asyncio.Event()

    @property
    def size(self) -> int:
        """Bytes of memory that wait."""
        return self._waiting.size

    @property
    def full(self) -> bool:
        """Whether so much waits that the reader should `await room()` before it reads on."""
        return self._waiting.size >= self._limit

    def put(self, events: Sequence[StreamEvent]) -> None:
        """Let events wait; never blocks, ask `full` afterwards."""
        if self._delay and not self._waiting:
            self._due = asyncio.get_running_loop().time() + self._delay
        self._waiting.receive(events)
        if self._delay and (self.full or not all(isinstance(event, _PIECES) for event in events)):
            self._pressing.set()
        self._something.set()

    def close(self) -> None:
        """Nothing more comes. What waits can still be taken."""
        self._closed = True
        self._pressing.set()
        self._something.set()

    async def take(self) -> list[StreamEvent]:
        """All that waits, joined; waits for something if nothing does. Empty means that nothing more comes.

        A take that is cancelled has taken nothing, and the next one goes on waiting where it was.
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
        """Wait until what waited was taken."""
        self._room.clear()
        await self._room.wait()
