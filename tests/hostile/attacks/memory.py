"""What requests and answers hold in memory."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import Counter
from typing import TYPE_CHECKING, Any

from grpc import aio

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import message_pb2
from tests.faults import script
from tests.faults.upstream import Flood, Plan, Send
from tests.hostile.attack import Attack, Prepared
from tests.hostile.attacks.building import STREAM, sent
from tests.hostile.bars import MIB
from tests.hostile.target import CALL_SECONDS, CHAT, KEY, MODEL
from tests.support.gateway import ask

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.hostile.target import Target

CREATE = f"{CHAT}CreateChatCompletion"
_SEEN_BY_PROVIDER = frozenset({"NOT_FOUND", "RESOURCE_EXHAUSTED", "UNIMPLEMENTED", "FAILED_PRECONDITION"})
"""The upstream answers 404."""
UNREAD_SECONDS = 5.0
"""How long callers do not read: after a second, queues no longer grow."""


def _images(count: int) -> Prepared:
    """So many requests of 19 MiB at once; the upstream refuses each."""
    image = message_pb2.ContentPart(image=message_pb2.Image(data=b"\x89PNG\r\n\x1a\n" + bytes(19 * MIB // 2)))
    message = message_pb2.ChatMessage(user=message_pb2.UserMessage(content=[image, image]))
    chat = ask(model=MODEL, messages=[message])
    return sent(STREAM, chat_pb.StreamChatCompletionRequest(chat=chat).SerializeToString(), count=count)


def _framed(chunk: script.Chunk) -> bytes:
    """An event, as one HTTP chunk."""
    return script.framed(b"data: " + json.dumps(chunk).encode() + b"\n\n")


def _large(method: str, piece: Callable[[], bytes], size: int, **fields: Any) -> Prepared:  # noqa: ANN401 (as the message)
    """One call whose answer repeats these events until it has so many bytes, and then ends."""
    chat = ask(**{"model": MODEL, **fields})
    message = chat_pb.StreamChatCompletionRequest if method is STREAM else chat_pb.CreateChatCompletionRequest
    request = message(chat=chat).SerializeToString()
    repeated = piece()
    body = (
        _framed(script.ROLE)
        + repeated * (size // len(repeated))
        + _framed(script.FINISH)
        + script.framed(script.event(script.DONE))
    )

    async def run(target: Target) -> Counter[str]:
        plan = Plan([Send(script.HEAD), Send(body, 1 << 16), Send(script.END)])
        return Counter([await target.call(method, request, plan=plan)])

    return Prepared(run, len(request))


def _unread(count: int) -> Prepared:
    """So many callers at once that read nothing of an endless answer, and then cancel their calls."""
    request = chat_pb.StreamChatCompletionRequest(chat=ask(model=MODEL)).SerializeToString()
    tokens = _framed(script.text("word ")) * 100

    async def one(target: Target) -> str:
        request_id = secrets.token_hex(8)
        metadata = (("x-request-id", request_id), ("authorization", f"Bearer {KEY}"))
        target.upstream.plans[request_id] = Plan([Send(script.HEAD), Send(_framed(script.ROLE)), Flood(tokens)])
        async with target.channel() as channel:
            start: aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(STREAM)
            call = start(request, timeout=CALL_SECONDS, metadata=metadata)
            try:
                await call.read()
            except aio.AioRpcError as error:
                return error.code().name
            await asyncio.sleep(UNREAD_SECONDS)
            call.cancel()
        return "OK"

    async def run(target: Target) -> Counter[str]:
        return Counter(await asyncio.gather(*(one(target) for _ in range(count))))

    return Prepared(run, len(request) * count, count)


def _logprobs() -> bytes:
    """Events of 128 choices, each a token with 20 alternatives."""
    token = {"token": "word", "logprob": -1.0, "bytes": [119, 111, 114, 100]}
    content = [{**token, "top_logprobs": [token] * 20}]
    return b"".join(
        _framed({"choices": [{"index": index, "delta": {"content": "word"}, "logprobs": {"content": content}}]})
        for index in range(128)
    )


def _arguments() -> bytes:
    """Events of a tool call's arguments, which never ends, for each of 128 choices."""
    return b"".join(
        _framed(
            {
                "choices": [
                    {
                        "index": index,
                        "delta": {
                            "tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": "a" * 1000}}]
                        },
                    }
                ]
            }
        )
        for index in range(128)
    )


def _text(length: int) -> Callable[[], bytes]:
    return lambda: _framed(script.text("w" * length)) * 100


_LOGPROBS = {"choice_count": 128, "logprobs": chat_pb.Logprobs(top_k=20)}
_TOO_LARGE = frozenset({"RESOURCE_EXHAUSTED"})
_OK = frozenset({"OK"})

MEMORY = (
    Attack("8 requests of 19 MiB at once", "memory", lambda: _images(8), _SEEN_BY_PROVIDER),
    Attack("an answer of 100 MiB", "memory", lambda: _large(STREAM, _text(1000), 100 * MIB), _OK),
    Attack("an answer of 80,000 short texts", "memory", lambda: _large(STREAM, _text(5), 8 * MIB), _OK),
    Attack("an answer of 100 MiB, not streamed", "memory", lambda: _large(CREATE, _text(1000), 100 * MIB), _TOO_LARGE),
    Attack("an answer of 3 MiB, not streamed", "memory", lambda: _large(CREATE, _text(1000), 3 * MIB), _OK),
    Attack(
        "100 MiB of log-probabilities of 128 choices",
        "memory",
        lambda: _large(STREAM, _logprobs, 100 * MIB, **_LOGPROBS),
        _OK | {"ABORTED"},
    ),
    Attack(
        "100 MiB of log-probabilities of 128 choices, not streamed",
        "memory",
        lambda: _large(CREATE, _logprobs, 100 * MIB, **_LOGPROBS),
        _TOO_LARGE,
    ),
    Attack(
        "100 MiB of arguments of tool calls of 128 choices",
        "memory",
        lambda: _large(STREAM, _arguments, 100 * MIB, choice_count=128),
        _TOO_LARGE,
    ),
    Attack("200 callers that do not read", "memory", lambda: _unread(200), _OK),
)
