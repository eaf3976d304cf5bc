"""Long work in steps: one step in a turn of the event loop, and time for others between them."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

from deltawire_server import pacing
from deltawire_server.pacing import give_way

if TYPE_CHECKING:
    import pytest


class Clock:
    """A clock that shows what it is set to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        """As in `time`."""
        return self.now


async def test_one_step_in_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tasks have long work, others wait for one step only; and the tasks take their steps in order."""
    clock = Clock()
    monkeypatch.setattr(pacing, "time", clock)
    steps: list[tuple[int, int]] = []
    turn = 0

    async def work(number: int) -> None:
        for _ in range(3):
            await give_way()
            clock.now += pacing.SHORT_SECONDS
            steps.append((turn, number))

    tasks = [asyncio.create_task(work(number)) for number in range(20)]
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0)
        turn += 1
    turns = [turn for turn, _ in steps]
    assert len(set(turns)) == len(turns) == 60
    assert [number for _, number in steps] == [*range(20)] * 3


async def test_short_steps_share_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many calls with a short step each are not delayed by as many turns; a longer step ends that."""
    clock = Clock()
    monkeypatch.setattr(pacing, "time", clock)
    turns: list[int] = []
    turn = 0

    async def work(number: int) -> None:
        await give_way()
        turns.append(turn)
        clock.now += pacing.SHORT_SECONDS if number == 22 else 0.0

    tasks = [asyncio.create_task(work(number)) for number in range(26)]
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0)
        turn += 1
    assert list(Counter(turns).values()) == [1, 2, 4, 8, 8, 1, 2]


async def test_others_get_time_after_some_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """In proportion to the steps, so that many long steps delay others no more than the last of them."""
    clock = Clock()
    monkeypatch.setattr(pacing, "time", clock)
    rests: list[float] = []
    loop = asyncio.get_running_loop()
    call_later = loop.call_later

    def noted(delay: float, *args: object) -> asyncio.TimerHandle:
        rests.append(delay)
        return call_later(0, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "call_later", noted)
    for seconds in (0.001, 0.003, 0.002, 0.030, 0.0):
        await give_way()
        clock.now += seconds
    await give_way()
    assert rests == [0.006 * pacing.REST, 0.030 * pacing.REST]


async def test_a_canceled_task_leaves_the_line() -> None:
    """Those behind it get their turns."""
    ends = asyncio.Queue[str]()

    async def work(name: str) -> None:
        await give_way()
        ends.put_nowait(name)

    tasks = [asyncio.create_task(work(name)) for name in "abc"]
    await asyncio.sleep(0)
    tasks[1].cancel()
    assert [await ends.get(), await ends.get()] == ["a", "c"]


def test_each_event_loop_has_a_line() -> None:
    """A loop that was closed in the middle of it does not stop another."""

    async def work() -> None:
        await asyncio.gather(*(give_way() for _ in range(3)))

    async def left_alone() -> None:
        asyncio.get_running_loop().create_task(work())
        await asyncio.sleep(0)

    asyncio.run(left_alone())
    asyncio.run(work())
