"""The clients of all languages through every case, and the doors through some."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import pytest

from tests.conformance import cases, client_driver, doors
from tests.conformance.cases import group

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.polyglot


@pytest.mark.parametrize("language", client_driver.languages())
async def test_every_case(language: str, tmp_path: Path) -> None:
    """Every language that has joined; Python is the reference of behavior."""
    command = client_driver.build(language, tmp_path)
    outcomes = await client_driver.run_side_by_side(command, cases.load())
    assert len(outcomes) == len(cases.load())
    assert "\n\n".join(f"{each.case}: {each.difference}" for each in outcomes if each.difference) == ""


@pytest.mark.parametrize("door", doors.DOORS)
async def test_each_door(door: str) -> None:
    """The groups that differ most in how they end; `make conformance` plays all that fit."""
    chosen = [
        case
        for case in cases.load()
        if doors.fits(case, door) and group(case.name) in ("fault", "refused", "tools", "unknown")
    ]
    opened = functools.partial(doors.opened, door)
    outcomes = await client_driver.run_side_by_side(doors.command(door), chosen, door=opened)
    assert len(outcomes) == len(chosen) > 10
    assert "\n\n".join(f"{each.case}: {each.difference}" for each in outcomes if each.difference) == ""
