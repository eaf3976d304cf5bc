"""Plain views of the API's messages: the one place where tests of the contract reach fields by their proto names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from google.rpc import error_details_pb2, status_pb2

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import error_reason_pb2, tool_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

DOMAIN = "deltawire.dev"
"""Of every ErrorInfo."""

REASON_TRAILER = "deltawire-reason"
DETAILS_TRAILER = "grpc-status-details-bin"
PUSHBACK_TRAILER = "grpc-retry-pushback-ms"
REQUEST_ID = "x-request-id"

StreamRequest = chat_pb.StreamChatCompletionRequest
Response = chat_pb.StreamChatCompletionResponse


@dataclass(frozen=True)
class Asked:
    """What a request asks for.

    Attributes:
        tools: The names of the tools that may be called.
        incremental: Whether calls are sent while they are written.
        heartbeats: Whether heartbeats may come.
        early_heartbeats: Whether they may come before `started`.
        usage_updates: Whether they may come.
        first_sequence: Of the first message.
        resumed: Whether it continues a retained stream: then nothing above is known.
    """

    tools: frozenset[str] = frozenset()
    incremental: bool = False
    heartbeats: bool = False
    early_heartbeats: bool = False
    usage_updates: bool = False
    first_sequence: int = 0
    resumed: bool = False


@dataclass(frozen=True)
class Call:
    """A message about a tool call, or a failed call in `completed`."""

    index: int
    call_id: str
    name: str
    status: str
    fragment: str
    arguments: str
    failure: str


@dataclass(frozen=True)
class End:
    """How a choice ended."""

    stop_reason: str
    engine_word: str
    executable: bool


@dataclass(frozen=True)
class Choice:
    """A choice of `completed`."""

    index: int
    text: str
    reasoning: str
    calls: tuple[tuple[str, str, str], ...]
    failed: tuple[Call, ...]
    end: End


@dataclass(frozen=True)
class Completed:
    """The last message."""

    choices: tuple[Choice, ...]
    messages_omitted: bool
    has_error: bool
    error_code: int
    error_reason: str
    usage: str


def chat_asked(chat: chat_pb.ChatRequest) -> Asked:
    """What a chat request asks for; as of a stream without options."""
    allowed = frozenset(chat.allowed_tools)
    return Asked(
        tools=frozenset(tool.name for tool in chat.tools if not allowed or tool.name in allowed),
        incremental=chat.tool_call_policy.streaming == chat_pb.ToolCallStreaming.TOOL_CALL_STREAMING_INCREMENTAL,
    )


def stream_asked(request: StreamRequest) -> Asked:
    """What a streamed request asks for."""
    if request.HasField("resume"):
        after = request.resume.last_sequence + 1 if request.resume.HasField("last_sequence") else 0
        return Asked(first_sequence=after, resumed=True)
    chat, options = chat_asked(request.chat), request.options
    return Asked(
        tools=chat.tools,
        incremental=chat.incremental,
        heartbeats=options.HasField("heartbeat_interval"),
        early_heartbeats=options.early_heartbeats,
        usage_updates=options.usage_updates,
    )


def kind(response: Response) -> str:
    """The event's arm; empty if none is set."""
    return response.WhichOneof("event") or ""


def sequence(response: Response) -> int:
    """Its number."""
    return response.sequence


def choice(response: Response) -> int | None:
    """The choice that it is about, if it is about one."""
    return response.choice_index if response.HasField("choice_index") else None


def text(response: Response) -> str:
    """The text of a `text_delta`."""
    return response.text_delta.text


def has_logprobs(response: Response) -> bool:
    """Whether a `text_delta` carries log-probabilities."""
    return bool(response.text_delta.logprobs or response.reasoning_delta.logprobs)


def reasoning(response: Response) -> str:
    """The text of a `reasoning_delta`."""
    return response.reasoning_delta.text


def call(response: Response) -> Call:
    """What a `tool_call_delta` says."""
    return _call(response.tool_call_delta)


