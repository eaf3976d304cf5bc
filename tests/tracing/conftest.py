"""A collector, and gateways that export to it."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol

import pytest

from deltawire_server.tracing.exporting import exporting
from tests.processes.conftest import start_worker
from tests.support.collector import Collector

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from contextlib import AbstractAsyncContextManager

__all__ = ["start_worker"]  # a fixture of the neighbors

VERSION = "1.2.3"


class Traced(Protocol):
    """Exports traces to the collector while it is entered; afterwards, the collector has all of them."""

    def __call__(self, worker: int | None = None) -> AbstractAsyncContextManager[Collector]: ...


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the variables of the shell that runs the tests."""
    for name in [*os.environ]:
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector, which the environment names."""
    with Collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        yield collector


@pytest.fixture
def traced(collector: Collector) -> Traced:
    """Exports traces."""

    @asynccontextmanager
    async def run(worker: int | None = None) -> AsyncIterator[Collector]:
        async with exporting(os.environ, VERSION, worker):
            yield collector

    return run
