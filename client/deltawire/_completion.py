"""From events to the finished answer, and from the way a stream ended to what is raised or given back.

Two verbs: `Accumulator.receive(event)` for each event, then `finish(failure)` once, with how the call ended. What decides:

    Completed came   its error   the call ended with      finish gives
    yes              no          anything                 the answer: it is whole, whatever happened to the status
    yes              yes         a status with a reason   that reason's error
    yes              yes         anything else            the error that `Completed.error` tells
    no               -           CANCELLED,               the error of that code: the caller's own doing
                                 DEADLINE_EXCEEDED
    no               -           another, before any      the error of that status
                                 event
    no               -           another, or OK           `StreamInterrupted`

Every error after the first event has what came in `answer`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, assert_never

import grpc

from deltawire._errors import (
    CallError,
    DeltawireError,
    FailedCall,
    Failure,
    Metadata,
    ProtocolError,
    StreamInterrupted,
    error_for,
    with_fault,
)
from deltawire._messages import message_text
from deltawire.v1.chat_completion_pb2 import (
    ChoiceFinished,
    Completed,
    CreateChatCompletionResponse,
    Started,
    StreamChatCompletionResponse,
    TokenLogprob,
    Usage,
)
from deltawire.v1.message_pb2 import AssistantMessage, ContentPart, Message

if TYPE_CHECKING:
    from deltawire._channel import CallInfo, Outgoing
    from deltawire.v1.chat_completion_pb2 import StopReason
    from deltawire.v1.tool_pb2 import ToolCall, ToolCallDelta

# Ends that are the caller's own doing: they mean the same whether or not the answer had begun.
CALLERS_OWN = frozenset({grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED})


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the answers to a request.

    `message` is the model's turn, ready to be sent back; its tool calls are those that can be executed.
    `failed_tool_calls` are the others, with all that the model said. `matched_stop` and `matched_token_id` say what made
    the engine stop, if it told; only a stream does. `logprobs` are those of all tokens, if asked for.
    """

    index: int
    message: Message
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
        """What the model thought before it answered; "" if the engine does not tell it apart."""
        return self.message.assistant.reasoning

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls that parsed. Execute them only if `tool_calls_executable`."""
        return tuple(self.message.assistant.tool_calls)


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. `text`, `message` and the like are those of choice 0; `choices` holds all, by ascending index.

    In an error's `answer` it is what had come by then: the stop reason of a choice that did not end is
    STOP_REASON_UNSPECIFIED, and `completed` may be empty.

    To go on with the conversation, append `message` to the history; after tool calls, `tool(call, result)` for each.
    """

    started: Started
    completed: Completed
    choices: tuple[Choice, ...]
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
    def message(self) -> Message:
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


@dataclass(slots=True)
class _Parts:
    """What the events said of one choice. Text is kept in pieces and joined once."""

    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    failed: list[ToolCallDelta] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finished: ChoiceFinished = field(default_factory=ChoiceFinished)

    def message(self) -> AssistantMessage:
        """The model's turn, as far as it came."""
        text = "".join(self.text)
        return AssistantMessage(
            content=[ContentPart(text=text)] if text else [],
            reasoning="".join(self.reasoning),
            tool_calls=self.calls,
        )


