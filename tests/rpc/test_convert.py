"""Events become messages, and the enums on both sides are the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import message_pb2, tool_pb2
from deltawire_server.completions.info import CompletionInfo, Timings
from deltawire_server.errors import Code, GatewayError, ProviderError, Reason
from deltawire_server.rpc.convert import MAX_PATH_BYTES, ResponseWriter, completed
from deltawire_server.rpc.status import MAX_MESSAGE
from deltawire_server.sansio.events import (
    ChoiceFinished,
    Completed,
    FailureReason,
    Fault,
    FinishedChoice,
    Heartbeat,
    Notice,
    NoticeKind,
    Provenance,
    ReasoningDelta,
    Refused,
    Started,
    StopReason,
    StreamEvent,
    TextDelta,
    ToolCallArguments,
    ToolCallFailed,
    ToolCallStarted,
    ToolCallSucceeded,
    Usage,
    UsageUpdate,
)
from deltawire_server.upstream.request import Sampling

if TYPE_CHECKING:
    import enum

    from deltawire_server.completions.info import CompletionView
    from deltawire_server.errors import DeltawireError

SUCCEEDED = ToolCallSucceeded(1, 2, "c", "t", '{"a": 1}')
FAILED = ToolCallFailed(1, 3, "d", "u", FailureReason.MALFORMED_JSON, "why", '{"a', 3)


class Answered:
    """What a writer needs of a completion."""

    def __init__(self, failure: DeltawireError | None = None, first: float | None = 0.5) -> None:
        self.head = CompletionInfo("cmpl-0", "m", "a", "p", 1.5, Sampling(top_k=3))
        self.failure = failure
        self.timings = Timings(2.25, first_event=first)


def written(event: StreamEvent, completion: CompletionView | None = None) -> chat_pb.StreamChatCompletionResponse:
    """The message of an event."""
    return ResponseWriter(completion or Answered(), 2**20).message(0, event)


def message(**fields: Any) -> chat_pb.StreamChatCompletionResponse:  # noqa: ANN401 (whatever the message takes)
    """A message of a stream."""
    return chat_pb.StreamChatCompletionResponse(**fields)


VERDICT = tool_pb2.ToolCallDelta(
    index=2,
    call_id="c",
    tool_name="t",
    parse_status=tool_pb2.TOOL_CALL_PARSE_STATUS_SUCCEEDED,
    tool_call=tool_pb2.ToolCall(call_id="c", tool_name="t", arguments='{"a": 1}'),
)
FAILURE = tool_pb2.ToolCallDelta(
    index=3,
    call_id="d",
    tool_name="u",
    parse_status=tool_pb2.TOOL_CALL_PARSE_STATUS_FAILED,
    failure=tool_pb2.ToolCallFailure(
        reason=tool_pb2.TOOL_CALL_FAILURE_REASON_MALFORMED_JSON, message="why", raw_arguments='{"a', byte_offset=3
    ),
)


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (TextDelta(0, "x"), message(choice_index=0, text_delta=chat_pb.TextDelta(text="x"))),
        (TextDelta(1, ""), message(choice_index=1, text_delta=chat_pb.TextDelta())),
        (ReasoningDelta(2, "x"), message(choice_index=2, reasoning_delta=chat_pb.ReasoningDelta(text="x"))),
        (
            ToolCallStarted(1, 2, "c", "t"),
            message(
                choice_index=1,
                tool_call_delta=tool_pb2.ToolCallDelta(
                    index=2, call_id="c", tool_name="t", parse_status=tool_pb2.TOOL_CALL_PARSE_STATUS_STARTED
                ),
            ),
        ),
        (
            ToolCallArguments(0, 0, "c", '{"a'),
            message(
                choice_index=0,
                tool_call_delta=tool_pb2.ToolCallDelta(
                    call_id="c",
                    parse_status=tool_pb2.TOOL_CALL_PARSE_STATUS_IN_PROGRESS,
                    arguments_fragment='{"a',
                ),
            ),
        ),
        (SUCCEEDED, message(choice_index=1, tool_call_delta=VERDICT)),
        (FAILED, message(choice_index=1, tool_call_delta=FAILURE)),
        (
            ChoiceFinished(1, StopReason.OUT_OF_TOKENS, "length"),
            message(
                choice_index=1,
                choice_finished=chat_pb.ChoiceFinished(
                    stop_reason=chat_pb.STOP_REASON_OUT_OF_TOKENS, engine_finish_reason="length"
                ),
            ),
        ),
        (
            ChoiceFinished(0, StopReason.END_OF_MESSAGE, "tool_calls", tool_calls_executable=True, matched_stop=0),
            message(
                choice_index=0,
                choice_finished=chat_pb.ChoiceFinished(
                    stop_reason=chat_pb.STOP_REASON_END_OF_MESSAGE,
                    engine_finish_reason="tool_calls",
                    tool_calls_executable=True,
                    matched_token_id=0,
                ),
            ),
        ),
        (
            ChoiceFinished(0, StopReason.STOP_SEQUENCE, "stop", matched_stop=""),
            message(
                choice_index=0,
                choice_finished=chat_pb.ChoiceFinished(
                    stop_reason=chat_pb.STOP_REASON_STOP_SEQUENCE, engine_finish_reason="stop", matched_stop=""
                ),
            ),
        ),
        (
            Started("up", "m"),
            message(
                started=chat_pb.Started(
                    completion_id="cmpl-0",
                    model="m",
                    alias="a",
                    provider_id="p",
                    create_time=Timestamp(seconds=1, nanos=500_000_000),
                    effective_sampling=chat_pb.Sampling(top_k=3),
                )
            ),
        ),
        (
            UsageUpdate(Usage(5, Provenance.LOWER_BOUND, 3)),
            message(
                usage_update=chat_pb.UsageUpdate(
                    usage=chat_pb.Usage(
                        prompt_tokens=3, completion_tokens=5, provenance=chat_pb.USAGE_PROVENANCE_LOWER_BOUND
                    )
                )
            ),
        ),
        (
            Notice(NoticeKind.FIELDS_NOT_CHECKED, "why", "chat.priority"),
            message(
                notice=chat_pb.Notice(kind=chat_pb.NOTICE_KIND_FIELDS_NOT_CHECKED, message="why", field="chat.priority")
            ),
        ),
        (Heartbeat(), message(heartbeat=chat_pb.Heartbeat())),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_event(event: StreamEvent, expected: chat_pb.StreamChatCompletionResponse) -> None:
    """Member for member; what is absent stays absent."""
    assert written(event) == expected


def test_a_failure_without_an_offset() -> None:
    """Nothing was parsed: zero would be wrong."""
    event = ToolCallFailed(0, 0, "d", "", FailureReason.MISSING_NAME, "why", "")
    failure = written(event).tool_call_delta.failure
    assert not failure.HasField("byte_offset")
    assert not failure.HasField("instance_path")


def test_a_mismatch_says_where() -> None:
    """The whole of the arguments is the empty pointer, which is not the same as none."""
    event = ToolCallFailed(0, 0, "d", "t", FailureReason.SCHEMA_MISMATCH, "why", "{}", None, "")
    failure = written(event).tool_call_delta.failure
    assert failure.reason == tool_pb2.TOOL_CALL_FAILURE_REASON_SCHEMA_MISMATCH
    assert failure.HasField("instance_path")
    assert failure.instance_path == ""


def test_completed() -> None:
    """All of an answer's end; `message` holds only what can be sent back."""
    choice = FinishedChoice(4, "text", "reasoning", (SUCCEEDED,), (FAILED,), StopReason.END_OF_MESSAGE, "stop", False)
    event = Completed(Usage(5, Provenance.EXACT, 3, 2, 1), (choice,))
    expected = chat_pb.Completed(
        usage=chat_pb.Usage(
            prompt_tokens=3,
            completion_tokens=5,
            cached_prompt_tokens=2,
            reasoning_tokens=1,
            provenance=chat_pb.USAGE_PROVENANCE_EXACT,
        ),
        timings=chat_pb.Timings(
            first_event_latency=Duration(nanos=500_000_000), total=Duration(seconds=2, nanos=250_000_000)
        ),
        choices=[
            chat_pb.Completed.Choice(
                index=4,
                message=message_pb2.AssistantMessage(
                    text="text",
                    reasoning="reasoning",
                    tool_calls=[VERDICT.tool_call],
                ),
                failed_tool_calls=[FAILURE],
                stop_reason=chat_pb.STOP_REASON_END_OF_MESSAGE,
                engine_finish_reason="stop",
            )
        ],
    )
    assert written(event) == message(completed=expected)


