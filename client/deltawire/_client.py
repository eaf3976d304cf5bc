"""The blocking client."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Self, TypeAlias, TypeVar, Unpack, cast
from weakref import WeakSet

import grpc

from deltawire._channel import DEFAULT_TARGET, CallOptions, ConnectOptions, Defaults, Outgoing, connection
from deltawire._completion import Answer, Resumption, StreamCalls, answer_of, text_of_event
from deltawire._errors import ProtocolError
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
    WatchModelsResponse,
)
from deltawire.v1.model_registry_pb2_grpc import ModelRegistryStub

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from types import TracebackType

    from grpc import _CallIterator

    from deltawire._failure import FailedCall
    from deltawire._tools.loop import OnError, ToolLike, ToolRun

Q = TypeVar("Q")
R = TypeVar("R")
Interceptor: TypeAlias = grpc.UnaryUnaryClientInterceptor | grpc.UnaryStreamClientInterceptor


class Client:
    """Talks to a gateway, one channel for all calls; close it, or use it in a `with` block.

    Any number of threads may share a client; a stream belongs to one thread at a time, and only its `cancel` may be
    called from others. A channel does not survive a fork: make the client in the child process.

    Args:
        target: A gRPC target: "host:port", "unix:/path", "dns:///name:port".
        channel: A channel of your own, used as it is; the client does not close it, and its retries, limits and TLS are
            up to you.
        interceptors: gRPC's own kind; the first is the outermost.
        options: See `ConnectOptions`.

    Raises:
        ValueError: A token would go over plaintext to another machine.

    Nothing is connected yet: the first call does that. Go on with `chat`, `models` and `providers`.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        channel: grpc.Channel | None = None,
        interceptors: Sequence[Interceptor] = (),
        **options: Unpack[ConnectOptions],
    ) -> None:
        end, defaults = connection(target, options, own_channel=channel is not None)
        self._owned: grpc.Channel | None = None
        if channel is None:
            if end.credentials is None:
                channel = grpc.insecure_channel(end.target, end.options)
            else:
                channel = grpc.secure_channel(end.target, end.credentials, end.options)
            self._owned = channel
        if interceptors:
            channel = grpc.intercept_channel(channel, *interceptors)
        registry = ModelRegistryStub(channel)
        self.chat = Chat(ChatCompletionStub(channel), defaults)
        self.models = Models(registry, defaults)
        self.providers = Providers(registry, defaults)

    def close(self) -> None:
        """Close the channel, unless it is your own. Calls that still run end as cancelled."""
        if self._owned is not None:
            # Those that pause between two calls would otherwise make the next one on a closed channel.
            for watch in tuple(self.models._watches):
                watch.cancel()
            for stream in tuple(self.chat._streams):
                stream.cancel()
            self._owned.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Chat:
    """Chats with a model."""

    def __init__(self, stub: ChatCompletionStub, defaults: Defaults) -> None:
        self._stub = stub
        self._defaults = defaults
        self._streams: WeakSet[ChatStream] = WeakSet()

    def create(self, messages: Messages | ChatRequest, **arguments: Unpack[ChatArguments]) -> Answer:
        """Ask, and wait for the whole answer.

        Args:
            messages: The conversation, or a whole `ChatRequest`.
            arguments: See `ChatOptions` and `CallOptions`.

        Raises:
            CallError: The call failed; see `deltawire._errors`.
            TypeError: An argument that does not exist.

        The answer's `message` goes into the history; if `tool_calls_executable`, run its `tool_calls` next.
        """
        chat, options = split_arguments(messages, arguments)
        outgoing = self._defaults.outgoing(options)
        response = _invoke(self._stub.CreateChatCompletion, CreateChatCompletionRequest(chat=chat), outgoing)
        return answer_of(response, outgoing.info)

    def stream(self, messages: Messages | ChatRequest, **arguments: Unpack[StreamArguments]) -> ChatStream:
        """Ask, and read the answer while it is generated. It takes what `create` takes, and how the stream is told.

        Args:
            messages: The conversation, or a whole `ChatRequest`.
            arguments: See `ChatOptions`, `TellingOptions` and `CallOptions`.

        Raises:
            TypeError: An argument that does not exist.

        The request is on its way when this returns; its errors come from reading. Use the stream in a `with` block:
        leaving it ends the call on both sides.

        With `retain_for` the gateway keeps the stream, and it goes on by itself, each event once, if the connection is
        lost, until nothing new has come for that long. Generation then ends by itself, by `soft_time_limit`, by
        `cancel_softly`, or when nobody has read for `retain_for`: leaving the block ends the call alone, and
        `resume` takes the stream up again. Without a `completion_id` one is made up, which nobody can guess.
        """
        request, options = split_streaming(messages, arguments)
        return self._going_on(ChatStream(self._stub, self._defaults, Resumption(request), options))

    def resume(
        self,
        completion_id: str,
        after_sequence: int | None = None,
        *,
        retain_for: Seconds = RESUME_FOR,
        **options: Unpack[CallOptions],
    ) -> ChatStream:
        """Read a stream that was asked for with `retain_for`, replayed and then live.

        Args:
            completion_id: Its id.
            after_sequence: The `sequence` of the last event that you have. None begins with the first.
            retain_for: For how long (seconds, or a `timedelta`) without anything new to go on by itself if the connection
                is lost; give what the stream was asked with.
            options: See `CallOptions`.

        Raises:
            ValueError: A length of time that is none.

        From the middle, `final()` gives what `completed` says of the answer; if its `messages_omitted` is set, only what
        came here; and after the last event, nothing.
        From reading come CompletionNotFoundError, CompletionGoneError and WrongReplicaError.
        """
        request, patience = resume_request(completion_id, after_sequence, retain_for)
        return self._going_on(ChatStream(self._stub, self._defaults, Resumption(request, patience), options))

    def cancel(self, completion_id: str, **options: Unpack[CallOptions]) -> CancelChatCompletionResponse:
        """End a completion softly: whoever reads it gets a normal end, with the text so far, and the usage.

        Raises:
            CompletionNotFoundError: There is none of this id.
            WrongReplicaError: Another gateway process has it.

        The `state` that comes back is the one before: one that had ended already is no error.
        """
        request = CancelChatCompletionRequest(completion_id=completion_id)
        return _invoke(self._stub.CancelChatCompletion, request, self._defaults.outgoing(options))

    def get(self, completion_id: str, **options: Unpack[CallOptions]) -> GetChatCompletionResponse:
        """How far a completion has come, what it has cost, and its result if that is retained.

        Raises:
            CompletionNotFoundError: There is none of this id, or it ended long ago.
            WrongReplicaError: Another gateway process has it.
        """
        request = GetChatCompletionRequest(completion_id=completion_id)
        return _invoke(self._stub.GetChatCompletion, request, self._defaults.outgoing(options))

    def count_tokens(self, messages: Messages | ChatRequest, **arguments: Unpack[ChatArguments]) -> CountTokensResponse:
        """How many tokens the prompt has that `create` would send; nothing is generated. It takes what `create` takes.

        Raises:
            NotSupportedByProviderError: The provider does not count.

        Read `prompt_tokens`, and `max_context_tokens` if it is there.
        """
        chat, options = split_arguments(messages, arguments)
        return _invoke(self._stub.CountTokens, CountTokensRequest(chat=chat), self._defaults.outgoing(options))

    def _going_on(self, stream: ChatStream) -> ChatStream:
        """Take note of a stream that goes on by itself: closing the client ends it."""
        if stream._resumption.is_retained:
            self._streams.add(stream)
        return stream

    def run_tools(
        self,
        messages: Messages | ChatRequest,
        *,
        tools: Iterable[ToolLike],
        max_rounds: int = 10,
        on_error: OnError = "raise",
        on_event: Callable[[StreamChatCompletionResponse], object] | None = None,
        **arguments: Unpack[ToolRunArguments],
    ) -> ToolRun:
        """Ask, run the functions that the model calls, tell it the results, and ask again, until it answers.

        A turn's calls are run only if all of them can be: else the model is told what was wrong with each, and none is run.
        The run also ends with an answer that was cut off, and with a call of a tool that is no function: then the calls in
        `run.answer` are yours to look at.

        Args:
            messages: The conversation, or a whole `ChatRequest`.
            tools: Functions, see `function_tool`; definitions alone are offered too.
            max_rounds: How often to ask.
            on_error: "raise" lets an exception in a function through; "tell" tells the model its type and message.
            on_event: Is called with every event of every answer as it comes.
            arguments: See `PlainChatOptions` and `CallOptions`. `timeout` is for each answer. A `tool_choice` that makes the
                model call is for the first round only: it would never answer.

        Raises:
            CallError: A call failed; see `deltawire._errors`.
            ToolRoundsExceededError: The model still called in the last round; its `run` has all that was said.
            TypeError: A function that cannot be a tool, or that has to be awaited.
            ValueError: Arguments that make no sense here: several choices, an id for one answer, two tools of one name.
        """
        request, options = split_arguments(messages, cast("ChatArguments", arguments))

        def ask(request: ChatRequest) -> Answer:
            if on_event is None:
                return self.create(request, **options)
            with self.stream(request, **options) as stream:
                for event in stream:
                    on_event(event)
                return stream.final()

        return shells.run(ToolLoop(request, tools, max_rounds=max_rounds, on_error=on_error), ask)


