"""What attacks are built of."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from deltawire.v1 import chat_completion_pb2 as chat_pb
from tests.faults import script
from tests.faults.upstream import Plan, Send
from tests.hostile.attack import Prepared
from tests.hostile.target import CHAT, KEY, MODEL, Target
from tests.support.gateway import ask, tool

if TYPE_CHECKING:
    from collections.abc import Callable

STREAM = f"{CHAT}StreamChatCompletion"


def sent(method: str, request: bytes, *, key: str | None = KEY, count: int = 1) -> Prepared:
    """Equal calls at once, whose requests have these bytes."""

    async def run(target: Target) -> Counter[str]:
        return await target.calls(count, method, request, key=key)

    return Prepared(run, len(request) * count, count)


def stream(**fields: Any) -> Prepared:  # noqa: ANN401 (whatever the message takes)
    """One streamed completion of a chat with these fields; the upstream refuses it, if it gets there."""
    chat = ask(**{"model": MODEL, **fields})
    return sent(STREAM, chat_pb.StreamChatCompletionRequest(chat=chat).SerializeToString())


def answered(steps: Callable[[], list[bytes]], **fields: Any) -> Prepared:  # noqa: ANN401 (whatever the message takes)
    """One streamed completion of a chat with these fields, and the events of the upstream's answer."""
    chat = ask(**{"model": MODEL, **fields})
    request = chat_pb.StreamChatCompletionRequest(chat=chat).SerializeToString()
    body = b"".join(map(script.framed, steps()))

    async def run(target: Target) -> Counter[str]:
        plan = Plan([Send(script.HEAD), Send(body, 1 << 16), Send(script.END)])
        return Counter([await target.call(STREAM, request, plan=plan)])

    return Prepared(run, len(request))


def checked(schema: object, arguments: str) -> Prepared:
    """A completion whose one tool has this schema, checked, and whose answer calls it with these arguments."""

    def events() -> list[bytes]:
        pieces = [arguments[at : at + (1 << 16)] for at in range(0, len(arguments), 1 << 16)]
        first = script.call(0, "", call_id="call_a", name="get_weather")
        return script.events_of(
            [script.ROLE, first, *(script.call(0, piece) for piece in pieces), script.FINISH, script.USAGE]
        )

    return answered(
        events,
        tools=[tool(input_schema=schema if isinstance(schema, str) else json.dumps(schema))],
        tool_call_policy=chat_pb.ToolCallPolicy(validate_schema=True),
    )
