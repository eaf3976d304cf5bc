"""The bound on a request's fields: what is counted, what it costs, and that the parser never sees more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.message import DecodeError
from grpc import aio
from hypothesis import example, given
from hypothesis import strategies as st

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import message_pb2, tool_pb2
from deltawire_server.errors import CallerError, Reason
from deltawire_server.rpc import wire
from tests.support.gateway import Running, ask, taken_apart, tool

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1 << 20
METHOD = "/deltawire.v1.ChatCompletion/StreamChatCompletion"
REQUEST = chat_pb.StreamChatCompletionRequest


class Watched(bytes):
    """Bytes that count how many of them are read one by one."""

    reads = 0

    def __getitem__(self, at: Any) -> Any:  # noqa: ANN401 (as bytes have it)
        self.reads += 1
        return super().__getitem__(at)


def varint(value: int) -> bytes:
    """A number on the wire."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def field(number: int, *content: bytes) -> bytes:
    """Length-delimited fields, one within the other; all but the outermost by the numbers before."""
    data = b"".join(content)
    return varint(number << 3 | 2) + varint(len(data)) + data


def chat(data: bytes) -> bytes:
    """A request with these fields of a chat."""
    return field(1, data)


def sampling(data: bytes) -> bytes:
    """A request with these fields of the sampling."""
    return chat(field(7, data))


def total(data: bytes) -> int:
    """How many fields are counted in all."""
    return list(wire.scan(data, REQUEST.DESCRIPTOR))[-1][0]


