"""A client that sees what a socket sees: nothing is decoded, mended or hidden."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import httpx

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from deltawire_server.fake_vllm import FakeVllm

TRANSCRIPTS = Path(__file__).parent.parent / "transcripts"

ASK: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "Hello, you."}], "stream": True}


class Raw:
    """One connection; `async with connect(vllm) as raw` opens and closes it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, vllm: FakeVllm) -> Self:
        return cls(*await asyncio.open_connection("127.0.0.1", vllm.port))

    def ask(self, body: dict[str, Any] | bytes = ASK, *headers: str) -> None:
        """Send a chat request."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = ["POST /v1/chat/completions HTTP/1.1", "Host: x", f"Content-Length: {len(data)}", *headers, "", ""]
        self.writer.write("\r\n".join(lines).encode() + data)

    async def head(self) -> str:
        """Read status line and headers."""
        return (await self.reader.readuntil(b"\r\n\r\n")).decode()

    async def chunk(self) -> bytes:
        """Read one HTTP chunk; the last one is empty."""
        size = int(await self.reader.readuntil(b"\r\n"), 16)
        return (await self.reader.readexactly(size + 2))[:-2]

    async def chunks(self) -> list[bytes]:
        """Read the HTTP chunks of a body up to the last one."""
        chunks = []
        while chunk := await self.chunk():
            chunks.append(chunk)
        return chunks

    def half_close(self) -> None:
        """Say that nothing more will be sent."""
        sock = self.writer.get_extra_info("socket")
        sock.shutdown(socket.SHUT_WR)


def http(base_url: str, **headers: str) -> httpx.AsyncClient:
    """Give an ordinary client; without the certificates whose loading takes longer than a test."""
    return httpx.AsyncClient(base_url=base_url, headers=headers, verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))


@contextlib.asynccontextmanager
async def connect(vllm: FakeVllm) -> AsyncIterator[Raw]:
    """Open a connection, and close it."""
    raw = await Raw.open(vllm)
    try:
        yield raw
    finally:
        raw.writer.close()
        with contextlib.suppress(ConnectionError):
            await raw.writer.wait_closed()


def events(body: bytes) -> list[dict[str, Any]]:
    """Decode a stream's events; it has to end with `[DONE]`."""
    parts = body.decode().removesuffix("\n\n").split("\n\n")
    assert parts[-1] == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-1]]


def shape(value: object) -> object:
    """Give a JSON value's members and kinds, in their order, without what differs from run to run."""
    if isinstance(value, dict):
        return [(name, shape(member)) for name, member in value.items()]
    if isinstance(value, list):
        return [shape(item) for item in value]
    return type(value).__name__
