"""The finished answer, and how it is put together."""

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

    `message` is the model's turn, ready to be sent back; its tool calls are those that can be executed.
    `failed_tool_calls` are the others, with all that the model said. `matched_stop` and `matched_token_id` say what made
    the engine stop, if it said so. `logprobs` are those of all tokens, if asked for.
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
        """What the model said."""
        return message_text(self.message)

    @property
    def reasoning(self) -> str:
        """What the model thought before it answered; "" if the engine does not separate it."""
        return self.message.assistant.reasoning

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls that parsed. Execute them only if `tool_calls_executable`."""
        return tuple(self.message.assistant.tool_calls)


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. `text`, `message` and the like are those of choice 0; `choices` holds all, by ascending index.

    In an error's `answer` it is what had come by then: the stop reason of a choice that did not end is
    STOP_REASON_UNSPECIFIED, and `completed` may hold no more than the usage as it was received last, if it was.

    `notices` are what the gateway had to say beside the answer; a call that gives the answer whole has none.

    To go on with the conversation, append `message` to the history; after tool calls, `tool(call, result)` for each.
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
        """What the gateway knows this completion by."""
        return self.started.completion_id

    @property
    def model(self) -> str:
        """The model that answered, by its id."""
        return self.started.model

    @property
    def usage(self) -> Usage:
        """Tokens used, over all choices."""
        return self.completed.usage

    @property
    def message(self) -> ChatMessage:
        """The model's turn, ready to be sent back."""
        return self.choices[0].message

    @property
    def text(self) -> str:
        """What the model said."""
        return self.choices[0].text

    @property
    def reasoning(self) -> str:
        """What the model thought before it answered."""
        return self.choices[0].reasoning

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls that parsed. Execute them only if `tool_calls_executable`."""
        return self.choices[0].tool_calls

    @property
    def failed_tool_calls(self) -> tuple[ToolCallDelta, ...]:
        """The calls that cannot be executed."""
        return self.choices[0].failed_tool_calls

    @property
    def tool_calls_executable(self) -> bool:
        """Whether the answer ended by itself, with at least one call, and all of them parsed."""
        return self.choices[0].tool_calls_executable

    @property
    def stop_reason(self) -> StopReason.ValueType:
        """Why the answer ended; `StopReason.Name` gives the word."""
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
    """The answer with what came beside it."""
    return replace(
        answer,
        request_id=info.request_id,
        initial_metadata=info.initial_metadata,
        trailing_metadata=info.trailing_metadata,
    )
