"""A gateway that says what it is told to: a real gRPC server in this process, with a script for each call."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from deltawire.v1 import chat_completion_pb2 as chat
from deltawire.v1 import chat_completion_pb2_grpc as chat_grpc
from deltawire.v1 import model_registry_pb2 as registry
from deltawire.v1 import model_registry_pb2_grpc as registry_grpc
from deltawire.v1 import tool_pb2 as tools
from deltawire.v1.message_pb2 import AssistantMessage
from deltawire.v1.tool_pb2 import ToolCall, ToolCallDelta, ToolCallFailure

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Event: TypeAlias = chat.StreamChatCompletionResponse


@dataclass(frozen=True)
class Fail:
    """A status to end a call with; `trailers` None makes those that a gateway sends with this reason."""

    code: grpc.StatusCode
    reason: str = ""
    message: str = "it failed"
    metadata: dict[str, str] = field(default_factory=dict)
    violations: Sequence[tuple[str, str]] = ()
    retry_after: float | None = None
    trailers: tuple[tuple[str, str | bytes], ...] | None = None

    def trailing(self) -> tuple[tuple[str, str | bytes], ...]:
        """The trailers, details and all."""
        if self.trailers is not None:
            return self.trailers
        status = Status(code=self.code.value[0], message=self.message)
        details = [ErrorInfo(reason=self.reason, domain="deltawire.dev", metadata=self.metadata)]
        if self.violations:
            fields = [BadRequest.FieldViolation(field=path, description=text) for path, text in self.violations]
            details.append(BadRequest(field_violations=fields))
        if self.retry_after is not None:
            retry = RetryInfo()
            retry.retry_delay.FromMilliseconds(int(self.retry_after * 1000))
            details.append(retry)
        for detail in details:
            packed = AnyMessage()
            packed.Pack(detail)
            status.details.append(packed)
        return (("deltawire-reason", self.reason), ("grpc-status-details-bin", status.SerializeToString()))


@dataclass(frozen=True)
class Headers:
    """Initial metadata to send before what follows."""

    metadata: tuple[tuple[str, str | bytes], ...]


# A step of a script: send this, fail like this, call this, or wait.
Step: TypeAlias = Any


@dataclass
class Call:
    """A call as it arrived; `ended` is set when it is over on this side."""

    method: str
    request: Any
    metadata: dict[str, str | bytes]
    ended: threading.Event = field(default_factory=threading.Event)


class Gateway:
    """Plays one script per call, in order, and keeps the calls."""

    def __init__(self) -> None:
        self.target = ""
        self.calls: list[Call] = []
        self.arrived = threading.Event()
        self._scripts: deque[Sequence[Step]] = deque()
        self._release = threading.Event()
        for method in UNARY:
            setattr(self, method, functools.partial(self._unary, method))

    def will(self, *steps: Step) -> None:
        """Add the script of the next call that has none yet."""
        self._scripts.append(steps)

    @property
    def last(self) -> Call:
        """The latest call."""
        return self.calls[-1]

    def stop_waiting(self) -> None:
        """Let every script that waits go on."""
        self._release.set()

    def _play(self, method: str, request: Any, context: Any) -> Iterator[Any]:  # noqa: ANN401
        call = Call(method, request, {each.key: each.value for each in context.invocation_metadata()})
        context.add_callback(call.ended.set)
        self.calls.append(call)
        self.arrived.set()
        for step in self._scripts.popleft():
            if isinstance(step, Fail):
                context.set_trailing_metadata(step.trailing())
                context.abort(step.code, step.message)
            elif isinstance(step, Headers):
                context.send_initial_metadata(step.metadata)
            elif callable(step):
                step()
            elif step is WAIT:
                while context.is_active() and not self._release.wait(0.01):
                    pass
            else:
                yield step

    def StreamChatCompletion(self, request: Any, context: Any) -> Iterator[Event]:  # noqa: ANN401, N802
        yield from self._play("StreamChatCompletion", request, context)

    def WatchModels(self, request: Any, context: Any) -> Iterator[registry.WatchModelsResponse]:  # noqa: ANN401, N802
        yield from self._play("WatchModels", request, context)

    def _unary(self, method: str, request: Any, context: Any) -> Any:  # noqa: ANN401
        return next(self._play(method, request, context))


WAIT = object()
UNARY = {
    "CreateChatCompletion", "CancelChatCompletion", "GetChatCompletion", "ListChatCompletions",
    "CountTokens",
    "RegisterModel", "GetModel", "ListModels", "UpdateModel", "UnregisterModel", "RefreshModels",
    "ListProviders", "CheckProviderHealth",
}  # fmt: skip


class Replica(Gateway):
    """One of several gateway processes: it plays scripts for the completions that it knows, and refuses others.

    Args:
        known: The ids of its completions.
        refusal: What calls about other completions get.
    """

    def __init__(self, *known: str, refusal: Fail | None = None) -> None:
        super().__init__()
        self.known = set(known)
        self._refusal = refusal or Fail(grpc.StatusCode.FAILED_PRECONDITION, "WRONG_REPLICA", "another process has it")

    def _play(self, method: str, request: Any, context: Any) -> Iterator[Any]:  # noqa: ANN401
        about = getattr(request, "resume", request)
        if getattr(about, "completion_id", "") and about.completion_id not in self.known:
            self._scripts.appendleft([self._refusal])
        yield from super()._play(method, request, context)


@contextlib.contextmanager
def serve(
    address: str = "127.0.0.1:0", credentials: grpc.ServerCredentials | None = None, gateway: Gateway | None = None
) -> Iterator[Gateway]:
    """Serve a scripted gateway."""
    gateway = gateway or Gateway()
    server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
    chat_grpc.add_ChatCompletionServicer_to_server(cast("Any", gateway), server)
    registry_grpc.add_ModelRegistryServicer_to_server(cast("Any", gateway), server)
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    gateway.target = address if address.startswith("unix:") else f"127.0.0.1:{port}"
    server.start()
    try:
        yield gateway
    finally:
        gateway.stop_waiting()
        server.stop(None).wait()


# --- Events ----------------------------------------------------------------------------------------------------------


def numbered(*events: Event) -> list[Event]:
    """The events with their sequence numbers."""
    for sequence, event in enumerate(events):
        event.sequence = sequence
    return list(events)


def started(completion_id: str = "cmpl-1", model: str = "llama") -> Event:
    """The first event."""
    return Event(started=chat.Started(completion_id=completion_id, model=model, provider_id="vllm"))


def text(piece: str, choice: int = 0, logprobs: Sequence[chat.TokenLogprob] = ()) -> Event:
    """A piece of text."""
    return Event(choice_index=choice, text_delta=chat.TextDelta(text=piece, logprobs=logprobs))


def reasoning(piece: str, choice: int = 0) -> Event:
    """A piece of reasoning."""
    return Event(choice_index=choice, reasoning_delta=chat.ReasoningDelta(text=piece))


def called(call: ToolCall, index: int = 0, choice: int = 0) -> Event:
    """A verdict: this call parsed."""
    delta = ToolCallDelta(
        index=index,
        call_id=call.call_id,
        tool_name=call.tool_name,
        parse_status=tools.TOOL_CALL_PARSE_STATUS_SUCCEEDED,
        tool_call=call,
    )
    return Event(choice_index=choice, tool_call_delta=delta)


def call_failed(name: str, raw: str, index: int = 0, choice: int = 0) -> Event:
    """A verdict: the call cannot be executed, and this is what the model wrote."""
    failure = ToolCallFailure(
        reason=tools.TOOL_CALL_FAILURE_REASON_TRUNCATED, message="the answer\nwas cut", raw_arguments=raw
    )
    delta = ToolCallDelta(
        index=index,
        call_id=f"call_{index}",
        tool_name=name,
        parse_status=tools.TOOL_CALL_PARSE_STATUS_FAILED,
        failure=failure,
    )
    return Event(choice_index=choice, tool_call_delta=delta)


def call_piece(index: int = 0, name: str = "get_weather", fragment: str = "", choice: int = 0) -> Event:
    """A call that has begun, or with a fragment a piece of its arguments."""
    status = tools.TOOL_CALL_PARSE_STATUS_IN_PROGRESS if fragment else tools.TOOL_CALL_PARSE_STATUS_STARTED
    delta = ToolCallDelta(index=index, call_id=f"call_{index}", tool_name=name, parse_status=status)
    if fragment:
        delta.arguments_fragment = fragment
    return Event(choice_index=choice, tool_call_delta=delta)


def used(tokens: int) -> Event:
    """What the answer has cost so far."""
    usage = chat.Usage(prompt_tokens=3, completion_tokens=tokens, provenance=chat.USAGE_PROVENANCE_LOWER_BOUND)
    return Event(usage_update=chat.UsageUpdate(usage=usage))


def notice(message: str, field: str = "") -> Event:
    """Something that the caller should know."""
    return Event(notice=chat.Notice(kind=chat.NOTICE_KIND_ANOTHER_REPLICA, message=message, field=field))


def heartbeat() -> Event:
    """Nothing has happened."""
    return Event(heartbeat=chat.Heartbeat())


def finished(choice: int = 0, reason: str = "END_OF_TURN", **fields: Any) -> Event:  # noqa: ANN401
    """A choice's end; `reason` is a stop reason without its prefix."""
    value = chat.StopReason.Value(f"STOP_REASON_{reason}")
    return Event(choice_index=choice, choice_finished=chat.ChoiceFinished(stop_reason=value, **fields))


