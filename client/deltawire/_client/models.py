"""Which models there are, changes to them as they happen, and the servers that have them."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Self, Unpack

import grpc

from deltawire._client.call import invoke
from deltawire._errors import ClientClosedError
from deltawire._failure import failed_call
from deltawire._requests import (
    ListArguments,
    ModelPages,
    ProviderPages,
    RegisterArguments,
    UpdateArguments,
    split_listing,
    split_registration,
    split_update,
)
from deltawire._watch import WatchCalls, WatchEvent, WatchState
from deltawire.v1.model_registry_pb2 import (
    CheckProviderHealthRequest,
    CheckProviderHealthResponse,
    GetModelRequest,
    ListModelsRequest,
    Model,
    Provider,
    RefreshModelsRequest,
    RefreshModelsResponse,
    RegisterModelRequest,
    UnregisterModelRequest,
    UpdateModelRequest,
    WatchModelsResponse,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from types import TracebackType

    from grpc import _CallIterator

    from deltawire._channel import CallOptions, Defaults
    from deltawire._client.connections import Connections
    from deltawire._failure import FailedCall
    from deltawire.v1.model_registry_pb2_grpc import ModelRegistryStub


class Models:
    """Which models can be called, under which names."""

    def __init__(self, connections: Connections, defaults: Defaults) -> None:
        self._connections = connections
        self._stub = connections.main.registry
        self._defaults = defaults

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
        return invoke(self._stub.GetModel, GetModelRequest(model_id=model_id), outgoing).model

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
        return invoke(self._stub.RegisterModel, request, self._defaults.outgoing(options)).model

    def update(self, model: str | Model | UpdateModelRequest, **arguments: Unpack[UpdateArguments]) -> Model:
        """Change a registered model. What is not given stays, and calls under way are not touched.

        Args:
            model: Its id or an alias, to change it in any case; the `Model` as it was read, to change it only if it
                has not changed since; or a whole request.
            arguments: See `UpdateOptions` and `CallOptions`.

        Raises:
            EtagMismatchError: It was changed since that etag; read it again. After a lost connection
                that may have been this call.
            ModelNotFoundError: There is none.
            ModelDiscoveredError: It was never registered: a provider serves it.
            ModelAlreadyExistsError: An alias belongs to another model.
            ModelNotServedError: The provider does not serve what it is to lead to.
            TypeError: Nothing is to be changed.

        Returns the model after the change, with the `etag` for the next one.
        """
        request, options = split_update(model, arguments)
        return invoke(self._stub.UpdateModel, request, self._defaults.outgoing(options)).model

    def unregister(self, model_id: str, *, etag: str = "", **options: Unpack[CallOptions]) -> None:
        """Unregister a model, by id or alias; with the `etag` that it had, only if it has not changed since.

        Raises:
            EtagMismatchError: It has; read it again, then decide again.
            ModelNotFoundError: There is none; after a lost connection, the first attempt may have unregistered it.
            ModelDiscoveredError: It was never registered: a provider serves it.
        """
        request = UnregisterModelRequest(model_id=model_id, etag=etag)
        invoke(self._stub.UnregisterModel, request, self._defaults.outgoing(options))

    def refresh(
        self, provider_id: str = "", **options: Unpack[CallOptions]
    ) -> Sequence[RefreshModelsResponse.Provider]:
        """List what a provider serves now, without waiting for its next turn; "" is all of them, by ascending id.

        Raises:
            ProviderNotFoundError: There is none of this name.

        One that cannot be listed is an answer and no error: look at each `error`, which is empty if all went well.
        """
        request = RefreshModelsRequest(provider_id=provider_id)
        return tuple(invoke(self._stub.RefreshModels, request, self._defaults.outgoing(options)).providers)

    def watch(
        self, revision: str = "", *, known: Iterable[Model] | None = None, **options: Unpack[CallOptions]
    ) -> ModelWatch:
        """All models, and then every change to them as it happens, across lost connections, each once.

        Args:
            revision: Go on after this revision of an earlier watch; "" begins with the models that there are.
            known: The models that you know from that watch. If the gateway no longer has the revision, the watch
                returns how they differ from now as changes; without `known` it ends then.
            options: See `CallOptions`. `timeout` is for the whole watch; None, also as the client's own, lets it go on.

        The request is on its way when this returns; its errors come from reading. Use the watch in a `with` block:
        leaving it ends the call on both sides.
        """
        watch = ModelWatch(self._stub, self._defaults, WatchState(revision, known), revision, options)
        self._connections.add(watch)
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
            self._receive(invoke(self._stub.ListModels, self._request, self._defaults.outgoing(self._options)))
        return self._models.popleft()


class ModelWatch(WatchCalls):
    """Changes to models, without an end: iterate over it, and look at what is a `ModelChange` or a `WatchBookmark`."""

    def __init__(
        self, stub: ModelRegistryStub, defaults: Defaults, state: WatchState, revision: str, options: CallOptions
    ) -> None:
        super().__init__(defaults, state, revision, options)
        self._stub = stub
        self._stopped = threading.Event()
        self._rpc: _CallIterator[WatchModelsResponse]
        self._call()

    def __iter__(self) -> Iterator[WatchEvent]:
        return self

    def __next__(self) -> WatchEvent:
        """The next event, whenever it comes. A watch waits out lost connections, and logs each to `deltawire`.

        Raises:
            RevisionGoneError: The gateway no longer has the revision, and `known` was not given. Watch
                again without one; models that the new watch does not return no longer exist.
            UnauthenticatedError, PermissionDeniedError, RequestError: Trying again would fail in the same way.
            InternalError: A defect of the gateway.
            DeadlineExceededError: The watch's own `timeout` passed.
            CallCancelledError: It was cancelled; ClientClosedError if by closing the client.
        """
        while self._error is None and not self._events:
            try:
                message = next(self._rpc)
            except StopIteration:
                self._go_on(None)
            except (grpc.RpcError, ValueError) as error:
                self._go_on(failed_call(error))
            else:
                if not self._begun:
                    self._begun = True
                    self._outgoing.began(self._rpc.initial_metadata())
                self._receive(message)
        return self._event()

    def cancel(self) -> None:
        """End the watch now, on both sides. Reading on raises `CallCancelledError`, unless it was over before."""
        self._stop(is_closed=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def _close(self) -> None:
        """End the call because the client is closed."""
        self._stop(is_closed=True)

    def _stop(self, *, is_closed: bool) -> None:
        """End the watch and its call, from any thread."""
        self._cancelled(is_closed=is_closed)
        self._stopped.set()
        self._rpc.cancel()

    def _call(self) -> None:
        """Make a call.

        Raises:
            ClientClosedError: There is no channel for it; reading raises the same error.
        """
        request = self._begin()
        try:
            self._rpc = self._stub.WatchModels(request, **self._outgoing.arguments)
        except ValueError as error:
            self._end(failed_call(error))
            self._event()

    def _go_on(self, failed: FailedCall | None) -> None:
        """Make the next call when it is time, unless the watch is over."""
        pause = self._end(failed)
        if pause is not None and not self._stopped.wait(pause):
            with contextlib.suppress(ClientClosedError):
                self._call()
            # Another thread may have cancelled the previous call instead of this one.
            if self._stopped.is_set():
                self._rpc.cancel()


class Providers:
    """The servers of models that the gateway's operator configured."""

    def __init__(self, connections: Connections, defaults: Defaults) -> None:
        self._stub = connections.main.registry
        self._defaults = defaults

    def list(self, **options: Unpack[CallOptions]) -> Sequence[Provider]:
        """All of them, by ascending id, from as many pages as there are; `timeout` is for each page."""
        pages = ProviderPages()
        while pages.request is not None:
            pages.receive(invoke(self._stub.ListProviders, pages.request, self._defaults.outgoing(options)))
        return tuple(pages.providers)

    def health(self, provider_id: str, **options: Unpack[CallOptions]) -> CheckProviderHealthResponse:
        """How a provider is; one that is down is an answer, `HEALTH_STATUS_ERROR`, and no error.

        Raises:
            ProviderNotFoundError: There is none of this name.
        """
        request = CheckProviderHealthRequest(provider_id=provider_id)
        return invoke(self._stub.CheckProviderHealth, request, self._defaults.outgoing(options))
