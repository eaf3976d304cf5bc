"""The generated tables name everything that the lab has, and nothing else."""

from __future__ import annotations

import pytest

from tests.faults.callers import Action, caller_cells, unread_cells
from tests.faults.faults import FAULTS
from tests.faults.races import LIMITS, races
from tests.faults.table import COMMAND, README
from tests.support.generated import part


def _rows(name: str) -> set[tuple[str, str]]:
    rows = [
        line.strip("| ").split(" | ") for line in part(README, name, COMMAND).splitlines() if line.startswith("| ")
    ][2:]
    return {(what, where) for what, wheres, _ in rows for where in wheres.split(", ")}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("faults", {(fault.name, phase.value) for fault in FAULTS.values() for phase in fault.phases}),
        ("callers", {(cell.what, cell.place) for cell in [*caller_cells(), *unread_cells()]}),
        ("races", {(race.limit.name, race.arrival.name) for race in races()}),
    ],
)
def test_the_table_is_complete(name: str, expected: set[tuple[str, str]]) -> None:
    """If it is not, run `make faults`."""
    assert _rows(name) == expected


def test_names_are_unique_and_fit_a_table() -> None:
    """A name stands for one thing in the tables."""
    names = [*FAULTS, *(action.value for action in Action), *(limit.name for limit in LIMITS)]
    assert len(set(names)) == len(names)
    assert not [name for name in names if "|" in name]
