"""Which fields of a chat request's body a version of vLLM supports. vLLM ignores all other fields silently.

vLLM lists the supported fields in its OpenAPI document, which `engine` reads. A request with only `CORE` fields needs no
check.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import msgspec

from deltawire_server.upstream.request import SAMPLING, FormatKind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from deltawire_server.upstream.request import ChatRequest

NOT_JSON = (msgspec.DecodeError, UnicodeError, RecursionError)
"""The exceptions that msgspec raises for bytes that are not JSON, not UTF-8, or nested too deeply."""

CHAT_PATH = "/v1/chat/completions"

FIELDS: Mapping[str, str] = MappingProxyType(
    {
        "model": "chat.model",
        "messages": "chat.messages",
        "tools": "chat.tools",
        "tool_choice": "chat.tool_choice",
        "parallel_tool_calls": "chat.parallel_tool_calls",
        "n": "chat.choice_count",
        "logprobs": "chat.logprobs",
        "top_logprobs": "chat.logprobs.top_k",
        "response_format": "chat.response_format",
        "structured_outputs": "chat.response_format",
        "max_completion_tokens": "chat.sampling.max_tokens",
        "reasoning_effort": "chat.reasoning.effort",
        "thinking_token_budget": "chat.reasoning.token_budget",
        "include_reasoning": "chat.reasoning.include",
        "priority": "chat.priority",
        "cache_salt": "chat.cache_salt",
        "chat_template_kwargs": "chat.chat_template_kwargs",
        "user": "chat.user",
        **{name: f"chat.sampling.{name}" for name in SAMPLING},
    }
)
"""The request field for each field of the body. Any other field of the body comes from `extra_body`."""

STRICT = "tools.function.strict"
"""The one nested field that an older vLLM ignores silently; the only effect would be invalid arguments."""

CORE = frozenset(
    {
        *("model", "messages", "stream", "stream_options", "n", "logprobs", "top_logprobs", "tools", "tool_choice"),
        *("response_format", "user"),
        *(name for name, row in SAMPLING.items() if not row.get("newer")),
    }
)
"""Fields that every vLLM since 0.6 supports, the first version with automatic tool choice and the oldest supported one."""

_FORMAT_FIELDS: Mapping[FormatKind, str] = MappingProxyType(
    {
        FormatKind.JSON_SCHEMA: "chat.response_format.json_schema.schema",
        FormatKind.GRAMMAR: "chat.response_format.grammar",
        FormatKind.REGEX: "chat.response_format.regex",
        FormatKind.CHOICE: "chat.response_format.choice.values",
        FormatKind.STRUCTURAL_TAG: "chat.response_format.structural_tag",
    }
)


def fields_to_check(body: Mapping[str, Any], request: ChatRequest) -> dict[str, str]:
    """The fields of a body that not every vLLM supports, each with the path of the request field that sets it.

    Args:
        body: The body of a chat request.
        request: The request that the body was built from.
    """
    found = {name: FIELDS.get(name, f"chat.extra_body.{name}") for name in body.keys() - CORE}
    strict = next((tool for tool in request.offered_tools if tool.strict is not None), None)
    if strict is not None:
        found[STRICT] = f"chat.tools[{request.tools.index(strict)}].strict"
    return found


def format_field(request: ChatRequest) -> str:
    """The path of the request field that vLLM compiles to constrain the answer; empty if there is none.

    Also empty for a JSON schema beside tools: vLLM's error for it reads like that for a tool's schema.
    """
    form = None if request.response_format is None else _FORMAT_FIELDS.get(request.response_format.kind)
    tools = FIELDS["tools"] if request.offered_tools else ""
    if tools and form == _FORMAT_FIELDS[FormatKind.JSON_SCHEMA]:
        return ""
    return form or tools


def field_names(document: bytes | None) -> frozenset[str]:
    """The names of the supported fields of a chat request's body; empty if the document does not list them.

    `STRICT` is among them if a tool supports it, or if the document does not list the fields of a tool's function.

    Args:
        document: An OpenAPI document; `None` if there is none.
    """
    spec = decoded(document)
    body = at(spec, "paths", CHAT_PATH, "post", "requestBody", "content", "application/json", "schema")
    properties = _properties(spec, body)
    if not {"model", "messages"} <= properties.keys():
        return frozenset()
    tool = _properties(spec, properties.get("tools"))
    function = _properties(spec, tool.get("function"))
    # A document that does not list a function's fields does not show that `strict` is unsupported.
    strict = {STRICT} if "strict" in function or "name" not in function else set()
    return frozenset(properties.keys() | strict)


def decoded(body: bytes | None) -> object:
    """The value of a JSON text; `None` if it is absent or not JSON."""
    try:
        return msgspec.json.decode(body or b"null")
    except NOT_JSON:
        return None


def text_of(value: object) -> str:
    """A JSON value if it is a string, else the empty string."""
    return value if isinstance(value, str) else ""


def at(value: object, *path: str) -> object:
    """The value at a path of names within nested JSON objects; `None` if there is none."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _properties(spec: object, schema: object) -> dict[str, object]:
    """The properties of a schema, or of its items if it is of lists. Follows references and `anyOf`, `allOf`, `oneOf`."""
    pending = [schema]
    for _ in range(_MAX_SCHEMAS):
        if not pending:
            break
        part = pending.pop()
        if not isinstance(part, dict):
            continue
        properties = part.get("properties")
        if isinstance(properties, dict):
            return properties
        reference = part.get("$ref")
        found = [at(spec, *reference.split("/")[1:])] if isinstance(reference, str) else []
        found.append(part.get("items"))
        for word in ("anyOf", "allOf", "oneOf"):
            choices = part.get(word)
            found += choices if isinstance(choices, list) else ()
        pending += reversed(found)
    return {}


_MAX_SCHEMAS = 100
"""Limit of the schemas visited for one schema's properties: vLLM's document needs 4; the limit ends reference cycles."""
