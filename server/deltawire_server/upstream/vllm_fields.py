"""Which fields of a chat request's body a vLLM knows. It ignores the others silently; these functions find them.

A vLLM lists what it knows in its OpenAPI document; `engine` reads that. Requests of nothing but `CORE` need none of it.
"""

from __future__ import annotations

from dataclasses import fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import msgspec

from deltawire_server.upstream.request import Sampling

if TYPE_CHECKING:
    from collections.abc import Mapping

    from deltawire_server.upstream.request import ChatRequest

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
        **{field.name: f"chat.sampling.{field.name}" for field in fields(Sampling)},
    }
)
"""The request field that each field of the body stands for; what is not here comes from `extra_body`."""

STRICT = "tools.function.strict"
"""The one field further down that an older vLLM ignores silently, and whose absence would show only in bad arguments."""

CORE = frozenset(
    {
        *("model", "messages", "stream", "stream_options", "n", "max_tokens", "temperature", "top_p", "top_k", "min_p"),
        *(
            "frequency_penalty",
            "presence_penalty",
            "repetition_penalty",
            "seed",
            "stop",
            "stop_token_ids",
            "min_tokens",
        ),
        *("ignore_eos", "logit_bias", "logprobs", "top_logprobs", "tools", "tool_choice", "response_format", "user"),
    }
)
"""Known to every vLLM since 0.6, the first that calls tools by itself, and so to every one that this is good for."""


def fields_to_check(body: Mapping[str, Any], request: ChatRequest) -> dict[str, str]:
    """The fields of a body that not every vLLM knows, each with the path of the request field that it is made from.

    Args:
        body: Of a chat request.
        request: What it was made from.
    """
    found = {name: FIELDS.get(name, f"chat.extra_body.{name}") for name in body.keys() - CORE}
    offered = {tool.name for tool in request.offered_tools}
    for index, tool in enumerate(request.tools):
        if tool.strict is not None and tool.name in offered:
            found[STRICT] = f"chat.tools[{index}].strict"
            break
    return found


def field_names(document: bytes | None) -> frozenset[str]:
    """The names of the fields of a chat request's body, and `STRICT` if it is one; empty if the document does not say.

    Args:
        document: An OpenAPI document; `None` for none.
    """
    spec = _decoded(document)
    body = at(spec, "paths", CHAT_PATH, "post", "requestBody", "content", "application/json", "schema")
    properties = _properties(spec, body)
    if not {"model", "messages"} <= properties.keys():
        return frozenset()
    tool = _properties(spec, properties.get("tools"))
    function = _properties(spec, tool.get("function"))
    # What does not tell a function's fields is not taken for one that has none.
    strict = {STRICT} if "strict" in function or "name" not in function else set()
    return frozenset(properties.keys() | strict)


def _decoded(body: bytes | None) -> object:
    try:
        return msgspec.json.decode(body or b"null")
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None


def at(value: object, *path: str) -> object:
    """What stands at a path of names within JSON objects; `None` if nothing does."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _properties(spec: object, schema: object) -> dict[str, object]:
    """The properties of a schema, or of the items of one of lists: behind references and beside null."""
    left = [schema]
    for _ in range(_MAX_SCHEMAS):
        if not left:
            break
        part = left.pop()
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
        left += reversed(found)
    return {}


_MAX_SCHEMAS = 100
"""Looked at for one schema's properties: vLLM's need four, and one that leads to itself must end."""
