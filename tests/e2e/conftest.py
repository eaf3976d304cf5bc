"""One real vLLM and one gateway for all tests, and a client for each."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from deltawire import AsyncClient
from tests.e2e.support import CALL_SECONDS, Engine
from tests.support.gateway_process import GatewayProcess
from tests.support.vllm_cpu import VllmServer, set_up

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

LAST = "test_failures.py"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests that stop the engine after all others."""
    items.sort(key=lambda item: item.path.name == LAST)


@pytest.fixture(scope="session")
def vllm() -> Iterator[VllmServer]:
    """A real vLLM with an API key, healthy and warmed up."""
    with VllmServer(set_up()) as server:
        yield server


@pytest.fixture(scope="session")
def engine(vllm: VllmServer) -> Engine:
    """The same vLLM, called directly."""
    return Engine(vllm)


@pytest.fixture(scope="session")
def gateway(vllm: VllmServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """The command `deltawire-server` in front of it, on a free port, with a registry of its own."""
    directory = tmp_path_factory.mktemp("gateway")
    flags = ["--listen", "127.0.0.1:0", "--database-url", f"sqlite:///{directory / 'registry.db'}"]
    quick = ["--set", "server.drain_delay=0", "--set", "server.drain_grace=5"]
    # Far above the time of this vLLM between two events, and short enough to test an engine that was stopped.
    quick += ["--set", "providers.vllm.silence_timeout=30"]
    variables = {"VLLM_URL": vllm.base_url, "VLLM_API_TOKEN": vllm.api_key}
    # Settings of another gateway in the developer's shell must not apply.
    foreign = {name: "" for name in os.environ if name.startswith(("DELTAWIRE_", "VLLM_"))}
    with GatewayProcess([*flags, *quick], foreign | variables, directory / "gateway.log") as process:
        yield process


@pytest.fixture
async def client(gateway: GatewayProcess) -> AsyncIterator[AsyncClient]:
    """A client of that gateway."""
    async with AsyncClient(gateway.address, timeout=CALL_SECONDS) as connected:
        yield connected
