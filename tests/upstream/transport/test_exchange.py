"""Responses, cut in every way: what a response comes to depends on its bytes only."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

import pytest

from deltawire_server.upstream.transport.errors import (
    ConnectFailedError,
    ConnectionLostError,
    ProtocolViolationError,
)
from deltawire_server.upstream.transport.exchange import (
    HIGH_WATER_BYTES,
    MAX_HEAD_BYTES,
    MAX_HEADERS,
    MAX_OVERHEAD_BYTES,
    Exchange,
)
from tests.support import chop
from tests.upstream.transport.peer import CHUNKED, HELLO, OK


class Carrier:
    """Stands for the connection."""

    def __init__(self) -> None:
        self.closed = 0
        self.resumed = 0

    def resume(self) -> None:
        self.resumed += 1

    def close(self) -> None:
        self.closed += 1


@dataclass(frozen=True)
class Result:
    """What a response came to; `reusable` only says something of one that is complete."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    error: str = ""
    reusable: bool = False


async def result_of(pieces: list[bytes], end: Exception | None = None) -> Result:
    """Feed a response, then the end of the connection."""
    exchange = Exchange(Carrier(), None)
    for piece in pieces:
        if exchange.done:
            break
        exchange.feed(piece)
    exchange.end(end)
    headers = tuple(exchange.headers) if exchange.head_complete else ()
    body = b""
    try:
        async for data in exchange:
            body += data
    except (ConnectFailedError, ConnectionLostError, ProtocolViolationError) as error:
        return Result(exchange.status, headers, body, f"{type(error).__name__}: {error}")
    return Result(exchange.status, headers, body, reusable=exchange.reusable)


def length(body: bytes) -> tuple[bytes, bytes]:
    """The header that says how long the body is."""
    return b"content-length", str(len(body)).encode()


TE = (b"transfer-encoding", b"chunked")
LOST = "ConnectionLostError: it closed the connection in the middle of its response"
BEFORE = "ConnectionLostError: it closed the connection before it responded"
BROKEN = "ProtocolViolationError: the chunked encoding of its response is broken"
MALFORMED = "ProtocolViolationError: the head of its response is malformed"
NO_HTTP = "ProtocolViolationError: it does not speak HTTP"
NO_HTTP11 = "ProtocolViolationError: it does not speak HTTP/1.1"
SPEAKS_TLS = "ConnectFailedError: it speaks TLS at this port: use https, or another port"
SHORT = "ConnectionLostError: the body of its response is shorter than its Content-Length"
PACKED = "ProtocolViolationError: the body of its response is compressed, which the request did not allow"
LARGE_HEAD = f"ProtocolViolationError: the head of its response is larger than {MAX_HEAD_BYTES} bytes"
OVERHEAD = (
    f"ProtocolViolationError: its response has more than {MAX_OVERHEAD_BYTES} bytes of chunk extensions or trailers"
)

WHOLE: dict[str, tuple[bytes, Result]] = {
    "a length": (HELLO, Result(200, (length(b"hello"),), b"hello", reusable=True)),
    "chunks": (
        CHUNKED + b"3;a=b\r\nhel\r\n02\r\nlo\r\n0\r\nTrailer: x\r\nEmpty:\r\n\r\n",
        Result(200, (TE,), b"hello", reusable=True),
    ),
    "chunks in capitals": (
        OK + b"Transfer-Encoding: Chunked\r\nX-Empty:\r\nX: y\r\n\r\nA\r\n0123456789\r\n0\r\n\r\n",
        Result(
            200, ((b"Transfer-Encoding", b"Chunked"), (b"X-Empty", b""), (b"X", b"y")), b"0123456789", reusable=True
        ),
    ),
    "to the end": (OK + b"\r\nhello", Result(200, (), b"hello")),
    "no reason": (b"HTTP/1.1 200\r\ncontent-length: 0\r\n\r\n", Result(200, (length(b""),), b"", reusable=True)),
    "no body": (b"HTTP/1.1 204 No Content\r\n\r\n", Result(204, (), b"", reusable=True)),
    "close": (
        OK + b"connection: close\r\ncontent-length: 2\r\n\r\nhi",
        Result(200, ((b"connection", b"close"), length(b"hi")), b"hi"),
    ),
    "HTTP/1.0": (b"HTTP/1.0 200 OK\r\n\r\nhello", Result(200, (), b"hello")),
    "HTTP/1.0 with a length": (
        b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nhi",
        Result(200, (length(b"hi"),), b"hi"),
    ),
    "HTTP/1.0 kept": (
        b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 2\r\n\r\nhi",
        Result(200, ((b"connection", b"keep-alive"), length(b"hi")), b"hi", reusable=True),
    ),
    "1xx before": (
        b"HTTP/1.1 100 Continue\r\na: b\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + HELLO,
        Result(200, (length(b"hello"),), b"hello", reusable=True),
    ),
    "an offer to upgrade": (
        OK + b"upgrade: h2c\r\nconnection: upgrade\r\ncontent-length: 2\r\n\r\nhi",
        Result(200, ((b"upgrade", b"h2c"), (b"connection", b"upgrade"), length(b"hi")), b"hi", reusable=True),
    ),
    "identity": (
        OK + b"content-encoding: identity\r\ncontent-length: 2\r\n\r\nhi",
        Result(200, ((b"content-encoding", b"identity"), length(b"hi")), b"hi", reusable=True),
    ),
    "an error": (
        b"HTTP/1.1 503 Busy\r\ncontent-length: 2\r\n\r\n{}",
        Result(503, (length(b"{}"),), b"{}", reusable=True),
    ),
}
"""Responses that are right."""

