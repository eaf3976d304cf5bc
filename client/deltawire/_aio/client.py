"""The asynchronous client itself: its channel, and the way to everything that it can do."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self, Unpack

from grpc import aio

from deltawire._aio.chat import AsyncChat
from deltawire._aio.models import AsyncModels, AsyncProviders
from deltawire._channel import DEFAULT_TARGET, ConnectOptions, connection
from deltawire.v1.chat_completion_pb2_grpc import ChatCompletionStub
from deltawire.v1.model_registry_pb2_grpc import ModelRegistryStub

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType


class AsyncClient:
    """Talks to a gateway, one channel for all calls; close it, or use it in an `async with` block.

    Make it inside the event loop that will use it: it belongs to that loop and its thread. A channel does not survive
    a fork: make the client in the child process.

    Args:
        target: A gRPC target: "host:port", "unix:/path", "dns:///name:port".
        channel: A `grpc.aio` channel of your own, used as it is; the client does not close it, and its retries, limits,
            interceptors and TLS are up to you.
        interceptors: grpc.aio's own kind; the first is the outermost.
        options: See `ConnectOptions`.

    Raises:
        RuntimeError: No event loop is running.
        ValueError: A token would go over plaintext to another machine, or interceptors came with a channel.

    Nothing is connected yet: the first call does that. Go on with `chat`, `models` and `providers`.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        channel: aio.Channel | None = None,
        interceptors: Sequence[aio.ClientInterceptor] = (),
        **options: Unpack[ConnectOptions],
    ) -> None:
        asyncio.get_running_loop()
        end, defaults = connection(target, options, own_channel=channel is not None)
        self._owned: aio.Channel | None = None
        if channel is None:
            if end.credentials is None:
                channel = aio.insecure_channel(end.target, end.options, interceptors=interceptors)
            else:
                channel = aio.secure_channel(end.target, end.credentials, end.options, interceptors=interceptors)
            self._owned = channel
        elif interceptors:
            message = "grpc.aio takes interceptors when a channel is made: give them to yours"
            raise ValueError(message)
        registry = ModelRegistryStub(channel)
        self.chat = AsyncChat(ChatCompletionStub(channel), defaults)
        self.models = AsyncModels(registry, defaults)
        self.providers = AsyncProviders(registry, defaults)

    async def close(self) -> None:
        """Close the channel, unless it is your own. Calls that still run end as cancelled."""
        if self._owned is not None:
            # Those that pause between two calls would otherwise make the next one on a closed channel.
            for watch in tuple(self.models._watches):
                watch.cancel()
            for stream in tuple(self.chat._streams):
                stream.cancel()
            await self._owned.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
