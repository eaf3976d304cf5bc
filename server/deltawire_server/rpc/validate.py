"""Converts request messages to validated values, or reports every invalid field in one error.

Only values that no vLLM accepts are refused here. vLLM validates everything else, and its error names the field. Field paths are
those of the message, with indexes: ``chat.messages[2].tool.call_id``.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import message_pb2, tool_pb2
from deltawire_server.errors import Violation, invalid_request
from deltawire_server.pacing import give_way
from deltawire_server.rpc import validate_options
from deltawire_server.rpc.status import shorten
from deltawire_server.rpc.validate_content import ContentLimits, ContentReader
from deltawire_server.rpc.violations import MAX_FIELD, Violations
from deltawire_server.schemas import MAX_SCHEMA_BYTES, compiled_checks
from deltawire_server.upstream.request import (
    SAMPLING,
    ChatMessage,
    ChatRequest,
    FormatKind,
    NamedTool,
    PastCall,
    Role,
    Sampling,
    TextFormat,
    ToolMode,
    ToolSpec,
    allowed_among,
)

KIB = 1024

MAX_CHOICES = 128
"""The limit of the chat API."""
MAX_TOOLS = 128
"""The limit of the chat API."""
MAX_MESSAGES = 10_000
"""Far more than any conversation has. Reading each message takes time, in which other calls wait."""
MAX_ENTRIES = 20_000
"""Parts and tool calls of all messages, for the same reason."""
MAX_PARTS = 4096
"""Parts and tool calls of one message, which are read without a pause: about 20 ms at most."""
STEP = 1024
"""Messages, parts and tool calls that are read before other calls run: 5 to 10 ms."""
MAX_CHOICE_VALUES = 65_536
"""Values of a `choice` response format, which are forwarded as one list and not kept."""
MAX_SAMPLING_VALUES = 4096
"""Entries of each list of texts or tokens in the sampling. The sampling is kept as long as the completion runs, and sent back in
`started`. Callers need far fewer."""
MAX_SAMPLING_BYTES = 64 * KIB
"""Bytes of all `stop` and `bad_words` together, for the same reason; vLLM accepts four stop texts."""
MAX_NAME_BYTES = 1024
"""Bytes of a model's or a tool's name, and of `user`. The name of a model may be a path. Errors and logs quote names."""
MAX_JSON_BYTES = 1024 * KIB
"""Bytes of `chat_template_kwargs` and of `extra_body`, which may contain documents for a template. A JSON object of this size has
up to 100,000 names, which take 50 ms to read."""
MAX_TOOLS_BYTES = 1024 * KIB
"""Bytes of the descriptions and `input_schema` of all tools together, which is 8 KiB for each of 128 tools. They are encoded
without a pause, and one answer may call all of them."""
MAX_FORM_BYTES = 1024 * KIB
"""Bytes of a grammar, of a regular expression, or of all values of a `choice`, which are encoded without a pause."""
MAX_ARGUMENTS_BYTES = 4096 * KIB
"""Bytes of one past tool call's arguments: `stream.max_tool_call_bytes` limits the arguments from a model to less."""
MAX_EXTRA_FIELDS = 128
"""Fields of `extra_body`: vLLM's own request has fewer, and each field is validated separately."""
MAX_CACHE_SALT = 1024
"""Characters: the largest limit of any vLLM version. Newer versions have lower limits and report them."""

_ANY = (-math.inf, math.inf, "must be finite")

_MODES = {
    tool_pb2.ToolChoice.MODE_AUTO: ToolMode.AUTO,
    tool_pb2.ToolChoice.MODE_REQUIRED: ToolMode.REQUIRED,
    tool_pb2.ToolChoice.MODE_NONE: ToolMode.NONE,
}


class _JsonObject(msgspec.Struct):
    """Any JSON object. Decoding only checks the syntax; fields are skipped."""


_json_object = msgspec.json.Decoder(_JsonObject)
_EMPTY_OBJECT = re.compile(r"[ \t\n\r]*\{[ \t\n\r]*\}[ \t\n\r]*")