class ChatStream(StreamCalls):
    """An answer on its way: iterate over its events, over `text`, or go straight to `final()`.

    All three read the same stream, so what one has taken the others do not see again; `final()` always has everything.
    """

    def __init__(
        self, stub: ChatCompletionStub, defaults: Defaults, resumption: Resumption, options: CallOptions
    ) -> None:
        super().__init__(defaults, resumption, options)
        self._stub = stub
        self._stopped = threading.Event()
        self._rpc = self._call()

    def __iter__(self) -> Iterator[StreamChatCompletionResponse]:
        return self

    def __next__(self) -> StreamChatCompletionResponse:
        """The next event; branch on `event.WhichOneof("event")` and skip None, an event of a later version.

        Lost connections of a retained stream are waited out and noted in the log `deltawire`.

        Raises:
            CallError: The call failed. After a fault this comes after the `completed` event, which tells the same.
            ProtocolError: The gateway broke the rules of the stream; the call is cancelled.
        """
        while self._outcome is None:
            try:
                event = next(self._rpc)
            except StopIteration:
                self._outgoing.ended(self._rpc.trailing_metadata())
                self._go_on(None)
            except grpc.RpcError as error:
                self._go_on(cast("FailedCall", error))
            else:
                if self._take(event):
                    return event
        self._result()
        raise StopIteration

    @property
    def text(self) -> Iterator[str]:
        """The text of choice 0, piece by piece. Raises what iterating over events raises."""
        return (piece for event in self if (piece := text_of_event(event)))

    def final(self) -> Answer:
        """Read to the end.

        Raises:
            CallError: See `__next__`; its `answer` has what had come.

        Call it as often as you like: the stream is read once.
        """
        for _ in self:
            pass
        return self._result()

    def cancel(self) -> None:
        """End the call now, on both sides. Reading on raises `CallCancelledError`, unless the stream had ended.

        With `retain_for` the gateway goes on all the same: `cancel_softly` ends that, `Chat.resume` reads it.
        """
        self._cancelled()
        self._stopped.set()
        self._rpc.cancel()

    def cancel_softly(self) -> CancelChatCompletionResponse:
        """End generation now. Reading on gives the normal end: the text so far, STOP_REASON_CANCELLED, and the usage.

        Any thread may call it, as often as it likes.

        Raises:
            RuntimeError: The completion's id is not known: `started` has not come, and the request has no
                `completion_id`. Then nothing has been generated: `cancel()`.
            CallError: See `Chat.cancel`.

        What comes back says what it met, and what the completion had cost by then.
        """
        request, outgoing = self._softly()
        return _invoke(self._stub.CancelChatCompletion, request, outgoing)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def _call(self) -> _CallIterator[StreamChatCompletionResponse]:
        """Make a call."""
        return self._stub.StreamChatCompletion(self._begin(), **self._outgoing.arguments)

    def _go_on(self, failed: FailedCall | None) -> None:
        """Make the next call when it is time, unless the stream is over."""
        pause = self._end(failed)
        if pause is None or self._stopped.wait(pause):
            return
        try:
            self._rpc = self._call()
        except ValueError:
            # A channel of the caller's own, which has been closed meanwhile.
            self._cancelled()
            return
        # Another thread may have cancelled the call before.
        if self._stopped.is_set():
            self._rpc.cancel()

    def _take(self, event: StreamChatCompletionResponse) -> bool:
        """Take note of an event; whether it is to be handed on."""
        if not self._begun:
            self._begun = True
            self._outgoing.began(self._rpc.initial_metadata())
        try:
            return self._receive(event)
        except ProtocolError:
            self._rpc.cancel()
            raise


class Models:
    """Which models can be called, under which names."""

    def __init__(self, stub: ModelRegistryStub, defaults: Defaults) -> None:
        self._stub = stub
        self._defaults = defaults
        self._watches: WeakSet[ModelWatch] = WeakSet()

    def list(self, **arguments: Unpack[ListArguments]) -> ModelList:
        """All models by ascending id, or those that pass every filter, fetched page by page while you iterate.

        Args:
            arguments: See `ListOptions` and `CallOptions`; `timeout` is for each page.

        Raises:
            ValueError: There is no such type, state or source.

        Read `unreachable_provider_ids` when the listing is at its end.
        """
        request, options = split_listing(arguments)
        return ModelList(self._stub, self._defaults, request, options)

    def get(self, model_id: str, **options: Unpack[CallOptions]) -> Model:
        """One model, by any name that a chat request takes.

        Raises:
            ModelNotFoundError: There is none.
            ModelAmbiguousError: Several providers serve a model of this name.
        """
        outgoing = self._defaults.outgoing(options)
        return _invoke(self._stub.GetModel, GetModelRequest(model_id=model_id), outgoing).model

    def register(self, model: str | RegisterModelRequest, **arguments: Unpack[RegisterArguments]) -> Model:
        """Give a served model an id and aliases of your own; doing the same again changes nothing.

        Args:
            model: The id to call it by, or a whole request.
            arguments: See `RegisterOptions` and `CallOptions`.

        Raises:
            ModelAlreadyExistsError: The id or an alias belongs to another model.
            ModelNotServedError: The provider does not serve it.

        The model comes back as registered: its `id` is what to call it by.
        """
        request, options = split_registration(model, arguments)
        return _invoke(self._stub.RegisterModel, request, self._defaults.outgoing(options)).model

    def update(self, model: str | Model | UpdateModelRequest, **arguments: Unpack[UpdateArguments]) -> Model:
        """Change a registered model. What is not given stays, and calls under way are not touched.

        Args:
            model: Its id or an alias, to change it in any case; the `Model` as it was read, to change it only if nobody
                else has since; or a whole request.
            arguments: See `UpdateOptions` and `CallOptions`.

        Raises:
            EtagMismatchError: Somebody has changed it since; read it again, then decide again. After a lost connection
                that may have been this call.
            ModelNotFoundError: There is none.
            ModelDiscoveredError: It was never registered: a provider serves it.
            ModelAlreadyExistsError: An alias belongs to another model.
            ModelNotServedError: The provider does not serve what it is to lead to.
            TypeError: Nothing is to be changed.

        The model comes back as it is now, with the `etag` for the next change.
        """
        request, options = split_update(model, arguments)
        return _invoke(self._stub.UpdateModel, request, self._defaults.outgoing(options)).model

    def unregister(self, model_id: str, *, etag: str = "", **options: Unpack[CallOptions]) -> None:
        """Forget a registered model, by id or alias; with the `etag` that it had, only if nobody has changed it since.

        Raises:
            EtagMismatchError: Somebody has; read it again, then decide again.
            ModelNotFoundError: There is none; after a lost connection that may be because it is gone already.
            ModelDiscoveredError: It was never registered: a provider serves it.
        """
        request = UnregisterModelRequest(model_id=model_id, etag=etag)
        _invoke(self._stub.UnregisterModel, request, self._defaults.outgoing(options))

    def refresh(
        self, provider_id: str = "", **options: Unpack[CallOptions]
    ) -> Sequence[RefreshModelsResponse.Provider]:
        """List what a provider serves now, without waiting for its next turn; "" is all of them, by ascending id.

        Raises:
            ProviderNotFoundError: There is none of this name.

        One that cannot be listed is an answer and no error: look at each `error`, which is empty if all went well.
        """
        request = RefreshModelsRequest(provider_id=provider_id)
        return tuple(_invoke(self._stub.RefreshModels, request, self._defaults.outgoing(options)).providers)

    def watch(
        self, revision: str = "", *, known: Iterable[Model] | None = None, **options: Unpack[CallOptions]
    ) -> ModelWatch:
        """All models, and then every change to them as it happens, across lost connections, each told once.

        Args:
            revision: Go on after this revision of an earlier watch; "" begins with the models that there are.
            known: The models that you know from that watch. What has become of them is told as changes if the revision
                turns out to be gone, which ends the watch otherwise.
            options: See `CallOptions`. `timeout` is for the whole watch; None, also as the client's own, lets it go on.

        The request is on its way when this returns; its errors come from reading. Use the watch in a `with` block:
        leaving it ends the call on both sides.
        """
        watch = ModelWatch(self._stub, self._defaults, WatchState(revision, known), revision, options)
        self._watches.add(watch)
        return watch