WRONG: dict[str, tuple[bytes, Result]] = {
    "nothing": (b"", Result(0, (), b"", BEFORE)),
    "half a head": (OK + b"content-le", Result(0, (), b"", BEFORE)),
    "only 1xx": (b"HTTP/1.1 100 Continue\r\n\r\n", Result(0, (), b"", BEFORE)),
    "another protocol": (b"SSH-2.0-OpenSSH_9.2\r\n", Result(0, (), b"", NO_HTTP)),
    "a page alone": (b"<html>hello</html>", Result(0, (), b"", NO_HTTP)),
    "no status": (b"HTTP/1.1 \r\n\r\n", Result(0, (), b"", NO_HTTP)),
    "a word as status": (b"HTTP/1.1 fine\r\n\r\n", Result(0, (), b"", NO_HTTP)),
    "HTTP/2": (b"HTTP/2.0 200 OK\r\n\r\n", Result(0, (), b"", NO_HTTP11)),
    "switched": (b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\nx", Result(0, (), b"", NO_HTTP11)),
    "TLS": (b"\x15\x03\x03\x00\x02\x02\x46", Result(0, (), b"", SPEAKS_TLS)),
    "no colon": (OK + b"nothing\r\n\r\n", Result(0, (), b"", MALFORMED)),
    "a NUL": (OK + b"a: b\0\r\n\r\n", Result(0, (), b"", MALFORMED)),
    "two lengths": (OK + b"content-length: 1\r\ncontent-length: 2\r\n\r\n", Result(0, (), b"", MALFORMED)),
    "a length and chunks": (OK + b"content-length: 1\r\n" + CHUNKED[len(OK) :], Result(0, (), b"", MALFORMED)),
    "a negative length": (OK + b"content-length: -1\r\n\r\n", Result(0, (), b"", MALFORMED)),
    "too short": (OK + b"content-length: 9\r\n\r\nhello", Result(200, (length(b"123456789"),), b"hello", SHORT)),
    "a size that is a word": (CHUNKED + b"2\r\nhi\r\nzz\r\n", Result(200, (TE,), b"hi", BROKEN)),
    "a negative size": (CHUNKED + b"2\r\nhi\r\n-1\r\n", Result(200, (TE,), b"hi", BROKEN)),
    "a huge size": (CHUNKED + b"2\r\nhi\r\n" + b"f" * 17 + b"\r\n", Result(200, (TE,), b"hi", BROKEN)),
    "no size": (CHUNKED + b"2\r\nhi\r\n\r\n", Result(200, (TE,), b"hi", BROKEN)),
    "no line end after a chunk": (CHUNKED + b"2\r\nhi2\r\nho\r\n", Result(200, (TE,), b"hi", BROKEN)),
    "more than the size": (CHUNKED + b"2\r\nhiya\r\n0\r\n\r\n", Result(200, (TE,), b"hi", BROKEN)),
    "no chunks at all": (CHUNKED + b"data: {}\n\n", Result(200, (TE,), b"", BROKEN)),
    "a trailer without colon": (CHUNKED + b"2\r\nhi\r\n0\r\noops\r\n\r\n", Result(200, (TE,), b"hi", BROKEN)),
    "closed in a chunk": (CHUNKED + b"5\r\nhel", Result(200, (TE,), b"hel", LOST)),
    "closed before the last chunk": (CHUNKED + b"2\r\nhi\r\n", Result(200, (TE,), b"hi", LOST)),
    "gzip": (OK + b"content-encoding: gzip\r\n\r\n\x1f\x8b", Result(200, ((b"content-encoding", b"gzip"),), b"", PACKED)),
    "a compressed error": (
        b"HTTP/1.1 503 Busy\r\ncontent-encoding: br\r\ncontent-length: 1\r\n\r\nx",
        Result(503, ((b"content-encoding", b"br"), length(b"1")), b"", PACKED),
    ),
    "gzip for the transfer": (
        OK + b"transfer-encoding: gzip, chunked\r\n\r\n",
        Result(200, ((b"transfer-encoding", b"gzip, chunked"),), b"", PACKED),
    ),
    "many headers": (
        OK + b"a: b\r\n" * (MAX_HEADERS + 1) + b"\r\n",
        Result(0, (), b"", f"ProtocolViolationError: its response has more than {MAX_HEADERS} headers"),
    ),
    "a large header": (OK + b"a: " + b"b" * MAX_HEAD_BYTES, Result(0, (), b"", LARGE_HEAD)),
    "endless 1xx": (b"HTTP/1.1 100 Continue\r\n\r\n" * 3000, Result(0, (), b"", LARGE_HEAD)),
    "an endless chunk extension": (
        CHUNKED + b"2\r\nhi\r\n2;" + b"x" * 3 * MAX_OVERHEAD_BYTES,
        Result(200, (TE,), b"hi", OVERHEAD),
    ),
    "endless trailers": (
        CHUNKED + b"2\r\nhi\r\n0\r\n" + b"a: b\r\n" * MAX_OVERHEAD_BYTES,
        Result(200, (TE,), b"hi", OVERHEAD),
    ),
}  # fmt: skip
"""Responses that are not, and what is delivered before the fault."""


@pytest.mark.parametrize(("data", "expected"), [*WHOLE.values(), *WRONG.values()], ids=[*WHOLE, *WRONG])
async def test_a_response_is_the_same_however_it_was_cut(data: bytes, expected: Result) -> None:
    """Whole, byte by byte and at random places; short ones in two at every place."""
    ways = 20 if len(data) < 2000 else 2
    for pieces in (chop.whole(data), chop.byte_by_byte(data), *chop.at_random(data, ways=ways)):
        assert await result_of([piece for piece in pieces if piece]) == expected
    if len(data) < 200:
        for pieces in chop.at_every_boundary(data):
            assert await result_of(pieces) == expected


@pytest.mark.parametrize("surplus", [HELLO, b"x", b"0\r\n\r\n"])
@pytest.mark.parametrize("name", [name for name, (_, result) in WHOLE.items() if result.reusable])
async def test_what_follows_a_response_is_no_part_of_it(name: str, surplus: bytes) -> None:
    """And its connection is not used again; when it arrives alone, that is for the connection to see."""
    data, expected = WHOLE[name]
    for cut in range(len(data), len(data) + len(surplus)):
        exchange = Exchange(Carrier(), None)
        exchange.feed((data + surplus)[:cut])
        if not exchange.done:
            exchange.feed((data + surplus)[cut:])
        assert (exchange.complete, exchange.error) == (True, None)
        assert exchange.reusable is (cut == len(data))
        assert b"".join([piece async for piece in exchange]) == expected.body


async def test_a_response_cut_by_a_reset() -> None:
    """Never whole, however its length is given."""
    for data, expected in WHOLE.values():
        if expected.body:
            reset = ConnectionResetError()
            assert (await result_of([data[:-1]], reset)).error == LOST
            end = await result_of([data], reset)
            assert (end.body, bool(end.error)) == (
                expected.body,
                not expected.reusable and b"content-length" not in data,
            )


async def test_random_bytes_raise_nothing_else() -> None:
    """Right responses with some bytes changed: a result, or an error of ours, and the same for each cut."""
    generator = random.Random(7)  # noqa: S311 (repeatable)
    data = [data for data, _ in WHOLE.values()]
    for _ in range(2000):
        broken = bytearray(generator.choice(data))
        for _ in range(generator.randint(1, 4)):
            broken[generator.randrange(len(broken))] = generator.choice(b"\r\n\0 :;0129afZ-\xff{")
        whole, single = await result_of([bytes(broken)]), await result_of(chop.byte_by_byte(bytes(broken)))
        # What arrives together with a response's end shows that its connection is out of step; alone it is not fed.
        assert (whole.status, whole.headers, whole.body, whole.error) == (
            single.status,
            single.headers,
            single.body,
            single.error,
        )


async def test_a_body_is_yielded_as_it_has_arrived() -> None:
    """All of it in one piece, and the socket is read again after that."""
    carrier = Carrier()
    exchange = Exchange(carrier, None)
    exchange.feed(CHUNKED)
    waiting = asyncio.ensure_future(anext(exchange))
    await asyncio.sleep(0)
    exchange.feed(b"1\r\na\r\n1\r\nb\r\n")
    exchange.feed(b"1\r\nc\r\n")
    assert await waiting == b"abc"
    assert carrier.resumed == 1
    exchange.feed(b"1\r\nd\r\n0\r\n\r\n")
    assert [piece async for piece in exchange] == [b"d"]
    await exchange.aclose()
    assert carrier.closed == 0


async def test_what_waits_is_counted() -> None:
    """Above the limit it is full, until it is read."""
    exchange = Exchange(Carrier(), None)
    exchange.feed(OK + b"\r\n")
    exchange.feed(b"x" * (HIGH_WATER_BYTES - 100))
    assert not exchange.full
    exchange.feed(b"x" * 101)
    assert exchange.full
    assert len(await anext(exchange)) == HIGH_WATER_BYTES + 1
    assert not exchange.full
    exchange.end(None)
