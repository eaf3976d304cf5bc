"""Turns of a conversation, and tools: short ways to build the API's messages, and to read their text.

Every function takes and returns the messages of `deltawire.v1` themselves, so its results can be mixed with messages that
were built by hand. All of them raise TypeError or ValueError, which names the field, for a value that a message cannot hold.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

from deltawire._fields import made
from deltawire._values import JsonObject, json_text
from deltawire.v1.chat_completion_pb2 import ResponseFormat
from deltawire.v1.message_pb2 import (
    AssistantMessage,
    ChatMessage,
    ContentPart,
    DeveloperMessage,
    Image,
    SystemMessage,
    ToolMessage,
    UserMessage,
)
from deltawire.v1.tool_pb2 import Tool, ToolCall

if TYPE_CHECKING:
    from pathlib import Path

T = TypeVar("T")

RoleMessage: TypeAlias = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage
# A turn as callers may pass it: text alone is a turn of the user.
MessageLike: TypeAlias = str | ChatMessage | RoleMessage
# A piece of a turn: text, the API's own part, or the object that OpenAI's API uses.
Part: TypeAlias = str | ContentPart | Mapping[str, Any]
Content: TypeAlias = Part | Iterable[Part]
# A JSON Schema.
Schema: TypeAlias = JsonObject


def system(content: Content) -> ChatMessage:
    """Instructions for the model: text, or text parts. Send it as the first message."""
    return ChatMessage(system=made(SystemMessage, _content(content)))


def developer(content: Content) -> ChatMessage:
    """Instructions under the newer role name. The model's chat template decides what it means; send it first."""
    return ChatMessage(developer=made(DeveloperMessage, _content(content)))


def user(content: Content) -> ChatMessage:
    """A turn of the user: text, or text and images as parts, in order. Append it to the messages."""
    return ChatMessage(user=made(UserMessage, _content(content)))


def assistant(content: Content = (), *, tool_calls: Iterable[ToolCall] = (), reasoning: str = "") -> ChatMessage:
    """A turn of the model, built by hand. For a real answer append `Answer.message` instead."""
    given = {**_content(content), "tool_calls": tool_calls, "reasoning": reasoning}
    return ChatMessage(assistant=made(AssistantMessage, given))


def tool(call: ToolCall | str, content: Content) -> ChatMessage:
    """The result of one tool call.

    Args:
        call: The call, or its id.
        content: The result as text.

    Append one for each call after the answer's own message, then send the request again with the same tools.
    """
    call_id = call if isinstance(call, str) else call.call_id
    return ChatMessage(tool=made(ToolMessage, {"call_id": call_id, **_content(content)}))


def image(source: str | bytes | Path) -> ContentPart:
    """An image, as a part of a turn of the user.

    Args:
        source: The file's bytes, a `Path` to read them from, or a URL: https://…, or data:image/png;base64,….

    Raises:
        ValueError: The text is not a URL. Pass a file's name as a `Path`.
        TypeError: The source has another type.
        OSError: The file cannot be read.

    Pass it to `user`: `user(["What is this?", image(Path("cat.png"))])`. The gateway fetches a URL only if its operator
    allows it; bytes always work.
    """
    if isinstance(source, os.PathLike):
        # Imported here because it takes longer than the rest of this module, and most programs send no image.
        from pathlib import Path

        return ContentPart(image=Image(data=Path(source).read_bytes()))
    if isinstance(source, bytes):
        return ContentPart(image=Image(data=source))
    if not isinstance(source, str):
        message = f"an image is a URL, bytes, or a pathlib.Path, not {type(source).__name__}"
        raise TypeError(message)
    if not is_image_url(source):
        message = f"an image is a URL, bytes, or a pathlib.Path, and {source[:80]!r} is not a URL"
        raise ValueError(message)
    return ContentPart(image=made(Image, {"url": source}))


def is_image_url(text: str) -> bool:
    """Whether a text is an image's URL, and not a file's name."""
    return "://" in text or text[:5].lower() == "data:"


def tool_definition(
    name: str,
    description: str = "",
    *,
    input_schema: Schema | None = None,
    output_schema: Schema | None = None,
    strict: bool | None = None,
) -> Tool:
    """A function that the model may call, and that the caller runs.

    Args:
        name: Its name, unique in a request.
        description: What it does and when to use it; the model receives it.
        input_schema: JSON Schema of the arguments, as a mapping or as JSON text. None means no arguments.
        output_schema: JSON Schema of the result, for the caller's own use; the model does not receive it.
        strict: Whether the engine must make the arguments follow the schema. None leaves it to the engine.

    Pass it to `tools=`; `Answer.tool_calls` has the calls.
    """
    given = {
        "name": name,
        "description": description,
        "input_schema": json_text("input_schema", input_schema),
        "output_schema": json_text("output_schema", output_schema),
        "strict": strict,
    }
    return made(Tool, given)


