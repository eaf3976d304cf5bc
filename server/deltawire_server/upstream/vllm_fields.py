"""Which fields of a chat request's body a vLLM knows. It ignores those that it does not, silently; this tells of them.

A vLLM says what it knows in its OpenAPI document, `/openapi.json`, and that stays the same as long as its `/version` does.
Both are read when a request first needs them, by one reader for each replica, and kept:

    nothing read, or too old ──/version──▶ the same: kept on
                                    └────▶ another: ──/openapi.json──▶ its fields, or nothing that can be checked

Requests of nothing but `CORE` need none of it.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import msgspec

from deltawire_server.errors import CallerError, Reason, Violation
from deltawire_server.sansio.events import Notice, NoticeKind
from deltawire_server.upstream.request import Sampling

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from deltawire_server.upstream.request import ChatRequest

CHAT_PATH = "/v1/chat/completions"

FRESH_SECONDS = 300.0
"""How long what was read is taken for true: an upgrade takes about as long, and asking `/version` then costs nothing."""

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


@dataclass(frozen=True, slots=True)
class KnownFields:
    """What a vLLM says of itself.

    Attributes:
        version: In its own words; empty if it does not say.
        names: Of the body's fields, and `STRICT` if a tool may have it.
    """

    version: str
    names: frozenset[str]


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


def check(asked: Mapping[str, str], known: KnownFields | None, provider_id: str) -> tuple[Notice, ...]:
    """Refuse a request with fields that its vLLM does not know.

    Args:
        asked: From `fields_to_check`.
        known: What the vLLM knows; `None` if it does not say.
        provider_id: Whose it is.

    Returns:
        What the caller should know: the fields that could not be checked.

    Raises:
        CallerError: FIELD_NOT_SUPPORTED, with each field that is not known.
    """
    if known is None:
        return tuple(
            Notice(
                NoticeKind.FIELDS_NOT_CHECKED,
                f"provider {provider_id!r} does not say which fields it knows; if it does not know {name}, it ignores it",
                path,
            )
            for name, path in sorted(asked.items())
        )
    unknown = sorted(asked.keys() - known.names)
    if not unknown:
        return ()
    version = f"vLLM {known.version}" if known.version else "a vLLM"
    raise CallerError(
        Reason.FIELD_NOT_SUPPORTED,
        f"provider {provider_id!r} is {version}, which does not know {', '.join(unknown)} and would ignore it: leave out "
        + ", ".join(asked[name] for name in unknown),
        metadata={"field": asked[unknown[0]], "provider": provider_id, "version": known.version},
        violations=[Violation(asked[name], f"{version} does not know {name}: leave it out") for name in unknown],
    )


class FieldReader:
    """Finds out what one vLLM knows, and remembers it.

    Args:
        read: Gives the body at a path; `None` if there is nothing that can be read. It does not raise.
        clock: Seconds that never go back.
    """

    def __init__(
        self, read: Callable[[str], Awaitable[bytes | None]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._read = read
        self._clock = clock
        self._known: KnownFields | None = None
        self._read_at = float("-inf")
        self._failures = 0
        self._lock = asyncio.Lock()  # whoever comes meanwhile waits for what is being read

    async def known(self, failures: int = 0) -> KnownFields | None:
        """What it knows; `None` if it does not say, or not in words that are understood.

        Args:
            failures: How often it has failed so far: after another failure it may be another vLLM that comes back.
        """
        if not self._fresh(failures):
            async with self._lock:
                if not self._fresh(failures):
                    self._known = await self._ask()
                    self._failures = failures
                    self._read_at = self._clock()
        return self._known

    def _fresh(self, failures: int) -> bool:
        return failures == self._failures and self._clock() - self._read_at < FRESH_SECONDS

    async def _ask(self) -> KnownFields | None:
        version = _version(await self._read("/version"))
        if version and self._known is not None and version == self._known.version:
            return self._known
        names = field_names(await self._read("/openapi.json"))
        return KnownFields(version, names) if names else None


def field_names(document: bytes | None) -> frozenset[str]:
    """The names of the fields of a chat request's body, and `STRICT` if it is one; empty if the document does not say.

    Args:
        document: An OpenAPI document; `None` for none.
    """
    spec = _decoded(document)
    body = _at(spec, "paths", CHAT_PATH, "post", "requestBody", "content", "application/json", "schema")
    properties = _properties(spec, body)
    if not {"model", "messages"} <= properties.keys():
        return frozenset()
    tool = _properties(spec, properties.get("tools"))
    function = _properties(spec, tool.get("function"))
    # What does not tell a function's fields is not taken for one that has none.
    strict = {STRICT} if "strict" in function or "name" not in function else set()
    return frozenset(properties.keys() | strict)


def _version(body: bytes | None) -> str:
    said = _at(_decoded(body), "version")
    return said if isinstance(said, str) else ""


def _decoded(body: bytes | None) -> object:
    try:
        return msgspec.json.decode(body or b"null")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _at(value: object, *path: str) -> object:
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _properties(spec: object, schema: object, depth: int = 0) -> dict[str, object]:
    """The properties of a schema, or of the items of one of lists: behind references and beside null."""
    if not isinstance(schema, dict) or depth > _MAX_DEPTH:
        return {}
    properties = schema.get("properties")
    if isinstance(properties, dict):
        return properties
    reference = schema.get("$ref")
    parts = [_at(spec, *reference.split("/")[1:])] if isinstance(reference, str) else []
    parts += [schema.get("items"), *(part for word in ("anyOf", "allOf", "oneOf") for part in schema.get(word) or ())]
    return next((found for part in parts if (found := _properties(spec, part, depth + 1))), {})


_MAX_DEPTH = 8
"""Of references in references: vLLM's have four, and one that leads to itself must end."""
