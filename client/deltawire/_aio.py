"""The asynchronous client: the blocking one with `await` in it."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from typing import TYPE_CHECKING, Self, TypeVar, Unpack, cast
from weakref import WeakSet

import grpc
from grpc import aio

from deltawire._channel import DEFAULT_TARGET, CallOptions, ConnectOptions, Defaults, Outgoing, connection
from deltawire._completion import Answer, Resumption, StreamCalls, answer_of, text_of_event
from deltawire._errors import CallCancelledError, ProtocolError
from deltawire._failure import Failure
from deltawire._requests import (
    ChatArguments,
    ListArguments,
    Messages,
    ModelPages,
    RegisterArguments,
    StreamArguments,
    ToolRunArguments,
    UpdateArguments,
    resume_request,
    split_arguments,
    split_listing,
    split_registration,
    split_streaming,
    split_update,
)
from deltawire._tools import shells
from deltawire._tools.loop import ToolLoop
from deltawire._values import RESUME_FOR, Seconds
from deltawire._watch import WatchCalls, WatchEvent, WatchState
from deltawire.v1.chat_completion_pb2 import (
    CancelChatCompletionRequest,
    CancelChatCompletionResponse,
    ChatRequest,
    CountTokensRequest,
    CountTokensResponse,
    CreateChatCompletionRequest,
    GetChatCompletionRequest,
    GetChatCompletionResponse,
    StreamChatCompletionResponse,
)
from deltawire.v1.chat_completion_pb2_grpc import ChatCompletionStub
from deltawire.v1.model_registry_pb2 import (
    CheckProviderHealthRequest,
    CheckProviderHealthResponse,
    GetModelRequest,
    ListModelsRequest,
    ListProvidersRequest,
    Model,
    Provider,
    RefreshModelsRequest,
    RefreshModelsResponse,
    RegisterModelRequest,
    UnregisterModelRequest,
    UpdateModelRequest,
)
from deltawire.v1.model_registry_pb2_grpc import ModelRegistryStub

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence
    from types import TracebackType

    from deltawire._failure import FailedCall
    from deltawire._tools.loop import OnError, ToolLike, ToolRun
    from deltawire.v1.chat_completion_pb2_grpc import ChatCompletionAsyncStub
    from deltawire.v1.model_registry_pb2_grpc import ModelRegistryAsyncStub

Q = TypeVar("Q")
R = TypeVar("R")


class AsyncClient:
    """Talks to a gateway, one channel for all calls; close it, or use it in an `async with` block.

    Make it inside the event loop that will use it: it belongs to that loop and its thread. A channel does not survive
    a fork: make the client in the child process.

    Args:
        target: A gRPC target: "host:port", "unix:/path", "dns:///name:port".
        channel: A `grpc.aio` channel of your own, used as it is; the client does not close it, and its retries, limits,
            interceptors and TLS are up to you.
        interceptors: grpc.aio's own kind; the first is the outermost.
        options: See `ConnectOptions`.

    Raises:
        RuntimeError: No event loop is running.
        ValueError: A token would go over plaintext to another machine, or interceptors came with a channel.

    Nothing is connected yet: the first call does that. Go on with `chat`, `models` and `providers`.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        channel: aio.Channel | None = None,
        interceptors: Sequence[aio.ClientInterceptor] = (),
        **options: Unpack[ConnectOptions],
    ) -> None:
        asyncio.get_running_loop()
        end, defaults = connection(target, options, own_channel=channel is not None)
        self._owned: aio.Channel | None = None
        if channel is None:
            if end.credentials is None:
                channel = aio.insecure_channel(end.target, end.options, interceptors=interceptors)
            else:
                channel = aio.secure_channel(end.target, end.credentials, end.options, interceptors=interceptors)
            self._owned = channel
        elif interceptors:
            message = "grpc.aio takes interceptors when a channel is made: give them to yours"
            raise ValueError(message)
        registry = ModelRegistryStub(channel)
        self.chat = AsyncChat(ChatCompletionStub(channel), defaults)
        self.models = AsyncModels(registry, defaults)
        self.providers = AsyncProviders(registry, defaults)

    async def close(self) -> None:
        """Close the channel, unless it is your own. Calls that still run end as cancelled."""
        if self._owned is not None:
            # Those that pause between two calls would otherwise make the next one on a closed channel.
            for watch in tuple(self.models._watches):
                watch.cancel()
            for stream in tuple(self.chat._streams):
                stream.cancel()
            await self._owned.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class AsyncChat:
    """Chats with a model."""

    def __init__(self, stub: ChatCompletionAsyncStub, defaults: Defaults) -> None:
        self._stub = stub
        self._defaults = defaults
        self._streams: WeakSet[AsyncChatStream] = WeakSet()

    async def create(self, messages: Messages | ChatRequest, **arguments: Unpack[ChatArguments]) -> Answer:
        """Ask, and wait for the whole answer; see `Chat.create`. Cancelling the task cancels the call."""
        chat, options = split_arguments(messages, arguments)
        outgoing = self._defaults.outgoing(options)
        response = await _invoke(self._stub.CreateChatCompletion, CreateChatCompletionRequest(chat=chat), outgoing)
        return answer_of(response, outgoing.info)

    def stream(self, messages: Messages | ChatRequest, **arguments: Unpack[StreamArguments]) -> AsyncChatStream:
        """Ask, and read the answer while it is generated; see `Chat.stream`. No `await` here.

        Use the stream in an `async with` block: leaving it ends the call on both sides, which leaving an `async for`
        does not.
        """
        request, options = split_streaming(messages, arguments)
        return self._going_on(AsyncChatStream(self._stub, self._defaults, Resumption(request), options))

    def resume(
        self,
        completion_id: str,
        after_sequence: int | None = None,
        *,
        retain_for: Seconds = RESUME_FOR,
        **options: Unpack[CallOptions],
    ) -> AsyncChatStream:
        """Read a stream that was asked for with `retain_for`, replayed and then live; see `Chat.resume`. No `await` here."""
        request, patience = resume_request(completion_id, after_sequence, retain_for)
        return self._going_on(AsyncChatStream(self._stub, self._defaults, Resumption(request, patience), options))

    async def cancel(self, completion_id: str, **options: Unpack[CallOptions]) -> CancelChatCompletionResponse:
        """End a completion softly; see `Chat.cancel`."""
        request = CancelChatCompletionRequest(completion_id=completion_id)
        return await _invoke(self._stub.CancelChatCompletion, request, self._defaults.outgoing(options))

    async def get(self, completion_id: str, **options: Unpack[CallOptions]) -> GetChatCompletionResponse:
        """How far a completion has come, and its result if that is retained; see `Chat.get`."""
        request = GetChatCompletionRequest(completion_id=completion_id)
        return await _invoke(self._stub.GetChatCompletion, request, self._defaults.outgoing(options))

    async def count_tokens(
        self, messages: Messages | ChatRequest, **arguments: Unpack[ChatArguments]
    ) -> CountTokensResponse:
        """How many tokens the prompt has that `create` would send; see `Chat.count_tokens`."""
        chat, options = split_arguments(messages, arguments)
        outgoing = self._defaults.outgoing(options)
        return await _invoke(self._stub.CountTokens, CountTokensRequest(chat=chat), outgoing)

    def _going_on(self, stream: AsyncChatStream) -> AsyncChatStream:
        """Take note of a stream that goes on by itself: closing the client ends it."""
        if stream._resumption.is_retained:
            self._streams.add(stream)
        return stream

    async def run_tools(
        self,
        messages: Messages | ChatRequest,
        *,
        tools: Iterable[ToolLike],
        max_rounds: int = 10,
        on_error: OnError = "raise",
        on_event: Callable[[StreamChatCompletionResponse], object] | None = None,
        **arguments: Unpack[ToolRunArguments],
    ) -> ToolRun:
        """Ask, run the functions that the model calls, and ask again, until it answers; see `Chat.run_tools`.

        The calls of a turn are run at the same time: functions with `async` here, others in threads. `on_event` may have to
        be awaited. Cancelling the task cancels the call and the functions, but a thread runs on to its end.
        """
        request, options = split_arguments(messages, cast("ChatArguments", arguments))

        async def ask(request: ChatRequest) -> Answer:
            if on_event is None:
                return await self.create(request, **options)
            async with self.stream(request, **options) as stream:
                async for event in stream:
                    if inspect.isawaitable(waiting := on_event(event)):
                        await waiting
                return await stream.final()

        return await shells.run_async(ToolLoop(request, tools, max_rounds=max_rounds, on_error=on_error), ask)


