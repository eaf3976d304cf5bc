"""The Python client's programs through every case; other languages' tests are beside this one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.conformance import cases, client_driver

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.polyglot


@pytest.mark.parametrize("language", ["python", "python-asyncio"])
async def test_every_case(language: str, tmp_path: Path) -> None:
    """The reference of behavior."""
    command = client_driver.build(language, tmp_path)
    outcomes = await client_driver.run_side_by_side(command, cases.load())
    assert len(outcomes) == len(cases.load())
    assert "\n\n".join(f"{each.case}: {each.difference}" for each in outcomes if each.difference) == ""
