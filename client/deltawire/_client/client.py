"""The blocking client itself: its channel, and the way to everything that it can do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self, TypeAlias, Unpack

import grpc

from deltawire._channel import DEFAULT_TARGET, ConnectOptions, connection
from deltawire._client.chat import Chat
from deltawire._client.models import Models, Providers
from deltawire.v1.chat_completion_pb2_grpc import ChatCompletionStub
from deltawire.v1.model_registry_pb2_grpc import ModelRegistryStub

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType


Interceptor: TypeAlias = grpc.UnaryUnaryClientInterceptor | grpc.UnaryStreamClientInterceptor


class Client:
    """Talks to a gateway, one channel for all calls; close it, or use it in a `with` block.

    Any number of threads may share a client; a stream belongs to one thread at a time, and only its `cancel` may be
    called from others. A channel does not survive a fork: make the client in the child process.

    Args:
        target: A gRPC target: "host:port", "unix:/path", "dns:///name:port".
        channel: A channel of your own, used as it is; the client does not close it, and its retries, limits and TLS are
            up to you.
        interceptors: gRPC's own kind; the first is the outermost.
        options: See `ConnectOptions`.

    Raises:
        ValueError: A token would go over plaintext to another machine.

    Nothing is connected yet: the first call does that. Go on with `chat`, `models` and `providers`.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        channel: grpc.Channel | None = None,
        interceptors: Sequence[Interceptor] = (),
        **options: Unpack[ConnectOptions],
    ) -> None:
        end, defaults = connection(target, options, own_channel=channel is not None)
        self._owned: grpc.Channel | None = None
        if channel is None:
            if end.credentials is None:
                channel = grpc.insecure_channel(end.target, end.options)
            else:
                channel = grpc.secure_channel(end.target, end.credentials, end.options)
            self._owned = channel
        if interceptors:
            channel = grpc.intercept_channel(channel, *interceptors)
        registry = ModelRegistryStub(channel)
        self.chat = Chat(ChatCompletionStub(channel), defaults)
        self.models = Models(registry, defaults)
        self.providers = Providers(registry, defaults)

    def close(self) -> None:
        """Close the channel, unless it is your own. Calls that still run end as cancelled."""
        if self._owned is not None:
            # Those that pause between two calls would otherwise make the next one on a closed channel.
            for watch in tuple(self.models._watches):
                watch.cancel()
            for stream in tuple(self.chat._streams):
                stream.cancel()
            self._owned.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
