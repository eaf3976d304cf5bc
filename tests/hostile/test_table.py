"""The table names every attack, and no bar was broken when it was written."""

from __future__ import annotations

from tests.hostile.attacks import ATTACKS
from tests.hostile.table import COMMAND, PART, README
from tests.support.generated import part


def test_the_table_is_complete_and_green() -> None:
    """If it is not, run `make hostile`."""
    rows = [
        line.strip("| ").split(" | ") for line in part(README, PART, COMMAND).splitlines() if line.startswith("| ")
    ][2:]
    assert [(area, name) for area, name, *_ in rows] == [(attack.area, attack.name) for attack in ATTACKS]
    assert {row[-1] for row in rows} == {"ok"}


def test_names_are_unique_and_fit_a_table() -> None:
    """A name stands for one attack in the table."""
    names = [attack.name for attack in ATTACKS]
    assert len(set(names)) == len(names)
    assert not [name for name in names if "|" in name]
