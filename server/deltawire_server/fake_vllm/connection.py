"""An HTTP/1.1 server connection of its own, because a library would not send invalid responses.

A `Connection` reads one request after another and calls the handler, which writes the response (see `player`). It detects a
client that disconnects, also within a response.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import parse_qsl, urlsplit

import msgspec

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

# A stream waits for its client above this many unsent bytes.
UNSENT_LIMIT = 256 * 1024


@dataclass(slots=True, eq=False)
class Request:
    """A request as it was received.

    Attributes:
        method: `GET`, `POST` ….
        path: The path without the query.
        query: The query's parameters; the last one of repeated ones.
        headers: The headers by lower-case name; the last one of repeated ones.
        raw: The body's bytes.
        body: The decoded JSON body; `None` if there is none or it cannot be decoded.
        closed_early: Set when the client has disconnected before the end of the answer, and generation has stopped.
    """

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    raw: bytes
    body: Any = None
    closed_early: asyncio.Event = field(default_factory=asyncio.Event)


class Metronome:
    """Wakes many paced streams with few timers: one for all streams that are due within the same millisecond.

    A timer for each stream would cost more than sending a token. vLLM sends in bursts too: a token of every stream per step.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, list[asyncio.Future[None]]] = {}

    async def wait(self, due: float) -> None:
        """Wait until the time `due` of the loop's clock, and at most 1 ms more."""
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        tick = int(due * 1000) + 1
        if tick in self._waiting:
            self._waiting[tick].append(waiter)
        else:
            self._waiting[tick] = [waiter]
            loop.call_at(tick / 1000, self._beat, tick)
        await waiter

    def _beat(self, tick: int) -> None:
        for waiter in self._waiting.pop(tick):
            if not waiter.done():
                waiter.set_result(None)


class Connection(asyncio.Protocol):
    """One client's connection.

    Args:
        handler: Answers a request by writing to `transport`; cancelled when the client disconnects.
        opened: The set of open connections; this one adds and removes itself.
        metronome: The timers of paced answers.

    Attributes:
        transport: The transport to write to.
        writable: Cleared while more than `UNSENT_LIMIT` bytes are unsent.
    """

    transport: asyncio.Transport

    def __init__(
        self,
        handler: Callable[[Request, Connection], Awaitable[None]],
        opened: set[Connection],
        metronome: Metronome,
    ) -> None:
        self._handler = handler
        self._opened = opened
        self.metronome = metronome
        self._received = bytearray()
        self._task: asyncio.Task[None] | None = None
        self.writable = asyncio.Event()
        self.writable.set()
        self._lost = False
        self._ended_by_us = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Register the connection."""
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(high=UNSENT_LIMIT)
        self._opened.add(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - a close and a reset are the same to vLLM
        """Cancel the answer in progress."""
        self._opened.discard(self)
        self._lost = True
        if self._task is not None:
            self._task.cancel()

    def eof_received(self) -> None:
        """Close the connection, as vLLM does after a half-close."""

    def pause_writing(self) -> None:
        """Pause the stream."""
        self.writable.clear()

    def resume_writing(self) -> None:
        """Resume the stream."""
        self.writable.set()

    def data_received(self, data: bytes) -> None:
        """Collect a request, which is processed after the one before it."""
        self._received += data
        if self._task is None:
            self._next()

    def drop(self) -> None:
        """Abort the connection, as a killed process does; unsent data is lost."""
        self._ended_by_us = True
        self.transport.abort()

    def close(self) -> None:
        """Send unsent data, then close."""
        self._ended_by_us = True
        self.transport.close()

    def _next(self) -> None:
        head, found, rest = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        lines = head.decode("latin-1").split("\r\n")
        try:
            method, target, _version = lines[0].split(" ")
            headers = {name.lower(): value.strip() for name, value in (line.split(":", 1) for line in lines[1:])}
            length = int(headers.get("content-length", "0"))
        except ValueError:
            self._refuse(400)
            return
        if "transfer-encoding" in headers:
            self._refuse(411)
            return
        if len(rest) < length:
            if headers.get("expect") == "100-continue" and not rest:
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            return
        raw = bytes(rest[:length])
        self._received = rest[length:]
        url = urlsplit(target)
        request = Request(method, url.path, dict(parse_qsl(url.query)), headers, raw)
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
            request.body = msgspec.json.decode(raw)
        self._task = asyncio.get_running_loop().create_task(self._serve(request))

    def _refuse(self, status: int) -> None:
        """Answer an unsupported request with an error, and close."""
        self.transport.write(f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-length: 0\r\n\r\n".encode())
        self.transport.close()

    async def _serve(self, request: Request) -> None:
        try:
            await self._handler(request, self)
        except asyncio.CancelledError:
            if self._lost and not self._ended_by_us:
                request.closed_early.set()
            raise
        except Exception:
            self.drop()
            raise
        finally:
            self._task = None
        if request.headers.get("connection", "").lower() == "close":
            self.transport.close()
        elif not self.transport.is_closing():
            self._next()