HOSTILE: dict[str, Callable[[int], bytes]] = {
    "empty messages": lambda size: chat(b"\x12\x00" * (size // 2)),
    "empty parts of one message": lambda size: chat(field(2, field(3, b"\x12\x00" * (size // 2)))),
    "empty texts": lambda size: sampling(field(11, b"") * (size // 2)),
    "tools with a name": lambda size: chat(field(3, field(1, b"a")) * (size // 5)),
    "entries of a map": lambda size: sampling(field(14, b"\x08\x01") * (size // 4)),
    "packed numbers": lambda size: sampling(field(12, b"\x00" * size)),
    "numbers that are not packed": lambda size: sampling(b"\x60\x01" * (size // 2)),
    "numbers for a field that is no list": lambda size: chat(field(10, b"\x00" * size)),
    "unknown numbers": lambda size: b"\xf8\x07\x00" * (size // 3),
    "unknown numbers of 10 bytes": lambda size: (b"\xf8\x07" + b"\xff" * 9 + b"\x01") * (size // 12),
    "unknown numbers of fixed size": lambda size: (b"\xf9\x07" + bytes(8) + b"\xfd\x07" + bytes(4)) * (size // 16),
    "unknown texts": lambda size: b"\xfa\x07\x00" * (size // 3),
    "groups side by side": lambda size: b"\xfb\x07\xfc\x07" * (size // 4),
    "groups one within the other": lambda size: b"\xfb\x07" * (size // 2),
    "numbers within a group": lambda size: b"\x0b" + b"\x10\x00" * (size // 2) + b"\x0c",
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_too_many_fields_are_refused_after_bounded_work(name: str) -> None:
    """Whatever kind of fields: the work stops at the bound however much follows; it is linear, and done in small steps."""
    data = Watched(HOSTILE[name](4 * MIB))
    with pytest.raises(CallerError, match=r"more than 100000 fields.*send fewer") as caught:
        await wire.check(data, METHOD)
    assert caught.value.reason is Reason.INVALID_REQUEST
    # A field of fixed size has at most 12 bytes that are read one by one: its tag and a number.
    assert data.reads <= 14 * (wire.MAX_FIELDS + wire.STEP)


def test_the_scan_returns_after_each_step() -> None:
    """So that other calls get their turn: between two steps there are as many fields as a step has, and no more."""
    counts = [count for count, _ in wire.scan(HOSTILE["empty messages"](MIB), REQUEST.DESCRIPTOR)]
    steps = [after - before for before, after in zip([0, *counts], counts, strict=False)]
    assert max(steps) == wire.STEP
    assert counts[-1] == 1 + MIB // 2


def test_texts_and_bytes_are_skipped_without_a_look() -> None:
    """The work is the number of fields, whatever they hold."""
    image = message_pb2.ContentPart(image=message_pb2.Image(data=b"\x12\x00" * (8 * MIB)))
    text = message_pb2.ContentPart(text="\x12\x00" * (4 * MIB))
    messages = [message_pb2.ChatMessage(user=message_pb2.UserMessage(content=[image, text]))]
    data = Watched(REQUEST(chat=ask(messages=messages)).SerializeToString())
    # Chat, model, message and role, parts.
    assert list(wire.scan(data, REQUEST.DESCRIPTOR)) == [(1 + 1 + 2 + 3 + 2, 16 * MIB)]
    assert data.reads < 100


async def test_an_honest_heavy_user_is_let_through() -> None:
    """The longest conversation that is allowed, each message with a tool call or its result, and 128 tools."""
    call = tool_pb2.ToolCall(call_id="call_1", tool_name="get_weather", arguments='{"city":"Bergen"}')
    messages = [
        message_pb2.ChatMessage(assistant=message_pb2.AssistantMessage(text="hm", reasoning="so", tool_calls=[call])),
        message_pb2.ChatMessage(tool=message_pb2.ToolMessage(call_id="call_1", text="rain")),
    ] * 5000
    request = REQUEST(chat=ask(messages=messages, tools=[tool(f"tool_{number}") for number in range(128)]))
    data = request.SerializeToString()
    assert len(data) > wire.SCANNED_BYTES
    await wire.check(data, METHOD)
    assert total(data) < wire.MAX_FIELDS * 2 / 3


@pytest.mark.parametrize(
    "big",
    [
        {"messages": [message_pb2.ChatMessage(user=message_pb2.UserMessage(text="x" * wire.MAX_BYTES))]},
        {"tools": [tool(input_schema="x" * (wire.MAX_BYTES // 8))] * 8},
        {"extra_body": "x" * wire.MAX_BYTES},
        {"sampling": chat_pb.Sampling(stop=["x" * wire.MAX_BYTES])},
    ],
    ids=lambda big: next(iter(big)),
)
async def test_bytes_besides_images_are_bounded(big: dict[str, Any]) -> None:
    """All texts and all JSON of a request together."""
    with pytest.raises(CallerError, match=r"bytes besides its images, at most 8388608 .*shorter messages") as caught:
        await wire.check(REQUEST(chat=ask(**big)).SerializeToString(), METHOD)
    assert caught.value.reason is Reason.INVALID_REQUEST


@pytest.mark.parametrize("source", [{"data": b"x" * (12 * MIB)}, {"url": "data:image/png;base64," + "x" * (12 * MIB)}])
async def test_images_may_be_larger(source: dict[str, Any]) -> None:
    """As bytes and as `data:` URLs, beside documents of a MiB."""
    parts = [message_pb2.ContentPart(text="x" * MIB)] * 7
    parts += [message_pb2.ContentPart(image=message_pb2.Image(**source))] * 2
    chat = ask(messages=[message_pb2.ChatMessage(user=message_pb2.UserMessage(content=parts))])
    await wire.check(REQUEST(chat=chat).SerializeToString(), METHOD)


async def test_unknown_bytes_count() -> None:
    """They are kept by the parser."""
    with pytest.raises(CallerError, match="besides its images"):
        await wire.check(field(200, bytes(wire.MAX_BYTES)), METHOD)


async def test_a_short_request_is_not_scanned() -> None:
    """It has about as many fields as are allowed at most, and parsing it takes about 10 ms."""
    data = Watched(HOSTILE["empty messages"](wire.SCANNED_BYTES - 64))
    await wire.check(data, METHOD)
    assert not data.reads
    assert total(data) < 1.5 * wire.MAX_FIELDS


@pytest.mark.parametrize(
    "data",
    [
        b"\x0a",
        b"\x0a\x05\x12",
        b"\x0a\x02\x12\x05",
        b"\x0a\x02\x12\xff",
        b"\x09\x00",
        b"\x0d\x00",
        b"\x08" + b"\xff" * 10 + b"\x01",
        b"\xff" * 11,
        b"\x0c",
        b"\x0b",
        b"\x0a\x01\x0b\x0c",
        b"\x0e",
        b"\x0a\x01\x08\x00",
        b"\x0a" + b"\x80" * 10 + b"\x01",
    ],
    ids=bytes.hex,
)
def test_bytes_that_are_not_protobuf_are_refused(data: bytes) -> None:
    """As the parser would: no more of them than it takes is ever read."""
    with pytest.raises(DecodeError):
        REQUEST.FromString(data)
    with pytest.raises(CallerError, match="not protobuf") as caught:
        total(data)
    assert caught.value.reason is Reason.INVALID_REQUEST


_PIECES = st.sampled_from([b"\x0a", b"\x12", b"\x0b", b"\x0c", b"\x08", b"\x3a", b"\x62", b"\x72", b"\x09", b"\x80"])


@given(st.lists(_PIECES | st.binary(max_size=9) | st.binary(max_size=9).map(chat)).map(b"".join))
@example(b"\x0b\x12\x05hello\x0c")
@example(b"\x9a\x80\x80\x80\x00\x00")
def test_what_the_parser_takes_the_scan_takes(data: bytes) -> None:
    """And counts at least each field that the message then has."""
    try:
        request = REQUEST.FromString(data)
    except DecodeError:
        return
    assert total(data) >= len(request.ListFields())


async def test_a_request_is_refused_before_it_is_parsed(served: Running) -> None:
    """With the reason, and what to do."""
    call: Any = served.channel.unary_stream(METHOD)
    with pytest.raises(aio.AioRpcError) as caught:
        _ = [event async for event in call(HOSTILE["empty messages"](MIB))]
    failure = taken_apart(caught.value)
    assert (failure.code, failure.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST")
    assert "more than 100000 fields" in failure.message


BAD = "\ue000".encode()
"""Stands for bytes that are not UTF-8 until the request is serialized."""

TEXTS = {
    "chat.user": ask(user=BAD.decode()),
    "chat.messages[0].user.text": ask(messages=[{"user": {"text": BAD.decode()}}]),
    "chat.messages[1].assistant.tool_calls[1].arguments": ask(
        messages=[
            {"user": {"text": "é"}},
            {"assistant": {"tool_calls": [{"call_id": "a"}, {"call_id": "b", "arguments": f"é{BAD.decode()}"}]}},
        ]
    ),
    "chat.sampling.stop[2]": ask(
        sampling={"seed": -1, "temperature": 0.5, "stop": ["a", "", BAD.decode(), BAD.decode()]}
    ),
}


@pytest.mark.parametrize(("path", "message"), TEXTS.items(), ids=TEXTS)
async def test_a_text_that_is_not_utf_8_is_named(path: str, message: chat_pb.ChatRequest) -> None:
    """The first one, by its path in the request."""
    data = REQUEST(chat=message).SerializeToString().replace(BAD, b"\xed\xa0\x80")
    with pytest.raises(DecodeError):
        REQUEST.FromString(data)
    error = await wire.unparsed(data, METHOD)
    assert error.message == f"{path}: is not UTF-8 text: encode it as UTF-8"
    assert [violation.field for violation in error.violations] == [path]


@given(st.binary(max_size=200))
@example(b"\x0b\x0a\x01\xff\x0c")
@example(b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")
async def test_other_bytes_are_only_not_a_message(data: bytes) -> None:
    """Whatever they are, there is an error."""
    error = await wire.unparsed(data, METHOD)
    assert error.reason is Reason.INVALID_REQUEST
