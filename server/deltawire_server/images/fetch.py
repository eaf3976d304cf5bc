"""Fetches one image: validates each redirect like the first URL, and counts the bytes as they arrive.

It uses the transport without httpx: httpx parses a URL from text again, but the validated parts must be the parts that are used.

A request has no credentials, no cookies and no referrer, and ignores proxies in the environment, which would look up the name
themselves. Compressed responses are refused, so there is no decompression bomb.
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
    validated_addresses,
    validated_socket,
)
from deltawire_server.images.sniff import KINDS, media_type_of
from deltawire_server.upstream.request import ImageData
from deltawire_server.upstream.transport.client import tls_context
from deltawire_server.upstream.transport.connection import Connection
from deltawire_server.upstream.transport.dial import dial
from deltawire_server.upstream.transport.errors import ConnectFailedError, ConnectionLostError
from deltawire_server.upstream.web_address import UrlError, WebAddress, joined

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator

    from deltawire_server.images.connect import LookUp, Permits
    from deltawire_server.images.policy import Policy
    from deltawire_server.upstream.transport.exchange import Exchange

_OK = 200
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_UNTYPED = frozenset({"", "application/octet-stream", "binary/octet-stream"})
"""The content types of servers without a known type for a file; all others must be an image type."""

_MISLED = "redirects to an address that images may not be fetched from"


class Budget:
    """The bytes that may still be fetched for one request."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._left = total

    def take(self, count: int) -> None:
        """Take bytes from the budget.

        Raises:
            UnavailableError: The budget is exceeded.
        """
        self._left -= count
        if self._left < 0:
            raise UnavailableError(f"makes more than {self._total} bytes with the request's others")


class Fetcher:
    """Fetches images. Safe for concurrent calls.

    Args:
        policy: The operator's policy.
        permits: Whether an IP address may be connected to.
        look_up: Looks up names; `None` for the operating system's resolver.
        tls: For https: a context that verifies certificates, or `True` for the system's authorities.
        user_agent: The User-Agent header.
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
        """Why a URL must not be fetched, without a lookup of its host; `None` if it may."""
        violation = self._policy.violation(address)
        if violation is None and not (may_be_public(address.host) if address.ip is None else self._permits(address.ip)):
            return NOWHERE
        return violation

    async def fetch(self, address: WebAddress, budget: Budget) -> ImageData:
        """Fetch an image.

        Args:
            address: Its URL, without a `violation`.
            budget: The budget of the request, from which the fetched bytes are taken.

        Raises:
            RefusedError: Its host, or the target of a redirect, is not allowed.
            UnavailableError: The image does not exist, is too large or too slow, or is not an image.
        """
        try:
            async with asyncio.timeout(self._policy.timeout):
                return await self._follow(address, budget)
        except TimeoutError:
            raise UnavailableError(f"took longer than {self._policy.timeout:g} seconds") from None
        except httpx.TransportError as error:
            raise UnavailableError(_problem(error)) from error

    async def close(self) -> None:
        """Close all connections; fetches in progress fail."""
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
        """The target of a redirect, if it is allowed. All violations have the same message."""
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
            raise UnavailableError("was sent compressed, which the request did not allow")
        declared = _header(response, b"content-type").partition(";")[0].strip().lower()
        if declared not in _UNTYPED and not declared.startswith("image/"):
            raise UnavailableError(f"is declared as {declared[:80]!r} and not as an image")
        limit = self._policy.max_image_bytes
        if int(_header(response, b"content-length") or 0) > limit:
            raise _too_large(limit)
        # The declared length may be missing or wrong.
        received = bytearray()
        async for chunk in response:
            budget.take(len(chunk))
            received += chunk
            if len(received) > limit:
                raise _too_large(limit)
        data = bytes(received)
        media_type = media_type_of(data)
        if media_type is None:
            raise UnavailableError(f"is not a {KINDS} file")
        return ImageData(data, media_type)

    @contextlib.asynccontextmanager
    async def _get(self, address: WebAddress) -> AsyncIterator[Exchange]:
        """Send a GET request on a new connection; yields the response after its headers."""
        connection = await dial(
            address.host,
            functools.partial(validated_addresses, self._look_up, self._permits, address),
            self._context if address.scheme == "https" else None,
            self._connection,
            None,  # the timeout of `fetch` applies
            functools.partial(validated_socket, self._permits),
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
        # It is closed after its response, so it is never idle.
        return Connection(sock, Connection.close, lambda *_: None)

    @functools.cached_property
    def _context(self) -> ssl.SSLContext:
        return tls_context(self._tls)

    def _head(self, address: WebAddress) -> bytes:
        """The request line and headers, from the validated parts without another parsing or escaping."""
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
    """The message for the caller. It does not have the transport's message, which would reveal the network of the gateway."""
    if isinstance(error.__cause__, ssl.SSLCertVerificationError):
        return "has a certificate that is not valid for it"
    if isinstance(error, ConnectFailedError):
        return "cannot be reached"
    if isinstance(error, ConnectionLostError) and error.begun:
        return "broke off"
    return "was not answered with valid HTTP"


def _header(response: Exchange, name: bytes) -> str:
    """The value of the first header of this name, which is in lower case; empty without one."""
    return next((value.decode("utf-8", "replace") for key, value in response.headers if key.lower() == name), "")


def _too_large(limit: int) -> UnavailableError:
    return UnavailableError(f"holds more than {limit} bytes, the most of an image")
