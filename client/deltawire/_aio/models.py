"""The models, changes to them as they happen, and the providers that serve them."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Self, Unpack

from grpc import aio

from deltawire._aio.call import invoke, pause, task_is_cancelled
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
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence
    from types import TracebackType

    from deltawire._aio.connections import Connections
    from deltawire._channel import CallOptions, Defaults
    from deltawire._failure import FailedCall
    from deltawire.v1.model_registry_pb2_grpc import ModelRegistryAsyncStub


class AsyncModels:
    """The models that can be called, and their registered names."""

    def __init__(self, connections: Connections, defaults: Defaults) -> None:
        self._connections = connections
        self._stub = connections.main.registry
        self._defaults = defaults

    def list(self, **arguments: Unpack[ListArguments]) -> AsyncModelList:
        """All models by ascending id, or those that match, for `async for`; see `Models.list`. No `await` here."""
        request, options = split_listing(arguments)
        return AsyncModelList(self._stub, self._defaults, request, options)

    async def get(self, model_id: str, **options: Unpack[CallOptions]) -> Model:
        """One model; see `Models.get`."""
        request = GetModelRequest(model_id=model_id)
        return (await invoke(self._stub.GetModel, request, self._defaults.outgoing(options))).model

    async def register(self, model: str | RegisterModelRequest, **arguments: Unpack[RegisterArguments]) -> Model:
        """Register a served model under an id and aliases of your own; see `Models.register`."""
        request, options = split_registration(model, arguments)
        return (await invoke(self._stub.RegisterModel, request, self._defaults.outgoing(options))).model

    async def update(self, model: str | Model | UpdateModelRequest, **arguments: Unpack[UpdateArguments]) -> Model:
        """Change a registered model; see `Models.update`."""
        request, options = split_update(model, arguments)
        return (await invoke(self._stub.UpdateModel, request, self._defaults.outgoing(options))).model

    async def unregister(self, model_id: str, *, etag: str = "", **options: Unpack[CallOptions]) -> None:
        """Unregister a model; see `Models.unregister`."""
        request = UnregisterModelRequest(model_id=model_id, etag=etag)
        await invoke(self._stub.UnregisterModel, request, self._defaults.outgoing(options))

    async def refresh(
        self, provider_id: str = "", **options: Unpack[CallOptions]
    ) -> Sequence[RefreshModelsResponse.Provider]:
        """List the models of a provider, or of all, now; see `Models.refresh`."""
        request = RefreshModelsRequest(provider_id=provider_id)
        outgoing = self._defaults.outgoing(options)
        return tuple((await invoke(self._stub.RefreshModels, request, outgoing)).providers)

    def watch(
        self, revision: str = "", *, known: Iterable[Model] | None = None, **options: Unpack[CallOptions]
    ) -> AsyncModelWatch:
        """All models, and then every change to them as it happens, each once; see `Models.watch`. No `await` here.

        Use the watch in an `async with` block: leaving it ends the call on both sides, which leaving an `async for` does
        not.
        """
        watch = AsyncModelWatch(self._stub, self._defaults, WatchState(revision, known), revision, options)
        self._connections.add(watch)
        return watch


class AsyncModelList(ModelPages):
    """Iterates over models, and fetches each page when it is needed; see `Models.list`."""

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
            self._receive(await invoke(self._stub.ListModels, self._request, outgoing))
        return self._models.popleft()


class AsyncModelWatch(WatchCalls):
    """Changes to models, without an end: iterate over it, and branch on `ModelChange` and `WatchBookmark`."""

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
        """The next event; see `ModelWatch.__next__`. Canceling the task ends the watch."""
        try:
            while self._error is None and not self._events:
                await self._read()
        except asyncio.CancelledError:
            # gRPC raises this too for a call that it ends because its channel is closed.
            self._stop(is_closed=not task_is_cancelled())
            if task_is_cancelled():
                raise
        return self._event()

    def cancel(self) -> None:
        """End the watch now, on both sides; see `ModelWatch.cancel`."""
        self._stop(is_closed=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def _close(self) -> None:
        """End the call because the client is closed."""
        self._stop(is_closed=True)

    def _stop(self, *, is_closed: bool) -> None:
        """End the watch and its call."""
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
            self._messages = self._rpc.__aiter__()
        except aio.UsageError as error:
            self._end(failed_call(error))
            self._event()

    async def _read(self) -> None:
        """Wait for a message, or for the next call."""
        try:
            message = await anext(self._messages)
        except StopAsyncIteration:
            await self._go_on(None)
        except (aio.AioRpcError, aio.UsageError) as error:
            await self._go_on(failed_call(error))
        else:
            if not self._begun:
                self._begun = True
                self._outgoing.began(await self._rpc.initial_metadata())
            self._receive(message)

    async def _go_on(self, failed: FailedCall | None) -> None:
        """Make the next call when it is time, unless the watch is over."""
        seconds = self._end(failed)
        if seconds is None:
            return
        await pause(seconds, self._stopped)
        if not self._stopped.is_set():
            with contextlib.suppress(ClientClosedError):
                self._call()


class AsyncProviders:
    """The providers that the gateway's operator configured."""

    def __init__(self, connections: Connections, defaults: Defaults) -> None:
        self._stub = connections.main.registry
        self._defaults = defaults

    async def list(self, **options: Unpack[CallOptions]) -> Sequence[Provider]:
        """All providers by ascending id; see `Providers.list`."""
        pages = ProviderPages()
        while pages.request is not None:
            pages.receive(await invoke(self._stub.ListProviders, pages.request, self._defaults.outgoing(options)))
        return tuple(pages.providers)

    async def health(self, provider_id: str, **options: Unpack[CallOptions]) -> CheckProviderHealthResponse:
        """Check a provider's health now; see `Providers.health`."""
        request = CheckProviderHealthRequest(provider_id=provider_id)
        return await invoke(self._stub.CheckProviderHealth, request, self._defaults.outgoing(options))
