"""The finished answer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from deltawire._messages import message_text
from deltawire.v1.message_pb2 import AssistantMessage, ChatMessage

if TYPE_CHECKING:
    from deltawire._metadata import CallInfo, Metadata
    from deltawire.v1.chat_completion_pb2 import (
        Completed,
        Notice,
        Started,
        StopReason,
        TokenLogprob,
        Usage,
    )
    from deltawire.v1.tool_pb2 import ToolCall, ToolCallDelta


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the answers to a request.

    Attributes:
        index: 0 for the first choice.
        message: The model's turn in the form of a request; its tool calls are those that were parsed.
        failed_tool_calls: The other calls, each with the reason and the text that the model wrote.
        stop_reason: Why the choice ended; STOP_REASON_UNSPECIFIED if it did not. `StopReason.Name` returns the name.
        engine_finish_reason: The engine's own `finish_reason`.
        tool_calls_executable: Whether the choice ended normally, has at least one call, and all of them were parsed.
        matched_stop: The text of `stop` that ended the choice; None if none did.
        matched_token_id: The id of `stop_token_ids` that ended the choice; None if none did.
        logprobs: The log-probabilities of all tokens, in order; empty if they were not requested.
    """

    index: int
    message: ChatMessage
    failed_tool_calls: tuple[ToolCallDelta, ...]
    stop_reason: StopReason.ValueType
    engine_finish_reason: str
    tool_calls_executable: bool
    matched_stop: str | None
    matched_token_id: int | None
    logprobs: tuple[TokenLogprob, ...]

    @property
    def text(self) -> str:
        """The answer's text; "" if it has none."""
        return message_text(self.message)

    @property
    def reasoning(self) -> str:
        """The model's reasoning; "" if the engine does not separate it."""
        return self.message.assistant.reasoning

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls that were parsed. Execute them only if `tool_calls_executable`."""
        return tuple(self.message.assistant.tool_calls)


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. The properties of `Choice` are those of choice 0.

    Attributes:
        started: The event `started`: the completion's id, the model, the sampling in effect.
        completed: The event `completed`: the usage, and the choices as messages of the API.
        choices: All choices by ascending index, at least one.
        notices: The gateway's notices; empty after `Chat.create`.
        request_id: The call's id in the gateway's log.
        initial_metadata: The headers.
        trailing_metadata: The trailers.

    In an error's `answer` it is what was received: `completed` may have only the latest usage, or nothing.

    To continue the conversation, append `message` to the history; after tool calls, append `tool(call, result)` for each.
    """

    started: Started
    completed: Completed
    choices: tuple[Choice, ...]
    notices: tuple[Notice, ...] = ()
    request_id: str = ""
    initial_metadata: Metadata = ()
    trailing_metadata: Metadata = ()

    @property
    def completion_id(self) -> str:
        """The completion's id, for `Chat.get`, `cancel` and `resume`."""
        return self.started.completion_id

    @property
    def model(self) -> str:
        """The id of the model that answered."""
        return self.started.model

    @property
    def usage(self) -> Usage:
        """The tokens used by all choices together, and how reliable the numbers are (`provenance`)."""
        return self.completed.usage

    @property
    def message(self) -> ChatMessage:
        """The model's turn in the form of a request: append it to the history."""
        return self.choices[0].message

    @property
    def text(self) -> str:
        """The answer's text; "" if it has none."""
        return self.choices[0].text

    @property
    def reasoning(self) -> str:
        """The model's reasoning; "" if the engine does not separate it."""
        return self.choices[0].reasoning

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls that were parsed. Execute them only if `tool_calls_executable`."""
        return self.choices[0].tool_calls

    @property
    def failed_tool_calls(self) -> tuple[ToolCallDelta, ...]:
        """The calls that cannot be executed, each with the reason and the text that the model wrote."""
        return self.choices[0].failed_tool_calls

    @property
    def tool_calls_executable(self) -> bool:
        """Whether the answer ended normally, has at least one call, and all of them were parsed."""
        return self.choices[0].tool_calls_executable

    @property
    def stop_reason(self) -> StopReason.ValueType:
        """Why the answer ended; `StopReason.Name` returns the name."""
        return self.choices[0].stop_reason


def choice_of(
    index: int,
    stated: Completed.Choice,
    message: AssistantMessage,
    failed: tuple[ToolCallDelta, ...],
    logprobs: tuple[TokenLogprob, ...],
) -> Choice:
    """A choice, from what was stated of it at the end and what its events said."""
    matched = stated.WhichOneof("matched")
    return Choice(
        index=index,
        message=ChatMessage(assistant=message),
        failed_tool_calls=failed,
        stop_reason=stated.stop_reason,
        engine_finish_reason=stated.engine_finish_reason,
        tool_calls_executable=stated.tool_calls_executable,
        matched_stop=stated.matched_stop if matched == "matched_stop" else None,
        matched_token_id=stated.matched_token_id if matched == "matched_token_id" else None,
        logprobs=logprobs,
    )


def with_info(answer: Answer, info: CallInfo) -> Answer:
    """The answer with the call's request id and metadata."""
    return replace(
        answer,
        request_id=info.request_id,
        initial_metadata=info.initial_metadata,
        trailing_metadata=info.trailing_metadata,
    )
