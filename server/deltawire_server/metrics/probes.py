"""The state that an orchestrator's HTTP probes read: whether the gateway is alive, and whether it accepts calls."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

HANGING_SECONDS = 30.0
"""Time without a `beat` after which the process hangs. The event loop of a healthy one is late by milliseconds."""


class Probes:
    """Written by the event loop of a process, and read by the thread that answers probes.

    Attributes:
        is_ready: Returns whether calls are accepted; set by the part that serves calls. It must not block.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.is_ready: Callable[[], bool] = lambda: False
        self._clock = clock
        self._beat: float | None = None

    def beat(self) -> None:
        """Record that the event loop runs; call it every second or so."""
        self._beat = self._clock()

    @property
    def is_alive(self) -> bool:
        """Whether the event loop runs. A gateway that still starts is alive, because a database may be slow."""
        return self._beat is None or self._clock() - self._beat < HANGING_SECONDS
