"""One connection: one request at a time, and closed at the first violation of the protocol."""

from __future__ import annotations

import asyncio
import contextlib
import select
from typing import TYPE_CHECKING, cast

import httpx

from deltawire_server.upstream.transport.errors import ConnectionLostError, ProtocolViolationError
from deltawire_server.upstream.transport.exchange import Exchange

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterable, Callable

SLICE_BYTES = 256 * 1024
"""Bytes of a request's body that are written at once; the next ones follow when the server has received most of them."""


READ_BYTES = 32 * 1024
"""Bytes that are read at once. The event loop's default is 256 KiB, which each slow reader would hold."""

_buffer = memoryview(bytearray(READ_BYTES))
"""The read buffer of all connections: its content is copied before the next read."""


class Connection(asyncio.BufferedProtocol):
    """A connection to an origin: `claim` it, then `send` a request.

    Args:
        sock: The connected socket; `None` with TLS.
        on_idle: Called when a response is complete and the connection can be reused.
        on_closed: Called once, when the connection is closed, with whether it was claimed.

    Attributes:
        error: Why the connection is closed; `None` while it is open.
    """

    def __init__(
        self,
        sock: socket.socket | None,
        on_idle: Callable[[Connection], None],
        on_closed: Callable[[Connection, bool], None],
    ) -> None:
        self._socket = sock
        self._on_idle = on_idle
        self._on_closed = on_closed
        self._exchange: Exchange | None = None
        self.error: httpx.TransportError | None = None
        self._claimed = False
        self._paused = False
        self._full = False  # whether the write buffer is above its high-water mark
        self._sent = False
        self._expiry: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport
        self._poll = select.poll()

    async def send(self, head: bytes, body: AsyncIterable[bytes], read_timeout: float | None) -> Exchange:
        """Send a request and wait for the head of its response.

        Args:
            head: The request line and headers.
            body: The body, in pieces. The next piece is requested after the server has received most of those before it.
            read_timeout: Seconds without progress in either direction; `None` for no limit.

        Raises:
            httpx.TransportError: There is no response. The connection is closed, as it is if this is canceled.
        """
        exchange = self._exchange = Exchange(self, read_timeout)
        self._sent = False
        await self._write(exchange, head, body)
        await exchange.head()
        return exchange

    def claim(self) -> bool:
        """Reserve it for a request, which must be sent before any `await`.

        Returns:
            Whether it can be used. If an idle connection has received any data or the end, it is closed instead.
        """
        if self._expiry is not None:
            self._expiry.cancel()
            # The event loop may not have reported the data yet.
            if self._poll.poll(0):
                self.close()
        self._claimed = self.error is None
        return self._claimed

    def expire_after(self, seconds: float) -> None:
        """Close it unless it is claimed within this time."""
        self._expiry = asyncio.get_running_loop().call_later(seconds, self.close)

    def close(self, error: httpx.TransportError | None = None) -> None:
        """Close it now: unsent data is dropped, and a response in progress fails."""
        if self.error is not None:
            return
        self.error = error or ConnectionLostError("the gateway closed the connection")
        if self._expiry is not None:
            self._expiry.cancel()
        self._transport.abort()
        self._detach()
        claimed, self._claimed = self._claimed, False
        self._on_closed(self, claimed)

    def resume(self) -> None:
        """Resume reading if it was paused."""
        if self._paused and self.error is None:
            self._paused = False
            self._transport.resume_reading()

    # Called by the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The connection is open."""
        self._transport = cast("asyncio.Transport", transport)
        self._poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 (the loop's guess)
        """The buffer to read into."""
        return _buffer

    def buffer_updated(self, nbytes: int) -> None:
        """`nbytes` bytes were received."""
        self._receive(bytes(_buffer[:nbytes]))

    def eof_received(self) -> None:
        """The server sends no more data; close the connection."""
        self._end(None)

    def connection_lost(self, error: Exception | None) -> None:
        """The connection is closed. Read what the server sent before, such as its rejection of a large request."""
        if error is not None and self._exchange is not None and self._socket is not None:
            with contextlib.suppress(OSError):
                while self._exchange is not None:
                    data = self._socket.recv(SLICE_BYTES)
                    if not data:
                        self._end(None)
                        break
                    self._receive(data)
        self._end(error)

    def pause_writing(self) -> None:
        """The write buffer is full."""
        self._full = True

    def resume_writing(self) -> None:
        """The write buffer has room."""
        self._full = False
        if self._exchange is not None:
            self._exchange.wake()

    def _receive(self, data: bytes) -> None:
        """Process received bytes. Without a request in progress, they must never become part of the next response."""
        exchange = self._exchange
        if exchange is None:
            self.close(ProtocolViolationError("it sent data before a request"))
            return
        exchange.feed(data)
        if exchange.done:
            self._finish(exchange)
        elif exchange.full and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    async def _write(self, exchange: Exchange, head: bytes, body: AsyncIterable[bytes]) -> None:
        """Write the request, as fast as the server receives it."""
        waiting = bytearray(head)
        async for piece in body:
            waiting += piece
            while len(waiting) > SLICE_BYTES:
                self._transport.write(waiting[:SLICE_BYTES])
                del waiting[:SLICE_BYTES]
                if not await self._takes_more(exchange):
                    return
        self._transport.write(waiting)
        self._sent = True

    async def _takes_more(self, exchange: Exchange) -> bool:
        """Wait until the server has received most of the written bytes; return whether to send the rest.

        This always waits at least once, because a server that reads fast would otherwise starve other tasks. It is not called
        after the last slice: the response may arrive at once, and a connection is reusable only if its request was sent.
        """
        if not self._full:
            asyncio.get_running_loop().call_soon(exchange.wake)
            await exchange.wait()
        # With an error status, the server does not read the rest of the request.
        while not (exchange.done or exchange.status >= httpx.codes.MULTIPLE_CHOICES):
            if not self._full:
                return True
            await exchange.wait()
        return False

    def _finish(self, exchange: Exchange) -> None:
        """Handle the end of the response."""
        sent = self._sent and not self._transport.get_write_buffer_size()
        if not (exchange.complete and exchange.reusable and sent):
            self.close()
        else:
            self._detach()
            self.resume()
            self._claimed = False
            self._on_idle(self)

    def _end(self, error: Exception | None) -> None:
        """Handle the end of the connection by the server."""
        if self._exchange is not None:
            self._exchange.end(error)
        self.close(ConnectionLostError("it closed the connection before it responded"))

    def _detach(self) -> None:
        """Detach the exchange; if its response has not ended, it fails."""
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            if self.error is not None:
                exchange.fail(self.error)
            exchange.release()
