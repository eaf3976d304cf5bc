"""Where events wait between the reader and the caller."""

from __future__ import annotations

import asyncio

from deltawire_server.completions.event_buffer import EventBuffer
from deltawire_server.sansio.events import TextDelta


async def test_events_are_queued_and_taken() -> None:
    """The buffer accepts events without a reader, reports when it is full, and returns queued events after `close`."""
    handover = EventBuffer(200)
    handover.put([TextDelta(0, "a")])
    assert not handover.full
    handover.put([TextDelta(0, "b" * 300)])
    assert handover.full
    room = asyncio.create_task(handover.room())
    await asyncio.sleep(0)
    assert not room.done()
    assert await handover.take() == [TextDelta(0, "a" + "b" * 300)]
    await room
    assert not handover.full
    waiting = asyncio.create_task(handover.take())
    await asyncio.sleep(0)
    handover.put([TextDelta(0, "c")])
    handover.close()
    assert await waiting == [TextDelta(0, "c")]
    assert await handover.take() == []
