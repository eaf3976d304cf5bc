"""Long work in steps, between which other calls get time.

A call passes through the event loop about ten times. If long work only went to the end of the loop's queue after each step,
every one of these turns would wait for one more step of each request that is worked on: with ten steps of 10 ms a call would be
delayed by a second as soon as there are ten such requests. So all long work of the process forms one line: one step in a turn
of the loop, and after some milliseconds of steps the loop is left to the others for about as long as a short call takes.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections import deque

WORK_SECONDS = 0.005
"""Steps after which others get time."""

REST = 0.5
"""Of the time that the steps took. Half of 5 ms: a health check takes 1 to 2 ms if nothing else runs."""


async def give_way() -> None:
    """Wait in line for the next step of long work. A step should take at most some milliseconds."""
    await _line().turn()


class _Line:
    """The tasks of one event loop that wait for their next step."""

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
        """After a step: begin the next one, or let others run first. What they did in this turn counts as well."""
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
