"""What the events of a stream add up to: what a client's accumulator must have at the end, or where the stream broke off."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltawire.v1 import chat_completion_pb2 as chat_pb
from tests.conformance.conformance_pb2 import Answer, ClientResult

if TYPE_CHECKING:
    from collections.abc import Iterable

Choice = chat_pb.Completed.Choice


def fold(events: Iterable[chat_pb.StreamChatCompletionResponse]) -> Answer:
    """The answer of events from the first one on, each of them once.

    It is made from the deltas alone. Only the usage is that of `completed`.
    """
    answer = Answer()
    choices: dict[int, Choice] = {}
    for event in events:
        if event.HasField("choice_index"):
            _add(choices.setdefault(event.choice_index, Choice(index=event.choice_index)), event)
        elif event.HasField("started"):
            answer.completion_id, answer.model = event.started.completion_id, event.started.model
        elif event.HasField("usage_update"):
            answer.usage.CopyFrom(event.usage_update.usage)
        elif event.HasField("notice"):
            answer.notices.append(event.notice)
        elif event.HasField("completed"):
            answer.usage.CopyFrom(event.completed.usage)
    answer.choices.extend(choice for _, choice in sorted(choices.items()))
    return tidy(answer)


def _add(choice: Choice, event: chat_pb.StreamChatCompletionResponse) -> None:
    """Add an event to its choice."""
    if event.HasField("text_delta"):
        choice.message.text += event.text_delta.text
        choice.logprobs.extend(event.text_delta.logprobs)
    elif event.HasField("reasoning_delta"):
        choice.message.reasoning += event.reasoning_delta.text
    elif event.tool_call_delta.HasField("tool_call"):
        choice.message.tool_calls.append(event.tool_call_delta.tool_call)
    elif event.tool_call_delta.HasField("failure"):
        choice.failed_tool_calls.append(event.tool_call_delta)
    else:
        # The fields of `choice_finished` are named as those of the choice.
        for field, value in event.choice_finished.ListFields():
            setattr(choice, field.name, value)


def tidy(answer: Answer) -> Answer:
    """The answer without the differences that say nothing: an empty text, a choice without content. Changes it in place."""
    kept = []
    for choice in answer.choices:
        if not choice.message.text:
            choice.message.ClearField("text")
        choice.message.SetInParent()
        if choice != Choice(index=choice.index, message=choice.message) or choice.message.ByteSize():
            kept.append(choice)
    answer.ClearField("choices")
    answer.choices.extend(kept)
    answer.usage.SetInParent()
    return answer


def tidy_result(result: ClientResult) -> ClientResult:
    """The same for a result: a `partial` in which there is nothing is none. Changes it in place."""
    if result.HasField("answer"):
        tidy(result.answer)
    if result.HasField("failure"):
        tidy(result.failure.partial)
        partial = result.failure.partial
        # A client that chose the id knows it, whatever arrived.
        if not (partial.model or partial.choices or partial.notices or partial.usage.ByteSize()):
            result.failure.ClearField("partial")
    return result
