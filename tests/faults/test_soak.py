"""The soak in small: `make soak` runs it for minutes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.faults.soak import Soak

if TYPE_CHECKING:
    from tests.faults.lab import Lab

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_a_few_seconds(shared: Lab) -> None:
    """Calls of all kinds beside faults: no violation, and nothing is left behind."""
    soaked = Soak(shared, seconds=3.0)
    await soaked.run(calls=4)
    assert soaked.problems == []
    assert {outcome.partition(":")[0] for outcome in soaked.outcomes} >= {"Stream", "INCREMENTAL", "retained", "Create"}


async def test_the_slope_is_that_of_the_second_half(shared: Lab) -> None:
    """In MiB per minute; what is filled at first does not count."""
    soaked = Soak(shared, seconds=0.0)
    soaked.memory = [(float(second), 10.0 * second) for second in range(50)]
    soaked.memory += [(float(second), 500.0 + second / 30) for second in range(50, 100)]
    assert soaked.slope == pytest.approx(2.0)
