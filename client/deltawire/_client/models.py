"""The models, changes to them as they happen, and the providers that serve them."""

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
    """The models that can be called, and their registered names."""

    def __init__(self, connections: Connections, defaults: Defaults) -> None:
        self._connections = connections
        self._stub = connections.main.registry
        self._defaults = defaults

    def list(self, **arguments: Unpack[ListArguments]) -> ModelList:
        """All models by ascending id, or those that match every filter, fetched page by page while you iterate.

        Args:
            arguments: See `ListOptions` and `CallOptions`; `timeout` is for each page.

        Raises:
            ValueError: There is no such type, state or source.

        Iterating raises CallError. After the last model, read `unreachable_provider_ids`.
        """
        request, options = split_listing(arguments)
        return ModelList(self._stub, self._defaults, request, options)

    def get(self, model_id: str, **options: Unpack[CallOptions]) -> Model:
        """One model, by any name that a chat request takes.

        Raises:
            ModelNotFoundError: No model has this name.
            ModelAmbiguousError: Several providers serve a model of this name.

        Pass the model to `update` to change it only if it has not changed since.
        """
        outgoing = self._defaults.outgoing(options)
        return invoke(self._stub.GetModel, GetModelRequest(model_id=model_id), outgoing).model

    def register(self, model: str | RegisterModelRequest, **arguments: Unpack[RegisterArguments]) -> Model:
        """Register a served model under an id and aliases of your own. An identical registration has no effect.

        Args:
            model: The new id, or a whole request.
            arguments: See `RegisterOptions` and `CallOptions`.

        Raises:
            ModelAlreadyExistsError: The id or an alias belongs to another model.
            ModelNotServedError: The provider does not serve it.
            RegistryFullError: The registry has no room for it.
            TypeError, ValueError: An argument does not exist or cannot be sent.

        Returns the registered model. Use its `id`, or an alias, as the `model` of requests.
        """
        request, options = split_registration(model, arguments)
        return invoke(self._stub.RegisterModel, request, self._defaults.outgoing(options)).model

    def update(self, model: str | Model | UpdateModelRequest, **arguments: Unpack[UpdateArguments]) -> Model:
        """Change a registered model. Fields that are not given are kept, and running calls are not affected.

        Args:
            model: Its id or an alias, to change it in any case; the `Model` that was read, to change it only if it
                has not changed since; or a whole request.
            arguments: See `UpdateOptions` and `CallOptions`.

        Raises:
            EtagMismatchError: It has changed since it had that etag; read it again. After a lost connection, the first
                attempt of this call may have changed it.
            ModelNotFoundError: No model has this id or alias.
            ModelDiscoveredError: It was discovered, not registered; register it first.
            ModelAlreadyExistsError: An alias belongs to another model.
            ModelNotServedError: The provider does not serve the new `provider_model_id`.
            TypeError: There is nothing to change.

        Returns the model after the change, with the `etag` for the next one.
        """
        request, options = split_update(model, arguments)
        return invoke(self._stub.UpdateModel, request, self._defaults.outgoing(options)).model

    def unregister(self, model_id: str, *, etag: str = "", **options: Unpack[CallOptions]) -> None:
        """Unregister a model, by id or alias; with an `etag`, only if the model still has it.

        Raises:
            EtagMismatchError: It has changed; read it again, then decide again.
            ModelNotFoundError: No model has this name; after a lost connection, the first attempt may have unregistered it.
            ModelDiscoveredError: It was discovered, not registered.
        """
        request = UnregisterModelRequest(model_id=model_id, etag=etag)
        invoke(self._stub.UnregisterModel, request, self._defaults.outgoing(options))

    def refresh(
        self, provider_id: str = "", **options: Unpack[CallOptions]
    ) -> Sequence[RefreshModelsResponse.Provider]:
        """List the models of a provider now, or of all providers, by ascending id, if it is "".

        Raises:
            ProviderNotFoundError: No provider has this id.

        A provider that cannot be listed raises nothing: check the `error` of each, which is empty on success.
        """
        request = RefreshModelsRequest(provider_id=provider_id)
        return tuple(invoke(self._stub.RefreshModels, request, self._defaults.outgoing(options)).providers)

    def watch(
        self, revision: str = "", *, known: Iterable[Model] | None = None, **options: Unpack[CallOptions]
    ) -> ModelWatch:
        """All models, and then every change to them as it happens, across lost connections, each once.

        Args:
            revision: Continue after this revision of an earlier watch; "" begins with all existing models.
            known: The models that you know from that watch. If the gateway no longer has the revision, the watch returns
                the differences from now as changes; without `known` it then raises RevisionGoneError.
            options: See `CallOptions`. `timeout` is for the whole watch; the client's own does not apply to it.

        Raises:
            TypeError, ValueError: An option does not exist or cannot be sent.

        This returns when the request is sent; reading raises the errors of the call. Use the watch in a `with` block:
        leaving it ends the call on both sides.
        """
        watch = ModelWatch(self._stub, self._defaults, WatchState(revision, known), revision, options)
        self._connections.add(watch)
        return watch


class ModelList(ModelPages):
    """Iterates over models, and fetches each page when it is needed; see `Models.list`."""

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
    """Changes to models, without an end: iterate over it, and branch on `ModelChange` and `WatchBookmark`."""

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
        """Wait for the next event. A watch resumes after lost connections, and logs each to `deltawire`.

        Raises:
            RevisionGoneError: The gateway no longer has the revision, and `known` was not given. Watch
                again without one; models that the new watch does not return no longer exist.
            UnauthenticatedError, PermissionDeniedError, RequestError: A retry would fail in the same way.
            InternalError: A defect of the gateway.
            DeadlineExceededError: The watch's own `timeout` passed.
            CallCancelledError: It was canceled; ClientClosedError if by closing the client.
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
        """End the watch now, on both sides. Reading then raises `CallCancelledError`, unless it had ended already."""
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
            # Another thread may have canceled the previous call instead of this one.
            if self._stopped.is_set():
                self._rpc.cancel()


class Providers:
    """The providers that the gateway's operator configured."""

    def __init__(self, connections: Connections, defaults: Defaults) -> None:
        self._stub = connections.main.registry
        self._defaults = defaults

    def list(self, **options: Unpack[CallOptions]) -> Sequence[Provider]:
        """All providers by ascending id, from all pages; `timeout` is for each page. Raises CallError."""
        pages = ProviderPages()
        while pages.request is not None:
            pages.receive(invoke(self._stub.ListProviders, pages.request, self._defaults.outgoing(options)))
        return tuple(pages.providers)

    def health(self, provider_id: str, **options: Unpack[CallOptions]) -> CheckProviderHealthResponse:
        """Check a provider's health now. A failed check raises nothing: its `status` is `HEALTH_STATUS_ERROR`.

        Raises:
            ProviderNotFoundError: No provider has this id.

        Branch on `status`; `message` has the problem, and `engine` what answers at the provider's addresses.
        """
        request = CheckProviderHealthRequest(provider_id=provider_id)
        return invoke(self._stub.CheckProviderHealth, request, self._defaults.outgoing(options))
