"""The types of a decoded event of the stream: a chunk of the answer, an error, or a marker. `decode` returns them.

They have only the fields that are used. Absent, null and additional fields are not an error.
"""

from __future__ import annotations

import enum
from typing import Annotated, Any

import msgspec

MAX_COUNT = 2**31 - 1
"""The largest token count and the largest token id of the API, an int32."""

Byte = Annotated[int, msgspec.Meta(ge=0, le=255)]
"""A byte of a token."""

Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_COUNT)]
"""A number of tokens."""

TokenId = Annotated[int, msgspec.Meta(ge=-MAX_COUNT - 1, le=MAX_COUNT)]
"""The id of a token in the vocabulary."""


class MalformedChunkError(ValueError):
    """The payload of an event is not a valid chunk; the rest of the answer cannot be read."""


class Marker(enum.Enum):
    """An event without JSON."""

    NOTHING = enum.auto()
    """No data: proxies send such events to keep a connection open."""
    DONE = enum.auto()
    """`[DONE]`, the last event of a stream."""


class _Part(msgspec.Struct, frozen=True, gc=False):
    """A decoded JSON object.

    A field of type `None` belongs elsewhere: if it has a value, `decode` uses its slow path and moves the value there.
    """


class Function(_Part, frozen=True):
    """A piece of a tool call."""

    name: str | None = None
    arguments: str | None = None


class ToolEntry(_Part, frozen=True):
    """One entry of `delta.tool_calls`."""

    index: int | None = None
    id: str | None = None
    function: Function | None = None
    name: None = None
    arguments: None = None


class Delta(_Part, frozen=True):
    """The new output of a choice. Before vLLM 0.12, the field `reasoning` was `reasoning_content`."""

    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolEntry] | None = None
    function_call: None = None


class TopLogprob(_Part, frozen=True):
    """An alternative token. vLLM sends null for a log-probability that it could not compute."""

    token: str
    logprob: float | None = None
    bytes: list[Byte] | None = None


class LogprobEntry(_Part, frozen=True):
    """A generated token."""

    token: str
    logprob: float | None = None
    bytes: list[Byte] | None = None
    top_logprobs: list[TopLogprob] | None = None


class Logprobs(_Part, frozen=True):
    """The tokens of a chunk."""

    content: list[LogprobEntry] | None = None


class Choice(_Part, frozen=True):
    """The part of a chunk for one choice."""

    index: int | None = 0
    delta: Delta | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: TokenId | str | None = None
    message: None = None


class PromptDetails(_Part, frozen=True):
    """Details of the prompt tokens."""

    cached_tokens: Count | None = None


class CompletionDetails(_Part, frozen=True):
    """Details of the completion tokens."""

    reasoning_tokens: Count | None = None


class UsageFigures(_Part, frozen=True):
    """Token counts: of one choice so far, or in the chunk without choices, of all choices. `None` without a valid count."""

    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None
    prompt_tokens_details: PromptDetails | None = None
    completion_tokens_details: CompletionDetails | None = None


class ErrorBody(_Part, frozen=True):
    """An error event of the engine; absent fields are empty or 0. `code` is an HTTP status."""

    message: str = ""
    type: str = ""
    param: str = ""
    code: int = 0


class Chunk(_Part, frozen=True):
    """An event that is not an error. Minimal, because there is one for every token."""

    choices: list[Choice] | None = None
    usage: UsageFigures | None = None
    id: str | None = None
    model: str | None = None
    error: Any = None


class LooseChunk(Chunk, frozen=True):
    """A chunk from the slow path. Its text, reasoning, names and arguments may have lone surrogates."""

    anomalies: dict[str, int] = {}
    """Its anomalies that were repaired or ignored, with counts."""