def test_an_end_without_anything() -> None:
    """No text is absent, no figure is no number, and no first event is no time."""
    choice = FinishedChoice(0, "", "", (), (), StopReason.ERROR, "", False)
    result = completed(Answered(first=None), Completed(Usage(0, Provenance.ESTIMATED), (choice,)))
    assert not result.choices[0].message.HasField("text")
    assert result.choices[0].HasField("message")
    assert not result.usage.HasField("prompt_tokens")
    assert not result.timings.HasField("first_event_latency")


@pytest.mark.parametrize(
    "failure",
    [
        ProviderError(Reason.UPSTREAM_ERROR, "m", code=Code.ABORTED),
        GatewayError(Reason.DURATION_LIMIT_EXCEEDED, "x" * 5000),
    ],
)
def test_a_fault(failure: ProviderError | GatewayError) -> None:
    """The error is the status that the call will end with."""
    event = Completed(Usage(0, Provenance.ESTIMATED), (), Fault(failure.reason, "m"))
    error = completed(Answered(failure), event).error
    assert (error.code, error.reason) == (failure.code.value, failure.reason.value)
    assert error.message[:20] == failure.message[:20]
    assert len(error.message.encode()) <= MAX_MESSAGE


def test_what_is_no_message() -> None:
    """The worker makes an error of it."""
    with pytest.raises(TypeError, match="Refused"):
        written(Refused(Fault(Reason.INTERNAL, "m")))


