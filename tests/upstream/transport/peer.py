"""The server's side of raw connections, step by step: a test says what is sent, when, and what must have arrived."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import httpx

from deltawire_server.upstream.transport.client import Transport

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator

OK = b"HTTP/1.1 200 OK\r\n"
HELLO = OK + b"content-length: 5\r\n\r\nhello"
CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"


class Peer:
    """One accepted connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def request(self) -> bytes:
        """Read a request; returns its head and body."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        for line in head.lower().splitlines():
            if line.startswith(b"content-length:"):
                return head + await self.reader.readexactly(int(line[15:]))
        return head

    def send(self, data: bytes) -> None:
        """Send bytes."""
        self.writer.write(data)

    def close(self) -> None:
        """Close the connection, after what was sent."""
        self.writer.close()

    def reset(self) -> None:
        """Close it with a TCP reset."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def closed(self) -> None:
        """Wait until the other side has closed the connection."""
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionError):
                await self.reader.read()


class Origin:
    """A listening socket whose connections the test serves."""

    def __init__(self) -> None:
        self.accepted: asyncio.Queue[Peer] = asyncio.Queue()
        self.peers: list[Peer] = []
        self.port = 0
        self.scheme = "http"
        self.host = "127.0.0.1"

    @property
    def url(self) -> str:
        """Of anything on it."""
        return f"{self.scheme}://{self.host}:{self.port}/path"

    async def accept(self) -> Peer:
        """The next connection."""
        async with asyncio.timeout(10):
            return await self.accepted.get()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take a connection."""
        peer = Peer(reader, writer)
        self.peers.append(peer)
        self.accepted.put_nowait(peer)


@asynccontextmanager
async def origin(context: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> AsyncIterator[Origin]:
    """Listen."""
    server = Origin()
    listener = await asyncio.start_server(server.serve, host, 0, ssl=context, limit=2**26)
    server.port = listener.sockets[0].getsockname()[1]
    server.host = f"[{host}]" if ":" in host else host
    if context is not None:
        server.scheme = "https"
    try:
        yield server
    finally:
        listener.close()
        for peer in server.peers:
            peer.writer.transport.abort()


@asynccontextmanager
async def client(tls: ssl.SSLContext | bool = False, **limits: int) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client over the transport, without time limits."""
    async with httpx.AsyncClient(transport=Transport(tls, **limits), timeout=None, trust_env=False) as http:  # noqa: S113
        yield http
