"""Splits long work into steps, and lets other calls run between the steps.

A call needs about ten iterations of the event loop. If long work only yielded to the loop after each step, each of these
iterations would run one step of every large request: with ten large requests and steps of 10 ms, a call would be delayed by a
second. So all long work of the process shares one queue. Each iteration of the loop runs one step, or several while they are short,
and after a few milliseconds of steps the queue pauses for about as long as a short call takes.
"""

from __future__ import annotations

import asyncio
import functools
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

WORK_SECONDS = 0.005
"""Duration of steps after which the queue pauses."""

REST = 0.5
"""Duration of a pause, as a share of the time that the steps took. With 5 ms of steps it is 2.5 ms: an undisturbed health check
takes 1 to 2 ms."""

SHORT_SECONDS = 0.001
"""Duration of the steps of an iteration below which the next iteration runs twice as many of them; otherwise it runs one."""

MOST_STEPS = 8
"""Limit for the steps of an iteration. Under load it takes milliseconds, and hundreds of calls have a short step each."""


async def give_way() -> None:
    """Wait for the turn of the next step of long work. A step should take at most a few milliseconds."""
    await _line().turn()


def call_in_turn(step: Callable[[], None]) -> None:
    """Call a step of long work in its turn."""
    _line().add(step)


def is_busy() -> bool:
    """Whether steps of long work wait, or the queue pauses after them."""
    return _line().is_moving


def charge(seconds: float) -> None:
    """Count a step that did not wait for its turn: the next ones wait for a pause. Short steps are not counted."""
    if seconds >= SHORT_SECONDS:
        _line().charge(seconds)


class _Line:
    """The queue of one event loop: the next steps of all long work."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.proxy(loop)
        self._waiting: deque[Callable[[], None]] = deque()
        self.is_moving = False
        self._steps = 1  # of the next iteration
        self._began = 0.0
        self._took = 0.0
        self._worked = 0.0  # since the last pause

    async def turn(self) -> None:
        turn: asyncio.Future[None] = self._loop.create_future()
        self.add(functools.partial(_begin, turn))
        await turn

    def add(self, step: Callable[[], None]) -> None:
        self._waiting.append(step)
        if not self.is_moving:
            self.is_moving = True
            self._loop.call_soon(self._move)

    def charge(self, seconds: float) -> None:
        if self.is_moving:
            self._worked += seconds
        else:
            self.is_moving = True
            self._loop.call_later(seconds * REST, self._go_on)

    def _move(self) -> None:
        """Run the steps of an iteration. A task that a step wakes runs after `_wake`, so its time is measured too."""
        began = time.perf_counter()
        self._loop.call_soon(self._wake)
        try:
            for _ in range(min(self._steps, len(self._waiting))):
                self._waiting.popleft()()
        finally:
            self._took = time.perf_counter() - began
            self._loop.call_soon(self._end)

    def _wake(self) -> None:
        self._began = time.perf_counter()

    def _end(self) -> None:
        """After the steps of an iteration: go on, or pause."""
        took = self._took + time.perf_counter() - self._began
        self._worked += took
        self._steps = min(2 * self._steps, MOST_STEPS) if took < SHORT_SECONDS else 1
        if self._worked >= WORK_SECONDS:
            self._loop.call_later(self._worked * REST, self._go_on)
            self._worked = 0.0
        else:
            self._go_on()

    def _go_on(self) -> None:
        if self._waiting:
            self._move()
        else:
            self.is_moving = False


def _begin(turn: asyncio.Future[None]) -> None:
    if not turn.done():  # else its task was canceled
        turn.set_result(None)


_lines: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Line] = weakref.WeakKeyDictionary()


def _line() -> _Line:
    loop = asyncio.get_running_loop()
    line = _lines.get(loop)
    if line is None:
        line = _lines[loop] = _Line(loop)
    return line
