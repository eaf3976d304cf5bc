"""What the command's tests share: a terminal, what is typed at it, and what a chat asked for."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

from deltawire import ChatRequest, ToolCall

if TYPE_CHECKING:
    from tests.client.scripted import Gateway

CALL = ToolCall(call_id="call_1", tool_name="get_weather", arguments='{\n  "city": "Köln"\n}')
Run: TypeAlias = Callable[..., tuple[int, str, str]]


class Terminal(io.StringIO):
    """Text in memory that says it is a terminal."""

    def isatty(self) -> bool:
        """It is."""
        return True


def typed(lines: Iterator[Any]) -> Callable[[str], str]:
    """What `input` does when somebody types this; an exception is a key like Ctrl-D."""

    def answer(prompt: str = "") -> str:
        print(prompt, end="")
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    return answer


def asked(gateway: Gateway, index: int = -1) -> ChatRequest:
    """What a chat call asked for."""
    request: ChatRequest = gateway.calls[index].request.chat
    return request
