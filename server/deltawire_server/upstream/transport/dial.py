"""Opens connections: name lookup, the first address that accepts, TLS."""

from __future__ import annotations

import asyncio
import socket
from ipaddress import ip_address
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, cast

from deltawire_server.upstream.transport.errors import ConnectFailedError, connect_failure

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable, Sequence

    from deltawire_server.upstream.transport.connection import Connection

HEAD_START_SECONDS = 0.25
"""Delay before the next address is tried concurrently, as RFC 8305 recommends."""

Address = tuple[socket.AddressFamily, tuple[str | int, ...]]
"""An address family and a socket address."""


def open_socket(address: Address) -> socket.socket:
    """Create an unconnected socket for an address."""
    return socket.socket(address[0], socket.SOCK_STREAM)


async def dial(
    host: str,
    look_up: Callable[[], Awaitable[Sequence[Address]]],
    tls: ssl.SSLContext | None,
    make: Callable[[socket.socket | None], Connection],
    connect_timeout: float | None,
    open_socket: Callable[[Address], socket.socket] = open_socket,
) -> Connection:
    """Open a connection.

    Args:
        host: The host that the server's certificate must be for: a name in DNS form, or an IP address without brackets.
        look_up: Returns the addresses of the host, at least one, in the order in which to try them.
        tls: The TLS context; `None` for plain TCP.
        make: Creates the connection from its socket, or from `None` with TLS.
        connect_timeout: Time limit in seconds, including the name lookup and the TLS handshake; `None` for no limit.
        open_socket: Creates the socket for the address that is connected to next; raises `OSError` if that is not allowed.

    Raises:
        ConnectFailedError: The connection could not be opened.
        Exception: Any other exception of `look_up` than `UnicodeError` and `OSError`.
    """
    loop = asyncio.get_running_loop()
    late = "its host name was not looked up"
    try:
        async with asyncio.timeout(connect_timeout):
            addresses = await look_up()
            late = "its address did not respond"
            sock = await _first(addresses, open_socket)
            late = "the TLS handshake was not complete"
            _, connection = await loop.create_connection(
                lambda: make(None if tls else sock),
                sock=sock,
                ssl=tls,
                server_hostname=host.rstrip(".") if tls else None,
            )
    except TimeoutError as error:
        # ETIMEDOUT of the operating system has an errno.
        if error.errno is not None:
            raise connect_failure(error) from error
        raise ConnectFailedError(f"{late} within {connect_timeout:g} seconds") from None
    except (UnicodeError, OSError) as error:
        raise connect_failure(error) from error
    return connection


async def look_up(host: str, port: int) -> list[Address]:
    """The addresses of a host in the resolver's order, alternating between the two families.

    Raises:
        UnicodeError: The host is not a valid name.
        OSError: The name does not resolve, or the lookup failed.
    """
    try:
        family = socket.AF_INET if ip_address(host).version == 4 else socket.AF_INET6
    except ValueError:
        found = await asyncio.to_thread(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        families: dict[socket.AddressFamily, list[Address]] = {}
        for kind, _, _, _, place in found:
            families.setdefault(kind, []).append((kind, cast("tuple[str | int, ...]", place)))
        return [address for address in chain.from_iterable(zip_longest(*families.values())) if address is not None]
    return [(family, (host, port))]


async def _first(addresses: Sequence[Address], open_socket: Callable[[Address], socket.socket]) -> socket.socket:
    """A socket connected to the first address that accepts; raises the last failure if none does."""
    if len(addresses) == 1:
        return await _connect(addresses[0], open_socket)
    waiting = list(addresses)
    attempts: list[asyncio.Task[socket.socket]] = []
    chosen: asyncio.Task[socket.socket] | None = None
    try:
        while True:
            if waiting:
                attempts.append(asyncio.create_task(_connect(waiting.pop(0), open_socket)))
            running = [attempt for attempt in attempts if not attempt.done()]
            if running:
                wait = HEAD_START_SECONDS if waiting else None
                await asyncio.wait(running, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
            chosen = next((attempt for attempt in attempts if attempt.done() and attempt.exception() is None), None)
            if chosen is not None:
                return chosen.result()
            if not waiting and all(attempt.done() for attempt in attempts):
                return attempts[-1].result()
    finally:
        for attempt in attempts:
            if not attempt.cancel() and attempt is not chosen and attempt.exception() is None:
                attempt.result().close()


async def _connect(address: Address, open_socket: Callable[[Address], socket.socket]) -> socket.socket:
    sock = open_socket(address)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(sock, address[1])
    except BaseException:
        sock.close()
        raise
    return sock
