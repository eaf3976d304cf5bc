"""A refusal, or an answer's end, that comes as a limit of the gateway's passes: one of the two, and never OK and empty."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.faults.lab import Lab, nothing_left
from tests.faults.races import LIMITS, moved_clock, race_sample, races, run_race
from tests.faults.table import Tally, check

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.faults.lab import Result
    from tests.faults.races import Race

pytestmark = pytest.mark.asyncio(loop_scope="module")

NAMES = [limit.name for limit in LIMITS]


@pytest.fixture(scope="module")
def tally() -> Iterator[Tally]:
    """Collects all results; the table of the docs is written once all are there."""
    tally = Tally("races")
    yield tally
    tally.write(complete=set(NAMES))


async def _run(lab: Lab, some: list[Race]) -> list[Result[Race]]:
    with moved_clock() as clock:
        async with nothing_left(lab):
            return [await run_race(lab, clock, race) for race in some]


@pytest.mark.parametrize("name", NAMES)
async def test_sample(name: str, shared: Lab) -> None:
    """Every arrival, with the kinds of calls and the distances in turn."""
    results = await _run(shared, [race for race in race_sample() if race.limit.name == name])
    check(results)


@pytest.mark.faults
@pytest.mark.parametrize("name", NAMES)
async def test_all(name: str, shared: Lab, tally: Tally) -> None:
    """Every arrival, kind of call and distance."""
    results = await _run(shared, [race for race in races() if race.limit.name == name])
    tally.add((result.cell.limit.name, result.cell.arrival.name, result) for result in results)
    check(results)
