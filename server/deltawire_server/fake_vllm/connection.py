"""HTTP/1.1 written by hand, since a proper server would refuse to do it wrong.

A `Connection` reads requests one after another and hands each to its handler, which writes the answer (see `player`). It
notices when the client goes, in the middle of an answer too.
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
        path: Without the query.
        query: The query's parameters; of repeated ones the last.
        headers: By lower-case name; of repeated ones the last.
        raw: The body's bytes.
        body: The decoded JSON body; `None` if there is none or it cannot be decoded.
        closed_early: Set when the client has closed its connection before the end of the answer, and the generation has
            been given up.
    """

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    raw: bytes
    body: Any = None
    closed_early: asyncio.Event = field(default_factory=asyncio.Event)


class Metronome:
    """Wakes many paced streams by few timers: those due within the same millisecond together.

    A timer each costs more than sending a token does. vLLM too sends in bursts, every stream's token after each step.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, list[asyncio.Future[None]]] = {}

    async def wait(self, due: float) -> None:
        """Wait until the loop's clock has passed `due`, and at most a millisecond more."""
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
        handler: Answers a request by writing to `transport`; it is cancelled when the client goes.
        opened: The open connections; this one adds and removes itself.
        metronome: What paced answers keep time by.

    Attributes:
        transport: Where the answer goes.
        writable: Cleared while more than `UNSENT_LIMIT` bytes wait for the client.
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
        """Start to listen."""
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(high=UNSENT_LIMIT)
        self._opened.add(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - a close and a reset are the same to vLLM
        """Give up what is under way."""
        self._opened.discard(self)
        self._lost = True
        if self._task is not None:
            self._task.cancel()

    def eof_received(self) -> None:
        """Close: like vLLM, take half a close for a whole one."""

    def pause_writing(self) -> None:
        """Let the stream wait for its client."""
        self.writable.clear()

    def resume_writing(self) -> None:
        """Let the stream go on."""
        self.writable.set()

    def data_received(self, data: bytes) -> None:
        """Collect a request; it waits while another one is being answered."""
        self._received += data
        if self._task is None:
            self._next()

    def drop(self) -> None:
        """End the connection as a killed process does; what was not sent yet is lost."""
        self._ended_by_us = True
        self.transport.abort()

    def close(self) -> None:
        """Send what waits, then close."""
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
        """Answer what is no request that this server reads, and close."""
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
