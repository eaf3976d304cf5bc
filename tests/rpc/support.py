"""The ModelRegistry service alone, over providers in memory, on a real server."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grpc import aio

from deltawire.v1 import model_registry_pb2 as pb
from deltawire.v1 import model_registry_pb2_grpc as pb_grpc
from deltawire_server.registry.registry import ModelRegistry
from deltawire_server.registry.store import Store
from deltawire_server.rpc.interceptors import CallInterceptor
from deltawire_server.rpc.model_registry import SLOW_WATCHER_SECONDS, ModelRegistryServicer
from deltawire_server.upstream.providers import Providers
from tests.support.gateway import WAIT, Failure, taken_apart

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from deltawire_server.registry.feed import Feed
    from tests.support.fake_provider import FakeProvider

STATES = {
    pb.MODEL_STATE_SERVING: "SERVING",
    pb.MODEL_STATE_UNAVAILABLE: "UNAVAILABLE",
    pb.MODEL_STATE_UNKNOWN: "UNKNOWN",
}
CHANGES = {
    pb.WatchModelsResponse.CHANGE_ADDED: "ADDED",
    pb.WatchModelsResponse.CHANGE_MODIFIED: "MODIFIED",
    pb.WatchModelsResponse.CHANGE_REMOVED: "REMOVED",
}

WatchCall = aio.UnaryStreamCall[pb.WatchModelsRequest, pb.WatchModelsResponse]


@dataclass
class Served:
    """The service on a port. No provider is listed unless a call asks for it.

    Attributes:
        stub: Of a client.
        registry: Behind the service.
        servicer: The service.
        calls: The calls under way.
        address: Where it listens.
    """

    stub: pb_grpc.ModelRegistryAsyncStub
    registry: ModelRegistry
    servicer: ModelRegistryServicer
    calls: CallInterceptor
    address: str


@asynccontextmanager
async def serving(
    *fakes: FakeProvider,
    feed: Feed | None = None,
    slow_watcher_seconds: float = SLOW_WATCHER_SECONDS,
    options: tuple[tuple[str, int], ...] = (),
) -> AsyncIterator[Served]:
    """Serve the registry of these providers from an empty database; what they list is not kept.

    Args:
        fakes: The providers.
        feed: Of its changes.
        slow_watcher_seconds: How long a watcher may not read.
        options: Of the client's channel.
    """
    providers = Providers(fakes, listing_seconds=0.0)
    registry = ModelRegistry(Store("sqlite://"), providers, feed)
    await registry.open()
    servicer = ModelRegistryServicer(registry, providers, slow_watcher_seconds=slow_watcher_seconds)
    calls = CallInterceptor(end_watches=servicer.end_watches)
    server = aio.server(interceptors=[calls])
    pb_grpc.add_ModelRegistryServicer_to_server(servicer, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        async with aio.insecure_channel(address, options=options) as channel:
            yield Served(pb_grpc.ModelRegistryStub(channel), registry, servicer, calls, address)
    finally:
        await server.stop(None)
        await registry.close()
        await providers.close()


async def take(call: WatchCall, count: int) -> list[pb.WatchModelsResponse]:
    """The next messages of a watch, which must not end before."""
    messages = []
    async with asyncio.timeout(WAIT):
        for _ in range(count):
            message = await call.read()
            assert isinstance(message, pb.WatchModelsResponse)
            messages.append(message)
    return messages


async def failed(call: WatchCall) -> tuple[list[pb.WatchModelsResponse], Failure]:
    """What still comes of a watch before it fails, and how it does."""
    messages: list[pb.WatchModelsResponse] = []
    try:
        async with asyncio.timeout(WAIT):
            while True:
                message = await call.read()
                assert isinstance(message, pb.WatchModelsResponse), "the watch ended well"
                messages.append(message)
    except aio.AioRpcError as error:
        return messages, taken_apart(error)


def shown(messages: list[pb.WatchModelsResponse]) -> list[str]:
    """What each message of a watch says, in short: "ADDED alpha/llama SERVING", or "bookmark"."""
    return [
        "bookmark"
        if message.bookmark
        else f"{CHANGES[message.change]} {message.model.id} {STATES[message.model.state]}"
        for message in messages
    ]
