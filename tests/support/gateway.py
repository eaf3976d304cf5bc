"""A whole gateway in this process, and what its callers see: messages, and failures taken apart."""

from __future__ import annotations

import asyncio
import io
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc import aio

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import chat_completion_pb2_grpc, message_pb2, model_registry_pb2, model_registry_pb2_grpc, tool_pb2
from deltawire_server.app import Gateway
from deltawire_server.settings import (
    AccessSettings,
    LimitsSettings,
    MetricsSettings,
    ProviderSettings,
    RegistrySettings,
    RetentionSettings,
    ServerSettings,
    Settings,
    StreamSettings,
    UsageSettings,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
    from pathlib import Path

    from google.protobuf.message import Message

WAIT = 30.0
"""Seconds after which something that was waited for has not happened. Never reached by a test that passes."""

Events = list[chat_pb.StreamChatCompletionResponse]
StreamCall = aio.UnaryStreamCall[chat_pb.StreamChatCompletionRequest, chat_pb.StreamChatCompletionResponse]


def settings_of(
    base_url: str,
    folder: Path,
    *,
    server: Mapping[str, Any] | None = None,
    stream: Mapping[str, Any] | None = None,
    provider: Mapping[str, Any] | None = None,
    access: Mapping[str, Any] | None = None,
    retention: Mapping[str, Any] | None = None,
    usage: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    limits: Mapping[str, Any] | None = None,
) -> Settings:
    """Settings of a gateway on a free port before one provider, named vllm, that does not dally when it stops."""
    return Settings(
        # Tests keep the process busy, and most of them expect a message for each delta.
        server=ServerSettings(**{"listen": "127.0.0.1:0", "drain_delay": 0, "max_adaptive_delay": 0, **(server or {})}),
        access=AccessSettings(**(access or {})),
        stream=StreamSettings(**(stream or {})),
        retention=RetentionSettings(**(retention or {})),
        # Most tests of a full gateway expect that it refuses a call at once.
        limits=LimitsSettings(**{"queue_size": 0, **(limits or {})}),
        # Not verified for plain HTTP, where nothing is, since the system's authorities take long to load.
        providers={
            "vllm": ProviderSettings(
                **{"base_url": base_url, "tls_verify": base_url.startswith("https:"), **(provider or {})}
            )
        },
        registry=RegistrySettings(database_url=f"sqlite:///{folder}/registry.db"),
        usage=UsageSettings(**(usage or {})),
        # Many gateways run beside each other.
        metrics=MetricsSettings(**{"listen": "off", **(metrics or {})}),
    )


@dataclass
class Running:
    """A gateway that serves, and stubs of its services on one channel."""

    gateway: Gateway
    channel: aio.Channel

    @property
    def address(self) -> str:
        """Where it listens."""
        return self.gateway.addresses[0]

    @property
    def chat(self) -> chat_completion_pb2_grpc.ChatCompletionAsyncStub:
        """The ChatCompletion service."""
        return chat_completion_pb2_grpc.ChatCompletionStub(self.channel)

    @property
    def models(self) -> model_registry_pb2_grpc.ModelRegistryAsyncStub:
        """The ModelRegistry service."""
        return model_registry_pb2_grpc.ModelRegistryStub(self.channel)

    def stream(
        self,
        chat: chat_pb.ChatRequest | None = None,
        *,
        options: chat_pb.StreamOptions | None = None,
        metadata: tuple[tuple[str, str], ...] = (),
        timeout: float | None = None,
    ) -> StreamCall:
        """Begin a streamed completion."""
        request = chat_pb.StreamChatCompletionRequest(chat=ask() if chat is None else chat, options=options)
        return self.chat.StreamChatCompletion(request, metadata=metadata, timeout=timeout)

    def resume(
        self, completion_id: str, after: int | None = None, *, metadata: tuple[tuple[str, str], ...] = ()
    ) -> StreamCall:
        """Resume a retained stream."""
        start = chat_pb.ResumePoint(completion_id=completion_id, last_sequence=after)
        return self.chat.StreamChatCompletion(chat_pb.StreamChatCompletionRequest(resume=start), metadata=metadata)

    async def cancel(
        self, completion_id: str, caller: str = "", *, metadata: tuple[tuple[str, str], ...] = ()
    ) -> chat_pb.CancelChatCompletionResponse:
        """End a completion softly."""
        request = chat_pb.CancelChatCompletionRequest(completion_id=completion_id, caller=caller)
        return await self.chat.CancelChatCompletion(request, metadata=metadata)

    async def list(
        self,
        *,
        metadata: tuple[tuple[str, str], ...] = (),
        **fields: Any,  # noqa: ANN401 (of the request)
    ) -> chat_pb.ListChatCompletionsResponse:
        """List completions."""
        return await self.chat.ListChatCompletions(chat_pb.ListChatCompletionsRequest(**fields), metadata=metadata)

    async def look_up(
        self, completion_id: str, caller: str = "", *, metadata: tuple[tuple[str, str], ...] = ()
    ) -> chat_pb.GetChatCompletionResponse:
        """Look up a completion."""
        request = chat_pb.GetChatCompletionRequest(completion_id=completion_id, caller=caller)
        return await self.chat.GetChatCompletion(request, metadata=metadata)

    async def create(
        self, chat: chat_pb.ChatRequest | None = None, *, metadata: tuple[tuple[str, str], ...] = ()
    ) -> chat_pb.CreateChatCompletionResponse:
        """Send a unary request."""
        request = chat_pb.CreateChatCompletionRequest(chat=ask() if chat is None else chat)
        return await self.chat.CreateChatCompletion(request, metadata=metadata)


@asynccontextmanager
async def running(settings: Settings, *, options: tuple[tuple[str, int], ...] = ()) -> AsyncIterator[Running]:
    """Run a gateway, with a channel to the first address it listens on."""
    async with Gateway(settings) as gateway, aio.insecure_channel(gateway.addresses[0], options=options) as channel:
        yield Running(gateway, channel)


def ask(text: str = "hi", **fields: Any) -> chat_pb.ChatRequest:  # noqa: ANN401 (whatever the message takes)
    """A chat request with one user message for the model that `FakeVllm` serves."""
    fields.setdefault("model", "fake")
    fields.setdefault("messages", [user(text)])
    return chat_pb.ChatRequest(**fields)


def user(*texts: str) -> message_pb2.ChatMessage:
    """A user's message."""
    content = [message_pb2.ContentPart(text=text) for text in texts]
    return message_pb2.ChatMessage(user=message_pb2.UserMessage(content=content))


def tool(name: str = "get_weather", **fields: Any) -> tool_pb2.Tool:  # noqa: ANN401 (whatever the message takes)
    """A tool with one argument, unless `fields` say otherwise."""
    fields.setdefault("input_schema", '{"type":"object","properties":{"city":{"type":"string"}},"required":["city"]}')
    return tool_pb2.Tool(name=name, **fields)


@dataclass
class Failure:
    """The failure of a call, as its caller receives it.

    Attributes:
        code: The status code.
        message: The status message.
        status: `google.rpc.Status` from the trailers.
        trailers: All of them, by name.
        initial: Initial metadata, by name; empty if none came.
        reason: From ErrorInfo.
        domain: From ErrorInfo.
        metadata: From ErrorInfo.
        fields: The fields that BadRequest blames.
        retry_seconds: From RetryInfo; `None` without it.
        quota: Whether there is a QuotaFailure.
        resource: From ResourceInfo; `None` without it.
    """

    code: grpc.StatusCode
    message: str
    status: status_pb2.Status
    trailers: Mapping[str, str | bytes]
    initial: Mapping[str, str | bytes]
    reason: str = ""
    domain: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    fields: list[str] = field(default_factory=list)
    retry_seconds: float | None = None
    quota: bool = False
    resource: str | None = None


def taken_apart(error: aio.AioRpcError) -> Failure:
    """The status of a failed call and of its trailers, which must be equal."""
    trailers = dict(error.trailing_metadata() or ())
    packed = trailers.get("grpc-status-details-bin")
    assert isinstance(packed, bytes), f"a failure without details: {error.code().name}: {error.details()}"
    status = status_pb2.Status.FromString(packed)
    failure = Failure(error.code(), error.details() or "", status, trailers, dict(error.initial_metadata() or ()))
    for detail in status.details:
        message = _unpacked(detail.TypeName().rpartition(".")[2], detail.value)
        match message:
            case error_details_pb2.ErrorInfo():
                failure.reason, failure.domain = message.reason, message.domain
                failure.metadata = dict(message.metadata)
            case error_details_pb2.BadRequest():
                failure.fields = [violation.field for violation in message.field_violations]
            case error_details_pb2.RetryInfo():
                failure.retry_seconds = message.retry_delay.ToTimedelta().total_seconds()
            case error_details_pb2.QuotaFailure():
                failure.quota = True
            case error_details_pb2.ResourceInfo():
                failure.resource = message.resource_name
    assert status.code == failure.code.value[0]
    assert status.message == failure.message
    assert failure.domain == "deltawire.dev"
    assert failure.reason == trailers["deltawire-reason"]
    assert failure.metadata["request_id"] == trailers["x-request-id"]
    return failure


def _unpacked(name: str, value: bytes) -> Message:
    message: Message = getattr(error_details_pb2, name).FromString(value)
    return message


async def failure_of(call: Awaitable[object]) -> Failure:
    """The failure of a unary call that must fail."""
    try:
        await call
    except aio.AioRpcError as error:
        return taken_apart(error)
    raise AssertionError("the call did not fail")


async def read(call: StreamCall) -> tuple[Events, Failure | None]:
    """All messages of a stream, and how it failed if it did."""
    events: Events = []
    try:
        async with asyncio.timeout(WAIT):
            async for event in call:
                events.append(event)
    except aio.AioRpcError as error:
        return events, taken_apart(error)
    return events, None


async def read_well(call: StreamCall) -> Events:
    """All messages of a stream that must not fail."""
    events, failure = await read(call)
    assert failure is None, failure
    return events


async def read_badly(call: StreamCall) -> tuple[Events, Failure]:
    """All messages of a stream that must fail, and how."""
    events, failure = await read(call)
    assert failure is not None
    return events, failure


def kinds(events: Events) -> list[str]:
    """The kind of each event, in order."""
    return [event.WhichOneof("event") or "" for event in events]


def text_of(events: Events, choice: int = 0) -> str:
    """The text of one choice, from its deltas."""
    return "".join(event.text_delta.text for event in events if event.choice_index == choice)


class Lines(io.StringIO):
    """Takes log lines in JSON; what is logged can be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[dict[str, Any]] = []
        self._more = asyncio.Event()

    def write(self, text: str) -> int:
        """Take one entry."""
        self.entries.append(json.loads(text))
        self._more.set()
        return super().write(text)

    async def find(self, event: str, **values: object) -> dict[str, Any]:
        """Wait for the first entry of this event with these values."""

        def fits(entry: dict[str, Any]) -> bool:
            return entry["event"] == event and all(entry.get(key) == value for key, value in values.items())

        async with asyncio.timeout(WAIT):
            while not (found := [entry for entry in self.entries if fits(entry)]):
                self._more.clear()
                await self._more.wait()
        return found[0]


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something holds that nothing announces: a state of the operating system's or of grpc's own."""
    async with asyncio.timeout(WAIT):
        while not condition():  # noqa: ASYNC110 (nothing announces it)
            await asyncio.sleep(0.005)


async def until_refused(gateway: Running) -> None:
    """Call until a call is refused: by us with DRAINING, or by grpc, which closes the connection in that moment."""
    code = grpc.StatusCode.OK
    while code is grpc.StatusCode.OK:
        try:
            await gateway.models.ListProviders(model_registry_pb2.ListProvidersRequest())
        except aio.AioRpcError as error:
            code = error.code()
    assert code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
