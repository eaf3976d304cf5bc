"""Turns of a conversation, and tools: short ways to write the API's messages, and to read their text.

Everything here takes and gives the messages of `deltawire.v1` themselves, never a copy of them in another shape, so what
a helper made and what was written out by hand can be mixed freely.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias, TypeVar

from deltawire.v1.chat_completion_pb2 import ResponseFormat
from deltawire.v1.message_pb2 import (
    AssistantMessage,
    ContentPart,
    DeveloperMessage,
    Message,
    SystemMessage,
    ToolMessage,
    UserMessage,
)
from deltawire.v1.tool_pb2 import Tool, ToolCall

T = TypeVar("T")

RoleMessage: TypeAlias = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage
# A turn as callers may give it: text alone is what the user says.
MessageLike: TypeAlias = str | Message | RoleMessage
Content: TypeAlias = str | ContentPart | Iterable[str | ContentPart]
# A JSON Schema as a mapping, or as JSON text, which is passed on to the letter.
Schema: TypeAlias = Mapping[str, Any] | str


def system(content: Content) -> Message:
    """Instructions for the model. Send it as the first of the messages."""
    return Message(system=SystemMessage(content=_parts(content)))


def developer(content: Content) -> Message:
    """Instructions under the newer role name; the model's chat template decides what it means."""
    return Message(developer=DeveloperMessage(content=_parts(content)))


def user(content: Content) -> Message:
    """What the user says."""
    return Message(user=UserMessage(content=_parts(content)))


def assistant(content: Content = (), *, tool_calls: Iterable[ToolCall] = (), reasoning: str = "") -> Message:
    """What the model said in an earlier answer, made by hand; `Answer.message` gives the real one."""
    return Message(assistant=AssistantMessage(content=_parts(content), tool_calls=tool_calls, reasoning=reasoning))


def tool(call: ToolCall | str, content: Content) -> Message:
    """The result of one tool call, for the model to read.

    Args:
        call: The call that this answers, or its id.
        content: The result as text.

    Append one per call after the answer's own message, then ask again with the same tools.
    """
    call_id = call if isinstance(call, str) else call.call_id
    return Message(tool=ToolMessage(call_id=call_id, content=_parts(content)))


def tool_definition(
    name: str,
    description: str = "",
    *,
    input_schema: Schema | None = None,
    output_schema: Schema | None = None,
    strict: bool | None = None,
) -> Tool:
    """A function that the model may ask the caller to run.

    Args:
        name: What the model calls it by; unique in a request.
        description: What it does and when to use it, for the model to read.
        input_schema: JSON Schema of the arguments. None means that it takes none.
        output_schema: JSON Schema of the result, for the caller's own use; the model never sees it.
        strict: Whether the engine must hold the arguments to the schema. None leaves it to the engine.

    Hand it to `tools=`; the calls come back in `Answer.tool_calls`.
    """
    return Tool(
        name=name,
        description=description,
        input_schema=_json_text(input_schema),
        output_schema=_json_text(output_schema),
        strict=strict,
    )


def tool_from_openai(value: Mapping[str, Any]) -> Tool:
    """A tool from the object that OpenAI's API uses: `{"type": "function", "function": {"name": ...}}`.

    The inner object alone (`{"name": ..., "parameters": ...}`) is taken too.

    Raises:
        ValueError: The object is no function tool; the message says what is wrong.
    """
    kind = value.get("type", "function")
    if kind != "function":
        message = f'the tool\'s "type" is {kind!r}, and only "function" can be used'
        raise ValueError(message)
    function = value.get("function", value)
    if not isinstance(function, Mapping):
        message = '"function" is not an object'
        raise ValueError(message)
    name = _member(function, "name", str)
    if not name:
        message = 'the tool has no "name"'
        raise ValueError(message)
    return tool_definition(
        name,
        _member(function, "description", str) or "",
        input_schema=_member(function, "parameters", dict),
        strict=_member(function, "strict", bool),
    )


def json_schema(schema: Schema, *, name: str = "", strict: bool | None = None) -> ResponseFormat:
    """A response format: the answer's text is JSON that follows a schema. Hand it to `response_format=`."""
    form = ResponseFormat.JsonSchema(name=name, schema=_json_text(schema), strict=strict)
    return ResponseFormat(json_schema=form)


def message_text(message: Message | RoleMessage) -> str:
    """The text of a turn: its text parts put together, "" if it has none."""
    if isinstance(message, Message):
        role = message.WhichOneof("role")
        return "" if role is None else message_text(getattr(message, role))
    return "".join(part.text for part in message.content)


def as_message(value: MessageLike) -> Message:
    """A turn in the shape that requests hold.

    Raises:
        TypeError: It is nothing that can be a turn.
    """
    match value:
        case Message():
            return value
        case str():
            return user(value)
        case SystemMessage():
            return Message(system=value)
        case DeveloperMessage():
            return Message(developer=value)
        case UserMessage():
            return Message(user=value)
        case AssistantMessage():
            return Message(assistant=value)
        case ToolMessage():
            return Message(tool=value)
        case _:
            message = f"a message is text or one of deltawire.v1's messages, not {type(value).__name__}"
            raise TypeError(message)


def _parts(content: Content) -> list[ContentPart]:
    """The content as a list of parts, in order."""
    pieces = [content] if isinstance(content, str | ContentPart) else content
    return [ContentPart(text=piece) if isinstance(piece, str) else piece for piece in pieces]


def _json_text(schema: Schema | None) -> str:
    """The schema as JSON text; text is kept to the letter."""
    if schema is None:
        return ""
    return schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)


def _member(value: Mapping[str, Any], name: str, kind: type[T]) -> T | None:
    """A member of a JSON object, None if it is absent or null.

    Raises:
        ValueError: It is of another type.
    """
    member = value.get(name)
    if member is not None and not isinstance(member, kind):
        message = f'"{name}" is not {_KINDS[kind]}'
        raise ValueError(message)
    return member


_KINDS: Mapping[type, str] = {str: "a string", dict: "an object", bool: "true or false"}
