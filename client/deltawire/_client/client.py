"""The blocking client itself: its channel and its services."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self, Unpack

from deltawire._channel import DEFAULT_TARGET, ConnectOptions, connection
from deltawire._client.chat import Chat
from deltawire._client.connections import Connections
from deltawire._client.models import Models, Providers

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    import grpc

    from deltawire._client.connections import Interceptor


class Client:
    """A client of a gateway, with one channel for all calls; close it, or use it in a `with` block.

    Any number of threads may share a client. A stream may be used by one thread at a time; `cancel` and `cancel_softly` may
    be called from any. A channel does not survive a fork: create the client in the child process.

    Args:
        target: A gRPC target: "host:port", "unix:/path", "dns:///name:port".
        channel: A channel of your own, used unchanged. The client does not close it; you configure its retries, limits
            and TLS. The client cannot make new connections then: WrongReplicaError is raised at once.
        interceptors: gRPC client interceptors; the first is the outermost.
        options: See `ConnectOptions`.

    Raises:
        TypeError: An option does not exist.
        ValueError: The target, the token or the timeout is invalid; a token would be sent over plaintext to another
            machine; or options for a channel were given together with a channel.

    The first call connects. Call the methods of `chat`, `models` and `providers`.
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
        self._connections = Connections(end, channel, interceptors)
        self.chat = Chat(self._connections, defaults)
        self.models = Models(self._connections, defaults)
        self.providers = Providers(self._connections, defaults)

    def close(self) -> None:
        """Close the channel, unless it is your own. Active and later calls raise `ClientClosedError`."""
        self._connections.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
