"""One image, fetched: its redirects, each judged as the first address was, and its bytes, counted as they come.

The transport alone, without the httpx around it that providers have: httpx takes an address as text, to be read once more,
and here the parts that were judged have to be the parts that are used.

Nothing of a caller, of the operator or of an earlier answer goes along: no credentials, no cookies, no referrer, and no
proxy from the environment, which would look the name up for itself. Nothing is unpacked, so nothing can swell.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ssl
from typing import TYPE_CHECKING

import httpx

from deltawire_server.images.addresses import may_be_public
from deltawire_server.images.connect import (
    NOWHERE,
    RefusedError,
    SystemNames,
    UnavailableError,
    judged_addresses,
    judged_socket,
)
from deltawire_server.images.sniff import KINDS, media_type_of
from deltawire_server.images.urls import UrlError, WebAddress, joined
from deltawire_server.upstream.request import ImageData
from deltawire_server.upstream.transport.client import tls_context
from deltawire_server.upstream.transport.connection import Connection
from deltawire_server.upstream.transport.dial import dial
from deltawire_server.upstream.transport.errors import ConnectFailedError, ConnectionLostError

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator

    from deltawire_server.images.connect import LookUp, Permits
    from deltawire_server.images.policy import Policy
    from deltawire_server.upstream.transport.exchange import Exchange

_OK = 200
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_UNTYPED = frozenset({"", "application/octet-stream", "binary/octet-stream"})
"""What servers declare that do not know what a file is; others have to declare an image."""

_MISLED = "redirects to an address that images may not be fetched from"


class Budget:
    """How many bytes may still be fetched for one request."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._left = total

    def take(self, count: int) -> None:
        """Use some of them up.

        Raises:
            UnavailableError: There are not that many.
        """
        self._left -= count
        if self._left < 0:
            raise UnavailableError(f"makes more than {self._total} bytes with the request's others")


