"""The validated chat request of the layers below gRPC: frozen dataclasses, independent of protobuf and of vLLM's names.

`None` and empty values mean absent. Absent values are not sent, so that the model's own defaults apply.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from deltawire_server.upstream.web_address import WebAddress


class Role(enum.Enum):
    """The role of a message; the values are those of the chat API."""

    SYSTEM = "system"
    DEVELOPER = "developer"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


@dataclass(frozen=True, slots=True)
class PastCall:
    """A tool call of an earlier turn; `arguments` is JSON text, sent verbatim."""

    call_id: str
    tool_name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ImageUrl:
    """An image that is not fetched yet.

    Attributes:
        address: Its http or https URL, validated and normalized.
        field: The path of the request field with the URL, for errors.
    """

    address: WebAddress
    field: str


@dataclass(frozen=True, slots=True)
class ImageData:
    """The bytes of an image; `media_type` is detected from them, such as "image/png"."""

    data: bytes = field(repr=False)
    media_type: str


Content = str | ImageUrl | ImageData
"""A piece of content: text, or an image."""


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn.

    Attributes:
        role: The role.
        content: The pieces in order; empty only for ASSISTANT.
        reasoning: The reasoning of ASSISTANT; empty for none.
        tool_calls: The tool calls of ASSISTANT.
        call_id: For TOOL, the id of the call that this message answers.
    """

    role: Role
    content: tuple[Content, ...] = ()
    reasoning: str = ""
    tool_calls: tuple[PastCall, ...] = ()
    call_id: str = ""


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A tool; `input_schema` is JSON text of an object, sent verbatim; empty for a tool without arguments."""

    name: str
    description: str = ""
    input_schema: str = ""
    strict: bool | None = None


class ToolMode(enum.Enum):
    """The tool choice for all tools; the values are those of the chat API."""

    AUTO = "auto"
    REQUIRED = "required"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class NamedTool:
    """The model must call this tool."""

    name: str


class FormatKind(enum.Enum):
    """The formats that a request can require of the text."""

    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"
    GRAMMAR = "grammar"
    REGEX = "regex"
    CHOICE = "choice"
    STRUCTURAL_TAG = "structural_tag"


@dataclass(frozen=True, slots=True)
class TextFormat:
    """The format that a request requires of the text.

    Attributes:
        kind: The kind of format.
        value: By kind: empty, a schema as JSON text, a grammar, a regular expression, texts, a structural tag as JSON text.
        name: The name of a JSON schema.
        strict: `strict` of a JSON schema; `None` if not set.
    """

    kind: FormatKind
    value: str | tuple[str, ...] = ""
    name: str = ""
    strict: bool | None = None


def _within(lowest: float, highest: float, violation: str) -> Any:  # noqa: ANN401 (as `dataclasses.field` returns)
    """A number that may be absent, with its range and the description of a violation."""
    return field(default=None, metadata={"range": (lowest, highest, violation)})


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters and stop conditions: the only list of them in the gateway, one row for each.

    `deltawire.v1.Sampling` and the body of vLLM's request have the same names. Numbers and booleans are `None` if absent, lists
    and tables empty. A number without a range may be any. `newer` marks what not every supported vLLM has, so that the
    gateway checks for it.
    """

    temperature: float | None = _within(0.0, math.inf, "must be 0 or above")
    top_p: float | None = _within(math.ulp(0.0), 1.0, "must be above 0 and at most 1")
    top_k: int | None = _within(-1, math.inf, "must be -1 or above")
    min_p: float | None = _within(0.0, 1.0, "must be between 0 and 1")
    frequency_penalty: float | None = _within(-2.0, 2.0, "must be between -2 and 2")
    presence_penalty: float | None = _within(-2.0, 2.0, "must be between -2 and 2")
    repetition_penalty: float | None = _within(math.ulp(0.0), math.inf, "must be above 0")
    seed: int | None = None
    max_tokens: int | None = _within(1, math.inf, "must be 1 or more; leave it out for the rest of the context")
    min_tokens: int | None = _within(0, math.inf, "must be 0 or more")
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: tuple[str, ...] = field(default=(), metadata={"newer": True})

    def given(self) -> dict[str, Any]:
        """The values that are not absent, by name: as protobuf and, encoded as JSON, vLLM have them."""
        return {name: value for name in SAMPLING if (value := getattr(self, name)) not in (None, (), {})}


