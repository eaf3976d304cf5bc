"""The queue of events between the reader of an answer and the caller."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from deltawire_server.completions.adaptive import AdaptiveDelay
from deltawire_server.completions.event_buffer import EventBuffer
from deltawire_server.metrics.table import LOOP_LAG_SECONDS
from deltawire_server.sansio.events import ChoiceFinished, StopReason, TextDelta

if TYPE_CHECKING:
    import pytest


async def test_events_wait_and_are_taken() -> None:
    """Adjacent deltas are merged, a full queue reports room, and the events at the close are still returned."""
    buffer = EventBuffer(200)
    room: list[bool] = []
    buffer.on_room = lambda: room.append(buffer.full)
    buffer.put([TextDelta(0, "a")])
    assert not buffer.full
    buffer.put([TextDelta(0, "b" * 300)])
    assert buffer.full
    assert room == []
    assert await buffer.take() == [TextDelta(0, "a" + "b" * 300)]
    assert room == [False]
    waiting = asyncio.create_task(buffer.take())
    await asyncio.sleep(0)
    buffer.put([TextDelta(0, "c")])
    buffer.close()
    assert await waiting == [TextDelta(0, "c")]
    assert await buffer.take() == []
    assert room == [False]


async def test_a_canceled_take_removes_nothing() -> None:
    """The next one returns the events."""
    buffer = EventBuffer(200)
    waiting = asyncio.create_task(buffer.take())
    await asyncio.sleep(0)
    buffer.put([TextDelta(0, "a")])
    waiting.cancel()
    await asyncio.wait([waiting])
    assert await buffer.take() == [TextDelta(0, "a")]


async def test_deltas_are_delayed_under_load() -> None:
    """But not the first ones, and nothing else with the deltas before it."""
    adaptive = AdaptiveDelay(3600.0)
    adaptive.seconds = 3600.0
    buffer = EventBuffer(1000, None, adaptive)
    buffer.put([TextDelta(0, "a")])
    assert await buffer.take() == [TextDelta(0, "a")]
    waiting = asyncio.create_task(buffer.take())
    buffer.put([TextDelta(0, "b")])
    buffer.put([TextDelta(0, "c")])
    await asyncio.sleep(0.01)
    assert not waiting.done()
    finished = ChoiceFinished(0, StopReason.END_OF_TURN, "stop", False, None)
    buffer.put([finished])
    assert await waiting == [TextDelta(0, "bc"), finished]


async def test_the_delay_ends_by_itself() -> None:
    """Without a further event."""
    adaptive = AdaptiveDelay(3600.0)
    adaptive.seconds = 0.01
    buffer = EventBuffer(1000, None, adaptive)
    for text in "ab":
        buffer.put([TextDelta(0, text)])
        assert await buffer.take() == [TextDelta(0, text)]


def test_the_delay_follows_the_load() -> None:
    """It grows in steps to its limit while the process is busy or late, and shrinks to nothing when there is time to spare."""
    adaptive = AdaptiveDelay(0.1)
    for _ in range(20):
        adaptive.adapt(0.2, 0.0)
    assert adaptive.seconds == 0
    for _ in range(20):
        adaptive.adapt(0.3, 0.0)
    assert adaptive.seconds == 0.1
    for _ in range(40):
        adaptive.adapt(0.1, 0.0)
    assert adaptive.seconds == 0


def test_one_late_turn_delays_nothing() -> None:
    """It may be another process's; two in a row count."""
    adaptive = AdaptiveDelay(0.1)
    for late in (True, False, True, False):
        adaptive.adapt(0.1, 0.02 if late else 0.0)
        assert adaptive.seconds == 0
    adaptive.adapt(0.1, 0.02)
    adaptive.adapt(0.1, 0.02)
    assert adaptive.seconds > 0


async def test_without_a_longest_delay_only_the_lag_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 0, tokens are never delayed."""
    monkeypatch.setattr("deltawire_server.completions.adaptive.INTERVAL", 0.001)
    lags: list[float] = []
    monkeypatch.setattr(LOOP_LAG_SECONDS, "observe", lags.append)
    adaptive = AdaptiveDelay(0)
    measuring = asyncio.create_task(adaptive.adapt_for_ever())
    await asyncio.sleep(0)
    time.sleep(0.02)  # noqa: ASYNC251 (a late event loop)
    while not lags:  # noqa: ASYNC110 (nothing announces it)
        await asyncio.sleep(0.001)
    measuring.cancel()
    assert adaptive.seconds == 0
    assert lags[0] > 0.01
