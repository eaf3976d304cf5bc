"""Prints an answer: choice 0 while it comes, the other choices after it, tool calls on a line each."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from deltawire._cli.output import say, word
from deltawire._cli.terminal import Aside, Printer
from deltawire.v1.chat_completion_pb2 import StopReason
from deltawire.v1.tool_pb2 import ToolCall, ToolCallDelta, ToolCallFailureReason, ToolCallParseStatus

if TYPE_CHECKING:
    from deltawire._answer import Choice
    from deltawire._client import ChatStream
    from deltawire.v1.chat_completion_pb2 import StreamChatCompletionResponse

# Ends that need no word: the model said what it had to say.
_PLAIN_ENDS = frozenset(
    {StopReason.STOP_REASON_END_OF_TURN, StopReason.STOP_REASON_END_OF_MESSAGE, StopReason.STOP_REASON_STOP_SEQUENCE}
)


def print_answer(stream: ChatStream) -> None:
    """Print choice 0 as it comes, and the other choices after it."""
    out, aside = Printer(sys.stdout), Aside()
    try:
        for event in stream:
            if event.choice_index == 0:
                _print_event(event, out, aside)
    finally:
        # Also after Ctrl-C or a fault: what came stays, on a line of its own.
        aside.end()
        out.end()
        for notice in stream.notices:
            field = f" ({notice.field})" if notice.field else ""
            say(f"note: {' '.join(notice.message.split())}{field}")
    answer = stream.final()
    if not answer.completed.choices:
        # There was no event after the one after which it was resumed, so its end was printed before.
        return
    for choice in answer.choices:
        if choice.index != 0:
            out.line(f"--- choice {choice.index}")
            print_choice(choice, out)
        if choice.stop_reason not in _PLAIN_ENDS:
            which = f"choice {choice.index}" if len(answer.choices) > 1 else "the answer"
            say(f"note: {which} ended with {word(StopReason, choice.stop_reason, 'STOP_REASON_')}")


def _print_event(event: StreamChatCompletionResponse, out: Printer, aside: Aside) -> None:
    """Print what an event adds to the answer."""
    kind = event.WhichOneof("event")
    if kind == "reasoning_delta":
        aside.piece(event.reasoning_delta.text)
    elif kind == "text_delta":
        aside.end()
        out.piece(event.text_delta.text)
    elif kind == "tool_call_delta":
        _print_call(event.tool_call_delta, out, aside)


def _print_call(delta: ToolCallDelta, out: Printer, aside: Aside) -> None:
    """Print the verdict on a call; what comes before it is no answer yet."""
    if delta.parse_status == ToolCallParseStatus.TOOL_CALL_PARSE_STATUS_STARTED:
        aside.end()
        out.end()
        aside.piece(f"{delta.tool_name} ")
    elif delta.parse_status == ToolCallParseStatus.TOOL_CALL_PARSE_STATUS_IN_PROGRESS:
        aside.piece(delta.arguments_fragment)
    else:
        aside.end()
        out.line(_verdict_line(delta))


def print_choice(choice: Choice, out: Printer) -> None:
    """Print a choice whole."""
    out.piece(choice.text)
    for call in choice.tool_calls:
        out.line(f"tool call: {call_line(call)}")
    for failed in choice.failed_tool_calls:
        out.line(_verdict_line(failed))
    out.end()


def call_line(call: ToolCall) -> str:
    """A tool call on one line, for people: name(arguments)."""
    try:
        arguments = json.dumps(json.loads(call.arguments), ensure_ascii=False)
    except (ValueError, RecursionError):
        arguments = " ".join(call.arguments.split())
    return f"{call.tool_name}({arguments})"


def _verdict_line(delta: ToolCallDelta) -> str:
    """A verdict on a tool call on one line, for people."""
    if delta.WhichOneof("outcome") == "tool_call":
        return f"tool call: {call_line(delta.tool_call)}"
    failure = delta.failure
    reason = word(ToolCallFailureReason, failure.reason, "TOOL_CALL_FAILURE_REASON_")
    raw = " ".join(failure.raw_arguments.split())
    return f"tool call failed: {delta.tool_name or '(no name)'}({raw}): {reason}: {' '.join(failure.message.split())}"
