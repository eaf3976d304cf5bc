"""A chat request as the layers below gRPC see it: plain frozen values, checked already, free of protobuf and of vLLM's names.

`None` and empty mean absent: what is absent is not sent, so that the model's own defaults apply.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping


class Role(enum.Enum):
    """Who speaks; the values are the chat API's own words."""

    SYSTEM = "system"
    DEVELOPER = "developer"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


@dataclass(frozen=True, slots=True)
class PastCall:
    """A tool call of an earlier turn; `arguments` is JSON text, passed on to the letter."""

    call_id: str
    tool_name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ImageUrl:
    """An image that is still where its address says.

    Attributes:
        url: http or https.
        field: The request's field that says so, for errors.
    """

    url: str
    field: str


@dataclass(frozen=True, slots=True)
class ImageData:
    """An image itself; `media_type` is what its bytes say that it is, such as "image/png"."""

    data: bytes = field(repr=False)
    media_type: str


Content = str | ImageUrl | ImageData
"""A piece of content: text, or an image."""


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn.

    Attributes:
        role: Who speaks.
        content: In order; may be empty for the assistant only.
        reasoning: The assistant's reasoning; empty for none.
        tool_calls: The assistant's calls.
        call_id: For TOOL, the call that this answers.
    """

    role: Role
    content: tuple[Content, ...] = ()
    reasoning: str = ""
    tool_calls: tuple[PastCall, ...] = ()
    call_id: str = ""


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A tool; `input_schema` is JSON text of an object, passed on to the letter; empty for a tool without arguments."""

    name: str
    description: str = ""
    input_schema: str = ""
    strict: bool | None = None


class ToolMode(enum.Enum):
    """A rule for all tools; the values are the chat API's own words."""

    AUTO = "auto"
    REQUIRED = "required"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class NamedTool:
    """The model must call this tool."""

    name: str


class FormatKind(enum.Enum):
    """The forms that an answer's text can be held to."""

    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"
    GRAMMAR = "grammar"
    REGEX = "regex"
    CHOICE = "choice"
    STRUCTURAL_TAG = "structural_tag"


@dataclass(frozen=True, slots=True)
class TextFormat:
    """What form the text must have.

    Attributes:
        kind: Which of the forms.
        value: By kind: nothing, a schema as JSON text, a grammar, a regular expression, texts, a structural tag as JSON text.
        name: Of a JSON schema.
        strict: Of a JSON schema; `None` if not said.
    """

    kind: FormatKind
    value: str | tuple[str, ...] = ""
    name: str = ""
    strict: bool | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen and when to stop; the units and ranges are those of `deltawire.v1.Sampling`."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: tuple[str, ...] = ()


class CheckBudget:
    """What the checks of one answer may take, all calls of all choices together.

    Attributes:
        left: Units of work; what a unit is, the checks say.
    """

    __slots__ = ("left",)

    def __init__(self, left: int) -> None:
        self.left = left

    def take(self, units: int) -> bool:
        """Use some of it up, if there is as much; whether there was."""
        if units > self.left:
            return False
        self.left -= units
        return True


class ArgumentCheck(Protocol):
    """Checks a call's arguments against its tool's schema."""

    def __call__(self, arguments: str, budget: CheckBudget | None = None, /) -> tuple[str, str] | None:
        """What is wrong with the JSON text of an object: a JSON Pointer and a sentence; `None` if it follows the schema."""


@dataclass(frozen=True, slots=True)
class Reasoning:
    """How much to think; `None` and empty leave it to the model. `effort` is the chat API's own word, such as "high"."""

    effort: str = ""
    token_budget: int | None = None
    include: bool | None = None


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """What to ask a model.

    Attributes:
        model: The name that the caller asked for.
        messages: At least one.
        tools: Names differ.
        tool_choice: `None` leaves the engine's default.
        parallel_tool_calls: `None` leaves the engine's default.
        sampling: How tokens are chosen.
        response_format: `None` for free text.
        top_logprobs: Alternatives per token, 0 for none; `None` asks for no log-probabilities.
        choice_count: 1 or more.
        allowed_tools: The names of those of the tools that the model gets to see; empty for all.
        reasoning: How much to think.
        incremental_tool_calls: Whether calls are told while they are written.
        argument_checks: By the tool's name, the check of its calls' arguments; none for tools whose calls are not checked.
        soft_time_limit: Seconds after which the answer ends as it is; `None` for no limit.
        completion_id: The caller's own; empty for none.
        priority: Lower goes earlier; `None` leaves the engine's default.
        cache_salt: Empty for none.
        chat_template_kwargs: JSON text of an object, to be passed on to the letter; empty for none.
        extra_body: JSON text of an object with further fields of the engine's; empty for none.
        user: Who the end user is; empty if not said.
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
        """The tools that the model gets to see: none of them under NONE."""
        if self.tool_choice is ToolMode.NONE:
            return ()
        return tuple(tool for tool in self.tools if not self.allowed_tools or tool.name in self.allowed_tools)