def test_a_message_follows_from_its_number_and_event() -> None:
    """The writer counts nothing, so that a message can be made again."""
    writer = ResponseWriter(Answered(), 2**20)
    assert [writer.message(number, TextDelta(0, "x")).sequence for number in (0, 7, 7)] == [0, 7, 7]


@pytest.mark.parametrize(
    ("ours", "theirs", "prefix"),
    [
        (StopReason, chat_pb.StopReason, "STOP_REASON_"),
        (Provenance, chat_pb.UsageProvenance, "USAGE_PROVENANCE_"),
        (NoticeKind, chat_pb.NoticeKind, "NOTICE_KIND_"),
        (FailureReason, tool_pb2.ToolCallFailureReason, "TOOL_CALL_FAILURE_REASON_"),
    ],
)
def test_enums_are_the_protos(ours: type[enum.Enum], theirs: Any, prefix: str) -> None:  # noqa: ANN401 (a generated wrapper)
    """By name and number, all of them but UNSPECIFIED: they are passed on by number."""
    assert {f"{prefix}{member.name}": member.value for member in ours} | {f"{prefix}UNSPECIFIED": 0} == dict(
        theirs.items()
    )


def test_a_verdict_fits_into_a_message() -> None:
    """A path made of the model's own keys is left out where it is as long as they are."""

    def path_of(path: str) -> tuple[bool, str]:
        failed = ToolCallFailed(0, 0, "c", "t", FailureReason.SCHEMA_MISMATCH, "why", "{}", None, path)
        failure = ResponseWriter(Answered(), 1 << 20).message(1, failed).tool_call_delta.failure
        return failure.HasField("instance_path"), failure.instance_path

    assert path_of("") == (True, "")
    assert path_of("/a/0") == (True, "/a/0")
    assert path_of("/" + "ß" * (MAX_PATH_BYTES // 2)) == (False, "")
