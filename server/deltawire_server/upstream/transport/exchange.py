"""The response to one request: parsed as it arrives, with limits, and read as the body of an `httpx.Response`."""

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
"""Limit for the status line and headers of a response, including those of 1xx responses before it."""

MAX_HEADERS = 128

MAX_OVERHEAD_BYTES = 16 * 1024
"""Limit for bytes after the headers that are not body (chunk sizes, chunk extensions, trailers) in a row. It is checked in steps of
this size, so the response fails after one to two times as many bytes."""

HIGH_WATER_BYTES = 64 * 1024
"""Received and unread bytes above which reading the socket is paused, so that TCP flow control slows the server down."""

_TLS_RECORDS = frozenset({0x15, 0x16})
"""The first byte of a TLS alert and of a TLS handshake, which no HTTP response begins with."""


class Carrier(Protocol):
    """The methods of a connection that an exchange uses."""

    def resume(self) -> None:
        """Resume reading if it was paused."""

    def close(self) -> None:
        """Close the connection now."""


class Exchange(httpx.AsyncByteStream):
    """The response to one request. One task at a time may wait for it, or `on_change` is called.

    Iteration yields all received bytes of the body in one piece. Bytes before a failure are yielded before it is raised.

    Args:
        connection: The connection of the response.
        timeout: Seconds to wait for the headers, and for each further piece of the body; `None` for no limit.

    Attributes:
        headers: The headers, in order; valid with `head_complete`.
        status: The status code; 0 before `head_complete`.
        head_complete: Whether the headers of the final response were received.
        complete: Whether the whole response was received.
        reusable: Whether the connection may be reused; valid with `complete`.
        error: The error that ended the response early; `None` without one.
        on_change: Called when bytes were received or the response has ended; `None` to read by iteration.
    """

    def __init__(self, connection: Carrier, timeout: float | None) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self.status = 0
        self.head_complete = False
        self.complete = False
        self.reusable = False
        self.error: httpx.TransportError | None = None
        self.on_change: Callable[[], None] | None = None
        self._connection = connection
        self._timeout = timeout
        self._pieces: list[bytes] = []
        self._unread = 0
        self._room = MAX_HEAD_BYTES
        self._framing = b""  # the header that delimits the body; without one, the end of the connection does
        self._waiter: asyncio.Future[None] | None = None
        # The parser looks up its callbacks when it is created; this one needs no Python frame.
        self.on_body: Callable[[bytes], None] = self._pieces.append
        self._parser = httptools.HttpResponseParser(self)

    @property
    def done(self) -> bool:
        """Whether the response has ended."""
        return self.complete or self.error is not None

    @property
    def full(self) -> bool:
        """Whether reading the socket should pause."""
        return self._unread > HIGH_WATER_BYTES

    # Called by the connection.

    def feed(self, data: bytes) -> None:
        """Parse received bytes."""
        if self._room == MAX_HEAD_BYTES and data[0] in _TLS_RECORDS:
            self.fail(ConnectFailedError("it speaks TLS at this port: use https, or another port", misconfigured=True))
            return
        self._unread += len(data)
        while data and not self.done:
            # Not beyond the limit, so that the result does not depend on how the bytes are split.
            step = min(self._room, MAX_OVERHEAD_BYTES)
            self._parse(data[:step])
            data = data[step:]
        if data:  # after the end of the response
            self.reusable = False
        self.wake()

    def end(self, error: Exception | None) -> None:
        """Handle the end of the connection, with or without an error."""
        if self.done:
            return
        if not self.head_complete:
            if isinstance(error, ssl.SSLError):
                # In TLS 1.3, a server rejects a client's certificate only after the handshake.
                self.fail(connect_failure(error))
            else:
                self.fail(ConnectionLostError("it closed the connection before it responded"))
        elif self._framing == b"content-length" and error is None:
            # A wrong length and a stopped server cannot be distinguished.
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
        """Drop the parser, to break its reference cycle with the exchange. `feed` must not be called any more."""
        del self._parser

    def wake(self) -> None:
        """Wake the waiting task, or call `on_change`."""
        if self.on_change is not None:
            self.on_change()
        elif self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # Called by the reader of the response.

    async def wait(self) -> None:
        """Wait for a change.

        Raises:
            httpx.ReadTimeout: There was none within the timeout.
        """
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            if self._timeout is None:
                await self._waiter
            else:
                async with asyncio.timeout(self._timeout):
                    await self._waiter
        except BaseException as error:
            # Also if canceled, because an engine stops generating when its connection is closed.
            self._connection.close()
            if isinstance(error, TimeoutError):
                raise httpx.ReadTimeout(f"it sent nothing for {self._timeout:g} seconds") from None
            raise
        finally:
            self._waiter = None

    async def head(self) -> None:
        """Wait for the headers.

        Raises:
            httpx.TransportError: The response failed before them.
        """
        while not self.head_complete:
            if self.error is not None:
                raise self.error
            await self.wait()

    def __aiter__(self) -> Self:
        """The body."""
        return self

    async def __anext__(self) -> bytes:
        """The received bytes of the body; waits if there are none."""
        while not self._pieces:
            if self.error is not None:
                raise self.error
            if self.complete:
                raise StopAsyncIteration
            await self.wait()
        return self.take()

    def take(self) -> bytes:
        """The received bytes of the body; empty if there are none."""
        if not self._pieces:
            return b""
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self._unread = 0
        self._connection.resume()
        return data

    def close(self) -> None:
        """Close the connection unless the whole response was received; unread bytes are dropped."""
        if not self.done:
            self._connection.close()
        # httpx's response has a reference cycle and keeps this object until a garbage collection.
        self._pieces.clear()

    async def aclose(self) -> None:
        """`close`, for httpx."""
        self.close()

    # Called by the parser. An exception stops it.

    def on_message_begin(self) -> None:
        """A response begins: the first one, or the next one after a 1xx response."""
        if self.complete:
            raise ProtocolViolationError("it sent two responses to one request")

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header. Trailers are ignored."""
        if self.head_complete:
            return
        if len(self.headers) == MAX_HEADERS:
            raise ProtocolViolationError(f"its response has more than {MAX_HEADERS} headers")
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The headers are complete. Those of a 1xx response are ignored."""
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
                # The caller can still read the status and the headers, for example of a compressed error page.
                raise ProtocolViolationError("the body of its response is compressed, which the request did not allow")

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
            raised = error.__context__
            self.fail(raised if isinstance(raised, ProtocolViolationError) else self._violation(), error)
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
