"""A client that speaks HTTP/2 itself: it can send half a request, ping as it likes, and count what it was allowed to send."""

from __future__ import annotations

import asyncio
import struct
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    ConnectionTerminated,
    Event,
    RemoteSettingsChanged,
    ResponseReceived,
    StreamReset,
    TrailersReceived,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

WAIT_SECONDS = 30.0
WINDOW = 65_535
"""Bytes of a stream that a server lets come before it asks for more."""


class RawClient:
    """One connection.

    Attributes:
        connection: The protocol's state.
        events: What has come.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        # Errors of the client are what the tests are about.
        config = H2Configuration(client_side=True, validate_outbound_headers=False, header_encoding="utf-8")
        self.connection = H2Connection(config)
        self.events: list[Event] = []
        self.closed = False

    def flush(self) -> None:
        """Send what is to be sent."""
        self._writer.write(self.connection.data_to_send())

    async def drain(self) -> None:
        """Wait until the server has read enough of what was sent."""
        await self._writer.drain()

    def call(self, method: str, *headers: tuple[str, str | bytes], body: bytes = b"", end: bool = False) -> int:
        """Begin a call, with the first bytes of its body. Returns the stream's number."""
        stream = self.connection.get_next_available_stream_id()
        self.connection.send_headers(
            stream,
            [
                (":method", "POST"),
                (":scheme", "http"),
                (":path", method),
                (":authority", "gateway"),
                ("te", "trailers"),
                ("content-type", "application/grpc"),
                *headers,
            ],
        )
        for at in range(0, len(body), 16_384):
            self.connection.send_data(stream, body[at : at + 16_384])
        if end:
            self.connection.end_stream(stream)
        self.flush()
        return stream

    async def until(self, condition: Callable[[], object]) -> None:
        """Read until something is so, or the connection is closed."""
        async with asyncio.timeout(WAIT_SECONDS):
            while not condition() and not self.closed:
                try:
                    data = await self._reader.read(65_536)
                except ConnectionError:
                    data = b""
                self.closed = not data
                if data:
                    self.events += self.connection.receive_data(data)
                    self.flush()

    def headers(self, stream: int) -> dict[str, str]:
        """What a stream was answered, headers and trailers together."""
        return {
            str(name): str(value)
            for event in self.events
            if isinstance(event, ResponseReceived | TrailersReceived) and event.stream_id == stream
            for name, value in event.headers or ()
        }

    async def status(self, stream: int) -> str:
        """The number of the status with which a call ends, while its body need not have ended."""
        await self.until(lambda: "grpc-status" in self.headers(stream))
        return self.headers(stream)["grpc-status"]

    def window(self, stream: int) -> int:
        """Bytes that the server would still take of a stream."""
        return self.connection.streams[stream].outbound_flow_control_window

    @property
    def resets(self) -> list[int]:
        """The streams that the server has reset."""
        return [event.stream_id for event in self.events if isinstance(event, StreamReset)]

    @property
    def terminated(self) -> ConnectionTerminated | None:
        """The server's GOAWAY."""
        return next((event for event in self.events if isinstance(event, ConnectionTerminated)), None)


def message(data: bytes, size: int | None = None) -> bytes:
    """A message as gRPC frames it; `size` if its header says another one."""
    return b"\0" + struct.pack(">I", len(data) if size is None else size) + data


@asynccontextmanager
async def raw_client(address: str) -> AsyncIterator[RawClient]:
    """A connection whose settings are exchanged."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    client = RawClient(reader, writer)
    try:
        client.connection.initiate_connection()
        client.flush()
        await client.until(lambda: any(isinstance(event, RemoteSettingsChanged) for event in client.events))
        yield client
    finally:
        writer.close()
