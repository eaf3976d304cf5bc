"""The events of a completion, as frozen values.

The events of one answer have this order, where `{x}` is any number of x:

    Refused
    Started {TextDelta | ReasoningDelta | ToolCallStarted | ToolCallArguments} {end of a choice} Completed

The end of a choice is the rest of its text, then
`{ToolCallStarted | ToolCallArguments | ToolCallSucceeded | ToolCallFailed} ChoiceFinished`. No event of a choice follows its
`ChoiceFinished`.

`choice` is the index of the choice, `index` the index of a tool call within its choice.
"""

from __future__ import annotations

import enum

import msgspec

from deltawire_server.errors import Reason  # noqa: TC001 (msgspec reads the annotations when it decodes)


class StopReason(enum.Enum):
    """Why a choice ended: `deltawire.v1.StopReason` without its prefix, with the same numbers."""

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
    """Why a tool call failed, the first reason that applies; with the numbers of the proto."""

    MISSING_NAME = 1
    UNKNOWN_TOOL = 2
    TRUNCATED = 3
    MALFORMED_JSON = 4
    NOT_AN_OBJECT = 5
    SCHEMA_MISMATCH = 6


class Provenance(enum.Enum):
    """The accuracy of a usage; with the numbers of the proto."""

    EXACT = 1
    LOWER_BOUND = 2
    ESTIMATED = 3


class _Value(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """An immutable value. It has no reference cycles, so the garbage collector does not track it."""


class Alternative(_Value, frozen=True):
    """An alternative token: its text, the natural logarithm of its probability (`None` if unknown), its bytes."""

    token: str
    logprob: float | None
    raw_bytes: bytes = b""


class TokenLogprob(_Value, frozen=True):
    """A generated token and its alternatives. `logprob` is `None` if the engine could not compute it."""

    token: str
    logprob: float | None
    raw_bytes: bytes = b""
    alternatives: tuple[Alternative, ...] = ()


class Fault(_Value, frozen=True):
    """The error that ended an answer early.

    Attributes:
        reason: The reason.
        message: A message for people.
        upstream_code: The code of the engine's error event; 0 without one.
        upstream_type: The type of the engine's error.
        upstream_param: The `param` of the engine's error: the field that it is about.
    """

    reason: Reason
    message: str
    upstream_code: int = 0
    upstream_type: str = ""
    upstream_param: str = ""


class Usage(_Value, frozen=True):
    """Tokens used by all choices; `None` if the engine did not report the number."""

    completion_tokens: int
    provenance: Provenance
    prompt_tokens: int | None = None
    cached_prompt_tokens: int | None = None
    reasoning_tokens: int | None = None


class _Event(_Value, frozen=True, tag_field="event"):
    """Base class of events."""


class Refused(_Event, frozen=True, tag="refused"):
    """The engine did not begin an answer; there is no other event."""

    fault: Fault


class Started(_Event, frozen=True, tag="started"):
    """The answer has begun; with the engine's own id of it and name of the model."""

    upstream_id: str
    upstream_model: str


class TextDelta(_Event, frozen=True, tag="text_delta"):
    """A piece of text; empty only if it has log-probabilities."""

    choice: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


class ReasoningDelta(_Event, frozen=True, tag="reasoning_delta"):
    """A piece of reasoning."""

    choice: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


class ToolCallStarted(_Event, frozen=True, tag="tool_call_started"):
    """The id and the name of a call are final."""

    choice: int
    index: int
    call_id: str
    tool_name: str


class ToolCallArguments(_Event, frozen=True, tag="tool_call_arguments"):
    """A piece of a call's arguments, verbatim."""

    choice: int
    index: int
    call_id: str
    fragment: str


class ToolCallSucceeded(_Event, frozen=True, tag="tool_call_succeeded"):
    """A call is complete: it names an offered tool, and its arguments are the text of a JSON object."""

    choice: int
    index: int
    call_id: str
    tool_name: str
    arguments: str


class ToolCallFailed(_Event, frozen=True, tag="tool_call_failed"):
    """A call cannot be executed.

    `byte_offset` is where parsing stopped, in UTF-8 bytes; `None` if nothing was parsed or all of it is valid. `instance_path` is
    a JSON Pointer to the value that violates the schema; `None` for other reasons.
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
    """A choice has ended. `matched_stop` is the stop text or token that the engine reports, the caller's or not."""

    choice: int
    stop_reason: StopReason
    engine_finish_reason: str
    tool_calls_executable: bool = False
    matched_stop: str | int | None = None


class FinishedChoice(_Value, frozen=True):
    """A whole choice: the sum of its events. `logprobs` is kept only on demand."""

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
    """The answer has ended; no event follows. `fault` is set if an error ended it.

    `messages_omitted` means that the choices have no content, because it is too large to repeat.
    """

    usage: Usage
    choices: tuple[FinishedChoice, ...]
    fault: Fault | None = None
    messages_omitted: bool = False

    def without_messages(self) -> Completed:
        """A copy without the content of the choices."""
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
    """The usage so far."""

    usage: Usage


class NoticeKind(enum.Enum):
    """The kind of a notice; with the numbers of the proto."""

    ANOTHER_REPLICA = 1
    FIELDS_NOT_CHECKED = 2


class Notice(_Event, frozen=True, tag="notice"):
    """A notice for the caller; `field` is the request field that it is about, empty for none."""

    kind: NoticeKind
    message: str
    field: str = ""


class Heartbeat(_Event, frozen=True, tag="heartbeat"):
    """Sent if there was no other event for the heartbeat interval."""


StreamEvent = Event | UsageUpdate | Notice | Heartbeat
"""The events of a stream: those of the answer, and those that the gateway adds."""
