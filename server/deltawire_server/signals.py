"""The signals that a process gets before its event loop can take them: noted from the first instruction on, and not lost.

Importing the gateway's libraries takes most of a second, in which SIGHUP and SIGTERM would end the process as if it had crashed.
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

_noted: list[int] = []


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """Note the signals while entered. Enter before anything that takes time; the event loop asks for `taken` when it takes over."""
    before = {number: signal.signal(number, _note) for number in (*STOP, RELOAD)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def taken() -> tuple[int, ...]:
    """The signals that came meanwhile, in order; they are forgotten here. Install the real handlers first."""
    came = tuple(_noted)
    _noted.clear()
    return came


def _note(number: int, _: FrameType | None) -> None:
    _noted.append(number)