def finished(response: Response) -> End:
    """What a `choice_finished` says."""
    return _end(response.choice_finished)


def completed(response: Response) -> Completed:
    """What a `completed` says."""
    return completed_of(response.completed)


def completed_of(message: chat_pb.Completed) -> Completed:
    """What the last event, or a whole answer, says."""
    return Completed(
        tuple(
            Choice(
                each.index,
                each.message.text,
                each.message.reasoning,
                tuple((call.call_id, call.tool_name, call.arguments) for call in each.message.tool_calls),
                tuple(map(_call, each.failed_tool_calls)),
                _end(each),
            )
            for each in message.choices
        ),
        message.messages_omitted,
        message.HasField("error"),
        message.error.code,
        error_reason_pb2.ErrorReason.Name(message.error.reason).removeprefix("ERROR_REASON_"),
        chat_pb.UsageProvenance.Name(message.usage.provenance).removeprefix("USAGE_PROVENANCE_"),
    )


def completion_id(responses: Iterable[Response]) -> str:
    """The id in `started`; empty if there is none."""
    return next((each.started.completion_id for each in responses if kind(each) == "started"), "")


@dataclass(frozen=True)
class Details:
    """What a failed call's trailers say.

    Attributes:
        code: Of `google.rpc.Status`; -1 without one.
        reason: Of ErrorInfo.
        domain: Of ErrorInfo.
        request_id: In ErrorInfo's metadata.
        retry_ms: RetryInfo's delay in milliseconds; `None` without one.
        reason_trailer: The plain trailer.
        request_id_trailer: The plain trailer.
        pushback: The plain trailer; `None` without one.
    """

    code: int = -1
    reason: str = ""
    domain: str = ""
    request_id: str = ""
    retry_ms: int | None = None
    reason_trailer: str = ""
    request_id_trailer: str = ""
    pushback: str | None = None


def details(trailers: Sequence[tuple[str, str | bytes]]) -> Details:
    """Take the trailers of a failed call apart."""
    by_name: Mapping[str, str | bytes] = dict(trailers)
    packed = by_name.get(DETAILS_TRAILER, b"")
    status = status_pb2.Status.FromString(packed if isinstance(packed, bytes) else packed.encode())
    info, retry_ms = error_details_pb2.ErrorInfo(), None
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            detail.Unpack(info)
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            retry_ms = retry.retry_delay.ToMilliseconds()
    pushback = by_name.get(PUSHBACK_TRAILER)
    return Details(
        status.code if packed else -1,
        info.reason,
        info.domain,
        info.metadata.get("request_id", ""),
        retry_ms,
        str(by_name.get(REASON_TRAILER, "")),
        str(by_name.get(REQUEST_ID, "")),
        None if pushback is None else str(pushback),
    )


def _call(delta: tool_pb2.ToolCallDelta) -> Call:
    status = tool_pb2.ToolCallParseStatus.Name(delta.parse_status).removeprefix("TOOL_CALL_PARSE_STATUS_")
    outcome = delta.WhichOneof("outcome")
    arguments = delta.tool_call.arguments if outcome == "tool_call" else delta.failure.raw_arguments
    failure = tool_pb2.ToolCallFailureReason.Name(delta.failure.reason).removeprefix("TOOL_CALL_FAILURE_REASON_")
    expected = {
        "STARTED": None,
        "IN_PROGRESS": "arguments_fragment",
        "SUCCEEDED": "tool_call",
        "FAILED": "failure",
    }
    fits = status in expected and outcome == expected[status]
    return Call(
        delta.index,
        delta.call_id,
        delta.tool_name,
        status if fits else f"{status} with {outcome}",
        delta.arguments_fragment,
        arguments,
        failure if outcome == "failure" else "",
    )


def _end(message: chat_pb.ChoiceFinished | chat_pb.Completed.Choice) -> End:
    return End(
        chat_pb.StopReason.Name(message.stop_reason).removeprefix("STOP_REASON_"),
        message.engine_finish_reason,
        message.tool_calls_executable,
    )
