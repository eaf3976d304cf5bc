"""Requests that are large, or mean a lot of work to read or to refuse."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

import grpc

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import message_pb2, tool_pb2
from tests.hostile.attack import Attack, Prepared
from tests.hostile.attacks.building import STREAM, sent, stream
from tests.hostile.bars import MIB
from tests.support.gateway import ask, tool, user

if TYPE_CHECKING:
    from tests.hostile.target import Target

_REFUSED = frozenset({"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"})
_SEEN_BY_PROVIDER = frozenset({*_REFUSED, "NOT_FOUND", "UNIMPLEMENTED", "FAILED_PRECONDITION"})
"""Where the request may also be one that is sent on: the upstream answers 404."""


def field(number: int, content: bytes) -> bytes:
    """One length-delimited field on the wire."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def empty_messages(size: int) -> bytes:
    """A request of so many bytes in which a chat has nothing but messages without content."""
    messages = chat_pb.ChatRequest.DESCRIPTOR.fields_by_name["messages"].number
    chat = chat_pb.StreamChatCompletionRequest.DESCRIPTOR.fields_by_name["chat"].number
    return field(chat, field(messages, b"") * (size // 2))


def _chat(data: bytes) -> Prepared:
    """A streamed completion of a chat that consists of these bytes."""
    return sent(STREAM, field(chat_pb.StreamChatCompletionRequest.DESCRIPTOR.fields_by_name["chat"].number, data))


def _sampling(name: str, data: bytes) -> Prepared:
    """A streamed completion whose sampling has one field of these bytes, so often that it makes 19 MiB."""
    one = field(chat_pb.Sampling.DESCRIPTOR.fields_by_name[name].number, data)
    sampling = chat_pb.ChatRequest.DESCRIPTOR.fields_by_name["sampling"].number
    return _chat(field(sampling, one * (19 * MIB // len(one))))


def _url(url: str) -> Prepared:
    """A streamed completion of a message with one image at this address."""
    return _said(message_pb2.ContentPart(image=message_pb2.Image(url=url)))


def _said(*parts: message_pb2.ContentPart) -> Prepared:
    """A streamed completion of one message with these parts."""
    return stream(messages=[message_pb2.ChatMessage(user=message_pb2.UserMessage(content=parts))])


def _past_calls() -> Prepared:
    """As many messages and tool calls as a request may have."""
    call = tool_pb2.ToolCall(call_id="c", tool_name="t", arguments='{"a":1}')
    message = message_pb2.ChatMessage(assistant=message_pb2.AssistantMessage(tool_calls=[call, call]))
    return stream(messages=[message] * 9_000)


def _compressed() -> Prepared:
    request = empty_messages(19 * MIB)

    async def run(target: Target) -> Counter[str]:
        return Counter([await target.call(STREAM, request, compression=grpc.Compression.Gzip)])

    return Prepared(run, 19 * 1024)


def _json_field(name: str) -> Prepared:
    return stream(**{name: '{"a":[' + "[]," * (4 * MIB // 3) + "[]]}"})


PNG_URL = "data:image/png;base64,iVBORw0KGgoA"

REQUESTS = (
    Attack("19 MiB of empty messages", "requests", lambda: sent(STREAM, empty_messages(19 * MIB)), _REFUSED),
    Attack("1 MiB of empty messages", "requests", lambda: sent(STREAM, empty_messages(MIB)), _REFUSED),
    Attack("19 MiB of packed numbers", "requests", lambda: _sampling("stop_token_ids", bytes(19 * MIB - 16)), _REFUSED),
    Attack("19 MiB of entries of a map", "requests", lambda: _sampling("logit_bias", b"\x08\x01"), _REFUSED),
    Attack("19 MiB of unknown numbers", "requests", lambda: _chat(b"\xf8\x07\x00" * (19 * MIB // 3)), _REFUSED),
    Attack("19 MiB of groups", "requests", lambda: _chat(b"\xfb\x07\xfc\x07" * (19 * MIB // 4)), _REFUSED),
    Attack("19 MiB of empty messages, compressed", "requests", _compressed, frozenset({"UNIMPLEMENTED"})),
    Attack("9,000 messages with two tool calls each", "requests", _past_calls, _SEEN_BY_PROVIDER),
    Attack(
        "7 MiB of control characters",
        "requests",
        lambda: _said(message_pb2.ContentPart(text="\x01" * (7 * MIB))),
        _SEEN_BY_PROVIDER,
    ),
    Attack(
        "two images of 9.5 MiB",
        "requests",
        lambda: _said(
            *[message_pb2.ContentPart(image=message_pb2.Image(data=b"\x89PNG\r\n\x1a\n" + bytes(19 * MIB // 2)))] * 2
        ),
        _SEEN_BY_PROVIDER,
    ),
    Attack("a `data:` URL of 16 MiB", "requests", lambda: _url(PNG_URL + "A" * (16 * MIB)), _SEEN_BY_PROVIDER),
    Attack("a `data:` URL of 16 MiB, not base64", "requests", lambda: _url(PNG_URL + "!" * (16 * MIB)), _REFUSED),
    Attack(
        "a `data:` URL of 19 MiB of escapes", "requests", lambda: _url("data:," + "%41" * (19 * MIB // 3)), _REFUSED
    ),
    Attack(
        "`extra_body` of 1 MiB of names",
        "requests",
        lambda: stream(extra_body=json.dumps(dict.fromkeys(map(str, range(90_000)), 1))),
        _REFUSED,
    ),
    *(
        Attack(
            f"`{name}` of 4 MiB of empty arrays",
            "requests",
            partial(_json_field, name),
            _REFUSED,
        )
        for name in ("chat_template_kwargs", "extra_body")
    ),
    Attack(
        "`input_schema` of 19 MiB of empty arrays",
        "requests",
        lambda: stream(messages=[user("hi")], tools=[tool(input_schema='{"a":[' + "[]," * (19 * MIB // 3) + "[]]}")]),
        _REFUSED,
    ),
    Attack(
        "20 tools with names of 100 kB and 63 wrong `allowed_tools`",
        "requests",
        lambda: stream(
            tools=[tool(f"{number:02}" + "x" * 100_000) for number in range(20)],
            allowed_tools=[f"y{number}" * 1000 for number in range(63)],
        ),
        _REFUSED,
    ),
    Attack(
        "16 MiB of `stop` texts",
        "requests",
        lambda: sent(
            STREAM,
            chat_pb.StreamChatCompletionRequest(
                chat=ask(sampling=chat_pb.Sampling(stop=["x" * MIB] * 16))
            ).SerializeToString(),
        ),
        _SEEN_BY_PROVIDER,
    ),
)