async def chat_request(message: chat_pb.ChatRequest, limits: ContentLimits | None = None) -> ChatRequest:
    """Validate a chat request. Other calls run in between if the request is long.

    Args:
        message: The request.
        limits: Limits of its messages.

    Returns:
        The request as a plain value. Find its provider and send it.

    Raises:
        CallerError: INVALID_REQUEST with every invalid field; unsupported schemas are reported only if all other fields are valid.
    """
    request = await _ChatReader(limits or ContentLimits()).read(message)
    if not message.tool_call_policy.validate_schema:
        return request
    # Without a schema any object is valid, so there is nothing to check.
    tools = {tool.name: tool for tool in request.offered_tools if tool.input_schema}
    checks, errors = await compiled_checks({name: tool.input_schema for name, tool in tools.items()})
    violations = Violations()
    for name, error in errors.items():
        violations.add(f"chat.tools[{request.tools.index(tools[name])}].input_schema", str(error))
    violations.raise_any()
    return replace(request, argument_checks=checks)


COUNTED = frozenset({"model", "messages", "tools", "tool_choice", "allowed_tools", "reasoning", "chat_template_kwargs"})
"""The fields of a chat request that affect the number of prompt tokens; of `reasoning`, only `effort`."""


async def count_request(message: chat_pb.ChatRequest, limits: ContentLimits | None = None) -> ChatRequest:
    """Validate a chat request for CountTokens: like `chat_request`, and it must not have fields that would be ignored.

    Raises:
        CallerError: INVALID_REQUEST with every invalid field.
    """
    ignored = [field.name for field, _ in message.ListFields() if field.name not in COUNTED]
    ignored += [f"reasoning.{field.name}" for field, _ in message.reasoning.ListFields() if field.name != "effort"]
    if ignored:
        raise invalid_request(
            [Violation(f"chat.{name}", "has no effect on the number of tokens: leave it out") for name in ignored]
        )
    return await chat_request(message, limits)