class Accumulator:
    """Folds a stream's events into its answer, and holds the stream to its rules."""

    def __init__(self) -> None:
        self._next = 0
        self._started: Started | None = None
        self._completed: Completed | None = None
        self._parts: dict[int, _Parts] = {}

    def receive(self, event: StreamChatCompletionResponse) -> None:
        """Take the next event. An event of a kind that is not known here counts, and is otherwise skipped.

        Raises:
            ProtocolError: An event is missing, or this one comes where it must not.
        """
        kind = event.WhichOneof("event")
        self._check(event.sequence, kind)
        self._next += 1
        match kind:
            case "started":
                self._started = event.started
            case "text_delta":
                parts = self._of(event)
                parts.text.append(event.text_delta.text)
                parts.logprobs.extend(event.text_delta.logprobs)
            case "reasoning_delta":
                parts = self._of(event)
                parts.reasoning.append(event.reasoning_delta.text)
                parts.logprobs.extend(event.reasoning_delta.logprobs)
            case "tool_call_delta":
                self._receive_call(self._of(event), event.tool_call_delta)
            case "choice_finished":
                self._of(event).finished = event.choice_finished
            case "completed":
                self._completed = event.completed
            case None:
                pass
            case _:
                assert_never(kind)

    def finish(self, failure: Failure | None, info: CallInfo) -> Answer:
        """Say what the stream came to.

        Args:
            failure: How the call failed; None if its status was OK.
            info: What came beside the events.

        Raises:
            CallError: By the table at the top of this file.
        """
        answer = self._answer(info)
        completed = self._completed
        if completed is not None and not completed.HasField("error"):
            return answer
        interrupted = failure is None or (self._next > 0 and failure.code not in CALLERS_OWN)
        # A status of OK without an answer is nothing that anybody should read as OK.
        failure = failure or Failure(
            grpc.StatusCode.UNKNOWN,
            "the stream ended without its last event",
            request_id=info.request_id,
            initial_metadata=info.initial_metadata,
            trailing_metadata=info.trailing_metadata,
        )
        failure = replace(failure, answer=answer if self._next else None)
        if completed is not None:
            if not failure.reason:
                fault = completed.error
                failure = with_fault(failure, fault.code, fault.reason, fault.message)
            raise error_for(failure)
        if interrupted:
            raise StreamInterrupted(failure)
        raise error_for(failure)

    def _check(self, sequence: int, kind: str | None) -> None:
        """Hold the next event to the rules: no gap, `started` first and once, nothing after `completed`."""
        if sequence != self._next:
            _broken(f"event {self._next} was expected and {sequence} came")
        if self._completed is not None:
            _broken("an event came after the last one")
        if kind is not None and (kind == "started") != (self._started is None):
            _broken(f"{kind} came {'before' if self._started is None else 'after'} started")

    def _of(self, event: StreamChatCompletionResponse) -> _Parts:
        """The parts of the choice that this event is about."""
        return self._parts.setdefault(event.choice_index, _Parts())

    @staticmethod
    def _receive_call(parts: _Parts, delta: ToolCallDelta) -> None:
        """Take a verdict on a tool call; a status that is not known here is skipped."""
        outcome = delta.WhichOneof("outcome")
        match outcome:
            case "tool_call":
                parts.calls.append(delta.tool_call)
            case "failure":
                parts.failed.append(delta)
            case None:
                pass
            case _:
                assert_never(outcome)

    def _answer(self, info: CallInfo) -> Answer:
        """The answer as far as it came, with choice 0 always in it."""
        completed = self._completed or Completed()
        stated = {} if completed.messages_omitted else {choice.index: choice for choice in completed.choices}
        closed = {choice.index: choice for choice in completed.choices}
        choices = []
        for index in sorted({0, *self._parts, *closed}):
            parts = self._parts.get(index) or _Parts()
            choice = closed.get(index) or Completed.Choice(
                stop_reason=parts.finished.stop_reason,
                engine_finish_reason=parts.finished.engine_finish_reason,
                tool_calls_executable=parts.finished.tool_calls_executable,
            )
            message = stated[index].message if index in stated else parts.message()
            failed = tuple(choice.failed_tool_calls) or tuple(parts.failed)
            choices.append(_choice(index, choice, message, failed, parts.finished, tuple(parts.logprobs)))
        return _with_info(Answer(self._started or Started(), completed, tuple(choices)), info)


def answer_of(response: CreateChatCompletionResponse, info: CallInfo) -> Answer:
    """The answer of a call that gave it whole."""
    completed = response.completed
    choices = tuple(
        _choice(
            choice.index,
            choice,
            choice.message,
            tuple(choice.failed_tool_calls),
            ChoiceFinished(),
            tuple(choice.logprobs),
        )
        for choice in completed.choices
    )
    if not choices:
        message = "the answer holds no choice"
        raise ProtocolError(message, info.request_id)
    return _with_info(Answer(response.started, completed, choices), info)


