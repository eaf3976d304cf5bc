"""One request's response: parsed as it arrives, bounded, and read as the body of an `httpx.Response`."""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING, Protocol, Self

import httptools
import httpx

from deltawire_server.upstream.transport.errors import (
    ConnectFailedError,
    ConnectionLostError,
    ProtocolViolationError,
    connect_failure,
)

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_HEAD_BYTES = 64 * 1024
"""Of the response's head, including those of the 1xx responses before it."""

MAX_HEADERS = 128

MAX_OVERHEAD_BYTES = 16 * 1024
"""After the head, without a byte of body: chunk sizes, chunk extensions, trailers. It is counted in steps of this size, so
between once and twice as much is read before the response fails."""

HIGH_WATER_BYTES = 64 * 1024
"""Received and not yet read, above which the socket is not read: the server is slowed down by TCP."""

_TLS_RECORDS = frozenset({0x15, 0x16})
"""The first byte of a TLS alert and of a TLS handshake; no HTTP response begins so."""


class Carrier(Protocol):
    """What an exchange needs of its connection."""

    def resume(self) -> None:
        """Read the socket again, if that was paused."""

    def close(self) -> None:
        """Close the connection now."""


class Exchange(httpx.AsyncByteStream):
    """The response to one request. One task at a time may wait for it.

    Iterating yields all that has arrived, in one piece. Everything that arrived before a failure is yielded first.

    Args:
        connection: What the response arrives on.
        timeout: Seconds to wait for the head, and each time for more of the body; `None` for no limit.

    Attributes:
        headers: Of the response, in order, once `head_complete`.
        status: Its status code; 0 until `head_complete`.
        head_complete: Whether the head of the final response has arrived.
        complete: Whether the response arrived as a whole.
        reusable: Whether the connection may be used again, once `complete`.
        error: What ended the response before it was complete; `None` if nothing did.
    """

    def __init__(self, connection: Carrier, timeout: float | None) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self.status = 0
        self.head_complete = False
        self.complete = False
        self.reusable = False
        self.error: httpx.TransportError | None = None
        self._connection = connection
        self._timeout = timeout
        self._pieces: list[bytes] = []
        self._unread = 0
        self._room = MAX_HEAD_BYTES
        self._framing = b""  # the header that says how long the body is; without one it ends with the connection
        self._waiter: asyncio.Future[None] | None = None
        # The parser looks callbacks up when it is made; this one needs no Python frame.
        self.on_body: Callable[[bytes], None] = self._pieces.append
        self._parser = httptools.HttpResponseParser(self)

    @property
    def done(self) -> bool:
        """Whether nothing more is expected."""
        return self.complete or self.error is not None

    @property
    def full(self) -> bool:
        """Whether more has arrived than should wait to be read."""
        return self._unread > HIGH_WATER_BYTES

    # What the connection calls.

    def feed(self, data: bytes) -> None:
        """Parse what has arrived."""
        if self._room == MAX_HEAD_BYTES and data[0] in _TLS_RECORDS:
            self.fail(ConnectFailedError("it speaks TLS at this port: use https, or another port", misconfigured=True))
            return
        self._unread += len(data)
        while data and not self.done:
            # Never beyond the limit: how the bytes were cut on their way must make no difference.
            step = min(self._room, MAX_OVERHEAD_BYTES)
            self._parse(data[:step])
            data = data[step:]
        if data:  # after the end of the response
            self.reusable = False
        self.wake()

    def end(self, error: Exception | None) -> None:
        """The connection has ended: cleanly, or with an error."""
        if self.done:
            return
        if not self.head_complete:
            if isinstance(error, ssl.SSLError):
                # In TLS 1.3 a server refuses a client's certificate only after the handshake.
                self.fail(connect_failure(error))
            else:
                self.fail(ConnectionLostError("it closed the connection before it responded"))
        elif self._framing == b"content-length" and error is None:
            # A wrong length and a server that was stopped look the same.
            self.fail(ConnectionLostError("the body of its response is shorter than its Content-Length", begun=True))
        elif self._framing or error is not None:
            self.fail(ConnectionLostError("it closed the connection in the middle of its response", begun=True))
        else:
            self.complete = True
            self.wake()

    def fail(self, error: httpx.TransportError, cause: Exception | None = None) -> None:
        """End the response with an error, if it has not ended yet."""
        if not self.done:
            error.__cause__ = cause
            self.error = error
            self.wake()

    def release(self) -> None:
        """Nothing more will be fed: parser and exchange no longer keep each other in memory."""
        del self._parser

    def wake(self) -> None:
        """Let the task that waits look again."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # What the caller of the request does.

    async def wait(self) -> None:
        """Wait until something has changed.

        Raises:
            httpx.ReadTimeout: Nothing did within the limit.
        """
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            if self._timeout is None:
                await self._waiter
            else:
                async with asyncio.timeout(self._timeout):
                    await self._waiter
        except BaseException as error:
            # Also when canceled: closing the connection is what makes an engine stop.
            self._connection.close()
            if isinstance(error, TimeoutError):
                raise httpx.ReadTimeout(f"it sent nothing for {self._timeout:g} seconds") from None
            raise
        finally:
            self._waiter = None

    async def head(self) -> None:
        """Wait for the head.

        Raises:
            httpx.TransportError: There will be none.
        """
        while not self.head_complete:
            if self.error is not None:
                raise self.error
            await self.wait()

    def __aiter__(self) -> Self:
        """The body."""
        return self

    async def __anext__(self) -> bytes:
        """What has arrived of the body since the last time; waits if that is nothing."""
        while not self._pieces:
            if self.error is not None:
                raise self.error
            if self.complete:
                raise StopAsyncIteration
            await self.wait()
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self._unread = 0
        self._connection.resume()
        return data

    async def aclose(self) -> None:
        """Close the connection, unless the response has arrived as a whole; what is unread is dropped."""
        if not self.done:
            self._connection.close()
        # httpx's response refers to itself, and so keeps this until the garbage is collected.
        self._pieces.clear()

    # What the parser calls. Raising stops it.

    def on_message_begin(self) -> None:
        """A response begins: the first, or one after a 1xx response."""
        if self.complete:
            raise ProtocolViolationError("it sent two responses to one request")

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer, which is ignored."""
        if self.head_complete:
            return
        if len(self.headers) == MAX_HEADERS:
            raise ProtocolViolationError(f"its response has more than {MAX_HEADERS} headers")
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """A head is complete; that of a 1xx response is ignored."""
        status = self._parser.get_status_code()
        if 100 <= status < 200 and status != 101:
            self.headers.clear()
            return
        if status < 200 or self._parser.get_http_version() not in ("1.0", "1.1"):
            raise ProtocolViolationError("it does not speak HTTP/1.1")
        self._room = MAX_OVERHEAD_BYTES
        self.status = status
        self.head_complete = True
        for name, value in self.headers:
            lower = name.lower()
            if lower in (b"content-length", b"transfer-encoding"):
                self._framing = lower
            if (lower == b"content-encoding" and value.lower() not in (b"", b"identity")) or (
                lower == b"transfer-encoding" and value.lower() != b"chunked"
            ):
                # The caller gets the head all the same: the status of a compressed error page is worth having.
                raise ProtocolViolationError("the body of its response is compressed, which was not asked for")

    def on_message_complete(self) -> None:
        """A response is complete; a 1xx response is ignored."""
        if self.head_complete:
            self.complete = True
            self.reusable = self._parser.should_keep_alive()

    def _parse(self, data: bytes) -> None:
        pieces = len(self._pieces)
        self._room -= len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.reusable = False
            said = error.__context__
            self.fail(said if isinstance(said, ProtocolViolationError) else self._violation(), error)
        if len(self._pieces) > pieces:
            self._room = MAX_OVERHEAD_BYTES
        elif self._room == 0:
            self.fail(self._too_much())

    def _violation(self) -> ProtocolViolationError:
        if self.head_complete:
            return ProtocolViolationError("the chunked encoding of its response is broken")
        if self._parser.get_status_code() < 100:
            return ProtocolViolationError("it does not speak HTTP")
        return ProtocolViolationError("the head of its response is malformed")

    def _too_much(self) -> ProtocolViolationError:
        if self.head_complete:
            limit = f"more than {MAX_OVERHEAD_BYTES} bytes of chunk extensions or trailers"
            return ProtocolViolationError(f"its response has {limit}")
        return ProtocolViolationError(f"the head of its response is larger than {MAX_HEAD_BYTES} bytes")
