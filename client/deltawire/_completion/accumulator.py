"""From events to the finished answer, and from the way a stream ended to what is raised or given back.

Two verbs: `Accumulator.receive(event)` for each event, then `finish(failure)` once, with how the last call ended. Whether
there is another call before that is decided in `resumption`. What decides:

    Completed came   its error   the call ended with      finish gives
    yes              no          anything                 the answer: it is whole, whatever happened to the status
    yes              yes         a status with a reason   that reason's error
    yes              yes         anything else            the error in `Completed.error`
    no               -           CANCELLED,               the error of that code: the caller's own doing
                                 DEADLINE_EXCEEDED
    no               -           another, before          the error of that status
                                 `started`
    no               -           OK, nothing having come  an empty answer: it was resumed after its last event, and all
                                 after a resume           of it had been read before
    no               -           another, or OK           `StreamInterrupted`

Heartbeats can come before `started`: they are no beginning. A stream that is read from its middle begins with its first
event. Every error after the beginning has what came in `answer`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, assert_never

import grpc

from deltawire._answer import Answer, choice_of, with_info
from deltawire._errors import ProtocolError, StreamInterrupted, error_for, with_fault
from deltawire._failure import Failure
from deltawire.v1.chat_completion_pb2 import (
    ChoiceFinished,
    Completed,
    Notice,
    Started,
    StreamChatCompletionResponse,
    TokenLogprob,
    Usage,
)
from deltawire.v1.message_pb2 import AssistantMessage

if TYPE_CHECKING:
    from deltawire._metadata import CallInfo
    from deltawire.v1.chat_completion_pb2 import CreateChatCompletionResponse
    from deltawire.v1.tool_pb2 import ToolCall, ToolCallDelta

# Ends that are the caller's own doing: they mean the same whether or not the answer had begun.
CALLERS_OWN = frozenset({grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED})


@dataclass(slots=True)
class _Parts:
    """The events' content for one choice. Text is kept in pieces, which are concatenated once."""

    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    failed: list[ToolCallDelta] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finished: ChoiceFinished = field(default_factory=ChoiceFinished)

    def message(self) -> AssistantMessage:
        """The model's turn, as far as it was received."""
        text = "".join(self.text)
        return AssistantMessage(
            text=text or None,
            reasoning="".join(self.reasoning),
            tool_calls=self.calls,
        )