class ModelList(ModelPages):
    """Iterates over models, fetching pages as they are needed."""

    def __init__(
        self, stub: ModelRegistryStub, defaults: Defaults, request: ListModelsRequest, options: CallOptions
    ) -> None:
        super().__init__(request)
        self._stub = stub
        self._defaults = defaults
        self._options = options

    def __iter__(self) -> Iterator[Model]:
        return self

    def __next__(self) -> Model:
        while not self._models:
            if self._request is None:
                raise StopIteration
            self._receive(_invoke(self._stub.ListModels, self._request, self._defaults.outgoing(self._options)))
        return self._models.popleft()


class ModelWatch(WatchCalls):
    """Changes to models, without an end: iterate over it, and look at what is a `ModelChange` or a `WatchBookmark`."""

    def __init__(
        self, stub: ModelRegistryStub, defaults: Defaults, state: WatchState, revision: str, options: CallOptions
    ) -> None:
        super().__init__(defaults, state, revision, options)
        self._stub = stub
        self._stopped = threading.Event()
        self._rpc = self._call()

    def __iter__(self) -> Iterator[WatchEvent]:
        return self

    def __next__(self) -> WatchEvent:
        """The next event, whenever it comes; lost connections are waited out and noted in the log `deltawire`.

        Raises:
            RevisionGoneError: The revision that `watch` was given is gone, and it was not told what is `known`. Watch
                again without one; what the new watch does not tell is gone.
            UnauthenticatedError, PermissionDeniedError, RequestError: Trying again would not mend it.
            InternalError: A defect of the gateway.
            DeadlineExceededError: The watch's own `timeout` passed.
            CallCancelledError: It was cancelled, or the client closed.
        """
        while self._error is None and not self._events:
            try:
                message = next(self._rpc)
            except StopIteration:
                self._go_on(None)
            except grpc.RpcError as error:
                self._go_on(cast("FailedCall", error))
            else:
                if not self._begun:
                    self._begun = True
                    self._outgoing.began(self._rpc.initial_metadata())
                self._receive(message)
        return self._event()

    def cancel(self) -> None:
        """End the watch now, on both sides. Reading on raises `CallCancelledError`, unless it was over before."""
        self._cancelled()
        self._stopped.set()
        self._rpc.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def _call(self) -> _CallIterator[WatchModelsResponse]:
        """Make a call."""
        return self._stub.WatchModels(self._begin(), **self._outgoing.arguments)

    def _go_on(self, failed: FailedCall | None) -> None:
        """Make the next call when it is time, unless the watch is over."""
        pause = self._end(failed)
        if pause is not None and not self._stopped.wait(pause):
            self._rpc = self._call()
            # Another thread may have cancelled the call before.
            if self._stopped.is_set():
                self._rpc.cancel()


