"""The JSON of one event: a chunk of the answer, or an error.

Only the fields that mean something here are decoded; what a vLLM may leave out, send as null or add is no error. What
has another type than the chat API gives it is.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

DONE = b"[DONE]"
"""The payload of the last event of a stream."""


Byte = Annotated[int, msgspec.Meta(ge=0, le=255)]
"""One of a token's bytes."""

Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
"""Tokens; what is passed on holds 31 bits."""

TokenId = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)]
"""A token; what is passed on holds 32 bits."""


class MalformedChunkError(ValueError):
    """An event's payload is not a chunk."""


class _Part(msgspec.Struct, frozen=True, gc=False):
    """A decoded JSON object."""


class Function(_Part, frozen=True):
    """A piece of a tool call."""

    name: str | None = None
    arguments: str | None = None


class ToolEntry(_Part, frozen=True):
    """One entry of `delta.tool_calls`."""

    index: int | None = None
    id: str | None = None
    function: Function | None = None


class Delta(_Part, frozen=True):
    """What a choice adds. vLLM calls reasoning `reasoning`, and before 0.12 called it `reasoning_content`."""

    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolEntry] | None = None


class TopLogprob(_Part, frozen=True):
    """A likely token."""

    token: str
    logprob: float
    bytes: list[Byte] | None = None


class LogprobEntry(_Part, frozen=True):
    """A generated token."""

    token: str
    logprob: float
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


class PromptDetails(_Part, frozen=True):
    """Of the prompt's tokens."""

    cached_tokens: Count | None = None


class CompletionDetails(_Part, frozen=True):
    """Of the generated tokens."""

    reasoning_tokens: Count | None = None


class UsageFigures(_Part, frozen=True):
    """Tokens used: of one choice so far, or in the chunk without choices of all."""

    prompt_tokens: Count = 0
    completion_tokens: Count | None = 0
    prompt_tokens_details: PromptDetails | None = None
    completion_tokens_details: CompletionDetails | None = None


class ErrorBody(_Part, frozen=True):
    """An error in vLLM's words."""

    message: str | None = None
    type: str | None = None
    param: Any = None
    code: Any = None


class _BareError(ErrorBody, frozen=True):
    """An error event as vLLM sent it before 0.10: the error's fields at the top, beside `object: "error"`."""

    object: str | None = None


class Chunk(_Part, frozen=True):
    """One event that is no error. Kept to what is needed: one is made for every token."""

    choices: list[Choice] | None = None
    usage: UsageFigures | None = None
    id: str | None = None
    model: str | None = None
    error: ErrorBody | str | None = None


_decoder = msgspec.json.Decoder(Chunk)
_bare_error_decoder = msgspec.json.Decoder(_BareError)


def decode_chunk(payload: bytes) -> Chunk | ErrorBody:
    """Decode an event's payload.

    Args:
        payload: The event's data, not `DONE`.

    Returns:
        The chunk, or the error that the event is.

    Raises:
        MalformedChunkError: It is not JSON, not an object, neither chunk nor error, or a field has another type than it should.
    """
    try:
        chunk = _decoder.decode(payload)
        if chunk.error is not None:
            return ErrorBody(message=chunk.error) if isinstance(chunk.error, str) else chunk.error
        if chunk.choices is not None or chunk.usage is not None:
            return chunk
        error = _bare_error_decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as problem:
        raise MalformedChunkError(f"an event is not a chunk: {problem}") from problem
    if error.object != "error":
        raise MalformedChunkError("an event is neither a chunk nor an error: it has no choices")
    return error
