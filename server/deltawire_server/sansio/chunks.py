"""One event of the stream, decoded: a chunk of the answer, an error, or a marker. `decode` makes them.

Only the fields that mean something here are decoded. What a vLLM may leave out, send as null or add is no error.
"""

from __future__ import annotations

import enum
from typing import Annotated, Any

import msgspec

MAX_COUNT = 2**31 - 1
"""The largest count of tokens, and the largest number of a token, that the API can hold."""

Byte = Annotated[int, msgspec.Meta(ge=0, le=255)]
"""One of a token's bytes."""

Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_COUNT)]
"""Tokens."""

TokenId = Annotated[int, msgspec.Meta(ge=-MAX_COUNT - 1, le=MAX_COUNT)]
"""A token's number in the vocabulary."""


class MalformedChunkError(ValueError):
    """An event's payload is not a chunk, or what it says has no meaning: the answer cannot be read on."""


class Marker(enum.Enum):
    """An event that is no JSON."""

    NOTHING = enum.auto()
    """No data: relays send such events to keep a connection open."""
    DONE = enum.auto()
    """`[DONE]`, the last event of a stream."""


class _Part(msgspec.Struct, frozen=True, gc=False):
    """A decoded JSON object.

    A field of type `None` is one that belongs elsewhere: if it holds anything, `decode` takes its slow path and puts it there.
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
    """What a choice adds. vLLM calls reasoning `reasoning`, and before 0.12 called it `reasoning_content`."""

    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolEntry] | None = None
    function_call: None = None


class TopLogprob(_Part, frozen=True):
    """A likely token. vLLM sends null for a probability that it could not compute."""

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
    """One choice's share of a chunk."""

    index: int | None = 0
    delta: Delta | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: TokenId | str | None = None
    message: None = None


class PromptDetails(_Part, frozen=True):
    """Of the prompt's tokens."""

    cached_tokens: Count | None = None


class CompletionDetails(_Part, frozen=True):
    """Of the generated tokens."""

    reasoning_tokens: Count | None = None


class UsageFigures(_Part, frozen=True):
    """Tokens used: of one choice so far, or in the chunk without choices of all. `None` where no usable count came."""

    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None
    prompt_tokens_details: PromptDetails | None = None
    completion_tokens_details: CompletionDetails | None = None


class ErrorBody(_Part, frozen=True):
    """An error in the engine's words: empty, or 0, where it gives none. `code` is an HTTP status."""

    message: str = ""
    type: str = ""
    param: str = ""
    code: int = 0


class Chunk(_Part, frozen=True):
    """One event that is no error. Kept to what is needed: one is made for every token."""

    choices: list[Choice] | None = None
    usage: UsageFigures | None = None
    id: str | None = None
    model: str | None = None
    error: Any = None


class LooseChunk(Chunk, frozen=True):
    """A chunk in an unusual form. Its text, reasoning, names and arguments may hold halves of surrogate pairs."""

    anomalies: dict[str, int] = {}
    """What was wrong with it and did not matter, with counts."""
