"""Callers that vanish, cancel, run out of time, end softly or do not read, at every event of every kind of call."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from tests.faults.callers import (
    STOP_READING,
    Action,
    CallerCell,
    caller_cells,
    caller_sample,
    read_steadily,
    run_caller,
    run_unread,
    unread_cells,
)
from tests.faults.lab import AT_ONCE, SLOW_SECONDS, CallKind, Lab, Result, lab, nothing_left
from tests.faults.script import PLACES, Phase
from tests.faults.table import Tally, check

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def tally() -> Iterator[Tally]:
    """Collects all results; the table of the docs is written once all are there."""
    tally = Tally("callers")
    yield tally
    tally.write(complete={STOP_READING, *(action.value for action in Action)})


async def _run(lab: Lab, some: list[CallerCell]) -> list[Result[CallerCell]]:
    slots = asyncio.Semaphore(AT_ONCE)

    async def one(cell: CallerCell) -> Result[CallerCell]:
        async with slots:
            return await (run_caller if cell.action else run_unread)(lab, cell)

    async with nothing_left(lab):
        return await asyncio.gather(*map(one, some))


@pytest.mark.parametrize("action", Action)
async def test_sample(action: Action, shared: Lab) -> None:
    """At each event once, with the kinds of calls in turn."""
    results = await _run(shared, [cell for cell in caller_sample() if cell.action is action])
    check(results)


@pytest.mark.faults
@pytest.mark.parametrize("action", Action)
async def test_all(action: Action, shared: Lab, tally: Tally) -> None:
    """All events and kinds of calls."""
    results = await _run(shared, [cell for cell in caller_cells() if cell.action is action])
    tally.add((result.cell.what, result.cell.place, result) for result in results)
    check(results)


async def test_a_caller_that_does_not_read_is_given_up(tmp_path: Path) -> None:
    """It gets what was written, and SLOW_CALLER; a retained stream can be resumed to its end."""
    async with lab(tmp_path, slow_caller_timeout=SLOW_SECONDS) as slow:
        check(await _run(slow, unread_cells([0, PLACES[Phase.TEXT], PLACES[Phase.TOOL]])))


@pytest.mark.faults
async def test_a_caller_that_does_not_read_from_any_event_on(tmp_path: Path, tally: Tally) -> None:
    """All events and kinds of calls."""
    async with lab(tmp_path, slow_caller_timeout=SLOW_SECONDS) as slow:
        results = await _run(slow, unread_cells())
    tally.add((result.cell.what, result.cell.place, result) for result in results)
    check(results)


async def test_a_caller_that_reads_one_message_after_the_other_is_not_slow(tmp_path: Path) -> None:
    """The limit is for each message: sixteen of them wait here, and take longer than that together."""
    async with lab(tmp_path, slow_caller_timeout=SLOW_SECONDS, queue_bytes=512 * 1024) as slow:
        seen = await read_steadily(slow, CallKind.STREAM, messages=32, pause=SLOW_SECONDS / 10)
    assert (seen.outcome, seen.broken) == ("OK", [])