class AsyncChatStream(StreamCalls):
    """An answer on its way: iterate over its events, over `text`, or go straight to `final()`.

    All three read the same stream, so what one has taken the others do not see again; `final()` always has everything.
    """

    def __init__(
        self, stub: ChatCompletionAsyncStub, defaults: Defaults, resumption: Resumption, options: CallOptions
    ) -> None:
        super().__init__(defaults, resumption, options)
        self._stub = stub
        self._stopped = asyncio.Event()
        self._call()

    def __aiter__(self) -> AsyncIterator[StreamChatCompletionResponse]:
        return self

    async def __anext__(self) -> StreamChatCompletionResponse:
        """The next event; see `ChatStream.__next__`. Cancelling the task cancels the call."""
        while self._outcome is None:
            try:
                event = await self._read()
            except asyncio.CancelledError:
                self._cancelled()
                if _task_is_cancelled():
                    raise
            else:
                if event is not None:
                    return event
        self._result()
        raise StopAsyncIteration

    @property
    def text(self) -> AsyncIterator[str]:
        """The text of choice 0, piece by piece. Raises what iterating over events raises."""
        return (piece async for event in self if (piece := text_of_event(event)))

    async def final(self) -> Answer:
        """Read to the end; see `ChatStream.final`."""
        async for _ in self:
            pass
        return self._result()

    def cancel(self) -> None:
        """End the call now, on both sides; see `ChatStream.cancel`."""
        self._cancelled()
        self._stopped.set()
        self._rpc.cancel()

    async def cancel_softly(self) -> CancelChatCompletionResponse:
        """End generation now, and let the stream end normally; see `ChatStream.cancel_softly`."""
        request, outgoing = self._softly()
        return await _invoke(self._stub.CancelChatCompletion, request, outgoing)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def _call(self) -> None:
        """Make a call."""
        self._rpc = self._stub.StreamChatCompletion(self._begin(), **self._outgoing.arguments)
        self._events = self._rpc.__aiter__()

    async def _read(self) -> StreamChatCompletionResponse | None:
        """Wait for an event, or for the next call; None if there is no event to hand on."""
        try:
            event = await anext(self._events)
        except StopAsyncIteration:
            self._outgoing.ended(await self._rpc.trailing_metadata())
            await self._go_on(None)
        except aio.AioRpcError as error:
            await self._go_on(error)
        else:
            if await self._take(event):
                return event
        return None

    async def _go_on(self, failed: FailedCall | None) -> None:
        """Make the next call when it is time, unless the stream is over."""
        pause = self._end(failed)
        if pause is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await self._stopped.wait()
        if self._stopped.is_set():
            return
        try:
            self._call()
        except aio.UsageError:
            # A channel of the caller's own, which has been closed meanwhile.
            self._cancelled()

    async def _take(self, event: StreamChatCompletionResponse) -> bool:
        """Take note of an event; whether it is to be handed on."""
        if not self._begun:
            self._begun = True
            self._outgoing.began(await self._rpc.initial_metadata())
        try:
            return self._receive(event)
        except ProtocolError:
            self._rpc.cancel()
            raise