class Accumulator:
    """Builds the answer from a stream's events, and checks the stream against its rules.

    Args:
        completion_id: The stream's id, for the answer if `started` is not received.
        last_sequence: The `sequence` of the last event that was read before; None if this reads the stream from its first
            event. Otherwise the answer has the messages of `completed`, and is incomplete if that omits them.

    Attributes:
        usage: The latest usage received.
        notices: The notices received, in order.

    Call `receive` for each event, then `finish` once.
    """

    def __init__(self, completion_id: str = "", last_sequence: int | None = None) -> None:
        self.usage = Usage()
        self.notices: list[Notice] = []
        self._completion_id = completion_id
        self._first = self._next = 0 if last_sequence is None else last_sequence + 1
        self._from_middle = last_sequence is not None
        self._started: Started | None = None
        self._completed: Completed | None = None
        self._parts: dict[int, _Parts] = {}

    @property
    def completion_id(self) -> str:
        """The stream's id; "" until `started`, unless one was given."""
        return self._completion_id if self._started is None else self._started.completion_id

    @property
    def expected(self) -> int:
        """The sequence of the next event."""
        return self._next

    @property
    def has_begun(self) -> bool:
        """Whether any part of the answer was received."""
        return self._started is not None or (self._from_middle and self._next > self._first)

    @property
    def is_only_the_end(self) -> bool:
        """Whether a stream that is read from the middle had no event: if it ends now, all of it was read before."""
        return self._from_middle and self._next == self._first

    @property
    def is_complete(self) -> bool:
        """Whether the last event was received."""
        return self._completed is not None

    def receive(self, event: StreamChatCompletionResponse) -> None:
        """Take the next event. An event of an unknown kind is counted, and otherwise skipped.

        Raises:
            ProtocolError: An event is missing, or this one is not allowed here.
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
            case "usage_update":
                self.usage = event.usage_update.usage
            case "notice":
                self.notices.append(event.notice)
            case "completed":
                self._completed = event.completed
                self.usage = event.completed.usage
            case "heartbeat" | None:
                pass
            case _:
                assert_never(kind)

    def finish(self, failure: Failure | None, info: CallInfo) -> Answer:
        """The answer of a stream whose last call has ended.

        Args:
            failure: How the call failed; None if its status was OK.
            info: The call's request id and metadata.

        Raises:
            CallError: By the table at the top of this file.
        """
        answer = self._answer(info)
        completed = self._completed
        if completed is not None and not completed.HasField("error"):
            return answer
        if failure is None and self.is_only_the_end:
            return answer
        interrupted = failure is None or (self.has_begun and failure.code not in CALLERS_OWN)
        # A status of OK without an answer is a failure.
        failure = failure or Failure(
            grpc.StatusCode.UNKNOWN,
            "the stream ended without its last event",
            request_id=info.request_id,
            initial_metadata=info.initial_metadata,
            trailing_metadata=info.trailing_metadata,
        )
        failure = replace(failure, answer=answer if self.has_begun else None)
        if completed is not None:
            if not failure.reason:
                fault = completed.error
                failure = with_fault(failure, fault.code, fault.reason, fault.message)
            raise error_for(failure)
        if interrupted:
            raise StreamInterrupted(failure)
        raise error_for(failure)

    def _check(self, sequence: int, kind: str | None) -> None:
        """Check the next event against the rules: no gap, `started` first and once, nothing after `completed`."""
        if sequence != self._next:
            _broken(f"event {self._next} was expected and {sequence} came")
        if self._completed is not None:
            _broken("an event came after the last one")
        if kind is None or kind == "heartbeat":
            return
        if kind == "started" and self._started is not None:
            _broken("started came after started")
        if kind != "started" and self._started is None and not self._from_middle:
            _broken(f"{kind} came before started")

    def _of(self, event: StreamChatCompletionResponse) -> _Parts:
        """The parts of the choice that this event is about."""
        return self._parts.setdefault(event.choice_index, _Parts())

    @staticmethod
    def _receive_call(parts: _Parts, delta: ToolCallDelta) -> None:
        """Take a verdict on a tool call. It has all that its fragments had, so those are not kept."""
        outcome = delta.WhichOneof("outcome")
        match outcome:
            case "tool_call":
                parts.calls.append(delta.tool_call)
            case "failure":
                parts.failed.append(delta)
            case "arguments_fragment" | None:
                pass
            case _:
                assert_never(outcome)

    def _answer(self, info: CallInfo) -> Answer:
        """The answer as far as it was received; it always has choice 0."""
        completed = self._completed or Completed(usage=self.usage)
        started = self._started or Started(completion_id=self._completion_id)
        stated = {} if completed.messages_omitted else {choice.index: choice for choice in completed.choices}
        closed = {choice.index: choice for choice in completed.choices}
        choices = []
        for index in sorted({0, *self._parts, *closed}):
            parts = self._parts.get(index) or _Parts()
            choice = closed.get(index) or _unstated(parts.finished)
            message = stated[index].message if index in stated else parts.message()
            failed = tuple(choice.failed_tool_calls) or tuple(parts.failed)
            choices.append(choice_of(index, choice, message, failed, tuple(parts.logprobs)))
        return with_info(Answer(started, completed, tuple(choices), tuple(self.notices)), info)


def answer_of(response: CreateChatCompletionResponse, info: CallInfo) -> Answer:
    """The answer of a call that gave it whole."""
    completed = response.completed
    choices = tuple(
        choice_of(
            choice.index,
            choice,
            choice.message,
            tuple(choice.failed_tool_calls),
            tuple(choice.logprobs),
        )
        for choice in completed.choices
    )
    if not choices:
        message = "the answer holds no choice"
        raise ProtocolError(message, info.request_id)
    return with_info(Answer(response.started, completed, choices), info)


def _unstated(finished: ChoiceFinished) -> Completed.Choice:
    """What `Completed` would have stated of a choice, as far as its own end said it.

    Its tool calls are not executable: the request must be sent again, and no tool may run twice.
    """
    choice = Completed.Choice(stop_reason=finished.stop_reason, engine_finish_reason=finished.engine_finish_reason)
    match finished.WhichOneof("matched"):
        case "matched_stop":
            choice.matched_stop = finished.matched_stop
        case "matched_token_id":
            choice.matched_token_id = finished.matched_token_id
        case None:
            pass
    return choice


def _broken(what: str) -> None:
    """Refuse a stream that breaks its own rules."""
    message = f"the gateway broke the rules of its stream: {what}"
    raise ProtocolError(message)
