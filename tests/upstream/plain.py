"""An HTTP server that says to each path what it is told to: for answers that no vLLM gives."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Mapping


@dataclass
class Plain:
    """What it answers, and what it was asked.

    Attributes:
        answers: Status line and headers, and body, by path. The length is added; if it is given and wrong, the
            connection is closed after the body. Other paths get a 404; an empty head closes the connection at once.
        port: Where it listens.
        heads: The heads of all requests, in lower case.
    """

    answers: Mapping[str, tuple[str, bytes]]
    port: int = 0
    heads: list[str] = field(default_factory=list)

    @property
    def paths(self) -> list[str]:
        """The paths that were asked for, in order."""
        return [head.split(" ")[1] for head in self.heads]

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                self.heads.append(head)
                for line in head.splitlines():
                    if line.startswith("content-length:"):
                        await reader.readexactly(int(line.partition(":")[2]))
                said, body = self.answers.get(head.split(" ")[1], ("404 Not Found", b'{"detail":"Not Found"}'))
                if not said:
                    return
                if "content-length" not in said:
                    said += f"\r\ncontent-length: {len(body)}"
                writer.write(f"HTTP/1.1 {said}\r\n\r\n".encode() + body)
                if f"content-length: {len(body)}" not in said:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


@asynccontextmanager
async def plain(
    answers: Mapping[str, tuple[str, bytes]], ssl_context: ssl.SSLContext | None = None
) -> AsyncIterator[Plain]:
    """Run one."""
    server = Plain(answers)
    listener = await asyncio.start_server(server.answer, "127.0.0.1", 0, ssl=ssl_context)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listener.close()