class StreamOutcome:
    """What both kinds of stream share: everything but the waiting."""

    def __init__(self, outgoing: Outgoing) -> None:
        self._outgoing = outgoing
        self._accumulator = Accumulator()
        self._outcome: Answer | DeltawireError | None = None

    @property
    def request_id(self) -> str:
        """What the gateway's log knows this call by; the gateway's own word once the first event is there."""
        return self._outgoing.info.request_id

    @property
    def initial_metadata(self) -> Metadata:
        """The headers; empty until the first event is there."""
        return self._outgoing.info.initial_metadata

    @property
    def trailing_metadata(self) -> Metadata:
        """The trailers; empty until the stream has ended."""
        return self._outgoing.info.trailing_metadata

    def _receive(self, event: StreamChatCompletionResponse) -> None:
        """Take an event.

        Raises:
            ProtocolError: See `Accumulator.receive`; the stream is over then.
        """
        try:
            self._accumulator.receive(event)
        except ProtocolError as error:
            error.request_id = self.request_id
            self._outcome = error
            raise

    def _end(self, failed: FailedCall | None) -> None:
        """Take the end of the call: its exception, or None if its status was OK."""
        failure = None if failed is None else self._outgoing.failure(failed)
        self._settle(failure)
        if failed is not None and isinstance(self._outcome, DeltawireError) and isinstance(failed, Exception):
            self._outcome.__cause__ = failed

    def _cancelled(self) -> None:
        """Take note that the caller gave up, unless the stream had ended before."""
        if self._outcome is None:
            info = self._outgoing.info
            self._settle(
                Failure(
                    grpc.StatusCode.CANCELLED,
                    "cancelled by the caller",
                    request_id=info.request_id,
                    initial_metadata=info.initial_metadata,
                )
            )

    def _settle(self, failure: Failure | None) -> None:
        """Decide what the stream came to; it is decided once."""
        try:
            self._outcome = self._accumulator.finish(failure, self._outgoing.info)
        except CallError as error:
            self._outcome = error

    def _result(self) -> Answer:
        """The answer of a stream that is over.

        Raises:
            DeltawireError: It ended otherwise; the same error each time.
        """
        if isinstance(self._outcome, DeltawireError):
            raise self._outcome
        if self._outcome is None:  # pragma: no cover -- both clients settle before they ask
            message = "the stream has not ended"
            raise RuntimeError(message)
        return self._outcome


def text_of_event(event: StreamChatCompletionResponse) -> str:
    """The text that an event adds to choice 0; "" if it adds none."""
    if event.WhichOneof("event") != "text_delta" or event.choice_index != 0:
        return ""
    return event.text_delta.text


def _choice(
    index: int,
    stated: Completed.Choice,
    message: AssistantMessage,
    failed: tuple[ToolCallDelta, ...],
    finished: ChoiceFinished,
    logprobs: tuple[TokenLogprob, ...],
) -> Choice:
    """A choice, from what was stated of it at the end and what its events said."""
    matched = finished.WhichOneof("matched")
    return Choice(
        index=index,
        message=Message(assistant=message),
        failed_tool_calls=failed,
        stop_reason=stated.stop_reason,
        engine_finish_reason=stated.engine_finish_reason,
        tool_calls_executable=stated.tool_calls_executable,
        matched_stop=finished.matched_stop if matched == "matched_stop" else None,
        matched_token_id=finished.matched_token_id if matched == "matched_token_id" else None,
        logprobs=logprobs,
    )


def _with_info(answer: Answer, info: CallInfo) -> Answer:
    """The answer with what came beside it."""
    return replace(
        answer,
        request_id=info.request_id,
        initial_metadata=info.initial_metadata,
        trailing_metadata=info.trailing_metadata,
    )


def _broken(what: str) -> None:
    """Refuse a stream that breaks its own rules."""
    message = f"the gateway broke the rules of its stream: {what}"
    raise ProtocolError(message)
