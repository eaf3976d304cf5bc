"""A database that gateways share, a fake vLLM, and gateways as processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING, Protocol

import pytest

from deltawire_server.fake_vllm import FakeVllm
from tests.gateways.support import SERVED, Gateway, connected
from tests.support.gateway_process import GatewayProcess

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.support.postgres import PostgresServer


class StartGateways(Protocol):
    """Runs gateways on the test's `database_url` in front of the test's `vllm` until the end of the test."""

    async def __call__(self, *names: str) -> list[Gateway]: ...


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database: an SQLite file, and one on a PostgreSQL server."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/registry.db"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.create_database()


@pytest.fixture
async def vllm() -> AsyncIterator[FakeVllm]:
    """A fake vLLM that serves several models."""
    async with FakeVllm(models=SERVED) as vllm:
        yield vllm


@pytest.fixture
async def start_gateways(database_url: str, vllm: FakeVllm, tmp_path: Path) -> AsyncIterator[StartGateways]:
    """Each gateway listens on a socket with its name, so that its address stays the same after a restart."""
    # Settings of another gateway in the developer's shell must not apply.
    foreign = {name: "" for name in os.environ if name.startswith(("DELTAWIRE_", "VLLM_"))}
    async with contextlib.AsyncExitStack() as stack:

        def process(name: str) -> GatewayProcess:
            flags = ["--listen", f"unix:{tmp_path}/{name}", "--database-url", database_url]
            flags += ["--vllm-url", vllm.base_url, "--set", "server.drain_delay=0", "--set", "server.drain_grace=2"]
            return GatewayProcess(flags, foreign, tmp_path / f"{name}.log")

        async def start(*names: str) -> list[Gateway]:
            processes = [process(name) for name in names]
            for each in processes:
                stack.push_async_callback(asyncio.to_thread, each.stop)
            # At once, as after a deployment: the first gateway creates the tables.
            await asyncio.gather(*(asyncio.to_thread(each.start) for each in processes))
            return [await stack.enter_async_context(connected(each)) for each in processes]

        yield start
