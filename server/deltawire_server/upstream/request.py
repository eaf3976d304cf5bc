"""A chat request as the layers below gRPC see it: plain frozen values, checked already, free of protobuf and of vLLM's names.

`None` and empty mean absent: what is absent is not sent, so that the model's own defaults apply.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

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
class ChatMessage:
    """One turn.

    Attributes:
        role: Who speaks.
        content: Text parts in order; may be empty for the assistant only.
        reasoning: The assistant's reasoning; empty for none.
        tool_calls: The assistant's calls.
        call_id: For TOOL, the call that this answers.
    """

    role: Role
    content: tuple[str, ...] = ()
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

    @property
    def offered_tools(self) -> frozenset[str]:
        """The names of the tools that the model gets to see: none of them under NONE."""
        if self.tool_choice is ToolMode.NONE:
            return frozenset()
        return frozenset(tool.name for tool in self.tools)