def choice(index: int = 0, said: str = "", reason: str = "END_OF_TURN", **fields: Any) -> chat.Completed.Choice:  # noqa: ANN401
    """What `Completed` says of a choice. `calls`, `thought` go into the message."""
    message = AssistantMessage(
        text=said or None,
        tool_calls=fields.pop("calls", ()),
        reasoning=fields.pop("thought", ""),
    )
    value = chat.StopReason.Value(f"STOP_REASON_{reason}")
    return chat.Completed.Choice(index=index, message=message, stop_reason=value, **fields)


def completed(*choices: chat.Completed.Choice, **fields: Any) -> Event:  # noqa: ANN401
    """The last event."""
    usage = chat.Usage(prompt_tokens=3, completion_tokens=5, provenance=chat.USAGE_PROVENANCE_EXACT)
    return Event(completed=chat.Completed(usage=usage, choices=choices, **fields))


def saying(*pieces: str, reason: str = "END_OF_TURN") -> list[Event]:
    """A whole stream of one choice that says this."""
    texts = [text(piece) for piece in pieces]
    end = choice(said="".join(pieces), reason=reason, engine_finish_reason="stop")
    return numbered(started(), *texts, finished(reason=reason), completed(end))


def calling(*calls: ToolCall, said: str = "") -> list[Event]:
    """A whole stream of one choice that makes these calls."""
    deltas = [called(call, index) for index, call in enumerate(calls)]
    end = choice(said=said, reason="END_OF_MESSAGE", calls=calls, tool_calls_executable=True)
    texts = [text(said)] if said else []
    close = finished(reason="END_OF_MESSAGE", tool_calls_executable=True)
    return numbered(started(), *texts, *deltas, close, completed(end))


def model(model_id: str, **fields: Any) -> registry.Model:  # noqa: ANN401
    """A registered LLM that is served, unless told otherwise."""
    values: dict[str, Any] = {
        "provider_id": "vllm",
        "provider_model_id": model_id.partition("/")[2] or model_id,
        "type": registry.MODEL_TYPE_LLM,
        "source": registry.MODEL_SOURCE_REGISTERED,
        "state": registry.MODEL_STATE_SERVING,
    }
    return registry.Model(id=model_id, **(values | fields))


def changed(kind: str, about: registry.Model, revision: str = "") -> registry.WatchModelsResponse:
    """A step of a watch, `kind` without its prefix; without a revision it belongs to a snapshot."""
    change = registry.WatchModelsResponse.Change.Value(f"CHANGE_{kind}")
    return registry.WatchModelsResponse(change=change, model=about, revision=revision)


def bookmark(revision: str) -> registry.WatchModelsResponse:
    """The step of a watch that is no change."""
    return registry.WatchModelsResponse(revision=revision, bookmark=True)
