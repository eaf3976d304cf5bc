"""Splits long work into steps, and lets other calls run between the steps.

A call needs about ten iterations of the event loop. If long work only yielded to the loop after each step, each of these
iterations would run one step of every large request: with ten large requests and steps of 10 ms, a call would be delayed by a
second. So all long work of the process shares one queue. Each iteration of the loop runs at most one step, and after a few
milliseconds of steps the queue pauses for about as long as a short call takes.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import deque

WORK_SECONDS = 0.005
"""Duration of steps after which the queue pauses."""

REST = 0.5
"""Duration of a pause, as a share of the time that the steps took. With 5 ms of steps it is 2.5 ms: an undisturbed health check
takes 1 to 2 ms."""


async def give_way() -> None:
    """Wait for the turn of the next step of long work. A step should take at most a few milliseconds."""
    await _line().turn()


class _Line:
    """The queue of one event loop: the tasks that wait for their next step."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.proxy(loop)
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_moving = False
        self._worked = 0.0
        self._began = 0.0

    async def turn(self) -> None:
        turn: asyncio.Future[None] = self._loop.create_future()
        self._waiting.append(turn)
        if not self._is_moving:
            self._is_moving = True
            self._began = time.perf_counter()
            self._loop.call_soon(self._move)
        await turn

    def _move(self) -> None:
        """After a step: start the next one, or pause. Other work in this iteration of the loop counts as well."""
        now = time.perf_counter()
        self._worked += now - self._began
        self._began = now
        if self._worked >= WORK_SECONDS:
            self._loop.call_later(self._worked * REST, self._rested)
            self._worked = 0.0
            return
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # else its task was canceled
                turn.set_result(None)
                self._loop.call_soon(self._move)
                return
        self._is_moving = False

    def _rested(self) -> None:
        self._began = time.perf_counter()
        self._move()


_lines: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Line] = weakref.WeakKeyDictionary()


def _line() -> _Line:
    loop = asyncio.get_running_loop()
    line = _lines.get(loop)
    if line is None:
        line = _lines[loop] = _Line(loop)
    return line
