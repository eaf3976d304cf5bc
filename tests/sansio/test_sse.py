"""The decoder of event streams: WHATWG's rules, limits, and any chopping."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltawire_server.sansio.sse import EventTooLargeError, SSEDecoder
from tests.support import chop

BOM = b"\xef\xbb\xbf"


def _decode(*pieces: bytes, limit: int = 1000) -> tuple[list[bytes], bool]:
    """The payloads, and whether the limit was exceeded."""
    decoder = SSEDecoder(max_event_bytes=limit)
    payloads: list[bytes] = []
    for piece in pieces:
        try:
            payloads += decoder.receive(piece)
        except EventTooLargeError as error:
            return payloads + error.payloads, True
    return payloads, False


RULES = {
    "lines end in LF": (b"data: a\n\n", [b"a"]),
    "lines end in CRLF": (b"data: a\r\n\r\n", [b"a"]),
    "lines end in CR": (b"data: a\r\r", [b"a"]),
    "line ends are mixed": (b"data: a\r\ndata: b\rdata: c\n\r\ndata: d\r\r\n", [b"a\nb\nc", b"d"]),
    "a CR after an LF ends another line": (b"data: a\n\rdata: b\n\n", [b"a", b"b"]),
    "several data lines are joined by LF": (b"data: a\ndata: b\ndata: c\n\n", [b"a\nb\nc"]),
    "several events": (b"data: a\n\ndata: b\n\n", [b"a", b"b"]),
    "data without colon is an empty line": (b"data\n\n", [b""]),
    "data without value is an empty line": (b"data:\n\n", [b""]),
    "data without colon joins": (b"data\ndata\n\n", [b"\n"]),
    "no space after the colon": (b"data:a\n\n", [b"a"]),
    "only the first space goes": (b"data:  a \n\n", [b" a "]),
    "a tab is no space": (b"data:\ta\n\n", [b"\ta"]),
    "a colon in the value": (b"data: a: b\n\n", [b"a: b"]),
    "a comment": (b": keep-alive\n\ndata: a\n\n", [b"a"]),
    "a comment amid an event": (b"data: a\n: keep-alive\ndata: b\n\n", [b"a\nb"]),
    "an empty comment": (b":\ndata: a\n\n", [b"a"]),
    "a comment that looks like data": (b":data: a\n\n", []),
    "only comments": (b": a\n\n: b\n\n", []),
    "other fields": (b"event: x\nid: 1\nretry: 5\nfoo: bar\ndata: a\n\n", [b"a"]),
    "other fields alone dispatch nothing": (b"event: x\nid: 1\n\n", []),
    "a field that begins like data": (b"database: a\n\ndata : b\n\n", []),
    "names are matched to the letter": (b"Data: a\n\n data: b\n\n", []),
    "blank lines alone": (b"\n\r\n\r\n\n", []),
    "a BOM at the start": (BOM + b"data: a\n\n", [b"a"]),
    "only one BOM": (BOM + BOM + b"data: a\n\n", []),
    "a BOM later is part of the name": (b"data: a\n\n" + BOM + b"data: b\n\n", [b"a"]),
    "a BOM after a blank line is part of the name": (b"\n" + BOM + b"data: b\n\n", []),
    "a BOM in the value stays": (b"data: " + BOM + b"\n\n", [BOM]),
    "an event without its blank line is dropped": (b"data: a\n\ndata: b\n", [b"a"]),
    "a line without its end is dropped": (b"data: a\n\ndata: b", [b"a"]),
    "NUL and bytes that are no UTF-8 pass": (b"data: \x00\xff\n\n", [b"\x00\xff"]),
    "U+2028 ends no line": ("data: a\u2028b\x0b\x0c\x85c\n\n".encode(), ["a\u2028b\x0b\x0c\x85c".encode()]),
    "nothing": (b"", []),
}


@pytest.mark.parametrize(("stream", "payloads"), RULES.values(), ids=RULES.keys())
def test_follows_the_rule(stream: bytes, payloads: list[bytes]) -> None:
    """Each rule of the specification holds, whole, byte by byte and cut in two at every boundary."""
    assert _decode(stream) == (payloads, False)
    for pieces in [chop.byte_by_byte(stream), *chop.at_every_boundary(stream)]:
        assert _decode(*pieces) == (payloads, False), pieces


def test_tells_an_event_as_soon_as_its_end_is_there() -> None:
    """The first byte of a line end that completes an event gives the event: a CR does not wait for the LF that may follow."""
    decoder = SSEDecoder()
    assert decoder.receive(b"data: a\r\n") == []
    assert decoder.receive(b"\r") == [b"a"]
    assert decoder.receive(b"") == []
    assert decoder.receive(b"\ndata: b\n\n") == [b"b"]


def test_a_cut_between_cr_and_lf_ends_one_line() -> None:
    """An LF that comes in the next read after a CR belongs to it, also when an empty read lies between."""
    assert _decode(b"data: a\r", b"\n", b"data: b\r", b"", b"\n\r", b"\n") == ([b"a\nb"], False)


# --- limits; the limit counts all bytes of an event, the line ends between its lines included

LIMITED = {
    "an event of just the limit": (b"data: 4567\n\n", 10, [b"4567"], False),
    "an event of one byte more": (b"data: 45678\n\n", 10, [], True),
    "a line that never ends": (b"data: 45678", 10, [], True),
    "many small lines": (b"data:\ndata:\ndata:\n\n", 16, [], True),
    "many small lines of just the limit": (b"data:\ndata:\ndata:\n\n", 17, [b"\n\n"], False),
    "a long comment": (b": 345678901\n\n", 10, [], True),
    "comments between the data count": (b"data: a\n:\n:\n:\n:\n:\n:\n:\n\n", 10, [], True),
    "every event counts anew": (b"data: 1\n\ndata: 2\n\ndata: 3\n\n", 10, [b"1", b"2", b"3"], False),
    "the events before it are returned": (b"data: 1\n\ndata: 2\n\ndata: 45678\n\ndata: 3\n\n", 10, [b"1", b"2"], True),
    "a BOM does not count": (BOM + b"data: 7\n\n", 7, [b"7"], False),
}


@pytest.mark.parametrize(("stream", "limit", "payloads", "exceeded"), LIMITED.values(), ids=LIMITED.keys())
def test_holds_no_more_than_its_limit(stream: bytes, limit: int, payloads: list[bytes], exceeded: bool) -> None:
    """A larger event fails, the events before it are returned, and no chopping changes them."""
    assert _decode(stream, limit=limit) == (payloads, exceeded)
    for pieces in [chop.byte_by_byte(stream), *chop.at_every_boundary(stream)]:
        assert _decode(*pieces, limit=limit) == (payloads, exceeded), pieces


def test_the_limit_is_named() -> None:
    """The failure says which limit it was."""
    with pytest.raises(EventTooLargeError, match="an event is larger than 10 bytes"):
        SSEDecoder(max_event_bytes=10).receive(b"data: 45678")


# --- any stream, any chopping

_LINES = st.sampled_from(
    [b"data: a", b"data:b", b"data", b"data:", b": c", b"id: 1", b"", b"", BOM, BOM + b"data: d", "data: é🚀".encode()]
)
_ENDS = st.sampled_from([b"\n", b"\r\n", b"\r", b""])
_STREAMS = st.lists(st.tuples(_LINES, _ENDS).map(b"".join), max_size=12).map(b"".join) | st.binary(max_size=60)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(_STREAMS, st.lists(st.integers(0, 150), max_size=8), st.integers(1, 40))
def test_no_chopping_changes_the_payloads(stream: bytes, positions: list[int], limit: int) -> None:
    """Whatever the bytes and however they are cut, the payloads and whether the limit is exceeded are the same."""
    expected = _decode(stream, limit=limit)
    assert _decode(*chop.at(stream, positions), limit=limit) == expected
    assert _decode(*chop.byte_by_byte(stream), limit=limit) == expected


def _by_the_book(stream: bytes) -> list[bytes]:
    """The specification's own words, as slow as they are plain."""
    lines = stream.removeprefix(BOM).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")[:-1]
    payloads, buffer = [], b""
    for line in lines:
        if not line:
            if buffer:
                payloads.append(buffer[:-1])
            buffer = b""
            continue
        name, _, value = line.partition(b":")
        if name == b"data":
            buffer += value.removeprefix(b" ") + b"\n"
    return payloads


@settings(max_examples=200, deadline=None, derandomize=True)
@given(_STREAMS)
def test_decodes_as_the_specification_says(stream: bytes) -> None:
    """The payloads are those that a literal transcription of the specification's steps gives."""
    assert _decode(stream)[0] == _by_the_book(stream)