class _ChatReader:
    """Converts one chat request and collects its violations."""

    def __init__(self, limits: ContentLimits) -> None:
        self._violations = Violations()
        self._content = ContentReader(self._violations, limits)

    async def read(self, chat: chat_pb.ChatRequest) -> ChatRequest:
        messages = await self._messages(chat)
        choice_count = chat.choice_count if chat.HasField("choice_count") else 1
        if not 1 <= choice_count <= MAX_CHOICES:
            self._violations.add("chat.choice_count", f"must be between 1 and {MAX_CHOICES}")
        if len(chat.cache_salt) > MAX_CACHE_SALT:
            self._violations.add("chat.cache_salt", f"must have at most {MAX_CACHE_SALT} characters")
        self._fits("chat.model", chat.model, MAX_NAME_BYTES)
        self._fits("chat.user", chat.user, MAX_NAME_BYTES)
        tools, allowed = self._tools(chat.tools), self._allowed_tools(chat)
        request = ChatRequest(
            model=chat.model,
            messages=messages,
            tools=tools,
            allowed_tools=allowed,
            tool_choice=self._tool_choice(chat, tools, allowed),
            parallel_tool_calls=chat.parallel_tool_calls if chat.HasField("parallel_tool_calls") else None,
            sampling=self._sampling(chat.sampling) if chat.HasField("sampling") else Sampling(),
            response_format=self._response_format(chat.response_format) if chat.HasField("response_format") else None,
            top_logprobs=self._top_logprobs(chat),
            choice_count=choice_count,
            reasoning=validate_options.reasoning(chat.reasoning, self._violations),
            incremental_tool_calls=validate_options.incremental_tool_calls(chat.tool_call_policy, self._violations),
            soft_time_limit=validate_options.soft_time_limit(chat, self._violations),
            completion_id=validate_options.own_completion_id(chat.completion_id, self._violations),
            priority=chat.priority if chat.HasField("priority") else None,
            cache_salt=chat.cache_salt,
            chat_template_kwargs=self._json_object(
                "chat.chat_template_kwargs", chat.chat_template_kwargs, MAX_JSON_BYTES, empty_allowed=True
            ),
            extra_body=self._extra_body(chat.extra_body),
            user=chat.user,
        )
        self._violations.raise_any()
        return request

    async def _messages(self, chat: chat_pb.ChatRequest) -> tuple[ChatMessage, ...]:
        """The messages. The counts that determine the duration are checked first."""
        if not chat.messages:
            self._violations.add("chat.messages", "needs at least one message")
        self._bound("chat.messages", len(chat.messages), MAX_MESSAGES)
        self._bound("chat.tools", len(chat.tools), MAX_TOOLS)
        self._bound("chat.allowed_tools", len(chat.allowed_tools), MAX_TOOLS)
        entries = [_entries(message) for message in chat.messages]
        self._bound("chat.messages", sum(entries), MAX_ENTRIES, "parts and tool calls")
        most = max(entries, default=0)
        self._bound(f"chat.messages[{entries.index(most) if most else 0}]", most, MAX_PARTS, "parts and tool calls")
        messages: list[ChatMessage] = []
        left = STEP
        for index, message in enumerate(chat.messages):
            left -= 1 + entries[index]
            if left < 0:
                await give_way()
                left = STEP
            messages.append(await self._message(f"chat.messages[{index}]", message))
        return tuple(messages)

    def _top_logprobs(self, chat: chat_pb.ChatRequest) -> int | None:
        if not chat.HasField("logprobs"):
            return None
        if chat.logprobs.top_k < 0:
            self._violations.add("chat.logprobs.top_k", "must be 0 or more")
        return chat.logprobs.top_k

    async def _message(self, path: str, message: message_pb2.ChatMessage) -> ChatMessage:
        match message.WhichOneof("role"):
            case "system":
                return ChatMessage(Role.SYSTEM, await self._content.read(f"{path}.system", message.system))
            case "developer":
                return ChatMessage(Role.DEVELOPER, await self._content.read(f"{path}.developer", message.developer))
            case "user":
                return ChatMessage(Role.USER, await self._content.read(f"{path}.user", message.user))
            case "assistant":
                return await self._assistant(f"{path}.assistant", message.assistant)
            case "tool":
                if not message.tool.call_id:
                    self._violations.add(f"{path}.tool.call_id", "is required: which call does this answer?")
                content = await self._content.read(f"{path}.tool", message.tool)
                return ChatMessage(Role.TOOL, content, call_id=message.tool.call_id)
            case None:
                self._violations.add(path, "needs a role: system, developer, user, assistant or tool")
                return ChatMessage(Role.USER)

    async def _assistant(self, path: str, message: message_pb2.AssistantMessage) -> ChatMessage:
        calls: list[PastCall] = []
        for index, call in enumerate(message.tool_calls):
            here = f"{path}.tool_calls[{index}]"
            if not call.call_id:
                self._violations.add(f"{here}.call_id", "is required")
            if not call.tool_name:
                self._violations.add(f"{here}.tool_name", "is required")
            arguments = self._json_object(f"{here}.arguments", call.arguments, MAX_ARGUMENTS_BYTES, empty_allowed=True)
            calls.append(PastCall(call.call_id, call.tool_name, arguments or "{}"))
        # The content of an assistant turn may be empty, if it was cut or its tool calls failed.
        content = await self._content.read(path, message, required=False)
        return ChatMessage(Role.ASSISTANT, content, reasoning=message.reasoning, tool_calls=tuple(calls))

    def _tools(self, tools: Iterable[tool_pb2.Tool]) -> tuple[ToolSpec, ...]:
        specs: list[ToolSpec] = []
        seen: set[str] = set()
        left = MAX_TOOLS_BYTES
        for index, tool in enumerate(tools):
            path = f"chat.tools[{index}]"
            if not tool.name:
                self._violations.add(f"{path}.name", "is required")
            elif not self._fits(f"{path}.name", tool.name, MAX_NAME_BYTES):
                pass
            elif tool.name in seen:
                self._violations.add(f"{path}.name", f"{tool.name!r} is used twice")
            seen.add(tool.name)
            schema = self._json_object(f"{path}.input_schema", tool.input_schema, MAX_SCHEMA_BYTES, empty_allowed=True)
            self._json_object(f"{path}.output_schema", tool.output_schema, MAX_SCHEMA_BYTES, empty_allowed=True)
            left -= len(schema.encode()) + len(tool.description.encode())
            if left < 0:
                what = f"have more than {MAX_TOOLS_BYTES} bytes of description and input_schema: offer fewer"
                self._violations.add("chat.tools", what)
                self._violations.raise_any()
            strict = tool.strict if tool.HasField("strict") else None
            specs.append(ToolSpec(tool.name, tool.description, schema, strict))
        return tuple(specs)

    def _allowed_tools(self, chat: chat_pb.ChatRequest) -> frozenset[str]:
        names = {tool.name: None for tool in chat.tools}  # (in their order)
        unknown = [index for index, name in enumerate(chat.allowed_tools) if name not in names]
        tools = _listed(names) if unknown else ""
        for index in unknown:
            violation = f"{_quoted(chat.allowed_tools[index])} is not one of the tools: {tools}"
            self._violations.add(f"chat.allowed_tools[{index}]", violation)
        return frozenset(chat.allowed_tools)

    def _tool_choice(
        self, chat: chat_pb.ChatRequest, tools: Iterable[ToolSpec], allowed: Collection[str]
    ) -> ToolMode | NamedTool | None:
        if not chat.HasField("tool_choice"):
            return None
        choice = chat.tool_choice
        names = {tool.name: None for tool in allowed_among(tools, allowed)}
        kind = "allowed tools" if allowed else "tools"
        if choice.WhichOneof("choice") == "tool_name":
            if choice.tool_name not in names:
                violation = f"{_quoted(choice.tool_name)} is not one of the {kind}: {_listed(names)}"
                self._violations.add("chat.tool_choice.tool_name", violation)
            return NamedTool(choice.tool_name)
        mode = _MODES.get(choice.mode)
        if mode is None:
            known = f"; mode {choice.mode} is not supported" if choice.mode else ""
            self._violations.add("chat.tool_choice", f"needs a mode (AUTO, REQUIRED or NONE) or a tool_name{known}")
        elif mode is ToolMode.REQUIRED and not names:
            self._violations.add(
                "chat.tool_choice.mode", f"REQUIRED needs at least one of the {kind}, and there is none"
            )
        return mode

    def _sampling(self, sampling: chat_pb.Sampling) -> Sampling:
        values: dict[str, Any] = {}
        value: Any
        for descriptor, value in sampling.ListFields():
            name = descriptor.name
            if isinstance(value, Mapping | Sequence):
                self._bound(f"chat.sampling.{name}", len(value), MAX_SAMPLING_VALUES)
                values[name] = dict(value) if isinstance(value, Mapping) else tuple(value)
            else:
                lowest, highest, violation = SAMPLING[name].get("range", _ANY)
                # Also refuses NaN, because comparisons with it are false, and infinity, which JSON cannot represent.
                if not (lowest <= value <= highest and math.isfinite(value)):
                    self._violations.add(f"chat.sampling.{name}", violation)
                values[name] = value
        size = 0
        for name in ("stop", "bad_words"):
            for index, text in enumerate(getattr(sampling, name)):
                if not text:
                    self._violations.add(f"chat.sampling.{name}[{index}]", "must not be empty")
                size += len(text.encode())
        self._bound("chat.sampling", size, MAX_SAMPLING_BYTES, "bytes of stop and bad_words")
        self._check_token_ids(sampling)
        return Sampling(**values)

    def _check_token_ids(self, sampling: chat_pb.Sampling) -> None:
        for index, token in enumerate(sampling.stop_token_ids):
            if token < 0:
                self._violations.add(f"chat.sampling.stop_token_ids[{index}]", "must be a token's id, 0 or more")
        for token, bias in sampling.logit_bias.items():
            if token < 0:
                self._violations.add(f"chat.sampling.logit_bias[{token}]", "must have a token's id as key, 0 or more")
            if not -100 <= bias <= 100:
                self._violations.add(f"chat.sampling.logit_bias[{token}]", "must be between -100 and 100")

    def _response_format(self, form: chat_pb.ResponseFormat) -> TextFormat | None:
        path = "chat.response_format"
        match form.WhichOneof("format"):
            case "text":
                return None
            case "json_object":
                return TextFormat(FormatKind.JSON_OBJECT)
            case "json_schema":
                self._fits(f"{path}.json_schema.name", form.json_schema.name, MAX_NAME_BYTES)
                schema = self._json_object(f"{path}.json_schema.schema", form.json_schema.schema, MAX_SCHEMA_BYTES)
                strict = form.json_schema.strict if form.json_schema.HasField("strict") else None
                return TextFormat(FormatKind.JSON_SCHEMA, schema or "{}", form.json_schema.name or "response", strict)
            case "grammar":
                return TextFormat(FormatKind.GRAMMAR, self._text(f"{path}.grammar", form.grammar))
            case "regex":
                return TextFormat(FormatKind.REGEX, self._text(f"{path}.regex", form.regex))
            case "choice":
                if not form.choice.values:
                    self._violations.add(f"{path}.choice.values", "needs at least one text")
                self._bound(f"{path}.choice.values", len(form.choice.values), MAX_CHOICE_VALUES)
                size = sum(len(value.encode()) for value in form.choice.values)
                self._bound(f"{path}.choice.values", size, MAX_FORM_BYTES, "bytes")
                return TextFormat(FormatKind.CHOICE, tuple(form.choice.values))
            case "structural_tag":
                self._json_object(f"{path}.structural_tag", form.structural_tag, MAX_SCHEMA_BYTES)
                return TextFormat(FormatKind.STRUCTURAL_TAG, form.structural_tag)
            case None:
                self._violations.add(path, "is empty: set one of its forms, or leave it out for free text")
                return None

    def _bound(self, path: str, count: int, limit: int, of_what: str = "entries") -> None:
        """Refuse the request immediately if it has too many entries, because they must not be read."""
        if count > limit:
            self._violations.add(path, f"has {count} {of_what}; at most {limit} are allowed")
            self._violations.raise_any()

    def _text(self, path: str, text: str) -> str:
        if not text:
            self._violations.add(path, "must not be empty")
        self._fits(path, text, MAX_FORM_BYTES)
        return text

    def _fits(self, path: str, text: str, max_bytes: int) -> bool:
        """Whether a text has at most `max_bytes` bytes of UTF-8; otherwise add a violation."""
        size = len(text.encode())
        if size > max_bytes:
            self._violations.add(path, f"has {size} bytes; at most {max_bytes} are allowed")
        return size <= max_bytes

    def _json_object(self, path: str, text: str, max_bytes: int, *, empty_allowed: bool = False) -> str:
        """Validate the text of a JSON object, which is forwarded unchanged. Return "" for `{}`, and if it is invalid."""
        if not self._fits(path, text, max_bytes):
            return ""
        if not text.strip():
            if not empty_allowed:
                self._violations.add(path, "is required: the JSON text of an object")
            return ""
        try:
            _json_object.decode(text)
        except msgspec.ValidationError:
            self._violations.add(path, "must be the JSON text of an object")
            return ""
        except msgspec.DecodeError as error:
            self._violations.add(path, f"is not valid JSON: {error}")
            return ""
        except RecursionError:
            self._violations.add(path, "is nested too deeply to be read")
            return ""
        return "" if _EMPTY_OBJECT.fullmatch(text) else text

    def _extra_body(self, text: str) -> str:
        """Like `_json_object`, with limits on the number and length of field names: each field is validated separately."""
        path = "chat.extra_body"
        text = self._json_object(path, text, MAX_JSON_BYTES, empty_allowed=True)
        fields = msgspec.json.decode(text, type=dict[str, msgspec.Raw]) if text else {}
        self._bound(path, len(fields), MAX_EXTRA_FIELDS, "fields")
        for name in fields:
            self._fits(f"{path}.{shorten(name, MAX_FIELD)}", name, MAX_NAME_BYTES)
        return text


def _entries(message: message_pb2.ChatMessage) -> int:
    """The number of parts and tool calls of a message."""
    match message.WhichOneof("role"):
        case None:
            return 0
        case "assistant":
            return len(message.assistant.content) + len(message.assistant.tool_calls)
        case role:
            return len(getattr(message, role).content)


def _quoted(name: str) -> str:
    """A name in quotes, cut if it is long."""
    return repr(shorten(name, 64))


def _listed(names: Collection[str]) -> str:
    """Up to 20 names, each cut if it is long. The result is repeated in each violation, so compute it once."""
    shown = [shorten(name, 64) for name in itertools.islice(names, 20)]
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return (", ".join(shown) or "none") + more
