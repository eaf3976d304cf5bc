"""One connection: a request and its response at a time, and closed at the first thing that is out of order."""

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
"""Of a request's body, given to the socket at once; the next follows when the server has taken most of it."""


READ_BYTES = 64 * 1024
"""What is read from a socket at once. The event loop's own choice is 256 KiB, which each answer that is read slowly would hold."""

_buffer = memoryview(bytearray(READ_BYTES))
"""Of all connections: what is read into it is copied before anything else is read."""


class Connection(asyncio.BufferedProtocol):
    """A connection to an origin: `claim` it, then `send` a request.

    Args:
        sock: Connected; `None` if TLS wraps it.
        on_idle: Called when a response was complete and the connection can take another request.
        on_closed: Called once, when it cannot be used any more, with whether it was claimed then.

    Attributes:
        error: Why it cannot be used any more; `None` as long as it can.
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
        self._full = False  # what was written is more than the socket takes now
        self._sent = False
        self._expiry: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport
        self._poll = select.poll()

    async def send(self, head: bytes, body: AsyncIterable[bytes], read_timeout: float | None) -> Exchange:
        """Send a request and wait for the head of its response.

        Args:
            head: The request's head.
            body: Its body, in pieces. No piece is asked for before the server has taken most of those before it.
            read_timeout: Seconds that the server may neither take nor send anything; `None` for no limit.

        Raises:
            httpx.TransportError: There is no response. The connection is closed then, as when canceled.
        """
        exchange = self._exchange = Exchange(self, read_timeout)
        self._sent = False
        await self._write(exchange, head, body)
        await exchange.head()
        return exchange

    def claim(self) -> bool:
        """Take it for a request, which has to be sent before anything is awaited.

        Returns:
            Whether it can be used. An idle connection on which anything has arrived, the end included, is closed instead.
        """
        if self._expiry is not None:
            self._expiry.cancel()
            # The loop may not have reported it yet.
            if self._poll.poll(0):
                self.close()
        self._claimed = self.error is None
        return self._claimed

    def expire_after(self, seconds: float) -> None:
        """Close it unless it is claimed within this time."""
        self._expiry = asyncio.get_running_loop().call_later(seconds, self.close)

    def close(self, error: httpx.TransportError | None = None) -> None:
        """Close it now: what has not been sent is dropped, and a response under way fails."""
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
        """Read the socket again, if that was paused."""
        if self._paused and self.error is None:
            self._paused = False
            self._transport.resume_reading()

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open."""
        self._transport = cast("asyncio.Transport", transport)
        self._poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 (the loop's guess)
        """Where to read into."""
        return _buffer

    def buffer_updated(self, nbytes: int) -> None:
        """So many bytes arrived."""
        self._receive(bytes(_buffer[:nbytes]))

    def eof_received(self) -> None:
        """The server sends no more, so neither do we."""
        self._end(None)

    def connection_lost(self, error: Exception | None) -> None:
        """It is closed. What the server sent before it stopped reading still counts: a refusal of a large request."""
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
        """The socket takes no more for now."""
        self._full = True

    def resume_writing(self) -> None:
        """The socket takes more."""
        self._full = False
        if self._exchange is not None:
            self._exchange.wake()

    def _receive(self, data: bytes) -> None:
        """Take bytes. Out of turn they belong to no request, and must never be taken for the next one's response."""
        exchange = self._exchange
        if exchange is None:
            self.close(ProtocolViolationError("it sent something before it was asked"))
            return
        exchange.feed(data)
        if exchange.done:
            self._finish(exchange)
        elif exchange.full and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    async def _write(self, exchange: Exchange, head: bytes, body: AsyncIterable[bytes]) -> None:
        """Give the socket the request, as fast as the server takes it."""
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
        """Wait until the server has taken most of what was written; whether it wants the rest.

        A server that reads as fast as this writes would let no other call have its turn. So this waits in any case, but never
        after the last slice, when the response may come at once, and only a request that was sent leaves its connection usable.
        """
        if not self._full:
            asyncio.get_running_loop().call_soon(exchange.wake)
            await exchange.wait()
        # The server has refused the request and will not read the rest of it.
        while not (exchange.done or exchange.status >= httpx.codes.MULTIPLE_CHOICES):
            if not self._full:
                return True
            await exchange.wait()
        return False

    def _finish(self, exchange: Exchange) -> None:
        """The response has ended."""
        sent = self._sent and not self._transport.get_write_buffer_size()
        if not (exchange.complete and exchange.reusable and sent):
            self.close()
        else:
            self._detach()
            self.resume()
            self._claimed = False
            self._on_idle(self)

    def _end(self, error: Exception | None) -> None:
        """The server has ended the connection."""
        if self._exchange is not None:
            self._exchange.end(error)
        self.close(ConnectionLostError("it closed the connection before it responded"))

    def _detach(self) -> None:
        """Part with the exchange; if its response has not ended, it fails."""
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            if self.error is not None:
                exchange.fail(self.error)
            exchange.release()