class AsyncModels:
    """Which models can be called, under which names."""

    def __init__(self, stub: ModelRegistryAsyncStub, defaults: Defaults) -> None:
        self._stub = stub
        self._defaults = defaults
        self._watches: WeakSet[AsyncModelWatch] = WeakSet()

    def list(self, **arguments: Unpack[ListArguments]) -> AsyncModelList:
        """All models by ascending id, or those that pass, for `async for`; see `Models.list`. No `await` here."""
        request, options = split_listing(arguments)
        return AsyncModelList(self._stub, self._defaults, request, options)

    async def get(self, model_id: str, **options: Unpack[CallOptions]) -> Model:
        """One model; see `Models.get`."""
        request = GetModelRequest(model_id=model_id)
        return (await _invoke(self._stub.GetModel, request, self._defaults.outgoing(options))).model

    async def register(self, model: str | RegisterModelRequest, **arguments: Unpack[RegisterArguments]) -> Model:
        """Give a served model an id and aliases of your own; see `Models.register`."""
        request, options = split_registration(model, arguments)
        return (await _invoke(self._stub.RegisterModel, request, self._defaults.outgoing(options))).model

    async def update(self, model: str | Model | UpdateModelRequest, **arguments: Unpack[UpdateArguments]) -> Model:
        """Change a registered model; see `Models.update`."""
        request, options = split_update(model, arguments)
        return (await _invoke(self._stub.UpdateModel, request, self._defaults.outgoing(options))).model

    async def unregister(self, model_id: str, *, etag: str = "", **options: Unpack[CallOptions]) -> None:
        """Forget a registered model; see `Models.unregister`."""
        request = UnregisterModelRequest(model_id=model_id, etag=etag)
        await _invoke(self._stub.UnregisterModel, request, self._defaults.outgoing(options))

    async def refresh(
        self, provider_id: str = "", **options: Unpack[CallOptions]
    ) -> Sequence[RefreshModelsResponse.Provider]:
        """List what a provider serves now; see `Models.refresh`."""
        request = RefreshModelsRequest(provider_id=provider_id)
        outgoing = self._defaults.outgoing(options)
        return tuple((await _invoke(self._stub.RefreshModels, request, outgoing)).providers)

    def watch(
        self, revision: str = "", *, known: Iterable[Model] | None = None, **options: Unpack[CallOptions]
    ) -> AsyncModelWatch:
        """All models, and then every change to them as it happens, each told once; see `Models.watch`. No `await` here.

        Use the watch in an `async with` block: leaving it ends the call on both sides, which leaving an `async for` does
        not.
        """
        watch = AsyncModelWatch(self._stub, self._defaults, WatchState(revision, known), revision, options)
        self._watches.add(watch)
        return watch


