"""Broken HTTP on raw sockets, and what a caller of the gateway gets: by what broke, and by how far the answer had come."""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from deltawire_server.errors import Code, ProviderError, Reason
from deltawire_server.upstream.base import HealthStatus
from tests.support.gateway import failure_of, kinds, read
from tests.support.pushed import BrokenBodyError, pulled
from tests.upstream.support import CALL, HI, provider, refusal_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.conftest import StartGateway

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"


def event(choices: bytes, usage: bytes = b"null") -> bytes:
    """An event as vLLM sends it."""
    chunk = b'{"id":"c","object":"chat.completion.chunk","created":1,"model":"fake"'
    return b"data: " + chunk + b',"choices":[' + choices + b'],"usage":' + usage + b"}\n\n"


FIRST = event(b'{"index":0,"delta":{"role":"assistant","content":"Hi"},"finish_reason":null}')
REST = (
    event(b'{"index":0,"delta":{"content":"!"},"finish_reason":"stop"}')
    + event(b"", b'{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3}')
    + b"data: [DONE]\n\n"
)


def chunk(data: bytes) -> bytes:
    """One HTTP chunk."""
    return b"%x\r\n%s\r\n" % (len(data), data)


@dataclass(frozen=True)
class Broken:
    """A response that breaks.

    Attributes:
        data: All of it.
        end: How the connection ends: "" if the server leaves it open, "close", "reset", or "flood" for the end of `data` over
            and over.
    """

    data: bytes
    end: str = ""


class Upstream:
    """Serves a model, and answers each chat with the same broken response."""

    def __init__(self, broken: Broken) -> None:
        self.broken = broken
        self.base_url = ""
        self.sent = 0
        self.chats = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
                await self._serve(reader, writer)
        finally:
            self._tasks.discard(task)
            if self.broken.end == "reset":
                sock = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            for line in head.lower().splitlines():
                if line.startswith(b"content-length:"):
                    await reader.readexactly(int(line[15:]))
            if b"/models" in head:
                body = b'{"data":[{"id":"fake"}]}'
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
                continue
            if b"/chat/" not in head:
                writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
                continue
            self.chats += 1
            writer.write(self.broken.data)
            await writer.drain()
            while self.broken.end == "flood":
                writer.write(self.broken.data[-65536:])
                await writer.drain()
                self.sent += 65536
            if self.broken.end:
                return

    def stop(self) -> None:
        """End what is being served."""
        for task in self._tasks:
            task.cancel()


@asynccontextmanager
async def upstream(broken: Broken) -> AsyncIterator[Upstream]:
    """Run one."""
    server = Upstream(broken)
    listener = await asyncio.start_server(server.answer, "127.0.0.1", 0)
    server.base_url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listener.close()
        server.stop()


