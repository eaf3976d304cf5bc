"""Records the signals that arrive before the event loop handles them, so that none is lost.

Importing the gateway's libraries takes most of a second. By default, SIGHUP or SIGTERM would kill the process in this time.
"""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

STOP = (signal.SIGTERM, signal.SIGINT)
RELOAD = signal.SIGHUP

_recorded: list[int] = []


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Record signals within this context. Enter it first. Call `take_recorded` once the event loop handles signals."""
    before = {number: signal.signal(number, _record) for number in (*STOP, RELOAD)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def take_recorded() -> tuple[int, ...]:
    """Return the recorded signals in order, and clear them. Install the final handlers before this call."""
    numbers = tuple(_recorded)
    _recorded.clear()
    return numbers


def _record(number: int, _: FrameType | None) -> None:
    _recorded.append(number)
