"""Writes an answer with its chunk boundaries, pauses and broken ends."""

from __future__ import annotations

import asyncio
import socket
import struct
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Sequence

    from deltawire_server.fake_vllm.connection import Connection
    from deltawire_server.fake_vllm.script import Script

KEEP_ALIVE = b": keep-alive\n\n"

PHRASES = {status.value: status.phrase for status in HTTPStatus}


def http_chunk(data: bytes) -> bytes:
    """Frame bytes as one chunk of HTTP's chunked encoding."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class Player:
    """Writes one answer to one connection.

    Args:
        connection: The connection to write to.
        script: The pace and the fault; `play` takes the content.
    """

    def __init__(self, connection: Connection, script: Script) -> None:
        self._connection = connection
        self._script = script
        self._write = connection.transport.write
        self._frame: Callable[[bytes], bytes] = http_chunk if script.chunked else bytes
        # The number of chunks before the end of the script; negative without a limit.
        self._left = -1 if script.after is None else script.after
        # With a pace, each token is written separately.
        self._at_once = 1 if script.chunk_delay else script.chunks_per_write
        self._held: list[bytes] = []
        self._due = 0.0
        self._clock = asyncio.get_running_loop().time

    async def play(self, steps: Iterable[Sequence[bytes | asyncio.Event]]) -> None:
        """Send the answer; returns after its end, when all data is written to the transport.

        Args:
            steps: The body's HTTP chunks, in groups that are sent together; an event pauses until it is set.

        Raises:
            asyncio.CancelledError: The client disconnected.
        """
        script = self._script
        if script.headers_delay:
            await asyncio.sleep(script.headers_delay)
        if not script.chunked:
            steps = list(steps)
        if not await self._head(steps):
            await self._end(complete=False)
            return
        if script.first_delay:
            await self._wait(asyncio.sleep(script.first_delay))
        await self._body(steps)

    async def _body(self, steps: Iterable[Sequence[bytes | asyncio.Event]]) -> None:
        """Send the body and end the answer."""
        for step in steps:
            if self._script.chunk_delay:
                await self._pace()
            for piece in step:
                if isinstance(piece, asyncio.Event):
                    await self._gate(piece)
                elif self._left == 0:
                    self._flush()
                    await self._end(piece, complete=self._script.chunked)
                    return
                elif piece:
                    self._left -= 1
                    self._held.append(self._frame(piece))
                    if len(self._held) >= self._at_once:
                        await self._send()
        self._flush()
        await self._end(complete=True)

    async def _pace(self) -> None:
        """Wait until the next step is due. A schedule, so that later steps make up for a late one."""
        now = self._clock()
        self._due = self._due + self._script.chunk_delay if self._due else now
        if self._due > now:
            await self._wait(self._connection.metronome.wait(self._due))

    async def _gate(self, event: asyncio.Event) -> None:
        """Send the buffered chunks and wait for the event; the schedule then starts again."""
        self._flush()
        await self._wait(event.wait())
        self._due = 0.0

    async def _send(self) -> None:
        """Send the buffered chunks, then wait for the client if it is slow, or give other streams a turn."""
        self._flush()
        if not self._connection.writable.is_set():
            await self._connection.writable.wait()
        elif not self._script.chunk_delay:
            await asyncio.sleep(0)

    def _flush(self) -> None:
        if self._held:
            self._write(self._held[0] if len(self._held) == 1 else b"".join(self._held))
            self._held.clear()

    async def _head(self, steps: Iterable[Sequence[bytes | asyncio.Event]]) -> bool:
        """Send the status line and headers; return whether they are complete."""
        script = self._script
        fields = {"date": formatdate(usegmt=True), "server": "uvicorn"}
        if script.chunked:
            fields |= {"content-type": script.content_type, "vary": "Origin", "transfer-encoding": "chunked"}
        else:
            length = sum(len(piece) for step in steps for piece in step if isinstance(piece, bytes))
            fields |= {"content-length": str(length), "content-type": script.content_type, "vary": "Origin"}
        fields |= script.headers
        status = f"HTTP/1.1 {script.status} {PHRASES.get(script.status, '')}"
        head = [
            f"{line}\r\n".encode() for line in (status, *(f"{name}: {value}" for name, value in fields.items()), "")
        ]
        whole = b"".join(head)
        if script.header_bytes is not None:
            self._write(whole[: script.header_bytes])
            return False
        if not script.header_pause:
            self._write(whole)
            return True
        for line in head:
            self._write(line)
            await asyncio.sleep(script.header_pause)
        return True

    async def _end(self, following: bytes = b"data: {", *, complete: bool) -> None:
        """End the answer according to the script.

        Args:
            following: The data that would have been sent next.
            complete: Whether a valid end of the HTTP response is possible.
        """
        match self._script.end:
            case "clean" | "no_done" if complete:
                if self._script.chunked:
                    self._write(b"0\r\n\r\n")
            case "hang":
                await self._wait(asyncio.Event().wait())
            case "reset":
                await self._reset()
            case "cut" if self._script.header_bytes is None:
                framed = self._frame(following)
                self._write(framed[: len(framed) // 2])
                self._connection.close()
            case _:
                self._connection.close()

    async def _reset(self) -> None:
        """Close with RST after all data is written to the socket."""
        transport = self._connection.transport
        transport.set_write_buffer_limits(0)
        await self._connection.writable.wait()
        # With a linger time of 0, the kernel sends RST.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._connection.drop()

    async def _wait(self, awaited: Coroutine[Any, Any, object]) -> None:
        """Wait, and send comment lines if the script has them."""
        if not (self._script.keep_alive and self._script.chunked):
            await awaited
            return
        task = asyncio.ensure_future(awaited)
        try:
            while not (await asyncio.wait({task}, timeout=self._script.keep_alive))[0]:
                self._write(http_chunk(KEEP_ALIVE))
        finally:
            task.cancel()
