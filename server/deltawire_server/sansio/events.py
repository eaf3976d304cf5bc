"""What happened, as frozen values: what this package returns and everything above it uses.

The events of one answer come in this order, where `{x}` may come any number of times:

    Refused
    Started {TextDelta | ReasoningDelta | ToolCallStarted | ToolCallArguments} {end of a choice} Completed

The end of a choice is `{ToolCallStarted | ToolCallArguments | ToolCallSucceeded | ToolCallFailed} ChoiceFinished`, after
what is left of its text. Nothing of a choice comes after its `ChoiceFinished`.

`choice` is the choice's index, `index` a tool call's index within its choice.
"""

from __future__ import annotations

import enum

import msgspec

from deltawire_server.errors import Reason  # noqa: TC001 (msgspec reads the annotations when it decodes)


class StopReason(enum.Enum):
    """Why a choice ended; `deltawire.v1.StopReason` without its prefix, with the proto's numbers."""

    END_OF_TURN = 1
    END_OF_MESSAGE = 2
    OUT_OF_TOKENS = 3
    STOP_SEQUENCE = 4
    CONTENT_FILTER = 5
    REPETITION = 6
    CANCELLED = 7
    TIME_LIMIT = 8
    UPSTREAM_INCOMPLETE = 9
    ERROR = 10


class FailureReason(enum.Enum):
    """Why a tool call cannot be executed, the first that applies; with the proto's numbers."""

    MISSING_NAME = 1
    UNKNOWN_TOOL = 2
    TRUNCATED = 3
    MALFORMED_JSON = 4
    NOT_AN_OBJECT = 5
    SCHEMA_MISMATCH = 6


class Provenance(enum.Enum):
    """How far a usage figure can be trusted; with the proto's numbers."""

    EXACT = 1
    LOWER_BOUND = 2
    ESTIMATED = 3


class _Value(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """A value without identity; free of cycles, so the garbage collector need not look at it."""


class Alternative(_Value, frozen=True):
    """A likely token: its text, the natural logarithm of its probability (`None` if not known), its bytes."""

    token: str
    logprob: float | None
    raw_bytes: bytes = b""


class TokenLogprob(_Value, frozen=True):
    """A generated token, and the likeliest ones at its place. `logprob` is `None` if the engine could not compute it."""

    token: str
    logprob: float | None
    raw_bytes: bytes = b""
    alternatives: tuple[Alternative, ...] = ()


class Fault(_Value, frozen=True):
    """What ended an answer before its end.

    Attributes:
        reason: In one word.
        message: For people.
        upstream_code: The code in the engine's error event; 0 if there was none.
        upstream_type: The error's type in the engine's words.
        upstream_param: The request field that the engine blames.
    """

    reason: Reason
    message: str
    upstream_code: int = 0
    upstream_type: str = ""
    upstream_param: str = ""


class Usage(_Value, frozen=True):
    """Tokens used over all choices; `None` where the engine did not say."""

    completion_tokens: int
    provenance: Provenance
    prompt_tokens: int | None = None
    cached_prompt_tokens: int | None = None
    reasoning_tokens: int | None = None


class _Event(_Value, frozen=True, tag_field="event"):
    """Something that happened."""


class Refused(_Event, frozen=True, tag="refused"):
    """The engine did not begin to answer; there is no other event."""

    fault: Fault


class Started(_Event, frozen=True, tag="started"):
    """The engine has begun, under its own id and name for the model."""

    upstream_id: str
    upstream_model: str


class TextDelta(_Event, frozen=True, tag="text_delta"):
    """A piece of text; empty only if it just carries log-probabilities."""

    choice: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


class ReasoningDelta(_Event, frozen=True, tag="reasoning_delta"):
    """A piece of reasoning."""

    choice: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


class ToolCallStarted(_Event, frozen=True, tag="tool_call_started"):
    """A call's id and name are settled."""

    choice: int
    index: int
    call_id: str
    tool_name: str


class ToolCallArguments(_Event, frozen=True, tag="tool_call_arguments"):
    """A piece of a call's arguments, as the model wrote it."""

    choice: int
    index: int
    call_id: str
    fragment: str


class ToolCallSucceeded(_Event, frozen=True, tag="tool_call_succeeded"):
    """A call is whole: a known tool, and arguments that are the text of a JSON object."""

    choice: int
    index: int
    call_id: str
    tool_name: str
    arguments: str


class ToolCallFailed(_Event, frozen=True, tag="tool_call_failed"):
    """A call cannot be executed.

    `byte_offset` is where parsing stopped, in UTF-8 bytes; `None` if nothing was parsed or all of it parses. `instance_path` is
    a JSON Pointer to what does not follow the schema; `None` for other reasons.
    """

    choice: int
    index: int
    call_id: str
    tool_name: str
    reason: FailureReason
    message: str
    raw_arguments: str
    byte_offset: int | None = None
    instance_path: str | None = None


class ChoiceFinished(_Event, frozen=True, tag="choice_finished"):
    """A choice has ended. `matched_stop` is the stop text or token that the engine names, the caller's or not."""

    choice: int
    stop_reason: StopReason
    engine_finish_reason: str
    tool_calls_executable: bool = False
    matched_stop: str | int | None = None


class FinishedChoice(_Value, frozen=True):
    """A choice, whole: what its events add up to. `logprobs` is kept only on demand."""

    index: int
    text: str
    reasoning: str
    tool_calls: tuple[ToolCallSucceeded, ...]
    failed_tool_calls: tuple[ToolCallFailed, ...]
    stop_reason: StopReason
    engine_finish_reason: str
    tool_calls_executable: bool
    matched_stop: str | int | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


class Completed(_Event, frozen=True, tag="completed"):
    """The answer has ended; nothing follows. `fault` is set if it was broken off.

    `messages_omitted` means that the choices have no content, because it is too large to be repeated.
    """

    usage: Usage
    choices: tuple[FinishedChoice, ...]
    fault: Fault | None = None
    messages_omitted: bool = False

    def without_messages(self) -> Completed:
        """The same end without the content of its choices."""
        bare = (
            msgspec.structs.replace(choice, text="", reasoning="", tool_calls=(), failed_tool_calls=(), logprobs=())
            for choice in self.choices
        )
        return msgspec.structs.replace(self, choices=tuple(bare), messages_omitted=True)


Event = (
    Refused
    | Started
    | TextDelta
    | ReasoningDelta
    | ToolCallStarted
    | ToolCallArguments
    | ToolCallSucceeded
    | ToolCallFailed
    | ChoiceFinished
    | Completed
)


class UsageUpdate(_Event, frozen=True, tag="usage_update"):
    """What the answer has cost so far."""

    usage: Usage


class NoticeKind(enum.Enum):
    """What a notice is about; with the proto's numbers."""

    ANOTHER_REPLICA = 1
    FIELDS_NOT_CHECKED = 2


class Notice(_Event, frozen=True, tag="notice"):
    """Something that the caller should know; `field` is the request's field that it is about, empty for none."""

    kind: NoticeKind
    message: str
    field: str = ""


class Heartbeat(_Event, frozen=True, tag="heartbeat"):
    """Nothing has happened for a while."""


StreamEvent = Event | UsageUpdate | Notice | Heartbeat
"""What a stream consists of: an answer's events, and what the gateway adds."""