class AsyncModelList(ModelPages):
    """Iterates over models, fetching pages as they are needed."""

    def __init__(
        self, stub: ModelRegistryAsyncStub, defaults: Defaults, request: ListModelsRequest, options: CallOptions
    ) -> None:
        super().__init__(request)
        self._stub = stub
        self._defaults = defaults
        self._options = options

    def __aiter__(self) -> AsyncIterator[Model]:
        return self

    async def __anext__(self) -> Model:
        while not self._models:
            if self._request is None:
                raise StopAsyncIteration
            outgoing = self._defaults.outgoing(self._options)
            self._receive(await _invoke(self._stub.ListModels, self._request, outgoing))
        return self._models.popleft()


class AsyncModelWatch(WatchCalls):
    """Changes to models, without an end: iterate over it, and look at what is a `ModelChange` or a `WatchBookmark`."""

    def __init__(
        self, stub: ModelRegistryAsyncStub, defaults: Defaults, state: WatchState, revision: str, options: CallOptions
    ) -> None:
        super().__init__(defaults, state, revision, options)
        self._stub = stub
        self._stopped = asyncio.Event()
        self._call()

    def __aiter__(self) -> AsyncIterator[WatchEvent]:
        return self

    async def __anext__(self) -> WatchEvent:
        """The next event; see `ModelWatch.__next__`. Cancelling the task ends the watch."""
        try:
            while self._error is None and not self._events:
                await self._read()
        except asyncio.CancelledError:
            self.cancel()
            if _task_is_cancelled():
                raise
        return self._event()

    def cancel(self) -> None:
        """End the watch now, on both sides. Reading on raises `CallCancelledError`, unless it was over before."""
        self._cancelled()
        self._stopped.set()
        self._rpc.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def _call(self) -> None:
        """Make a call."""
        self._rpc = self._stub.WatchModels(self._begin(), **self._outgoing.arguments)
        self._messages = self._rpc.__aiter__()

    async def _read(self) -> None:
        """Wait for a message, or for the next call."""
        try:
            message = await anext(self._messages)
        except StopAsyncIteration:
            await self._go_on(None)
        except aio.AioRpcError as error:
            await self._go_on(error)
        else:
            if not self._begun:
                self._begun = True
                self._outgoing.began(await self._rpc.initial_metadata())
            self._receive(message)

    async def _go_on(self, failed: FailedCall | None) -> None:
        """Make the next call when it is time, unless the watch is over."""
        pause = self._end(failed)
        if pause is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await self._stopped.wait()
        if not self._stopped.is_set():
            self._call()


class AsyncProviders:
    """The servers of models that the gateway's operator configured."""

    def __init__(self, stub: ModelRegistryAsyncStub, defaults: Defaults) -> None:
        self._stub = stub
        self._defaults = defaults

    async def list(self, **options: Unpack[CallOptions]) -> Sequence[Provider]:
        """All of them, by ascending id."""
        outgoing = self._defaults.outgoing(options)
        return tuple((await _invoke(self._stub.ListProviders, ListProvidersRequest(), outgoing)).providers)

    async def health(self, provider_id: str, **options: Unpack[CallOptions]) -> CheckProviderHealthResponse:
        """How a provider is; see `Providers.health`."""
        request = CheckProviderHealthRequest(provider_id=provider_id)
        return await _invoke(self._stub.CheckProviderHealth, request, self._defaults.outgoing(options))


async def _invoke(method: aio.UnaryUnaryMultiCallable[Q, R], request: Q, outgoing: Outgoing) -> R:
    """Make a call with one answer.

    Raises:
        CallError: It failed.
    """
    call = method(request, **outgoing.arguments)
    try:
        response = await call
    except aio.AioRpcError as error:
        raise outgoing.error(error) from error
    except asyncio.CancelledError:
        if _task_is_cancelled():
            raise
        failure = Failure(grpc.StatusCode.CANCELLED, "the client was closed", request_id=outgoing.info.request_id)
        raise CallCancelledError(failure) from None
    outgoing.began(await call.initial_metadata())
    outgoing.ended(await call.trailing_metadata())
    return response


def _task_is_cancelled() -> bool:
    """Whether it is this task that is being cancelled, and not only its call: gRPC raises the same for both."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0
