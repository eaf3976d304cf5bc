"""The checks of servers: a gateway keeps them all, and a server that does not is noticed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from deltawire_server.fake_vllm import FakeVllm, Script
from tests.conformance import cases, scripted_server, server_checks
from tests.conformance.case_pb2 import Case, ServerCall
from tests.support.gateway_process import GatewayProcess

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.polyglot


@pytest.fixture
async def vllm() -> AsyncIterator[FakeVllm]:
    """One that takes its time for long answers."""
    async with FakeVllm(Script.generated(tokens=2000, tokens_per_second=400)) as vllm:
        yield vllm


@pytest.mark.parametrize("key", ["", "a-key-that-only-tests-know"], ids=["open", "with a key"])
async def test_a_gateway(vllm: FakeVllm, tmp_path: Path, key: str) -> None:
    """Every check, by its address alone."""
    flags = (
        "--vllm-url",
        vllm.base_url,
        "--listen",
        "127.0.0.1:0",
        "--metrics-listen",
        "off",
        "--set",
        "server.drain_delay=0",
    )
    database = f"sqlite:///{tmp_path}/registry.db"
    access = {"DELTAWIRE_ACCESS_KEYS": f"checker call,read {key}" if key else ""}
    gateway = GatewayProcess((*flags, "--database-url", database), access, tmp_path / "log")
    # In a thread, because the vLLM that the gateway asks runs in this one.
    await asyncio.to_thread(gateway.start)
    try:
        outcomes = await server_checks.run(gateway.address, key)
    finally:
        await asyncio.to_thread(gateway.stop)
    assert [outcome.case for outcome in outcomes] == server_checks.names()
    assert "\n\n".join(f"{each.case}: {each.difference}" for each in outcomes if each.difference) == ""


@pytest.mark.parametrize("name", ["interrupted/without-completed", "fault/status-ok-by-a-proxy", "unknown/enum-values"])
async def test_a_server_that_breaks_the_contract_is_noticed(name: str) -> None:
    """It sends OK after a stream without `completed`, or with an error in it; or a verdict that there is not."""
    (case,) = [each for each in cases.load() if each.name == name]
    played = Case(calls=[ServerCall(steps=call.steps) for call in case.calls])
    async with scripted_server.serving() as server:
        server.play(played)
        (outcome,) = await server_checks.run(server.target, prefix="stream/contract")
    assert "contract" in outcome.difference
