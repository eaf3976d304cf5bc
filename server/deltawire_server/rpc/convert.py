"""Converts events to response messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

from google.protobuf import duration_pb2, timestamp_pb2

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import error_reason_pb2, message_pb2, tool_pb2
from deltawire_server.completions.info import Outcome
from deltawire_server.rpc.status import MAX_MESSAGE, shorten
from deltawire_server.sansio.events import (
    ChoiceFinished,
    Completed,
    FinishedChoice,
    Heartbeat,
    Notice,
    ReasoningDelta,
    Refused,
    Started,
    StreamEvent,
    TextDelta,
    TokenLogprob,
    ToolCallArguments,
    ToolCallFailed,
    ToolCallStarted,
    ToolCallSucceeded,
    Usage,
    UsageUpdate,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deltawire_server.completions.info import CompletionInfo, CompletionView, Timings
    from deltawire_server.completions.records import Record

MAX_PATH_BYTES = 16 * 1024
"""The longest JSON Pointer that is sent. Its steps are keys that the model wrote, and the same message has arguments of up to
nearly 4 MiB."""


class ResponseWriter:
    """Converts the events of one completion to numbered messages. The result depends only on the number and the event.

    Args:
        completion: The completion.
        max_completed_bytes: Size above which `Completed` omits the messages.
    """

    def __init__(self, completion: CompletionView, max_completed_bytes: int) -> None:
        self._completion = completion
        self._max_completed_bytes = max_completed_bytes

    def message(  # noqa: C901 (one flat arm per event)
        self, sequence: int, event: StreamEvent
    ) -> chat_pb.StreamChatCompletionResponse:
        """The message of an event.

        Args:
            sequence: The message's number in the stream, from 0; merged events are one message.
            event: Any event except `Refused`, which the worker converts to an error.
        """
        response = chat_pb.StreamChatCompletionResponse(sequence=sequence)
        choice: int | None = getattr(event, "choice", None)
        if choice is not None:
            response.choice_index = choice
        match event:
            case TextDelta() | ReasoningDelta():
                delta = response.text_delta if isinstance(event, TextDelta) else response.reasoning_delta
                delta.text = event.text
                if event.logprobs:
                    delta.logprobs.extend(logprobs(event.logprobs))
            case ToolCallStarted():
                _set_call(response.tool_call_delta, event, tool_pb2.TOOL_CALL_PARSE_STATUS_STARTED)
                response.tool_call_delta.tool_name = event.tool_name
            case ToolCallArguments():
                _set_call(response.tool_call_delta, event, tool_pb2.TOOL_CALL_PARSE_STATUS_IN_PROGRESS)
                response.tool_call_delta.arguments_fragment = event.fragment
            case ToolCallSucceeded() | ToolCallFailed():
                response.tool_call_delta.CopyFrom(_verdict(event))
            case ChoiceFinished():
                response.choice_finished.CopyFrom(_choice_finished(event))
            case Started():
                response.started.CopyFrom(started(self._completion.head))
            case Completed():
                response.completed.CopyFrom(completed(self._completion, event))
                if response.ByteSize() > self._max_completed_bytes:
                    response.completed.CopyFrom(completed(self._completion, event.without_messages()))
            case UsageUpdate():
                response.usage_update.usage.CopyFrom(usage(event.usage))
            case Notice():
                response.notice.kind = chat_pb.NoticeKind.ValueType(event.kind.value)
                response.notice.message = event.message
                response.notice.field = event.field
            case Heartbeat():
                response.heartbeat.SetInParent()
            case Refused():
                raise TypeError(f"{type(event).__name__} is not sent in a stream")
            case _:
                assert_never(event)
        return response


def started(head: CompletionInfo) -> chat_pb.Started:
    """The first message: model, provider and sampling."""
    return chat_pb.Started(
        completion_id=head.completion_id,
        model=head.model,
        alias=head.alias,
        provider_id=head.provider_id,
        create_time=_timestamp(head.create_time),
        effective_sampling=chat_pb.Sampling(**head.sampling.given()),
    )


def completed(completion: CompletionView, event: Completed) -> chat_pb.Completed:
    """The last message: the whole answer with usage and timings."""
    message = chat_pb.Completed(
        usage=usage(event.usage),
        timings=_timings(completion.timings),
        choices=[_choice(choice, has_message=not event.messages_omitted) for choice in event.choices],
        messages_omitted=event.messages_omitted,
    )
    if completion.failure is not None:
        message.error.CopyFrom(_error(Outcome.of(completion.failure)))
    return message


def get_response(record: Record, *, has_content: bool = True) -> chat_pb.GetChatCompletionResponse:
    """The response of GetChatCompletion; without content for operators."""
    response = chat_pb.GetChatCompletionResponse(
        completion_id=record.completion_id, state=state(record), usage=usage(record.usage)
    )
    if record.head is not None and record.begun:
        response.started.CopyFrom(started(record.head))
        if not has_content:
            response.started.ClearField("effective_sampling")
    if record.outcome is not None:
        response.error.CopyFrom(_error(record.outcome))
        if not has_content:
            response.error.ClearField("message")  # a provider's message may quote the request
    stream = record.stream
    if stream is not None and stream.is_retained:
        if stream.completed is not None and has_content:
            response.completed.CopyFrom(completed(stream, stream.completed))
        if stream.last_sequence is not None:
            response.last_sequence = stream.last_sequence
        if stream.expire_time is not None:
            response.expire_time.CopyFrom(_timestamp(stream.expire_time))
    return response


def summary(record: Record, process: str, worker: int, *, for_operator: bool) -> chat_pb.CompletionSummary:
    """The entry of a completion in a list.

    Args:
        record: Its record.
        process: The digits that identify this process.
        worker: The number of this worker process.
        for_operator: Whether the entry is for an operator, who may see addresses.
    """
    record.note()
    outcome, stream = record.outcome, record.stream
    entry = chat_pb.CompletionSummary(
        completion_id=record.completion_id if record.caller else "",
        caller=record.label,
        replica=record.replica if for_operator else "",
        state=state(record),
        stop_reasons=[chat_pb.StopReason.ValueType(reason.value) for reason in record.stop_reasons],
        usage=usage(record.usage),
        time_limit=_duration(record.time_limit),
        process=process,
        worker=worker,
    )
    entry.create_time.FromMicroseconds(record.created)
    if record.head is not None:
        entry.model, entry.alias, entry.provider_id = record.head.model, record.head.alias, record.head.provider_id
    if record.ended_at is not None:
        entry.end_time.CopyFrom(_timestamp(record.ended_at))
    if outcome is not None:
        entry.error_code = outcome.code.value
        entry.error_reason = error_reason_pb2.ErrorReason.ValueType(outcome.reason.value if outcome.reason else 0)
    if stream is not None and stream.is_retained and stream.expire_time is not None:
        entry.expire_time.CopyFrom(_timestamp(stream.expire_time))
    return entry


def state(record: Record) -> chat_pb.CompletionState.ValueType:
    """The state of a completion."""
    if not record.ended:
        return chat_pb.COMPLETION_STATE_RUNNING
    return chat_pb.COMPLETION_STATE_COMPLETED if record.outcome is None else chat_pb.COMPLETION_STATE_FAILED


def _error(outcome: Outcome) -> chat_pb.Completed.Error:
    return chat_pb.Completed.Error(
        code=outcome.code.value,
        reason=error_reason_pb2.ErrorReason.ValueType(0 if outcome.reason is None else outcome.reason.value),
        message=shorten(outcome.message, MAX_MESSAGE),
    )


def _timings(timings: Timings) -> chat_pb.Timings:
    return chat_pb.Timings(
        queue=_duration(timings.queue),
        first_event_latency=_duration(timings.first_event),
        mean_gap=_duration(timings.mean_gap),
        worst_gap=_duration(timings.worst_gap),
        total=_duration(timings.total),
    )


def _choice(choice: FinishedChoice, *, has_message: bool) -> chat_pb.Completed.Choice:
    message = chat_pb.Completed.Choice(
        index=choice.index,
        message=message_pb2.AssistantMessage(
            text=choice.text or None,
            reasoning=choice.reasoning,
            tool_calls=[_tool_call(call) for call in choice.tool_calls],
        )
        if has_message
        else None,
        failed_tool_calls=[_verdict(call) for call in choice.failed_tool_calls],
        stop_reason=chat_pb.StopReason.ValueType(choice.stop_reason.value),
        tool_calls_executable=choice.tool_calls_executable,
        engine_finish_reason=choice.engine_finish_reason,
        logprobs=logprobs(choice.logprobs),
    )
    _set_matched(message, choice.matched_stop)
    return message


def _choice_finished(event: ChoiceFinished) -> chat_pb.ChoiceFinished:
    message = chat_pb.ChoiceFinished(
        stop_reason=chat_pb.StopReason.ValueType(event.stop_reason.value),
        engine_finish_reason=event.engine_finish_reason,
        tool_calls_executable=event.tool_calls_executable,
    )
    _set_matched(message, event.matched_stop)
    return message


def _set_matched(message: chat_pb.ChoiceFinished | chat_pb.Completed.Choice, matched: str | int | None) -> None:
    if isinstance(matched, str):
        message.matched_stop = matched
    elif matched is not None:
        message.matched_token_id = matched


def _tool_call(call: ToolCallSucceeded) -> tool_pb2.ToolCall:
    return tool_pb2.ToolCall(call_id=call.call_id, tool_name=call.tool_name, arguments=call.arguments)


def _set_call(
    message: tool_pb2.ToolCallDelta,
    event: ToolCallStarted | ToolCallArguments,
    status: tool_pb2.ToolCallParseStatus.ValueType,
) -> None:
    message.index = event.index
    message.call_id = event.call_id
    message.parse_status = status


def _verdict(event: ToolCallSucceeded | ToolCallFailed) -> tool_pb2.ToolCallDelta:
    message = tool_pb2.ToolCallDelta(index=event.index, call_id=event.call_id, tool_name=event.tool_name)
    if isinstance(event, ToolCallSucceeded):
        message.parse_status = tool_pb2.TOOL_CALL_PARSE_STATUS_SUCCEEDED
        message.tool_call.CopyFrom(_tool_call(event))
        return message
    message.parse_status = tool_pb2.TOOL_CALL_PARSE_STATUS_FAILED
    message.failure.reason = tool_pb2.ToolCallFailureReason.ValueType(event.reason.value)
    message.failure.message = event.message
    message.failure.raw_arguments = event.raw_arguments
    if event.byte_offset is not None:
        message.failure.byte_offset = event.byte_offset
    if event.instance_path is not None and len(event.instance_path.encode()) <= MAX_PATH_BYTES:
        message.failure.instance_path = event.instance_path
    return message


def logprobs(tokens: Sequence[TokenLogprob]) -> list[chat_pb.TokenLogprob]:
    """The log-probabilities of some tokens."""
    return [
        chat_pb.TokenLogprob(
            token=token.token,
            logprob=token.logprob,
            raw_bytes=token.raw_bytes,
            alternatives=[
                chat_pb.TokenLogprob.Alternative(token=other.token, logprob=other.logprob, raw_bytes=other.raw_bytes)
                for other in token.alternatives
            ],
        )
        for token in tokens
    ]


def usage(usage: Usage) -> chat_pb.Usage:
    """The usage, as far as it is known."""
    return chat_pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_prompt_tokens=usage.cached_prompt_tokens,
        reasoning_tokens=usage.reasoning_tokens,
        provenance=chat_pb.UsageProvenance.ValueType(usage.provenance.value),
    )


def _timestamp(seconds: float) -> timestamp_pb2.Timestamp:
    timestamp = timestamp_pb2.Timestamp()
    timestamp.FromNanoseconds(int(seconds * 1e9))
    return timestamp


def _duration(seconds: float | None) -> duration_pb2.Duration | None:
    if seconds is None:
        return None
    duration = duration_pb2.Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration
