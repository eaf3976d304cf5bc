from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from deltawire_server.registry.messages import some
from tests.registry.helpers import failure_of

if TYPE_CHECKING:
    from deltawire_server.registry.registry import ModelRegistry
    from tests.support.fake_provider import FakeProvider


async def test_messages_stay_short(registry: ModelRegistry, alpha: FakeProvider) -> None:
    """They travel in the trailers, which have a limit."""
    alpha.served = [f"{number}{'x' * 1000}" for number in range(50)]
    failure = await failure_of(registry.get("y" * 100_000))
    assert len(failure.message) <= 1024
    assert len(failure.metadata["model"]) <= 257


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        ([], ""),
        (["a", "b"], "a, b"),
        ([str(number) for number in range(20)], ", ".join(map(str, range(20)))),
        ([str(number) for number in range(21)], ", ".join(map(str, range(20))) + " and 1 more"),
        (["x" * 200] * 4, ", ".join(["x" * 200] * 3) + " and 1 more"),
        (["x" * 1000, "y"], "x" * 256 + "…, y"),
    ],
)
def test_some_names(names: list[str], shown: str) -> None:
    """Few in full, of many the first, and always at least one."""
    assert some(names) == shown
