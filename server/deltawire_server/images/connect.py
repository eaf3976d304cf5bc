"""Opens connections to validated addresses only.

A host name is looked up once, and all its addresses must be allowed. The connection uses these addresses without another lookup,
which prevents DNS rebinding. The address is validated again when its socket is created, just before it connects. That includes IP
addresses in URLs, which need no lookup, so the peer address need not be checked afterwards.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from typing import TYPE_CHECKING

from deltawire_server.images.addresses import IPAddress
from deltawire_server.upstream.transport.dial import open_socket

if TYPE_CHECKING:
    from deltawire_server.upstream.transport.dial import Address
    from deltawire_server.upstream.web_address import WebAddress

Permits = Callable[[IPAddress], bool]
"""Whether an address may be connected to."""

LookUp = Callable[[str], Awaitable[Sequence[IPAddress]]]
"""Returns the addresses of a name in lower case without a trailing dot; none if the name does not exist."""

LOOK_UP_THREADS = 8
"""Separate threads, so that a name server that does not answer cannot block lookups of the engines' hosts."""

NOWHERE = "leads to no address that images may be fetched from"
"""The same message for a name that does not exist and for an internal one, so that callers cannot probe internal names."""

_NO_SUCH_NAME = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}  # not every system has the second


class RefusedError(Exception):
    """An image must not be fetched; the message continues the name of the field."""


class UnavailableError(Exception):
    """An image could not be fetched; the message continues "the image at HOST"."""


class SystemNames:
    """Looks up names with the operating system's resolver, in its own threads."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(LOOK_UP_THREADS, thread_name_prefix="image-hosts")

    async def __call__(self, name: str) -> Sequence[IPAddress]:
        """The addresses of a name.

        Raises:
            UnavailableError: The lookup failed.
        """
        loop = asyncio.get_running_loop()
        # The trailing dot makes it absolute, so that no search domain is appended.
        look_up = loop.run_in_executor(self._threads, _addresses, f"{name}.")
        try:
            return await look_up
        except socket.gaierror as error:
            if error.errno in _NO_SUCH_NAME:
                return ()
            raise UnavailableError("cannot be looked up now") from error

    def close(self) -> None:
        """Start no more lookups; those in progress are not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _addresses(name: str) -> tuple[IPAddress, ...]:
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return tuple(dict.fromkeys(ip_address(address[0]) for *_, address in found))


async def validated_addresses(look_up: LookUp, permits: Permits, address: WebAddress) -> list[Address]:
    """The addresses of the host of a URL, if all of them are allowed.

    Args:
        look_up: Looks up names.
        permits: Whether an IP address may be connected to.
        address: The URL. If its host is an IP address, it is already validated and needs no lookup.

    Raises:
        RefusedError: The host has no address, or at least one that is not allowed.
        UnavailableError: The lookup failed.
    """
    found = [address.ip] if address.ip is not None else await look_up(address.host)
    if not found or (address.ip is None and not all(map(permits, found))):
        raise RefusedError(NOWHERE)
    return [(socket.AF_INET if ip.version == 4 else socket.AF_INET6, (str(ip), address.port)) for ip in found]


def validated_socket(permits: Permits, address: Address) -> socket.socket:
    """Create a socket for the address that is connected to next.

    Raises:
        PermissionError: The address is not allowed.
    """
    if not permits(ip_address(address[1][0])):
        raise PermissionError("the address is not allowed")
    return open_socket(address)
