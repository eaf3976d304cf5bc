"""The asynchronous client itself: its channel and its services."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self, Unpack

from deltawire._aio.chat import AsyncChat
from deltawire._aio.connections import Connections
from deltawire._aio.models import AsyncModels, AsyncProviders
from deltawire._channel import DEFAULT_TARGET, ConnectOptions, connection

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from grpc import aio


class AsyncClient:
    """A client of a gateway, with one channel for all calls; close it, or use it in an `async with` block.

    Create it inside the event loop that uses it: it belongs to that loop and its thread. A channel does not survive a fork:
    create the client in the child process.

    Args:
        target: A gRPC target: "host:port", "unix:/path", "dns:///name:port".
        channel: A `grpc.aio` channel of your own, used unchanged. The client does not close it; you configure its retries,
            limits, interceptors and TLS. The client cannot make new connections then: WrongReplicaError is raised at once.
        interceptors: grpc.aio client interceptors; the first is the outermost.
        options: See `ConnectOptions`.

    Raises:
        RuntimeError: No event loop is running.
        ValueError: See `Client`; or interceptors were given together with a channel.

    The first call connects. Call the methods of `chat`, `models` and `providers`.
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
        if channel is not None and interceptors:
            message = "grpc.aio takes interceptors when a channel is made: give them to yours"
            raise ValueError(message)
        self._connections = Connections(end, channel, interceptors)
        self.chat = AsyncChat(self._connections, defaults)
        self.models = AsyncModels(self._connections, defaults)
        self.providers = AsyncProviders(self._connections, defaults)

    async def close(self) -> None:
        """Close the channel, unless it is your own. Active and later calls raise `ClientClosedError`."""
        await self._connections.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
