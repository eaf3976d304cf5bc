"""Builds the body of vLLM's chat request.

Fields that the request does not set are left out, so that the model's own defaults apply. Fields with different names:

    choice_count        n
    top_logprobs        logprobs: true, and top_logprobs
    response_format     response_format for the JSON forms, structured_outputs for the others
    tool_choice NONE    neither tools nor tool_choice, because vLLM's `none` leaves the tools in the prompt
    allowed_tools       only these tools in tools
    reasoning           reasoning_effort, thinking_token_budget, include_reasoning
"""

from __future__ import annotations

import binascii
from typing import TYPE_CHECKING, Any

import msgspec

from deltawire_server.pacing import give_way
from deltawire_server.upstream.request import (
    ChatMessage,
    ChatRequest,
    Content,
    FormatKind,
    ImageData,
    ImageUrl,
    NamedTool,
    Reasoning,
    Role,
    TextFormat,
    ToolMode,
    ToolSpec,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator, Mapping

STEP_BYTES = 3 * 128 * 1024
"""Bytes that are encoded in one step, in 1 to 10 ms. A multiple of 3, so that the base64 of pieces can be concatenated."""

_MESSAGE_BYTES = 2048
"""The fixed cost of encoding a message, in bytes: added to its own size."""

_PLACE_BYTES = b"\0"
_PLACE = msgspec.Raw(_PLACE_BYTES)
"""A placeholder for content that is encoded separately. JSON text never has this byte, because strings escape it."""

_NO_ARGUMENTS = '{"type": "object", "properties": {}}'

_PLAIN = ("priority", "cache_salt", "user")
"""Fields with the same name in vLLM; `None` and empty ones are left out."""

_PROMPT_FIELDS = (
    "add_generation_prompt",
    "add_special_tokens",
    "chat_template",
    "continue_final_message",
    "media_io_kwargs",
    "mm_processor_kwargs",
)
"""Further fields of a chat request's body that change the prompt; a `/tokenize` request has them under the same names."""


async def request_body(request: ChatRequest, model: str) -> bytes:
    """The JSON body of a streamed chat request, without `extra_body`; see `chat_body` and `encode_body`."""
    body = await encode_body(chat_body(request, model), request.messages)
    return b"".join([piece async for piece in body])


def chat_body(request: ChatRequest, model: str, extra: Mapping[str, msgspec.Raw] | None = None) -> dict[str, Any]:
    """Build the body of a streamed chat request, without its messages.

    Args:
        request: The request.
        model: The provider's own name of the model.
        extra: Further fields of the body, already validated.

    Returns:
        The body; POST it, encoded by `encode_body`, to `/v1/chat/completions`.
    """
    body: dict[str, Any] = {
        "model": model,
        "messages": _PLACE,
        "stream": True,
        # If the answer breaks off, the running counts are the only usage there is.
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    if request.choice_count != 1:
        body["n"] = request.choice_count
    if request.offered_tools:
        body["tools"] = [_tool(tool) for tool in request.offered_tools]
        if request.tool_choice is not None:
            body["tool_choice"] = _tool_choice(request.tool_choice)
        if request.parallel_tool_calls is not None:
            body["parallel_tool_calls"] = request.parallel_tool_calls
    if request.top_logprobs is not None:
        body["logprobs"] = True
        body["top_logprobs"] = request.top_logprobs
    if request.response_format is not None:
        body.update(_response_format(request.response_format))
    body.update(request.sampling.given())
    body.update(_reasoning(request.reasoning))
    body.update({name: value for name in _PLAIN if (value := getattr(request, name)) not in (None, "")})
    if request.chat_template_kwargs:
        body["chat_template_kwargs"] = msgspec.Raw(request.chat_template_kwargs.encode())
    body.update(extra or {})
    return body


def count_body(request: ChatRequest, model: str, extra: Mapping[str, msgspec.Raw] | None = None) -> dict[str, Any]:
    """Build the body, without its messages, of a request to count the prompt of the chat request of `chat_body`.

    `/tokenize` lacks the fields of a chat request that only some templates use. vLLM passes those to the template as
    arguments, and so does this function.

    Args:
        request: The chat request; its messages must not have images.
        model: The provider's own name of the model.
        extra: Further fields of the chat request's body, already validated.

    Returns:
        The body; POST it, encoded by `encode_body`, to `/tokenize`.
    """
    body: dict[str, Any] = {"model": model, "messages": _PLACE}
    if request.offered_tools:
        body["tools"] = [_tool(tool) for tool in request.offered_tools]
    given = request.chat_template_kwargs or "{}"
    arguments: dict[str, Any] = msgspec.json.decode(given, type=dict[str, msgspec.Raw])
    extra = extra or {}
    if request.reasoning.effort:
        # Templates use either the effort or a switch; vLLM sets both, the switch only if the caller did not.
        arguments.setdefault("enable_thinking", request.reasoning.effort != "none")
        arguments["reasoning_effort"] = request.reasoning.effort
    if "documents" in extra:
        arguments["documents"] = extra["documents"]
    if arguments:
        body["chat_template_kwargs"] = arguments
    body.update({name: value for name, value in extra.items() if name in _PROMPT_FIELDS})
    return body


class Body:
    """A request's body, encoded piece by piece each time it is sent: it holds the contents, not their encoded form.

    Iterate over it once for each attempt; `clear` it after the last one.

    Attributes:
        size: Length of the JSON text in bytes.
    """

    def __init__(self) -> None:
        self.size = 0
        self._parts: list[bytes | str | ImageData] = []

    def add(self, part: bytes) -> None:
        """Append JSON text."""
        self._parts.append(part)
        self.size += len(part)

    async def add_large(self, content: str | ImageData) -> None:
        """Append a JSON string. Other tasks get a turn while the length of a text is computed."""
        self._parts.append(content)
        if isinstance(content, ImageData):
            self.size += len(_image_head(content)) + 4 * -(-len(content.data) // 3) + 1
            return
        for piece in _pieces(content):
            self.size += len(piece)
            await give_way()

    def clear(self) -> None:
        """Drop the contents; the body is empty afterwards."""
        self._parts.clear()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """The JSON text, in pieces that each take at most 10 ms to encode."""
        for part in tuple(self._parts):
            if isinstance(part, bytes):
                yield part
            else:
                for piece in _pieces(part):
                    yield piece
                    await give_way()


async def encode_body(body: Mapping[str, Any], messages: Iterable[ChatMessage]) -> Body:
    """Encode a body with its messages as JSON. Other tasks get a turn about every `STEP_BYTES`.

    Args:
        body: From `chat_body` or `count_body`.
        messages: The request's messages.

    Returns:
        The body to send; images and long texts are encoded while it is sent.
    """
    head, tail = msgspec.json.encode(body).split(_PLACE_BYTES)
    encoded = Body()
    encoded.add(head + b"[")
    left = STEP_BYTES
    comma = b""
    for message in messages:
        large = _Large()
        first, *others = msgspec.json.encode(_message(message, large)).split(_PLACE_BYTES)
        encoded.add(comma + first)
        comma = b","
        left -= len(first) + _MESSAGE_BYTES
        for content, after in zip(large.contents, others, strict=True):
            await encoded.add_large(content)
            encoded.add(after)
        if left < 0:
            await give_way()
            left = STEP_BYTES
    encoded.add(b"]" + tail)
    return encoded


class _Large:
    """The contents of a message that are encoded in pieces: images, and all texts after the first `STEP_BYTES` of text."""

    def __init__(self) -> None:
        self.contents: list[str | ImageData] = []
        self._left = STEP_BYTES

    def text(self, text: str) -> str | msgspec.Raw:
        """The text, or a placeholder for it."""
        self._left -= len(text)
        return text if self._left >= 0 else self.add(text)

    def add(self, content: str | ImageData) -> msgspec.Raw:
        """Add content that is encoded in pieces; return its placeholder."""
        self.contents.append(content)
        return _PLACE


def _pieces(content: str | ImageData) -> Iterator[bytes]:
    """The pieces of a JSON string."""
    if isinstance(content, str):
        yield b'"'
        for start in range(0, len(content), STEP_BYTES):
            yield msgspec.json.encode(content[start : start + STEP_BYTES])[1:-1]
    else:
        yield _image_head(content)
        for start in range(0, len(content.data), STEP_BYTES):
            yield binascii.b2a_base64(content.data[start : start + STEP_BYTES], newline=False)
    yield b'"'


def _image_head(image: ImageData) -> bytes:
    return f'"data:{image.media_type};base64,'.encode()


def _message(message: ChatMessage, large: _Large) -> dict[str, Any]:
    # Placeholders must be in the order in which their contents are added, so build each value in place.
    body: dict[str, Any] = {"role": message.role.value, "content": _content(message, large)}
    if message.role is Role.TOOL:
        body["tool_call_id"] = message.call_id
    if message.reasoning:
        body["reasoning"] = large.text(message.reasoning)
    if message.tool_calls:
        body["tool_calls"] = [
            {
                "id": call.call_id,
                "type": "function",
                "function": {"name": call.tool_name, "arguments": large.text(call.arguments)},
            }
            for call in message.tool_calls
        ]
    return body


def _content(message: ChatMessage, large: _Large) -> str | msgspec.Raw | list[dict[str, Any]] | None:
    """A single text as a string, because many chat templates concatenate it; otherwise a list; null for tool calls only."""
    if len(message.content) == 1 and isinstance(text := message.content[0], str):
        return large.text(text)
    if message.content:
        return [_part(part, large) for part in message.content]
    return None if message.tool_calls else ""


def _part(part: Content, large: _Large) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": large.text(part)}
    if isinstance(part, ImageUrl):
        return {"type": "image_url", "image_url": {"url": str(part.address)}}
    return {"type": "image_url", "image_url": {"url": large.add(part)}}


def _tool(tool: ToolSpec) -> dict[str, Any]:
    # Verbatim: decoding and encoding could change a schema.
    parameters = msgspec.Raw((tool.input_schema or _NO_ARGUMENTS).encode())
    function: dict[str, Any] = {"name": tool.name, "parameters": parameters}
    if tool.description:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _tool_choice(choice: ToolMode | NamedTool) -> str | dict[str, Any]:
    if isinstance(choice, NamedTool):
        return {"type": "function", "function": {"name": choice.name}}
    return choice.value


def _response_format(form: TextFormat) -> dict[str, Any]:
    if form.kind is FormatKind.JSON_OBJECT:
        return {"response_format": {"type": "json_object"}}
    if form.kind is FormatKind.JSON_SCHEMA:
        schema: dict[str, Any] = {"name": form.name, "schema": msgspec.Raw(str(form.value).encode())}
        if form.strict is not None:
            schema["strict"] = form.strict
        return {"response_format": {"type": "json_schema", "json_schema": schema}}
    return {"structured_outputs": {form.kind.value: form.value}}


def _reasoning(reasoning: Reasoning) -> dict[str, Any]:
    given = {
        "reasoning_effort": reasoning.effort or None,
        "thinking_token_budget": reasoning.token_budget,
        "include_reasoning": reasoning.include,
    }
    return {name: value for name, value in given.items() if value is not None}
