"""How long deltas are held back under load, so that more of them share a message.

A message costs the same whatever is in it, and half of the process's time is spent on messages. While the process is idle, every
token is sent at once and alone. While it is busy, deltas are held back for a delay that grows in small steps, up to a limit, and
shrinks again when there is time to spare: never longer than the load needs.
"""

from __future__ import annotations

import asyncio
import time

from deltawire_server.metrics.table import ADAPTIVE_DELAY, LOOP_LAG_SECONDS

INTERVAL = 0.1
"""Seconds between two measurements."""

BUSY = 0.25
"""CPU time of the process per second above which the delay grows."""

IDLE = 0.2
"""CPU time of the process per second below which the delay shrinks. Between the two, it stays."""

LAG = 0.005
"""Seconds that the event loop runs late, twice in a row, above which the delay grows: one late turn may be another process's."""

STEPS = 4
"""Intervals in which the delay grows from nothing to its limit."""

SHRINK = 0.8
"""The factor by which the delay shrinks in an interval."""

LEAST = 0.001
"""Seconds below which the delay is 0."""


class AdaptiveDelay:
    """The delay of one process.

    Args:
        longest: Its limit in seconds; 0 disables it.

    Attributes:
        seconds: The delay now.
    """

    def __init__(self, longest: float) -> None:
        self.seconds = 0.0
        self._longest = longest
        self._was_late = False

    async def adapt_for_ever(self) -> None:
        """Measure the load and the lag of the event loop, and adapt the delay, until canceled."""
        loop = asyncio.get_running_loop()
        while True:
            cpu, began = time.process_time(), loop.time()
            await asyncio.sleep(INTERVAL)
            took = loop.time() - began
            LOOP_LAG_SECONDS.observe(max(0.0, took - INTERVAL))
            if self._longest:
                self.adapt((time.process_time() - cpu) / took, took - INTERVAL)
                ADAPTIVE_DELAY.set(self.seconds)

    def adapt(self, load: float, lag: float) -> None:
        """Adapt the delay to one measurement.

        Args:
            load: CPU time of the process per second.
            lag: Seconds that the event loop ran late.
        """
        late = lag > LAG
        if load > BUSY or (late and self._was_late):
            self.seconds = min(self._longest, self.seconds + self._longest / STEPS)
        elif load < IDLE:
            self.seconds = self.seconds * SHRINK if self.seconds > LEAST else 0.0
        self._was_late = late
