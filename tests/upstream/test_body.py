"""The pushed body of an answer: order, turns, pauses and ends."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from deltawire_server import pacing
from deltawire_server.errors import Reason
from deltawire_server.upstream.body import MAX_PIECE, AnswerBody
from deltawire_server.upstream.transport.errors import ConnectionLostError, ProtocolViolationError
from deltawire_server.upstream.transport.exchange import Exchange

if TYPE_CHECKING:
    import httpx

    from deltawire_server.sansio.events import Fault

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


class Carrier:
    """A connection that does nothing."""

    def resume(self) -> None:
        """Nothing is paused."""

    def close(self) -> None:
        """Nothing is open."""


class Pushed:
    """What a body pushes."""

    def __init__(self, body: AnswerBody) -> None:
        self.pieces: list[bytes] = []
        self.ends: list[Fault | None] = []
        body.follow(self.pieces.append, self.ends.append)


def chunk(data: bytes) -> bytes:
    """A chunk of the encoding."""
    return b"%x\r\n%b\r\n" % (len(data), data)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine does not change the number of iterations."""
    monkeypatch.setattr(pacing, "WORK_SECONDS", float("inf"))


@pytest.fixture
def exchange() -> Exchange:
    """A response whose headers were received."""
    exchange = Exchange(Carrier(), None)
    exchange.feed(HEAD)
    return exchange


async def test_small_pieces_are_pushed_at_once(exchange: Exchange) -> None:
    """The opening first, each piece as it is received, and the end once."""
    exchange.feed(chunk(b"b"))
    pushed = Pushed(AnswerBody(b"a", exchange))
    assert pushed.pieces == [b"a", b"b"]
    exchange.feed(chunk(b"c"))
    exchange.feed(chunk(b"d") + b"0\r\n\r\n")
    exchange.end(None)
    assert pushed.pieces == [b"a", b"b", b"c", b"d"]
    assert pushed.ends == [None]


async def test_large_pieces_take_turns(exchange: Exchange) -> None:
    """A body at full speed is divided, and other tasks run between its pieces; nothing overtakes them."""
    pushed = Pushed(AnswerBody(b"a" * (2 * MAX_PIECE + 1), exchange))
    exchange.feed(chunk(b"b"))
    assert pushed.pieces == []
    counts = []
    for _ in range(10):
        await asyncio.sleep(0)
        counts.append(len(pushed.pieces))
    assert sorted(set(counts)) == [1, 4]
    assert [len(piece) for piece in pushed.pieces] == [MAX_PIECE, MAX_PIECE, 1, 1]
    assert pushed.pieces[-1] == b"b"


async def test_a_paused_body_keeps_its_pieces_and_its_end(exchange: Exchange) -> None:
    """They are pushed on `resume`."""
    body = AnswerBody(b"", exchange)
    pushed = Pushed(body)
    body.pause()
    exchange.feed(chunk(b"a") + b"0\r\n\r\n")
    assert (pushed.pieces, pushed.ends) == ([], [])
    body.resume()
    assert (pushed.pieces, pushed.ends) == ([b"a"], [None])


async def test_a_pause_during_a_turn(exchange: Exchange) -> None:
    """The piece whose turn it is waits for `resume` as well."""
    body = AnswerBody(b"a" * MAX_PIECE, exchange)
    pushed = Pushed(body)
    body.pause()
    for _ in range(5):
        await asyncio.sleep(0)
    assert pushed.pieces == []
    body.resume()
    for _ in range(5):
        await asyncio.sleep(0)
    assert pushed.pieces == [b"a" * MAX_PIECE]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ProtocolViolationError("broken"), Reason.UPSTREAM_MALFORMED),
        (ConnectionLostError("lost"), None),
    ],
)
async def test_failures(exchange: Exchange, error: httpx.TransportError, reason: Reason | None) -> None:
    """A violation of HTTP is a fault after all pieces; of a lost connection, the events show what is missing."""
    pushed = Pushed(AnswerBody(b"a", exchange))
    exchange.fail(error)
    assert pushed.pieces == [b"a"]
    assert [fault and fault.reason for fault in pushed.ends] == [reason]


async def test_a_closed_body_pushes_nothing(exchange: Exchange) -> None:
    """Not even a piece whose turn comes, and no end."""
    body = AnswerBody(b"a" * MAX_PIECE, exchange)
    pushed = Pushed(body)
    body.close()
    exchange.feed(chunk(b"b") + b"0\r\n\r\n")
    for _ in range(5):
        await asyncio.sleep(0)
    assert (pushed.pieces, pushed.ends) == ([], [])
