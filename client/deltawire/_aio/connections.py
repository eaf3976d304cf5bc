"""The connections of one client: its channel, and new ones to reach another gateway process."""

from __future__ import annotations

import asyncio
from types import AsyncGeneratorType
from typing import TYPE_CHECKING, Protocol, TypeVar
from weakref import WeakSet

from grpc import aio

from deltawire._aio.call import invoke, pause
from deltawire._completion import MAX_CONNECTIONS, Search
from deltawire._errors import WrongReplicaError
from deltawire.v1.chat_completion_pb2_grpc import ChatCompletionStub
from deltawire.v1.model_registry_pb2_grpc import ModelRegistryStub

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from deltawire._channel import Endpoint, Outgoing
    from deltawire.v1.chat_completion_pb2_grpc import ChatCompletionAsyncStub

Q = TypeVar("Q")
R = TypeVar("R")


class Dependent(Protocol):
    """What ends when its client is closed."""

    def _close(self) -> None:
        """End it."""


class Connection:
    """A channel, and the stubs over it."""

    def __init__(self, channel: aio.Channel, closing: set[asyncio.Task[None]]) -> None:
        self._channel = channel
        self._closing = closing
        self.chat = ChatCompletionStub(channel)
        self.registry = ModelRegistryStub(channel)

    def close(self, reading: AsyncIterator[object] | None = None) -> None:
        """Close the channel soon, without waiting for it; calls over it end as CANCELLED.

        `reading` is what its stream was read from.
        """
        task = asyncio.get_running_loop().create_task(self._shut(reading))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    _close = close

    async def _shut(self, reading: AsyncIterator[object] | None) -> None:
        await self._channel.close()
        # A generator that was left in the middle and its call refer to each other, and an open call keeps the connection
        # open. One that a task still reads from ends by the cancellation.
        if isinstance(reading, AsyncGeneratorType) and not reading.ag_running:
            await reading.aclose()


class Connections:
    """The connections of one client; see the blocking kind."""

    def __init__(
        self, endpoint: Endpoint, channel: aio.Channel | None, interceptors: Sequence[aio.ClientInterceptor]
    ) -> None:
        self._endpoint = endpoint
        self._interceptors = interceptors
        self._owned = channel is None
        self._closing: set[asyncio.Task[None]] = set()
        self.main = self._made(endpoint) if channel is None else Connection(channel, self._closing)
        self.limit = MAX_CONNECTIONS if self._owned else 0
        self.closed = asyncio.Event()
        self._dependents: WeakSet[Dependent] = WeakSet()

    def another(self) -> Connection:
        """A connection of its own, to whichever process a balancer picks; close it after the call."""
        connection = self._made(self._endpoint.apart)
        self.add(connection)
        return connection

    def add(self, dependent: Dependent) -> None:
        """Let closing the client close this too; at once if the client is closed already."""
        self._dependents.add(dependent)
        if self.closed.is_set():
            dependent._close()

    async def close(self) -> None:
        """Close everything that was made here; a channel of the caller's own stays open, and so do its calls."""
        if not self._owned:
            return
        self.closed.set()
        for dependent in (*self._dependents, self.main):
            dependent._close()
        while self._closing:
            await asyncio.wait(self._closing)

    async def find(
        self,
        method: Callable[[ChatCompletionAsyncStub], aio.UnaryUnaryMultiCallable[Q, R]],
        request: Q,
        outgoing: Outgoing,
        first: Connection | None = None,
    ) -> R:
        """Make a call about a completion, on new connections until one reaches the process that has it.

        See the blocking kind.
        """
        search = Search(outgoing, self.limit)
        connection = first = first or self.main
        while True:
            try:
                return await invoke(method(connection.chat), request, outgoing)
            except WrongReplicaError as error:
                seconds = search.next(error)
                if seconds is None:
                    raise
            finally:
                if connection is not first:
                    connection.close()
            await pause(seconds, self.closed)
            connection = self.another()

    def _made(self, endpoint: Endpoint) -> Connection:
        """A connection over a channel of our own."""
        options, interceptors = endpoint.options, self._interceptors
        if endpoint.credentials is None:
            channel = aio.insecure_channel(endpoint.target, options, interceptors=interceptors)
        else:
            channel = aio.secure_channel(endpoint.target, endpoint.credentials, options, interceptors=interceptors)
        return Connection(channel, self._closing)