class Fetcher:
    """Fetches images; safe for any number at once.

    Args:
        policy: What is allowed.
        permits: Says which addresses may be connected to.
        look_up: Says where names lead.
        tls: For https: a context that verifies, or `True` for the system's authorities.
        user_agent: How servers are told who asks.
    """

    def __init__(
        self, policy: Policy, permits: Permits, look_up: LookUp | None, tls: ssl.SSLContext | bool, user_agent: str
    ) -> None:
        self._policy = policy
        self._permits = permits
        self._system_names = SystemNames()
        self._look_up = look_up or self._system_names
        self._tls = tls
        self._user_agent = user_agent
        self._open: set[Connection] = set()

    def violation(self, address: WebAddress) -> str | None:
        """Why nothing may be fetched from an address, as far as one can see without looking up its host; `None` if it may."""
        violation = self._policy.violation(address)
        if violation is None and not (may_be_public(address.host) if address.ip is None else self._permits(address.ip)):
            return NOWHERE
        return violation

    async def fetch(self, address: WebAddress, budget: Budget) -> ImageData:
        """Fetch an image.

        Args:
            address: Where it is; there must be no `violation` about it.
            budget: What may be fetched; what is, is taken from it.

        Raises:
            RefusedError: Its host, or where it redirects to, is not allowed.
            UnavailableError: It is not there, too large, too slow, or no image.
        """
        try:
            async with asyncio.timeout(self._policy.timeout):
                return await self._follow(address, budget)
        except TimeoutError:
            raise UnavailableError(f"took longer than {self._policy.timeout:g} seconds") from None
        except httpx.TransportError as error:
            raise UnavailableError(_problem(error)) from error

    async def close(self) -> None:
        """Close its connections; what is under way fails."""
        for connection in tuple(self._open):
            connection.close()
        self._system_names.close()

    async def _follow(self, address: WebAddress, budget: Budget) -> ImageData:
        for hop in range(self._policy.max_redirects + 1):
            try:
                async with self._get(address) as response:
                    if response.status not in _REDIRECTS:
                        return await self._image(response, budget)
                    location = _header(response, b"location")
            except RefusedError:
                raise RefusedError(_MISLED if hop else NOWHERE) from None
            address = self._next(address, location)
        raise UnavailableError(f"redirects more than {self._policy.max_redirects} times")

    def _next(self, address: WebAddress, location: str) -> WebAddress:
        """Where a redirect leads, if that is allowed; whatever is wrong with it is told in the same words."""
        if not location:
            raise UnavailableError("redirects to nowhere")
        try:
            following = joined(address, location)
        except UrlError:
            raise RefusedError(_MISLED) from None
        if self.violation(following) is not None:
            raise RefusedError(_MISLED)
        return following

    async def _image(self, response: Exchange, budget: Budget) -> ImageData:
        if response.status != _OK:
            raise UnavailableError(f"was answered with HTTP status {response.status}")
        encoding = _header(response, b"content-encoding").lower()
        if encoding not in ("", "identity"):
            raise UnavailableError("came encoded, which was not asked for")
        declared = _header(response, b"content-type").partition(";")[0].strip().lower()
        if declared not in _UNTYPED and not declared.startswith("image/"):
            raise UnavailableError(f"is declared as {declared[:80]!r} and not as an image")
        limit = self._policy.max_image_bytes
        if int(_header(response, b"content-length") or 0) > limit:
            raise _too_large(limit)
        # The declared length may be missing, or a lie.
        received = bytearray()
        async for chunk in response:
            budget.take(len(chunk))
            received += chunk
            if len(received) > limit:
                raise _too_large(limit)
        data = bytes(received)
        media_type = media_type_of(data)
        if media_type is None:
            raise UnavailableError(f"is no {KINDS} file")
        return ImageData(data, media_type)

    @contextlib.asynccontextmanager
    async def _get(self, address: WebAddress) -> AsyncIterator[Exchange]:
        """Ask for what is at an address, on a connection of its own: the response, of which only the head has arrived."""
        connection = await dial(
            address.host,
            functools.partial(judged_addresses, self._look_up, self._permits, address),
            self._context if address.scheme == "https" else None,
            self._connection,
            None,  # the only clock is `fetch`'s own
            functools.partial(judged_socket, self._permits),
        )
        self._open.add(connection)
        try:
            if not connection.claim():
                raise connection.error or AssertionError
            yield await connection.send(self._head(address), httpx.ByteStream(b""), None)
        finally:
            connection.close()
            self._open.discard(connection)

    def _connection(self, sock: socket.socket | None) -> Connection:
        # It is closed after its response, and so is never idle.
        return Connection(sock, Connection.close, lambda *_: None)

    @functools.cached_property
    def _context(self) -> ssl.SSLContext:
        return tls_context(self._tls)

    def _head(self, address: WebAddress) -> bytes:
        """The parts as they are; nothing is read or escaped once more."""
        host = f"[{address.host}]" if ":" in address.host else address.host
        lines = (
            f"GET {address.target} HTTP/1.1",
            f"Host: {host}" if address.on_usual_port else f"Host: {host}:{address.port}",
            "Accept: image/*",
            "Accept-Encoding: identity",
            f"User-Agent: {self._user_agent}",
            "Connection: close",
        )
        return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")


def _problem(error: httpx.TransportError) -> str:
    """What the caller is told; the words of the transport say where connections went."""
    if isinstance(error.__cause__, ssl.SSLCertVerificationError):
        return "has a certificate that is not valid for it"
    if isinstance(error, ConnectFailedError):
        return "cannot be reached"
    if isinstance(error, ConnectionLostError) and error.begun:
        return "broke off"
    return "was not answered as HTTP asks for"


def _header(response: Exchange, name: bytes) -> str:
    """The first header of this name, in lower case; empty if there is none."""
    return next((value.decode("utf-8", "replace") for key, value in response.headers if key.lower() == name), "")


def _too_large(limit: int) -> UnavailableError:
    return UnavailableError(f"holds more than {limit} bytes, the most of an image")