SAMPLING: Mapping[str, Mapping[str, Any]] = MappingProxyType({row.name: row.metadata for row in fields(Sampling)})
"""The names in `Sampling`, each with "range" (lowest, highest and violation) and "newer", if it has them."""


class CheckBudget:
    """The work that argument checks of one answer may do, for all calls of all choices together.

    Attributes:
        left: Remaining units of work; the checks define the unit.
    """

    __slots__ = ("left",)

    def __init__(self, left: int) -> None:
        self.left = left

    def take(self, units: int) -> bool:
        """Take units if that many remain; return whether they did."""
        if units > self.left:
            return False
        self.left -= units
        return True


class ArgumentCheck(Protocol):
    """Checks a call's arguments against its tool's schema."""

    def __call__(self, arguments: str, budget: CheckBudget | None = None, /) -> tuple[str, str] | None:
        """Check the JSON text of an object; return a JSON Pointer and a message, or `None` if it is valid."""


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Reasoning parameters; `None` and empty leave the model's default. `effort` is a value of the chat API such as "high"."""

    effort: str = ""
    token_budget: int | None = None
    include: bool | None = None


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A chat request.

    Attributes:
        model: The model name in the call.
        messages: The messages; at least one.
        tools: The tools; their names differ.
        tool_choice: `None` leaves the engine's default.
        parallel_tool_calls: `None` leaves the engine's default.
        sampling: Sampling parameters and stop conditions.
        response_format: `None` for free text.
        top_logprobs: Alternatives per token, 0 for none; `None` requests no log-probabilities.
        choice_count: Number of choices, 1 or more.
        allowed_tools: The names of the tools that are sent to the model; empty for all.
        reasoning: Reasoning parameters.
        incremental_tool_calls: Whether events for tool calls are sent while the arguments are generated.
        argument_checks: The check of the arguments by tool name; tools without an entry are not checked.
        soft_time_limit: Seconds after which the answer ends, without an error; `None` for no limit.
        completion_id: The caller's own completion id; empty for none.
        priority: Lower values are scheduled earlier; `None` leaves the engine's default.
        cache_salt: The salt of the prefix cache; empty for none.
        chat_template_kwargs: JSON text of an object, sent verbatim; empty for none.
        extra_body: JSON text of an object with further fields of the engine's request body; empty for none.
        user: The id of the end user; empty for none.
    """

    model: str
    messages: tuple[ChatMessage, ...]
    tools: tuple[ToolSpec, ...] = ()
    tool_choice: ToolMode | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    sampling: Sampling = field(default_factory=Sampling)
    response_format: TextFormat | None = None
    top_logprobs: int | None = None
    choice_count: int = 1
    allowed_tools: frozenset[str] = frozenset()
    reasoning: Reasoning = field(default_factory=Reasoning)
    incremental_tool_calls: bool = False
    argument_checks: Mapping[str, ArgumentCheck] = field(default_factory=dict)
    soft_time_limit: float | None = None
    completion_id: str = ""
    priority: int | None = None
    cache_salt: str = ""
    chat_template_kwargs: str = ""
    extra_body: str = ""
    user: str = ""

    @property
    def offered_tools(self) -> tuple[ToolSpec, ...]:
        """The tools that are sent to the model: none if `tool_choice` is NONE."""
        return () if self.tool_choice is ToolMode.NONE else allowed_among(self.tools, self.allowed_tools)


def allowed_among(tools: Iterable[ToolSpec], allowed: Collection[str]) -> tuple[ToolSpec, ...]:
    """The tools that the model may call: all if `allowed` is empty, else those that it names."""
    return tuple(tool for tool in tools if not allowed or tool.name in allowed)