def tool_from_openai(value: Mapping[str, Any]) -> Tool:
    """A tool from the object that OpenAI's API uses: `{"type": "function", "function": {"name": ...}}`.

    The inner object alone (`{"name": ..., "parameters": ...}`) is accepted too.

    Raises:
        ValueError: The object is not a function tool; the message has the problem.
        TypeError: It is not an object.

    Pass it to `tools=`, which also accepts the object itself.
    """
    if not isinstance(value, Mapping):
        message = f"a tool is a Tool or an object of OpenAI's, not {type(value).__name__}"
        raise TypeError(message)
    kind = value.get("type", "function")
    if kind != "function":
        message = f'the tool\'s "type" is {kind!r}, and only "function" can be used'
        raise ValueError(message)
    function = value.get("function", value)
    if not isinstance(function, Mapping):
        message = '"function" is not an object'
        raise ValueError(message)
    _refuse_others(function, _FUNCTION if "function" in value else _FUNCTION | {"type"})
    if "function" in value:
        _refuse_others(value, {"type", "function"})
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
    """A response format: JSON that follows a schema, given as a mapping or as JSON text. Pass it to `response_format=`."""
    given = {"name": name, "schema": json_text("schema", schema), "strict": strict}
    return ResponseFormat(json_schema=made(ResponseFormat.JsonSchema, given))


def regex(pattern: str) -> ResponseFormat:
    """A response format: the whole text matches a regular expression. Pass it to `response_format=`."""
    return made(ResponseFormat, {"regex": pattern})


def choice(values: Iterable[str]) -> ResponseFormat:
    """A response format: the text is one of these. Pass it to `response_format=`.

    Raises:
        TypeError: The argument is a single text, whose letters would be the choices.
    """
    return ResponseFormat(choice=made(ResponseFormat.Choice, {"values": values}, {"values": "choice"}))


def grammar(text: str) -> ResponseFormat:
    """A response format: the text follows a grammar in EBNF (GBNF) or Lark. Pass it to `response_format=`."""
    return made(ResponseFormat, {"grammar": text})


def structural_tag(tag: JsonObject) -> ResponseFormat:
    """A response format: a structural tag in vLLM's form, as a mapping or as JSON text. Pass it to `response_format=`."""
    return made(ResponseFormat, {"structural_tag": json_text("structural_tag", tag)})


def message_text(message: ChatMessage | RoleMessage) -> str:
    """The text of a turn: its `text`, or its text parts concatenated; "" if it has none."""
    if isinstance(message, ChatMessage):
        role = message.WhichOneof("role")
        return "" if role is None else message_text(getattr(message, role))
    return message.text if message.HasField("text") else "".join(part.text for part in message.content)


def as_message(value: MessageLike) -> ChatMessage:
    """A turn as a `ChatMessage`.

    Raises:
        TypeError: The value cannot be a turn.
    """
    match value:
        case ChatMessage():
            return value
        case str():
            return user(value)
        case SystemMessage():
            return ChatMessage(system=value)
        case DeveloperMessage():
            return ChatMessage(developer=value)
        case UserMessage():
            return ChatMessage(user=value)
        case AssistantMessage():
            return ChatMessage(assistant=value)
        case ToolMessage():
            return ChatMessage(tool=value)
        case _:
            # Such as OpenAI's {"role": "user", "content": "hi"}.
            hint = ': write user("hi"), system(...), assistant(...) or tool(...)' if isinstance(value, Mapping) else ""
            message = f"a message is text or one of deltawire.v1's messages, not {type(value).__name__}{hint}"
            raise TypeError(message)


def _content(content: Content) -> dict[str, Any]:
    """The content as a turn's `text`, if it is one text alone, else as its `content`: the parts in order."""
    alone = isinstance(content, str | bytes | ContentPart | Mapping) or not isinstance(content, Iterable)
    pieces = [cast("Part", content)] if alone else cast("Iterable[Part]", content)
    parts = [_part(piece) for piece in pieces]
    return {"text": parts[0].text} if len(parts) == 1 and parts[0].HasField("text") else {"content": parts}


def _part(piece: Part) -> ContentPart:
    """A piece of content; OpenAI's object is {"type": "text", "text": …} or {"type": "image_url", "image_url": …}.

    Raises:
        ValueError: It is an object of another kind; the message has the problem.
        TypeError: The value cannot be a piece.
    """
    if isinstance(piece, ContentPart):
        return piece
    if isinstance(piece, str):
        return made(ContentPart, {"text": piece})
    if not isinstance(piece, Mapping):
        message = f"content is text, a ContentPart or an object of OpenAI's, not {type(piece).__name__}"
        raise TypeError(message)
    match piece.get("type"):
        case "text":
            return made(ContentPart, {"text": _member(piece, "text", str) or ""})
        case "image_url":
            address = piece.get("image_url")
            url = address if isinstance(address, str) else _member(_object(piece, "image_url"), "url", str)
            return ContentPart(image=made(Image, {"url": url or ""}))
        case kind:
            message = f'the content part\'s "type" is {kind!r}, and only "text" and "image_url" can be used'
            raise ValueError(message)


def _object(value: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A member of a JSON object that is an object itself, empty if it is absent."""
    return _member(value, name, dict) or {}


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


def _refuse_others(tool: Mapping[str, Any], known: Collection[str]) -> None:
    """Check the members of a tool: a misspelt one would be ignored.

    Raises:
        ValueError: A member is unknown.
    """
    for name in tool:
        if name not in known:
            message = f'the tool has an unknown member "{name}"; known are {", ".join(sorted(known))}'
            raise ValueError(message)


_FUNCTION = frozenset(("name", "description", "parameters", "strict"))
_KINDS: Mapping[type, str] = {str: "a string", dict: "an object", bool: "true or false"}
