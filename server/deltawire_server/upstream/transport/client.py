"""The transport for an `httpx.AsyncClient`, with a connection pool for each origin."""

from __future__ import annotations

import asyncio
import functools
import ssl
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import httpx

from deltawire_server.upstream.transport.connection import Connection
from deltawire_server.upstream.transport.dial import dial, look_up

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterable, Mapping, Sequence

    from deltawire_server.upstream.transport.dial import Address
    from deltawire_server.upstream.transport.exchange import Exchange

KEEPALIVE_SECONDS = 4.0
"""Idle time after which a connection is closed. uvicorn, vLLM's server, closes it after 5 s; closing first avoids a race."""

ADDRESSES_SECONDS = 10.0
"""How long the addresses of a name are cached, so that a burst of calls is not a burst of lookups in a few threads. A failure to
connect discards them."""

_PORTS = {"http": 80, "https": 443}


class Transport(httpx.AsyncBaseTransport):
    """HTTP/1.1 for an `httpx.AsyncClient`. It belongs to the event loop of its first request.

    `errors` has the exceptions. A request must have a method whose responses have a body, and a Content-Length if it has a body.
    The timeouts of a request are those of httpx, but `connect` includes the name lookup and TLS, and `read` applies to sending
    too.

    Args:
        tls: For https: a context, `True` for the system's authorities, or `False` to accept any certificate.
        max_connections: Limit of open connections for each origin; further requests wait.
    """

    def __init__(self, tls: ssl.SSLContext | bool = True, max_connections: int = 100) -> None:
        self._tls = tls
        self._max_connections = max_connections
        self._pools: dict[tuple[str, str, int], _Pool] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; return the response after its headers."""
        body = cast("httpx.AsyncByteStream", request.stream)
        exchange = await self.send(self.prepare(request), (), body, request.extensions.get("timeout", {}))
        return httpx.Response(exchange.status, headers=exchange.headers, stream=exchange)

    def prepare(self, request: httpx.Request) -> Prepared:
        """The parts of a request that are the same in all requests like it. Its body is ignored."""
        lines = [b"%s %s HTTP/1.1" % (request.method.encode("ascii"), request.url.raw_path)]
        lines += [b"%s: %s" % header for header in request.headers.raw]
        if "transfer-encoding" in request.headers:
            raise httpx.LocalProtocolError("the request cannot be sent: it has a body without a length")
        return Prepared(self._pool(request.url), _joined(lines))

    async def send(
        self,
        prepared: Prepared,
        headers: Sequence[tuple[str, str]],
        body: AsyncIterable[bytes],
        limits: Mapping[str, float | None],
    ) -> Exchange:
        """Send a request without the objects of httpx, which take a third of the time of a short call.

        Args:
            prepared: The request's head, without `headers`.
            headers: The headers of this request alone.
            body: The body, whose length is in one of the headers.
            limits: Seconds, as the timeouts of httpx: `pool` for a free connection, `connect` for name lookup, connection and TLS,
                `read` without progress in either direction; `None` or no entry for no limit.

        Returns:
            The response after its headers; `aclose` it at the end.

        Raises:
            httpx.TransportError: There is no response.
        """
        lines = [f"{name}: {value}".encode() for name, value in headers]
        head = _joined([prepared.head, *lines, b"", b""], prepared.head.count(b"\r\n"))
        connection = await prepared.pool.take(limits.get("pool"), limits.get("connect"))
        return await connection.send(head, body, limits.get("read"))

    async def aclose(self) -> None:
        """Close all connections; requests in progress fail."""
        for pool in self._pools.values():
            pool.close()

    def _pool(self, url: httpx.URL) -> _Pool:
        host = url.raw_host.decode("ascii")
        origin = (url.scheme, host, url.port or _PORTS[url.scheme])
        if origin not in self._pools:
            self._pools[origin] = _Pool(
                *origin[1:], self._context if url.scheme == "https" else None, self._max_connections
            )
        return self._pools[origin]

    @functools.cached_property
    def _context(self) -> ssl.SSLContext:
        return tls_context(self._tls)


@dataclass(frozen=True, slots=True)
class Prepared:
    """The parts of a request that are the same in all requests like it.

    Attributes:
        pool: The pool of its origin.
        head: The first lines of its head; not in the repr, because headers may be secrets.
    """

    pool: _Pool
    head: bytes = field(repr=False)


def tls_context(tls: ssl.SSLContext | bool) -> ssl.SSLContext:
    """The TLS context for https. Create it for the first connection, because the system's authorities take long to load.

    Args:
        tls: A context, `True` for the system's authorities, or `False` to accept any certificate.
    """
    if isinstance(tls, ssl.SSLContext):
        return tls
    context = ssl.create_default_context()
    if not tls:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class _Pool:
    """The connections to one origin. The most recently used one is used next, so that the others can expire."""

    def __init__(self, host: str, port: int, tls: ssl.SSLContext | None, max_connections: int) -> None:
        self._host = host
        self._port = port
        self._tls = tls
        self._free = asyncio.Semaphore(max_connections)  # the number of connections that are not busy
        self._open: set[Connection] = set()
        self._idle: dict[Connection, None] = {}
        self._closed = False
        self._looking_up = asyncio.Lock()
        self._addresses: Sequence[Address] = ()
        self._stale_at = float("-inf")  # on the loop's clock

    async def take(self, wait: float | None, connect: float | None) -> Connection:
        """Acquire a connection for a request."""
        try:
            async with asyncio.timeout(wait):
                await self._free.acquire()
        except TimeoutError:
            raise httpx.PoolTimeout(f"all its connections were in use for {wait:g} seconds") from None
        try:
            while self._idle:
                connection, _ = self._idle.popitem()
                if connection.claim():
                    return connection
            connection = await dial(self._host, self._look_up, self._tls, self._make, connect)
            if self._closed:
                connection.close()
            if not connection.claim():
                raise connection.error or AssertionError
            self._open.add(connection)
        except BaseException:
            self._stale_at = float("-inf")
            self._free.release()
            raise
        return connection

    def close(self) -> None:
        """Close all connections."""
        self._closed = True
        for connection in tuple(self._open):
            connection.close()

    async def _look_up(self) -> Sequence[Address]:
        """The origin's addresses, rotated by one each time to spread connections over them."""
        async with self._looking_up:
            now = asyncio.get_running_loop().time()
            if now >= self._stale_at:
                self._addresses = await look_up(self._host, self._port)
                self._stale_at = now + ADDRESSES_SECONDS
        addresses = self._addresses
        self._addresses = [*addresses[1:], addresses[0]]
        return addresses

    def _make(self, sock: socket.socket | None) -> Connection:
        return Connection(sock, self._on_idle, self._on_closed)

    def _on_idle(self, connection: Connection) -> None:
        self._idle[connection] = None
        connection.expire_after(KEEPALIVE_SECONDS)
        self._free.release()

    def _on_closed(self, connection: Connection, busy: bool) -> None:
        self._open.discard(connection)
        self._idle.pop(connection, None)
        if busy:
            self._free.release()


def _joined(lines: Sequence[bytes], inner: int = 0) -> bytes:
    """The lines of a request's head, of which the first has `inner` line breaks already.

    Raises:
        httpx.LocalProtocolError: A header has a line break.
    """
    head = b"\r\n".join(lines)
    if head.count(b"\r") + head.count(b"\n") + head.count(b"\0") != 2 * (len(lines) - 1 + inner):
        raise httpx.LocalProtocolError("the request cannot be sent: a line break in a header")
    return head