NO_HTTP = {
    "another protocol": Broken(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "a page alone": Broken(b"<html>hello</html>"),
    "HTTP/2": Broken(b"HTTP/2.0 200 OK\r\n\r\n"),
    "a bad status": Broken(b"HTTP/1.1 abc OK\r\n\r\n"),
    "no colon": Broken(b"HTTP/1.1 200 OK\r\nnothing\r\n\r\n"),
    "two lengths": Broken(HEAD + b"content-length: 1\r\ncontent-length: 2\r\n\r\n"),
    "many headers": Broken(HEAD + b"a: b\r\n" * 200 + b"\r\n"),
    "a large head": Broken(HEAD + b"a: " + b"b" * 70000 + b"\r\n\r\n"),
    "an endless head": Broken(HEAD + b"a: " + b"b" * 70000, "flood"),
    "endless 1xx": Broken(b"HTTP/1.1 100 Continue\r\n\r\n" * 4000, "flood"),
    "gzip": Broken(HEAD + b"content-encoding: gzip\r\n\r\n\x1f\x8b\x08"),
}
"""Before anything of an answer."""

BROKEN = {
    "a bad size": Broken(b"xyz\r\n"),
    "a negative size": Broken(b"-5\r\nhello\r\n"),
    "a size without end": Broken(b"f" * 32 + b"\r\n"),
    "no line end": Broken(b"2\r\n: \n2\r\n: \r\n"),
    "no chunks": Broken(b"data: {}\n\n"),
    "a chunk extension without end": Broken(b"2;" + b"x" * 70000, "flood"),
    "trailers without end": Broken(b"0\r\n" + b"a: b\r\n" * 12000, "flood"),
}
"""In the place of a chunk."""

LOST = {
    "closed": Broken(b"", "close"),
    "closed in a chunk": Broken(b"ff\r\n:", "close"),
    "reset": Broken(b"", "reset"),
}
"""Instead of one."""

PHASES = {"head": b"", "event": chunk(FIRST), "answer": chunk(FIRST + REST)}
"""What came of the answer before."""


def cases() -> dict[str, tuple[Broken, Reason | None, Code | None]]:
    """What breaks in which phase, and how the call ends: `None` for OK."""
    found: dict[str, tuple[Broken, Reason | None, Code | None]] = {
        name: (broken, Reason.UPSTREAM_MALFORMED, Code.INTERNAL) for name, broken in NO_HTTP.items()
    }
    for phase, before in PHASES.items():
        for kinds_of, early, late in (
            (BROKEN, (Reason.UPSTREAM_MALFORMED, Code.INTERNAL), (Reason.UPSTREAM_MALFORMED, Code.ABORTED)),
            (LOST, (Reason.UPSTREAM_UNAVAILABLE, Code.UNAVAILABLE), (Reason.UPSTREAM_INCOMPLETE, Code.ABORTED)),
        ):
            for name, broken in kinds_of.items():
                whole = Broken(CHUNKED + before + broken.data, broken.end)
                expected = {"head": early, "event": late, "answer": (None, None)}[phase]
                found[f"{name} after {phase}"] = (whole, *expected)
    short = b"content-length: 9999\r\n\r\n"
    found["a short body before an event"] = (
        Broken(HEAD + short, "close"),
        Reason.UPSTREAM_UNAVAILABLE,
        Code.UNAVAILABLE,
    )
    found["a short body after an event"] = (
        Broken(HEAD + short + FIRST, "close"),
        Reason.UPSTREAM_INCOMPLETE,
        Code.ABORTED,
    )
    found["a short body after the answer"] = (Broken(HEAD + short + FIRST + REST, "close"), None, None)
    found["a length that cuts the answer"] = (
        Broken(HEAD + b"content-length: %d\r\n\r\n" % len(FIRST) + FIRST + REST),
        Reason.UPSTREAM_INCOMPLETE,
        Code.ABORTED,
    )
    found["HTTP/1.0"] = (Broken(HEAD.replace(b"1.1", b"1.0") + b"\r\n" + FIRST + REST, "close"), None, None)
    found["connection: close"] = (Broken(HEAD + b"connection: close\r\n\r\n" + FIRST + REST, "close"), None, None)
    return found


CASES = cases()


@pytest.mark.parametrize(("broken", "reason", "code"), CASES.values(), ids=CASES)
async def test_what_callers_get(
    start_gateway: StartGateway, broken: Broken, reason: Reason | None, code: Code | None
) -> None:
    """By stream and whole, at once: no time limit is near. The upstream is asked once, and not read for long."""
    async with upstream(broken) as server, start_gateway(base_url=server.base_url) as gateway:
        async with asyncio.timeout(10):
            events, failure = await read(gateway.stream())
        if reason is None:
            assert failure is None
            assert kinds(events)[-1] == "completed"
            assert (await gateway.create()).completed.choices[0].message.text == "Hi!"
            return
        assert code is not None
        assert failure is not None
        assert (failure.code.value[0], failure.reason) == (code, reason.name)
        assert (kinds(events)[-1:] == ["completed"]) is (code is Code.ABORTED)
        assert (failure.retry_seconds is not None) is (code is Code.UNAVAILABLE)
        for word in ("Error", "Exception", "aiohttp", "httpx", "llhttp", "Errno"):
            assert word not in failure.message
        async with asyncio.timeout(10):
            failure = await failure_of(gateway.create())
        assert (failure.code.value[0], failure.reason) == (code, reason.name)
        assert server.chats == 2
        assert server.sent < 16 * 2**20


async def test_a_broken_body_ends_with_a_fault_after_all_its_pieces() -> None:
    """The provider's own interface."""
    broken = Broken(CHUNKED + chunk(FIRST) + b"x\r\n")
    async with (
        upstream(broken) as server,
        provider(server.base_url) as p,
        p.stream_chat(HI, "fake", CALL) as answering,
    ):
        body = pulled(answering.body)
        assert await anext(body) == FIRST
        with pytest.raises(BrokenBodyError) as caught:
            await anext(body)
    assert caught.value.fault.reason is Reason.UPSTREAM_MALFORMED
    assert caught.value.fault.message == "the chunked encoding of its response is broken"


@pytest.mark.parametrize(
    ("base_url", "words"),
    [
        ("http://256.1.1.1:8000", "its address is invalid"),
        (f"http://{'a' * 64}.example", "its host name is invalid"),
    ],
)
async def test_addresses_that_cannot_be(base_url: str, words: str) -> None:
    """Someone has to change the settings, and trying again is of no use."""
    async with provider(base_url) as p:
        for failing in (refusal_of(p), p.list_models(), p.count_tokens(HI, "fake", CALL)):
            try:
                error = await failing
            except ProviderError as raised:
                error = raised
            assert isinstance(error, ProviderError)
            assert (error.reason, error.retry_after) == (Reason.PROVIDER_MISCONFIGURED, None)
            assert error.message.endswith(words)
        health = await p.check_health()
        assert (health.status, health.message) == (HealthStatus.ERROR, f"Health check failed: {words}")


async def test_what_an_upstream_says_out_of_turn_reaches_no_call(start_gateway: StartGateway) -> None:
    """A second answer behind the first, on the same connection: the next call gets its own."""
    own = event(b'{"index":0,"delta":{"content":"own"},"finish_reason":null}')
    stolen = event(b'{"index":0,"delta":{"content":"stolen"},"finish_reason":null}')
    response = CHUNKED + chunk(own + REST) + b"0\r\n\r\n"
    broken = Broken(response + CHUNKED + chunk(stolen + REST) + b"0\r\n\r\n")
    async with upstream(broken) as server, start_gateway(base_url=server.base_url) as gateway:
        for _ in range(20):
            assert (await gateway.create()).completed.choices[0].message.text == "own!"
        assert server.chats == 20
