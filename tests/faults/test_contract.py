"""The checks of the contract themselves: what is right passes, and each broken promise is named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import error_reason_pb2, message_pb2, tool_pb2
from tests.support import fields
from tests.support.contract import MAX_MESSAGE_BYTES, ContractError, Ending, check_failure, check_stream, check_whole
from tests.support.gateway import ask, tool

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Response = chat_pb.StreamChatCompletionResponse
Responses = list[chat_pb.StreamChatCompletionResponse]

SUCCEEDED = tool_pb2.ToolCallParseStatus.TOOL_CALL_PARSE_STATUS_SUCCEEDED
FAILED = tool_pb2.ToolCallParseStatus.TOOL_CALL_PARSE_STATUS_FAILED
STARTED = tool_pb2.ToolCallParseStatus.TOOL_CALL_PARSE_STATUS_STARTED
IN_PROGRESS = tool_pb2.ToolCallParseStatus.TOOL_CALL_PARSE_STATUS_IN_PROGRESS
MALFORMED = tool_pb2.ToolCallFailureReason.TOOL_CALL_FAILURE_REASON_MALFORMED_JSON
CALL = tool_pb2.ToolCall(call_id="a", tool_name="get_weather", arguments='{"city":"Oslo"}')


def _request(**options: object) -> chat_pb.StreamChatCompletionRequest:
    request = chat_pb.StreamChatCompletionRequest(chat=ask(tools=[tool()]))
    for name, value in options.items():
        setattr(request.options, name, value)
    return request


def _incremental() -> chat_pb.StreamChatCompletionRequest:
    request = _request()
    request.chat.tool_call_policy.streaming = chat_pb.ToolCallStreaming.TOOL_CALL_STREAMING_INCREMENTAL
    return request


def _answer(*, incremental: bool = False) -> Responses:
    """A whole stream: reasoning, text, a call, and the end."""
    end: dict[str, Any] = {
        "stop_reason": chat_pb.StopReason.STOP_REASON_END_OF_MESSAGE,
        "engine_finish_reason": "tool_calls",
        "tool_calls_executable": True,
    }
    pieces = [
        tool_pb2.ToolCallDelta(call_id="a", tool_name="get_weather", parse_status=STARTED),
        tool_pb2.ToolCallDelta(call_id="a", parse_status=IN_PROGRESS, arguments_fragment='{"city":'),
        tool_pb2.ToolCallDelta(call_id="a", parse_status=IN_PROGRESS, arguments_fragment='"Oslo"}'),
    ]
    verdict = tool_pb2.ToolCallDelta(call_id="a", tool_name="get_weather", parse_status=SUCCEEDED, tool_call=CALL)
    message = message_pb2.AssistantMessage(text="Hi", reasoning="Hm", tool_calls=[CALL])
    completed = chat_pb.Completed(
        usage=chat_pb.Usage(provenance=chat_pb.UsageProvenance.USAGE_PROVENANCE_EXACT),
        choices=[chat_pb.Completed.Choice(message=message, **end)],
    )
    responses = [
        Response(started=chat_pb.Started(completion_id="c")),
        Response(choice_index=0, reasoning_delta=chat_pb.ReasoningDelta(text="Hm")),
        Response(choice_index=0, text_delta=chat_pb.TextDelta(text="H")),
        Response(choice_index=0, text_delta=chat_pb.TextDelta(text="i")),
        *(Response(choice_index=0, tool_call_delta=piece) for piece in pieces if incremental),
        Response(choice_index=0, tool_call_delta=verdict),
        Response(choice_index=0, choice_finished=chat_pb.ChoiceFinished(**end)),
        Response(completed=completed),
    ]
    return _numbered(responses)


def _numbered(responses: Responses) -> Responses:
    for number, response in enumerate(responses):
        response.sequence = number
    return responses


def _ending(code: int = 10, reason: str = "UPSTREAM_ERROR", changes: Mapping[str, str | None] | None = None) -> Ending:
    """A failure that is right, but for the trailers that are changed."""
    packed = any_pb2.Any()
    packed.Pack(error_details_pb2.ErrorInfo(reason=reason, domain=fields.DOMAIN, metadata={"request_id": "r"}))
    status = status_pb2.Status(code=code, details=[packed])
    trailers: dict[str, str | bytes | None] = {
        fields.REASON_TRAILER: reason,
        fields.REQUEST_ID: "r",
        fields.PUSHBACK_TRAILER: "-1",
        fields.DETAILS_TRAILER: status.SerializeToString(),
        **(changes or {}),
    }
    name = {10: "ABORTED", 13: "INTERNAL", 14: "UNAVAILABLE"}[code]
    return Ending(name, "no", tuple((key, value) for key, value in trailers.items() if value is not None))


def _faulted() -> Responses:
    """The stream, ended by a fault."""
    responses = _answer()
    responses[-2].choice_finished.tool_calls_executable = False
    completed = responses[-1].completed
    completed.choices[0].tool_calls_executable = False
    completed.error.code = 10
    completed.error.reason = error_reason_pb2.ErrorReason.ERROR_REASON_UPSTREAM_ERROR
    return responses


def test_what_is_right_passes() -> None:
    """An answer, one with fragments, one that failed after it began, one that was refused, and one that its caller left."""
    check_stream(_request(), _answer(), Ending())
    check_stream(_incremental(), _answer(incremental=True), Ending())
    check_stream(_request(), _faulted(), _ending())
    check_stream(_request(), [], _ending(13))
    check_stream(_request(), _answer()[:3], Ending("CANCELLED", by_caller=True))
    check_stream(_request(), _answer()[:3], Ending("UNKNOWN", by_caller=True))


def test_a_resumed_stream_is_checked_from_where_it_goes_on() -> None:
    """Its first number follows the last one that was received; what came before is not missed."""
    resume = chat_pb.StreamChatCompletionRequest(resume=chat_pb.ResumePoint(completion_id="c", last_sequence=2))
    check_stream(resume, _answer()[3:], Ending())
    check_stream(resume, [], Ending())
    check_stream(resume, [], _ending())
    with pytest.raises(ContractError, match="sequence is 4 where 3 is next"):
        check_stream(resume, _answer()[4:], Ending())


def _drop(place: int) -> Callable[[Responses], Responses]:
    return lambda responses: _numbered([*responses[:place], *responses[place + 1 :]])


def _move(place: int, to: int) -> Callable[[Responses], Responses]:
    def change(responses: Responses) -> Responses:
        responses.insert(to, responses.pop(place))
        return _numbered(responses)

    return change


def _add(response: Response, place: int) -> Callable[[Responses], Responses]:
    def change(responses: Responses) -> Responses:
        responses.insert(place, response)
        return _numbered(responses)

    return change


def _set(change: Callable[[Responses], object]) -> Callable[[Responses], Responses]:
    def changed(responses: Responses) -> Responses:
        change(responses)
        return responses

    return changed


HEARTBEAT = Response(heartbeat=chat_pb.Heartbeat())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop(0), "contract 1: reasoning_delta came before started"),
        (_drop(2), "contract 2: the deltas' text is 'i', completed's 'Hi'"),
        (_move(2, 3), "contract 2: the deltas' text is 'iH'"),
        (_drop(1), "contract 2: the deltas' reasoning is ''"),
        (_drop(4), "contract 6: calls are executable, but the verdicts are"),
        (_drop(5), "contract 7: choice 0 has no choice_finished"),
        (_drop(6), "contract 7: the call ended OK without completed"),
        (_move(3, 4), "contract 4: text_delta came after a verdict"),
        (_move(3, 5), "contract 4: text_delta came after the choice's choice_finished"),
        (_move(5, 6), "contract 7: choice_finished came after completed|contract 7: choice 0 has no choice_finished"),
        (_add(HEARTBEAT, 7), "contract 7: heartbeat came after completed"),
        (_add(HEARTBEAT, 2), "a heartbeat came and none was asked for"),
        (_add(Response(), 2), "has no event that is known"),
        (_add(Response(started=chat_pb.Started()), 2), "contract 1: started came twice"),
        (_add(Response(usage_update=chat_pb.UsageUpdate()), 2), "a usage update came and none was asked for"),
        (_add(Response(choice_index=0, text_delta=chat_pb.TextDelta()), 2), "contract 2: an empty text_delta came"),
        (_set(lambda r: setattr(r[3], "sequence", 7)), "sequence is 7 where 3 is next"),
        (_set(lambda r: r[2].ClearField("choice_index")), "text_delta names no choice"),
        (_set(lambda r: setattr(r[0], "choice_index", 0)), "started names a choice"),
        (_set(lambda r: setattr(r[2].text_delta, "text", "x" * MAX_MESSAGE_BYTES)), "receives at most 4194304"),
        (_set(lambda r: setattr(r[4].tool_call_delta.tool_call, "arguments", "[1]")), "contract 4: .* are no object"),
        (_set(lambda r: setattr(r[4].tool_call_delta.tool_call, "arguments", "{")), "contract 4: .* not JSON"),
        (_set(lambda r: setattr(r[4].tool_call_delta.tool_call, "arguments", '{"a":NaN}')), "contract 4: .* not JSON"),
        (_set(lambda r: setattr(r[4].tool_call_delta, "tool_name", "rm")), "contract 4: .* has no such tool"),
        (_set(lambda r: setattr(r[4].tool_call_delta, "parse_status", FAILED)), "contract 4: call 0 is FAILED with"),
        (
            _set(lambda r: r[-1].completed.choices[0].message.ClearField("tool_calls")),
            "contract 6: calls are executable",
        ),
        (_set(lambda r: r[-1].completed.ClearField("choices")), r"contract 7: completed has choices \[\]"),
        (_set(lambda r: r[-1].completed.ClearField("usage")), "contract 9: completed has no usage"),
        (
            _set(lambda r: r[-1].completed.error.SetInParent()),
            "contract 6: calls are executable in an answer that ended",
        ),
        (
            _set(lambda r: setattr(r[-1].completed.choices[0], "engine_finish_reason", "stop")),
            "contract 7: choice_finished says",
        ),
        (
            _set(lambda r: setattr(r[-2].choice_finished, "engine_finish_reason", "length")),
            "contract 6: calls are executable, but the engine's finish reason is 'length'",
        ),
    ],
)
def test_a_broken_stream_is_named(change: Callable[[Responses], Responses], message: str) -> None:
    """Each breach of an answer that ends OK."""
    with pytest.raises(ContractError, match=message):
        check_stream(_request(), change(_answer()), Ending())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop(4), "contract 4: call 0 has a verdict, and was never STARTED|a fragment of call 0 came before STARTED"),
        (_drop(5), "contract 4: the fragments of call 0 are '\"Oslo\"}'"),
        (_move(5, 6), "contract 4: the fragments of call 0"),
        (_move(6, 7), "contract 4: the fragments of call 0"),
        (_set(lambda r: setattr(r[5].tool_call_delta, "arguments_fragment", "")), "contract 4: an empty fragment"),
        (
            _set(lambda r: setattr(r[4].tool_call_delta, "tool_name", "other")),
            "contract 4: call 0 was STARTED as 'other'",
        ),
    ],
)
def test_a_call_that_is_sent_in_fragments_is_checked(change: Callable[[Responses], Responses], message: str) -> None:
    """STARTED, fragments, verdict: in order and about the same call."""
    with pytest.raises(ContractError, match=message):
        check_stream(_incremental(), change(_answer(incremental=True)), Ending())


def test_fragments_come_only_if_asked_for() -> None:
    """ASSEMBLED has verdicts only."""
    with pytest.raises(ContractError, match="contract 4: STARTED came, but only verdicts were asked for"):
        check_stream(_request(), _answer(incremental=True), Ending())


def test_a_failure_after_started_has_completed_with_the_same_error() -> None:
    """Proxies lose the status; what is in `completed` stays."""
    with pytest.raises(ContractError, match="contract 7: ABORTED/UPSTREAM_ERROR after started, without completed"):
        check_stream(_request(), _faulted()[:-1], _ending())
    with pytest.raises(
        ContractError, match=r"contract 7: completed has the error UPSTREAM_ERROR \(10\), the call ABORTED/"
    ):
        check_stream(_request(), _faulted(), _ending(reason="UPSTREAM_TIMEOUT"))
    with pytest.raises(ContractError, match="contract 7: UPSTREAM_ERROR after started is INTERNAL, not ABORTED"):
        check_stream(_request(), _faulted(), _ending(13))
    with pytest.raises(
        ContractError, match="contract 7: the call ended with ABORTED/UPSTREAM_ERROR, but completed has no"
    ):
        check_stream(_request(), _answer(), _ending())
    with pytest.raises(
        ContractError, match="contract 7: the call ended OK, but completed has the error UPSTREAM_ERROR"
    ):
        check_stream(_request(), _faulted(), Ending())
    check_stream(_request(), _faulted()[:-1], _ending(14, "SLOW_CALLER"))
    check_stream(_request(), _faulted()[:-1], _ending(13, "INTERNAL"))


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        (Ending("UNKNOWN", "oh"), "UNKNOWN .'oh'. has no reason"),
        (Ending("UNAVAILABLE", "", _ending(13).trailers), "the status is UNAVAILABLE, its details have code 13"),
        (_ending(13, changes={fields.REASON_TRAILER: "X"}), "the reason is UPSTREAM_ERROR, in the plain trailer 'X'"),
        (_ending(13, changes={fields.REQUEST_ID: "q"}), "the request id is 'r', in the plain trailer 'q'"),
        (
            _ending(13, changes={fields.PUSHBACK_TRAILER: None}),
            "contract 1: grpc-retry-pushback-ms .* is None, not '-1'",
        ),
        (
            _ending(13, changes={fields.PUSHBACK_TRAILER: "1000"}),
            "contract 1: grpc-retry-pushback-ms .* is '1000', not '-1'",
        ),
        (_ending(), "contract 1: ABORTED/UPSTREAM_ERROR before started"),
        (Ending("INTERNAL", "", _ending(13).trailers, (("a", "b"),)), "contract 1: .* came after initial metadata"),
    ],
)
def test_a_broken_status_is_named(ending: Ending, message: str) -> None:
    """Of a stream that was refused, and of any other call."""
    with pytest.raises(ContractError, match=message):
        check_stream(_request(), [], ending)
    with pytest.raises(ContractError, match=message):
        check_failure(ending)


def test_the_pushback_is_the_delay_of_retry_info() -> None:
    """In milliseconds."""
    status = status_pb2.Status.FromString(dict(_ending(14).trailers)[fields.DETAILS_TRAILER])
    retry = any_pb2.Any()
    retry.Pack(error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(nanos=250_000_000)))
    status.details.append(retry)
    trailers = dict(_ending(14).trailers) | {fields.DETAILS_TRAILER: status.SerializeToString()}
    with pytest.raises(ContractError, match="is '-1', not '250'"):
        check_failure(Ending("UNAVAILABLE", "", tuple(trailers.items())))
    check_failure(Ending("UNAVAILABLE", "", tuple((trailers | {fields.PUSHBACK_TRAILER: "250"}).items())))


def test_a_whole_answer_is_checked() -> None:
    """As the stream's last message."""
    request = chat_pb.CreateChatCompletionRequest(chat=ask(tools=[tool()]))
    completed = _answer()[-1].completed
    response = chat_pb.CreateChatCompletionResponse(started=chat_pb.Started(), completed=completed)
    check_whole(request, response, Ending())
    check_whole(request, None, _ending())
    check_whole(request, None, Ending("CANCELLED", by_caller=True))
    with pytest.raises(ContractError, match="contract 7: the call ended OK without a completed answer"):
        check_whole(request, chat_pb.CreateChatCompletionResponse(), Ending())
    response.completed.error.SetInParent()
    with pytest.raises(ContractError, match="contract 7: the call ended OK, but completed has the error"):
        check_whole(request, response, Ending())