class Providers:
    """The servers of models that the gateway's operator configured."""

    def __init__(self, stub: ModelRegistryStub, defaults: Defaults) -> None:
        self._stub = stub
        self._defaults = defaults

    def list(self, **options: Unpack[CallOptions]) -> Sequence[Provider]:
        """All of them, by ascending id."""
        outgoing = self._defaults.outgoing(options)
        return tuple(_invoke(self._stub.ListProviders, ListProvidersRequest(), outgoing).providers)

    def health(self, provider_id: str, **options: Unpack[CallOptions]) -> CheckProviderHealthResponse:
        """How a provider is; one that is down is an answer, `HEALTH_STATUS_ERROR`, and no error.

        Raises:
            ProviderNotFoundError: There is none of this name.
        """
        request = CheckProviderHealthRequest(provider_id=provider_id)
        return _invoke(self._stub.CheckProviderHealth, request, self._defaults.outgoing(options))


def _invoke(method: grpc.UnaryUnaryMultiCallable[Q, R], request: Q, outgoing: Outgoing) -> R:
    """Make a call with one answer.

    Raises:
        CallError: It failed.
    """
    try:
        response, call = method.with_call(request, **outgoing.arguments)
    except grpc.RpcError as error:
        # gRPC's exception is the call itself, which its type does not say.
        raise outgoing.error(cast("FailedCall", error)) from error
    outgoing.began(call.initial_metadata())
    outgoing.ended(call.trailing_metadata())
    return response
