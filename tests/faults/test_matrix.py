"""Every fault, at every phase, seen by every kind of call: what the contract allows, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.faults.faults import FAULTS
from tests.faults.lab import CallKind, Cell, Lab, Result, at_every_event, cells, nothing_left, run_alone, sample
from tests.faults.script import Phase
from tests.faults.table import Tally, check

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.asyncio(loop_scope="module")

SAMPLE = {name: [cell for cell in sample() if cell.fault.name == name] for name in FAULTS}


@pytest.fixture(scope="module")
def tally() -> Iterator[Tally]:
    """Collects all results; the table of the docs is written once all are there."""
    tally = Tally("faults")
    yield tally
    tally.write(complete=set(FAULTS))


async def _run(lab: Lab, folder: Path, some: list[Cell]) -> list[Result[Cell]]:
    if some[0].fault.alone:
        return [await run_alone(folder, cell) for cell in some]
    async with nothing_left(lab):
        return await lab.run_all(some)


async def test_the_sample_has_every_fault_phase_and_call() -> None:
    """Nothing is left out of `make check`."""
    chosen = sample()
    assert {cell.fault.name for cell in chosen} == set(FAULTS)
    assert {cell.phase for cell in chosen} == set(Phase)
    assert {cell.kind for cell in chosen} == set(CallKind)


@pytest.mark.parametrize("name", FAULTS)
async def test_sample(name: str, shared: Lab, tmp_path: Path) -> None:
    """Each phase once, with the kinds of calls in turn."""
    results = await _run(shared, tmp_path, SAMPLE[name])
    check(results)


@pytest.mark.parametrize("name", ["eof", "reset", "body-ends", "silence"])
async def test_an_answer_that_stops_after_any_event(name: str, shared: Lab, tmp_path: Path) -> None:
    """Each kind of call; the phases are only some of the places."""
    check(await _run(shared, tmp_path, at_every_event(name)))


@pytest.mark.faults
@pytest.mark.parametrize("name", FAULTS)
async def test_all(name: str, shared: Lab, tmp_path: Path, tally: Tally) -> None:
    """All phases and kinds of calls."""
    results = await _run(shared, tmp_path, cells([name]))
    tally.add((result.cell.fault.name, result.cell.phase.value, result) for result in results)
    check(results)
