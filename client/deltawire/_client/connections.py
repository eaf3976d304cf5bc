"""The connections of one client: its channel, and new ones to reach another gateway process."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar, cast
from weakref import WeakSet

import grpc

from deltawire._client.call import invoke
from deltawire._completion import MAX_CONNECTIONS, Search
from deltawire._errors import WrongReplicaError
from deltawire.v1.chat_completion_pb2_grpc import ChatCompletionStub
from deltawire.v1.model_registry_pb2_grpc import ModelRegistryStub

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from deltawire._channel import Endpoint, Outgoing

Q = TypeVar("Q")
R = TypeVar("R")
Interceptor: TypeAlias = grpc.UnaryUnaryClientInterceptor | grpc.UnaryStreamClientInterceptor


class Dependent(Protocol):
    """What ends when its client is closed."""

    def _close(self) -> None:
        """End it."""


class Connection:
    """A channel, and the stubs over it; `channel` is without the interceptors."""

    def __init__(self, channel: grpc.Channel, interceptors: Sequence[Interceptor]) -> None:
        self.channel = channel
        if interceptors:
            channel = grpc.intercept_channel(cast("grpc.Channel", _Unregistered(channel)), *interceptors)
        self.chat = ChatCompletionStub(channel)
        self.registry = ModelRegistryStub(channel)

    def close(self) -> None:
        """Close the channel; calls over it end as CANCELLED."""
        self.channel.close()

    _close = close


class Connections:
    """The connections of one client.

    Args:
        endpoint: Where the gateway is.
        channel: The caller's own channel; None makes one to the endpoint.
        interceptors: For every call.

    Attributes:
        main: The client's connection for all calls.
        limit: How many new connections a call may make: none without an endpoint to make one to.
        closed: Set when the client is closed.
    """

    def __init__(self, endpoint: Endpoint, channel: grpc.Channel | None, interceptors: Sequence[Interceptor]) -> None:
        self._endpoint = endpoint
        self._interceptors = interceptors
        self._owned = channel is None
        self.main = self._made(endpoint) if channel is None else Connection(channel, interceptors)
        self.limit = MAX_CONNECTIONS if self._owned else 0
        self.closed = threading.Event()
        self._dependents: WeakSet[Dependent] = WeakSet()
        self._lock = threading.Lock()

    def another(self) -> Connection:
        """A connection of its own, to whichever process a balancer picks; close it after the call."""
        connection = self._made(self._endpoint.apart)
        self.add(connection)
        return connection

    def add(self, dependent: Dependent) -> None:
        """Let closing the client close this too; at once if the client is closed already."""
        with self._lock:
            self._dependents.add(dependent)
        if self.closed.is_set():
            dependent._close()

    def close(self) -> None:
        """Close everything that was made here; a channel of the caller's own stays open, and so do its calls."""
        if not self._owned:
            return
        self.closed.set()
        with self._lock:
            dependents = tuple(self._dependents)
        for dependent in dependents:
            dependent._close()
        self.main.close()

    def find(
        self,
        method: Callable[[ChatCompletionStub], grpc.UnaryUnaryMultiCallable[Q, R]],
        request: Q,
        outgoing: Outgoing,
        first: Connection | None = None,
    ) -> R:
        """Make a call about a completion, on new connections until one reaches the process that has it.

        Args:
            method: Picks the method from a stub.
            request: The request.
            outgoing: The call. Its timeout covers all attempts.
            first: The connection to begin with; None is `main`.

        Raises:
            WrongReplicaError: None of the connections reached it.
            CallError: The call failed otherwise.
        """
        search = Search(outgoing, self.limit)
        connection = first = first or self.main
        while True:
            try:
                return invoke(method(connection.chat), request, outgoing)
            except WrongReplicaError as error:
                pause = search.next(error)
                if pause is None:
                    raise
            finally:
                if connection is not first:
                    connection.close()
            self.closed.wait(pause)
            connection = self.another()

    def _made(self, endpoint: Endpoint) -> Connection:
        """A connection over a channel of our own."""
        if endpoint.credentials is None:
            channel = grpc.insecure_channel(endpoint.target, endpoint.options)
        else:
            channel = grpc.secure_channel(endpoint.target, endpoint.credentials, endpoint.options)
        return Connection(channel, self._interceptors)


class _Unregistered:
    """A channel under interceptors, which registers no methods.

    gRPC makes an intercepted method anew for every call. On a closed channel, registering it there crashes the process.
    """

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel

    def unary_unary(self, method: str, serialize: Any, deserialize: Any, _: object = None) -> Any:  # noqa: ANN401
        """A method with one answer."""
        return self._channel.unary_unary(method, serialize, deserialize)

    def unary_stream(self, method: str, serialize: Any, deserialize: Any, _: object = None) -> Any:  # noqa: ANN401
        """A method with a stream of answers."""
        return self._channel.unary_stream(method, serialize, deserialize)
