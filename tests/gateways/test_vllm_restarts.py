"""A vLLM stops, starts, and restarts with another model: watches report each change."""

from __future__ import annotations

import asyncio
import sys
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from deltawire import AsyncClient, ModelNotFoundError, UpstreamUnavailableError
from deltawire.v1.model_registry_pb2 import ModelState
from tests.gateways.support import client_watch, following
from tests.support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.conftest import StartGateway

SERVING = ModelState.MODEL_STATE_SERVING
UNAVAILABLE = ModelState.MODEL_STATE_UNAVAILABLE
NEVER = 3600.0
"""Seconds between two listings; no test waits for the second one."""


@asynccontextmanager
async def vllm_serving(model: str, port: int) -> AsyncIterator[None]:
    """The fake vLLM in its own process, until the end of the block."""
    command = (sys.executable, "-m", "deltawire_server.fake_vllm", "--port", str(port), "--model", model)
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert b"listening" in await process.stdout.readline()
        yield
    finally:
        process.kill()
        await process.wait()


async def test_a_vllm_that_restarts(start_gateway: StartGateway) -> None:
    """Without any call, the models of a vLLM are listed, unavailable, available and replaced; a registered model remains."""
    port = free_port()
    provider = {"refresh_interval": 0.1}
    async with (
        start_gateway(base_url=f"http://127.0.0.1:{port}", provider=provider) as gateway,
        AsyncClient(gateway.address) as client,
        following(client_watch(client)) as watch,
    ):
        assert not watch.models
        async with vllm_serving("llama", port):
            await watch.until_state("vllm/llama", SERVING)
            await client.models.register("mine", provider_model_id="llama")
            await watch.until_state("mine", SERVING)
        await watch.until_state("mine", UNAVAILABLE)
        async with vllm_serving("llama", port):
            await watch.until_state("mine", SERVING)
        await watch.until_state("mine", UNAVAILABLE)
        async with vllm_serving("qwen", port):
            await watch.until_state("vllm/qwen", SERVING)
            assert watch.models["mine"].state == UNAVAILABLE
            await client.models.update("mine", provider_model_id="qwen")
            await watch.until_removed("vllm/qwen")
            assert (await client.chat.create("hi", model="mine")).started.model == "mine"
    assert [(change, model_id) for change, model_id, _ in watch.changes] == [
        ("ADDED", "vllm/llama"),
        # A registered model replaces its target in listings.
        ("ADDED", "mine"),
        ("REMOVED", "vllm/llama"),
        ("MODIFIED", "mine"),
        ("MODIFIED", "mine"),
        ("MODIFIED", "mine"),
        ("ADDED", "vllm/qwen"),
        ("MODIFIED", "mine"),
        ("REMOVED", "vllm/qwen"),
    ]


async def test_a_failed_call_updates_the_states(start_gateway: StartGateway) -> None:
    """One failed call updates the models of a provider for all watches, before its next listing."""
    port = free_port()
    provider = {"refresh_interval": NEVER}
    async with (
        start_gateway(base_url=f"http://127.0.0.1:{port}", provider=provider) as gateway,
        AsyncClient(gateway.address) as client,
        AsyncExitStack() as stack,
    ):
        async with vllm_serving("llama", port):
            await client.models.refresh()
            watch = await stack.enter_async_context(following(client_watch(client)))
            assert watch.models["vllm/llama"].state == SERVING
        async with vllm_serving("qwen", port):
            assert watch.models["vllm/llama"].state == SERVING  # no listing was made
            with pytest.raises(ModelNotFoundError):
                await client.chat.create("hi", model="llama")
            await watch.until_removed("vllm/llama")
            await watch.until_state("vllm/qwen", SERVING)
        with pytest.raises(UpstreamUnavailableError):
            await client.chat.create("hi", model="qwen")
        await watch.until_state("vllm/qwen", UNAVAILABLE)
        listing = client.models.list()
        assert [model.id async for model in listing] == ["vllm/qwen"]
        assert listing.unreachable_provider_ids == ["vllm"]
