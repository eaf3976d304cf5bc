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

from aiohttp.abc import AbstractResolver, ResolveResult

from deltawire_server.upstream.images.addresses import IPAddress

if TYPE_CHECKING:
    from aiohttp.connector import AddrInfoType

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


class JudgedNames(AbstractResolver):
    """Gives a connector the addresses of names, if all of them may be connected to."""

    def __init__(self, look_up: LookUp, permits: Permits) -> None:
        self._look_up = look_up
        self._permits = permits

    async def resolve(
        self,
        host: str,
        port: int = 0,
        family: socket.AddressFamily = socket.AF_UNSPEC,  # noqa: ARG002 (all are wanted)
    ) -> list[ResolveResult]:
        """What `host` leads to.

        Raises:
            RefusedError: Nowhere, or also to where nobody may connect: one such address is as bad as all.
            UnavailableError: It could not be looked up.
        """
        found = await self._look_up(host)
        if not found or not all(map(self._permits, found)):
            raise RefusedError(NOWHERE)
        return [
            ResolveResult(
                hostname=host,
                host=str(ip),
                port=port,
                family=socket.AF_INET if ip.version == 4 else socket.AF_INET6,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for ip in found
        ]

    async def close(self) -> None:
        """Nothing to do: the look-up is whose it was."""


def judged_socket(permits: Permits) -> Callable[[AddrInfoType], socket.socket]:
    """What makes a connector's sockets: each for one address, and none for one that may not be connected to."""

    def make(address: AddrInfoType) -> socket.socket:
        family, kind, protocol, _, place = address
        if not permits(ip_address(place[0])):
            raise PermissionError("an address that was not judged so")
        return socket.socket(family, kind, protocol)

    return make
