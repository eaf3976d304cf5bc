"""Between the task that reads an answer and the call that writes it: events wait here, bounded, and are joined."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from deltawire_server.sansio.coalesce import Coalescer

if TYPE_CHECKING:
    from deltawire_server.sansio.events import Event


class Handover:
    """Where the reader task puts events and the caller takes them: one of each, bounded by bytes.

    Args:
        limit: Bytes that may wait before `full`.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting = Coalescer()
        self._closed = False
        self.exhausted = False
        """Whether the caller has been told that nothing more comes."""
        self._something = asyncio.Event()
        self._room = asyncio.Event()

    @property
    def full(self) -> bool:
        """Whether so much waits that the reader should `await room()` before it reads on."""
        return self._waiting.size >= self._limit

    def put(self, events: list[Event]) -> None:
        """Let events wait; never blocks, ask `full` afterwards."""
        self._waiting.receive(events)
        self._something.set()

    def close(self) -> None:
        """Nothing more comes. What waits can still be taken."""
        self._closed = True
        self._something.set()

    async def take(self) -> list[Event]:
        """All that waits, joined; waits for something if nothing does. Empty means that nothing more comes."""
        while not self._waiting and not self._closed:
            self._something.clear()
            await self._something.wait()
        events = self._waiting.take()
        self.exhausted = not events
        self._room.set()
        return events

    async def room(self) -> None:
        """Wait until what waited was taken."""
        self._room.clear()
        await self._room.wait()
