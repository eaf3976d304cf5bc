"""One lab for all tests of a module: hundreds of cells share a gateway and an upstream."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
import structlog

from deltawire_server.telemetry import configure_logging
from tests.faults.lab import Lab, lab

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """No line for each of thousands of calls: a failed test says itself what is wrong."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    configure_logging("error", "json")
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    """A lab that is up."""
    async with lab(tmp_path_factory.mktemp("lab")) as made:
        yield made
