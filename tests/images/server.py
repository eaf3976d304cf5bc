"""A web server with scripted, verbatim responses, and scripted name resolution."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Mapping, Sequence

    from deltawire_server.images.addresses import IPAddress


@dataclass(frozen=True)
class Answer:
    """What a path answers.

    Attributes:
        raw: The bytes of head and body.
        endless: Written after them repeatedly, as long as the client reads.
        hold: Whether the connection then stays open until the other side closes it.
    """

    raw: bytes
    endless: bytes = b""
    hold: bool = False


def ok(body: bytes, *headers: str, hold: bool = False) -> Answer:
    """An answer with this body and its length, as an image without a type; `headers` come first."""
    head = "\r\n".join(["HTTP/1.1 200 OK", *headers, f"Content-Length: {len(body)}"])
    return Answer(f"{head}\r\n\r\n".encode() + body, hold=hold)


def redirect(location: str, status: int = 302) -> Answer:
    """An answer that leads elsewhere; with none if `location` is empty."""
    header = f"Location: {location}\r\n" if location else ""
    return Answer(f"HTTP/1.1 {status} Moved\r\n{header}Content-Length: 4\r\n\r\nhere".encode())


@dataclass
class Server:
    """What it answers, and what it was asked.

    Attributes:
        answers: By target; others get a 404.
        port: Where it listens, on the loopback address.
        heads: The heads of all requests.
        connections: How many were opened.
        open: How many of them still are.
        most: How many were open at once, at most.
        gate: If set, no answer begins before it is.
    """

    answers: dict[str, Answer]
    port: int = 0
    heads: list[str] = field(default_factory=list)
    connections: int = 0
    open: int = 0
    most: int = 0
    gate: asyncio.Event | None = None

    @property
    def targets(self) -> list[str]:
        """What was asked for, in order."""
        return [head.split(" ")[1] for head in self.heads]

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        self.connections += 1
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            with suppress(asyncio.IncompleteReadError, ConnectionError):
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                self.heads.append(head)
                if self.gate is not None:
                    await self.gate.wait()
                answer = self.answers.get(head.split(" ")[1], Answer(b"HTTP/1.1 404 Not Found\r\n\r\n"))
                writer.write(answer.raw)
                while answer.endless:
                    writer.write(answer.endless)
                    await writer.drain()
                    await asyncio.sleep(0)
                if answer.hold:
                    await reader.read()
        finally:
            self.open -= 1
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


@asynccontextmanager
async def web(answers: Mapping[str, Answer], tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    """Run one."""
    server = Server(dict(answers))
    listener = await asyncio.start_server(server.answer, "127.0.0.1", 0, ssl=tls)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listener.close()


class Names:
    """Looks names up in a table: one answer after the other, the last one for ever; other names are not there.

    Attributes:
        asked: The names that were looked up, in order.
    """

    def __init__(self, table: Mapping[str, Sequence[Sequence[str]]]) -> None:
        self._table = {name: list(answers) for name, answers in table.items()}
        self.asked: list[str] = []

    async def __call__(self, name: str) -> Sequence[IPAddress]:
        """The next answer for a name."""
        self.asked.append(name)
        answers = self._table.get(name, [()])
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        return [ip_address(text) for text in answer]
