"""An upstream on plain asyncio sockets that answers each chat request by a plan, byte by byte, with faults.

No HTTP library takes part, so a plan can break every rule of TCP, HTTP, server-sent events and the chat API. One server
serves many calls at once: a plan is found by the request id that the gateway passes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import socket
import struct
import termios
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Sequence

MODEL = "fake"
"""The one model that is listed."""

POLL_SECONDS = 0.001
"""Between two looks at the kernel's send queue, which nothing announces."""


@dataclass(frozen=True)
class Send:
    """Write these bytes; with `size`, that many at a time, each in a segment of its own."""

    data: bytes
    size: int = 0


@dataclass(frozen=True)
class Flood:
    """Write the same bytes until this many have been sent or the peer has closed, then stall.

    With `pause`, wait that many seconds after each piece.
    """

    piece: bytes
    limit: int = 100_000_000
    pause: float = 0.0


@dataclass(frozen=True)
class Gate:
    """Wait until the test sets `Plan.gate`, or the peer has closed."""


@dataclass(frozen=True)
class Stall:
    """Send nothing more; the connection stays open until the peer closes it."""


@dataclass(frozen=True)
class Close:
    """Close the connection in order (FIN)."""


@dataclass(frozen=True)
class Reset:
    """Reset the connection (RST), after the peer has acknowledged what was sent."""


Step = Send | Flood | Gate | Stall | Close | Reset


@dataclass
class Plan:
    """What is answered to one request, and what has happened.

    Attributes:
        steps: In order. After the last one the connection waits for its next request, unless a step ended it.
        asked: Set when a request has been read.
        at_gate: Set when a `Gate` is reached.
        gate: Set by the test to pass all gates.
        settled: Set when the request's connection is closed, or free for the next request.
        requests: How many requests had this plan.
        sent: How many bytes were written.
        peer_closed: Whether the gateway closed the connection before the plan was played to its end.
    """

    steps: Sequence[Step]
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    at_gate: asyncio.Event = field(default_factory=asyncio.Event)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    requests: int = 0
    sent: int = 0
    peer_closed: bool = False


class _EndedError(Exception):
    """The connection has ended."""


class Upstream:
    """The server: `async with Upstream() as upstream` listens on a free port of 127.0.0.1.

    Attributes:
        port: Where it listens.
        plans: By request id. A request without a plan is answered with status 404.
        connections: The connections that are open now.
        busy: How many of them play a plan.
        paths: How often each path was requested.
    """

    def __init__(self) -> None:
        self.port = 0
        self.plans: dict[str, Plan] = {}
        self.connections: set[asyncio.StreamWriter] = set()
        self.busy = 0
        self.paths: dict[str, int] = {}
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def base_url(self) -> str:
        """For the provider's settings."""
        return f"http://127.0.0.1:{self.port}/v1"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.refuse()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def refuse(self) -> None:
        """Stop listening, so that the kernel refuses every new connection. Open ones stay."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Kept here so that leaving can end it: asyncio keeps only weak references to tasks.
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.connections.add(writer)
        connection = _Connection(self, reader, writer)
        try:
            await connection.serve()
        except (_EndedError, ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()
            self.connections.discard(writer)
            if connection.plan is not None:
                self.busy -= 1
                connection.plan.settled.set()


class _Connection:
    """One connection and the plan that it plays now."""

    def __init__(self, upstream: Upstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.plan: Plan | None = None
        self._upstream = upstream
        self._reader = reader
        self._writer = writer
        # Each write is a segment of its own, and `drain` waits until the kernel has taken all of it.
        self._socket: socket.socket = writer.get_extra_info("socket")
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        writer.transport.set_write_buffer_limits(0)

    async def serve(self) -> None:
        """Answer requests until the connection ends."""
        while True:
            path, headers = await self._request()
            self._upstream.paths[path] = self._upstream.paths.get(path, 0) + 1
            request_id = headers.get("x-request-id", "").rpartition("-")[0]
            plan = self._upstream.plans.get(request_id) if path == "/v1/chat/completions" else None
            if plan is None:
                await self._write(_document(path))
                continue
            self.plan = plan
            self._upstream.busy += 1
            plan.requests += 1
            plan.settled.clear()
            plan.asked.set()
            try:
                for step in plan.steps:
                    await self._play(plan, step)
            except ConnectionError:
                # A peer that closes with bytes unread resets the connection.
                plan.peer_closed = True
                raise
            self.plan = None
            self._upstream.busy -= 1
            plan.settled.set()

    async def _request(self) -> tuple[str, dict[str, str]]:
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.split("\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        await self._reader.readexactly(int(headers.get("content-length", "0")))
        return first.split(" ")[1], headers

    async def _play(self, plan: Plan, step: Step) -> None:
        match step:
            case Send(data, size):
                for start in range(0, len(data), size or len(data) or 1):
                    piece = data[start : start + size] if size else data
                    await self._write(piece, plan)
            case Flood(piece, limit, pause):
                while plan.sent < limit:
                    await self._write(piece, plan)
                    if pause:
                        await self._closed_within(plan, pause)
                await self._closed_within(plan, None)
            case Gate():
                plan.at_gate.set()
                await self._closed_before(plan, plan.gate)
            case Stall():
                await self._closed_within(plan, None)
            case Close():
                raise _EndedError
            case Reset():
                await self._acknowledged()
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self._writer.transport.abort()
                raise _EndedError

    async def _write(self, data: bytes, plan: Plan | None = None) -> None:
        self._writer.write(data)
        await self._writer.drain()
        if plan is not None:
            plan.sent += len(data)
        # Others of the many calls have their turn, too.
        await asyncio.sleep(0)

    async def _acknowledged(self) -> None:
        """Wait until the peer's kernel has all that was sent."""
        queue = bytearray(4)
        while not self._writer.is_closing():
            fcntl.ioctl(self._socket.fileno(), termios.TIOCOUTQ, queue)
            if not int.from_bytes(queue, "little"):
                return
            await asyncio.sleep(POLL_SECONDS)

    async def _closed_within(self, plan: Plan, seconds: float | None) -> None:
        """End when the peer closes; return after so many seconds, if it does not."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                # A client sends nothing before it has its answer, so whatever can be read is the end.
                await self._reader.read(1)
                plan.peer_closed = True
                raise _EndedError

    async def _closed_before(self, plan: Plan, gate: asyncio.Event) -> None:
        closing = asyncio.ensure_future(self._reader.read(1))
        opening = asyncio.ensure_future(gate.wait())
        try:
            await asyncio.wait([closing, opening], return_when=asyncio.FIRST_COMPLETED)
            if not gate.is_set():
                plan.peer_closed = True
                raise _EndedError
        finally:
            for waiting in (closing, opening):
                waiting.cancel()
            await asyncio.wait([closing, opening])


def _document(path: str) -> bytes:
    """What a vLLM says of itself: its models. It has nothing else."""
    if path == "/v1/models":
        return response("200 OK", json.dumps({"object": "list", "data": [{"id": MODEL, "object": "model"}]}).encode())
    if path in ("/health", "/version"):
        return response("200 OK", b'{"version":"0.32.0"}')
    return response("404 Not Found", b'{"detail":"Not Found"}')


def response(status: str, body: bytes, *headers: str, content_type: str = "application/json") -> bytes:
    """A whole response with its length.

    Args:
        status: As in the status line: ``"404 Not Found"``.
        body: All of it.
        headers: Further header lines.
        content_type: Of the body; none if empty.
    """
    kind = [f"content-type: {content_type}"] if content_type else []
    lines = [f"HTTP/1.1 {status}", *kind, f"content-length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body
