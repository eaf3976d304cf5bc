"""What gives other calls their turn in between, run at once and without an event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar
from unittest import mock

from deltawire_server import pacing
from deltawire_server.rpc import validate

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from deltawire.v1 import chat_completion_pb2 as chat_pb
    from deltawire_server.rpc.validate_content import ContentLimits
    from deltawire_server.upstream.request import ChatRequest
    from deltawire_server.upstream.vllm_request import Body

T = TypeVar("T")


def at_once(work: Coroutine[object, None, T]) -> tuple[T, int]:
    """The result of work that waits for nothing but its next turn, and how often it gave others theirs."""
    turns = 0
    with mock.patch.object(pacing, "_line", _EmptyLine):
        try:
            while True:
                work.send(None)
                turns += 1
        except StopIteration as end:
            result: T = end.value
            return result, turns


class _EmptyLine:
    """A queue without other tasks."""

    async def turn(self) -> None:
        await asyncio.sleep(0)


def chat_request(message: chat_pb.ChatRequest, limits: ContentLimits | None = None) -> ChatRequest:
    """`validate.chat_request`, at once."""
    return at_once(validate.chat_request(message, limits))[0]


def encoded(encoding: Coroutine[object, None, Body]) -> bytes:
    """The text of a body that `encode_body` makes, at once."""

    async def joined() -> bytes:
        return b"".join([piece async for piece in await encoding])

    return at_once(joined())[0]
