"""A vLLM that stops, starts, and comes back with another model: watchers are told as it happens."""

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
"""Seconds between two listings, of which no test sees the second."""


@asynccontextmanager
async def vllm_serving(model: str, port: int) -> AsyncIterator[None]:
    """The look-alike as a process of its own, until this is left."""
    command = (sys.executable, "-m", "deltawire_server.fake_vllm", "--port", str(port), "--model", model)
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert b"listening" in await process.stdout.readline()
        yield
    finally:
        process.kill()
        await process.wait()


async def test_a_vllm_that_comes_and_goes(start_gateway: StartGateway) -> None:
    """Found, away, back, and back with another model, without anybody calling; a registered model outlives that."""
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
            await watch.until_gone("vllm/qwen")
            assert (await client.chat.create("hi", model="mine")).started.model == "mine"
    assert [(change, model_id) for change, model_id, _ in watch.changes] == [
        ("ADDED", "vllm/llama"),
        # Whoever is registered stands for what it leads to.
        ("ADDED", "mine"),
        ("REMOVED", "vllm/llama"),
        ("MODIFIED", "mine"),
        ("MODIFIED", "mine"),
        ("MODIFIED", "mine"),
        ("ADDED", "vllm/qwen"),
        ("MODIFIED", "mine"),
        ("REMOVED", "vllm/qwen"),
    ]


async def test_a_call_notices_what_has_happened(start_gateway: StartGateway) -> None:
    """Long before the provider's next turn: one call that fails is enough for all watchers to know."""
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
            assert watch.models["vllm/llama"].state == SERVING  # nobody has looked
            with pytest.raises(ModelNotFoundError):
                await client.chat.create("hi", model="llama")
            await watch.until_gone("vllm/llama")
            await watch.until_state("vllm/qwen", SERVING)
        with pytest.raises(UpstreamUnavailableError):
            await client.chat.create("hi", model="qwen")
        await watch.until_state("vllm/qwen", UNAVAILABLE)
        listing = client.models.list()
        assert [model.id async for model in listing] == ["vllm/qwen"]
        assert listing.unreachable_provider_ids == ["vllm"]
