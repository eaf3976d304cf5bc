"""Connections to judged addresses only.

A host is looked up once, here, and all that it leads to has to be allowed; the connection is made to these addresses and
the name is not looked up again, so what a second answer would say does not matter. What is judged once more when a socket
is made, just before it connects, is the very address that it connects to. That holds for IP addresses too, about which
no resolver is asked, and makes looking at the peer afterwards needless.
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
    from deltawire_server.images.urls import WebAddress
    from deltawire_server.upstream.transport.dial import Address

Permits = Callable[[IPAddress], bool]
"""Whether an address may be connected to."""

LookUp = Callable[[str], Awaitable[Sequence[IPAddress]]]
"""The addresses of a name that is in lower case and without a dot at its end; none if there is no such name."""

LOOK_UP_THREADS = 8
"""Of their own: a name server that does not answer would hold those in which vLLM's own host is looked up."""

NOWHERE = "leads to no address that images may be fetched from"
"""Of a name that is not there, and of one that is and leads to where only the gateway can reach: nobody is to learn which."""

_NO_SUCH_NAME = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}  # not every system has the second


class RefusedError(Exception):
    """An image must not be fetched; the message follows the field's name."""


class UnavailableError(Exception):
    """An image could not be fetched; the message follows "the image at HOST"."""


class SystemNames:
    """Looks names up as the operating system does, in threads of its own."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(LOOK_UP_THREADS, thread_name_prefix="image-hosts")

    async def __call__(self, name: str) -> Sequence[IPAddress]:
        """The addresses of a name.

        Raises:
            UnavailableError: It could not be looked up.
        """
        loop = asyncio.get_running_loop()
        # With a dot at its end it is the whole name: no search list makes an internal one of it.
        look_up = loop.run_in_executor(self._threads, _addresses, f"{name}.")
        try:
            return await look_up
        except socket.gaierror as error:
            if error.errno in _NO_SUCH_NAME:
                return ()
            raise UnavailableError("cannot be looked up now") from error

    def close(self) -> None:
        """Begin no more look-ups; those under way end by themselves."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _addresses(name: str) -> tuple[IPAddress, ...]:
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return tuple(dict.fromkeys(ip_address(address[0]) for *_, address in found))


async def judged_addresses(look_up: LookUp, permits: Permits, address: WebAddress) -> list[Address]:
    """The addresses that the host of a web address leads to, if all of them may be connected to.

    Args:
        look_up: Says where names lead.
        permits: Says which addresses may be connected to.
        address: Its host is not looked up if it is an IP address; that one was judged with the web address.

    Raises:
        RefusedError: It leads nowhere, or also to an address that may not be connected to: one such address is as bad as all.
        UnavailableError: It could not be looked up.
    """
    found = [address.ip] if address.ip is not None else await look_up(address.host)
    if not found or (address.ip is None and not all(map(permits, found))):
        raise RefusedError(NOWHERE)
    return [(socket.AF_INET if ip.version == 4 else socket.AF_INET6, (str(ip), address.port)) for ip in found]


def judged_socket(permits: Permits, address: Address) -> socket.socket:
    """A socket for an address that is connected to next.

    Raises:
        PermissionError: The address may not be connected to.
    """
    if not permits(ip_address(address[1][0])):
        raise PermissionError("an address that was not judged so")
    return open_socket(address)
