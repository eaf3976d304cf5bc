"""What several of these tests share: a container engine, and the image that it builds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.deploy.engine import Engine

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """An engine without any images."""
    with Engine() as engine:
        yield engine


@pytest.fixture(scope="session")
def image(engine: Engine) -> dict[str, Any]:
    """The image, as the engine describes it."""
    return engine.build()
