"""The TypeScript client's program through every case."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.conformance import cases, client_driver

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.polyglot


async def test_every_case(tmp_path: Path) -> None:
    """As the Python client."""
    command = client_driver.build("typescript", tmp_path)
    outcomes = await client_driver.run_side_by_side(command, cases.load())
    assert len(outcomes) == len(cases.load())
    assert "\n\n".join(f"{each.case}: {each.difference}" for each in outcomes if each.difference) == ""
