"""Requests that are large, or mean a lot of work to read or to refuse."""

from __future__ import annotations

from functools import partial

from deltawire.v1 import chat_completion_pb2 as chat_pb
from tests.hostile.attack import Attack, Prepared
from tests.hostile.attacks.building import STREAM, sent, stream
from tests.hostile.bars import MIB
from tests.support.gateway import ask, tool, user

_REFUSED = frozenset({"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"})
_SEEN_BY_PROVIDER = frozenset({*_REFUSED, "NOT_FOUND", "UNIMPLEMENTED"})
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


def _json_field(name: str) -> Prepared:
    return stream(**{name: '{"a":[' + "[]," * (4 * MIB // 3) + "[]]}"})


REQUESTS = (
    Attack("31 MiB of empty messages", "requests", lambda: sent(STREAM, empty_messages(31 * MIB)), _REFUSED),
    Attack("1 MiB of empty messages", "requests", lambda: sent(STREAM, empty_messages(MIB)), _REFUSED),
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
        "`input_schema` of 30 MiB of empty arrays",
        "requests",
        lambda: stream(messages=[user("hi")], tools=[tool(input_schema='{"a":[' + "[]," * (30 * MIB // 3) + "[]]}")]),
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
