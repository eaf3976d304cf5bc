"""A TCP proxy that breaks connections on request or after a number of bytes, anywhere in a message."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType


class CuttingProxy:
    """Stands before one address. Use it in an `async with` block.

    Args:
        target: "host:port".
        cut_after: Asked for each connection: after how many bytes to the client it is reset; `None` for never.

    Attributes:
        address: Where it listens.
        connections: How many were made.
        cuts: How many were reset after their number of bytes.
        passed: Bytes that went to clients.
    """

    def __init__(self, target: str, cut_after: Callable[[], int | None] = lambda: None) -> None:
        self.address = ""
        self.connections = 0
        self.cuts = 0
        self.passed = 0
        self._host, _, self._port = target.rpartition(":")
        self._cut_after = cut_after
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Reset every connection that there is; new ones can be made."""
        for task in self._tasks:
            task.cancel()

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            their_reader, their_writer = await asyncio.open_connection(self._host, int(self._port))
            upwards = asyncio.create_task(self._upwards(reader, their_writer))
            try:
                await self._downwards(their_reader, writer, self._cut_after())
            finally:
                upwards.cancel()
                their_writer.transport.abort()
        finally:
            # Reset, not closed: a killed process or a lost network says no goodbye.
            writer.transport.abort()

    async def _upwards(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.transport.abort()  # which ends the other way too

    async def _downwards(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limit: int | None) -> None:
        left = limit
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536 if left is None else left):
                writer.write(data)
                await writer.drain()
                self.passed += len(data)
                if left is not None:
                    left -= len(data)
                    if not left:
                        self.cuts += 1
                        break
