"""One image, fetched: its redirects, each judged as the first address was, and its bytes, counted as they come.

aiohttp alone, without the httpx around it that providers have: httpx hands an address over as text, to be read once more,
and here the parts that were judged have to be the parts that are used.

Nothing of a caller, of the operator or of an earlier answer goes along: no credentials, no cookies, no referrer, and no
proxy from the environment, which would look the name up for itself. Nothing is unpacked, so nothing can swell.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import aiohttp
import yarl

from deltawire_server.upstream.images.addresses import may_be_public
from deltawire_server.upstream.images.connect import (
    NOWHERE,
    JudgedNames,
    RefusedError,
    SystemNames,
    UnavailableError,
    judged_socket,
)
from deltawire_server.upstream.images.sniff import KINDS, media_type_of
from deltawire_server.upstream.images.urls import UrlError, WebAddress, joined
from deltawire_server.upstream.request import ImageData

if TYPE_CHECKING:
    import ssl

    from deltawire_server.upstream.images.connect import LookUp, Permits
    from deltawire_server.upstream.images.policy import Policy

MAX_HEADERS = 64
MAX_HEADER_BYTES = 8190
"""Of an answer's head: its lines, and each of them. Whoever sends more is no file server."""

_OK = 200
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_UNTYPED = frozenset({"", "application/octet-stream", "binary/octet-stream"})
"""What servers declare that do not know what a file is; others have to declare an image."""

_MISLED = "redirects to an address that images may not be fetched from"

_PROBLEMS = (
    (aiohttp.ClientConnectorCertificateError, "has a certificate that is not valid for it"),
    (aiohttp.ClientConnectorError, "cannot be reached"),
    (aiohttp.ClientPayloadError, "broke off"),
    (Exception, "was not answered as HTTP asks for"),
)
"""By kind of failure, what the caller is told; the first that fits. The texts of exceptions tell where connections went."""


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
        self._opened: aiohttp.ClientSession | None = None

    def complaint(self, address: WebAddress) -> str | None:
        """Why nothing may be fetched from an address, as far as one can see without looking up its host; `None` if it may."""
        complaint = self._policy.complaint(address)
        if complaint is None and not (may_be_public(address.host) if address.ip is None else self._permits(address.ip)):
            return NOWHERE
        return complaint

    async def fetch(self, address: WebAddress, budget: Budget) -> ImageData:
        """Fetch an image.

        Args:
            address: Where it is; there must be no `complaint` about it.
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
        except (aiohttp.ClientError, OSError) as error:
            problem = next(problem for kind, problem in _PROBLEMS if isinstance(error, kind))
            raise UnavailableError(problem) from error

    async def close(self) -> None:
        """Close its connections; what is under way fails."""
        if self._opened is not None:
            await self._opened.close()
        self._system_names.close()

    async def _follow(self, address: WebAddress, budget: Budget) -> ImageData:
        for hop in range(self._policy.max_redirects + 1):
            try:
                async with self._session().get(_url(address), allow_redirects=False) as response:
                    if response.status not in _REDIRECTS:
                        return await self._image(response, budget)
                    location = response.headers.get("Location", "")
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
        if self.complaint(following) is not None:
            raise RefusedError(_MISLED)
        return following

    async def _image(self, response: aiohttp.ClientResponse, budget: Budget) -> ImageData:
        if response.status != _OK:
            raise UnavailableError(f"was answered with HTTP status {response.status}")
        encoding = response.headers.get("Content-Encoding", "identity").lower()
        if encoding != "identity":
            raise UnavailableError("came encoded, which was not asked for")
        declared = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if declared not in _UNTYPED and not declared.startswith("image/"):
            raise UnavailableError(f"is declared as {declared[:80]!r} and not as an image")
        limit = self._policy.max_image_bytes
        if (response.content_length or 0) > limit:
            raise _too_large(limit)
        # The declared length may be missing, or a lie.
        received = bytearray()
        async for chunk in response.content.iter_any():
            budget.take(len(chunk))
            received += chunk
            if len(received) > limit:
                raise _too_large(limit)
        data = bytes(received)
        media_type = media_type_of(data)
        if media_type is None:
            raise UnavailableError(f"is no {KINDS} file")
        return ImageData(data, media_type)

    def _session(self) -> aiohttp.ClientSession:
        """Made by the first request, since it belongs to the running loop."""
        if self._opened is None:
            connector = aiohttp.TCPConnector(
                resolver=JudgedNames(self._look_up, self._permits),
                socket_factory=judged_socket(self._permits),
                use_dns_cache=False,
                ssl=self._tls,
                # Each connection is for one answer: what a server does with it afterwards is of no interest.
                force_close=True,
                limit=0,
            )
            self._opened = aiohttp.ClientSession(
                connector=connector,
                headers={"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": self._user_agent},
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
                # The only clock is `fetch`'s own.
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
                max_line_size=MAX_HEADER_BYTES,
                max_field_size=MAX_HEADER_BYTES,
                max_headers=MAX_HEADERS,
            )
        return self._opened


def _too_large(limit: int) -> UnavailableError:
    return UnavailableError(f"holds more than {limit} bytes, the most of an image")


def _url(address: WebAddress) -> yarl.URL:
    """The parts as they are; nothing is read or escaped once more."""
    path, _, query = address.target.partition("?")
    return yarl.URL.build(
        scheme=address.scheme, host=address.host, port=address.port, path=path, query_string=query, encoded=True
    )
