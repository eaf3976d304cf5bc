"""Shared by the tests of several gateways: calls to a gateway, and watches of its models."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from grpc import aio

from deltawire import AsyncClient, WatchBookmark
from deltawire.v1 import model_registry_pb2 as pb
from deltawire.v1.model_registry_pb2 import ModelSource
from deltawire.v1.model_registry_pb2_grpc import ModelRegistryStub
from tests.support.gateway import WAIT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from deltawire.v1.model_registry_pb2_grpc import ModelRegistryAsyncStub
    from tests.support.gateway_process import GatewayProcess

SERVED = ("llama", "qwen", "mistral", "phi")
"""The models of the fake vLLM."""

Seen = tuple[str, str, str]
"""A change for comparison: its kind, the id, and the etag, which is empty for a discovered model."""


@dataclass(frozen=True)
class Gateway:
    """A gateway process, with a stub and a client."""

    process: GatewayProcess
    stub: ModelRegistryAsyncStub
    client: AsyncClient

    async def models(self) -> dict[str, pb.Model]:
        """All models, by id."""
        return {model.id: model async for model in self.client.models.list(timeout=WAIT)}


@asynccontextmanager
async def connected(process: GatewayProcess) -> AsyncIterator[Gateway]:
    """Connect to a serving gateway, and wait for the first listing of its provider, which changes the states of models."""
    async with aio.insecure_channel(process.address) as channel, AsyncClient(process.address) as client:
        gateway = Gateway(process, ModelRegistryStub(channel), client)
        # One that was killed and is back is not tried again at once by channels that share its address.
        [provider] = await client.models.refresh(wait_for_ready=True, timeout=WAIT)
        assert provider.model_count == len(SERVED)
        yield gateway


@dataclass
class Folded:
    """The models according to a watch; each event is checked against the events before it.

    Attributes:
        models: By id, after the last event.
        changes: The changes after the snapshot, in order.
    """

    models: dict[str, pb.Model] = field(default_factory=dict)
    changes: list[Seen] = field(default_factory=list)
    complete: bool = False
    _more: asyncio.Event = field(default_factory=asyncio.Event)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until the received events fulfill a condition."""
        async with asyncio.timeout(WAIT):
            while not condition():
                self._more.clear()
                await self._more.wait()

    async def until_present(self, model_id: str, etag: str = "") -> pb.Model:
        """Wait until there is a model of this id, with this etag if one is given."""
        await self.until(lambda: model_id in self.models and etag in ("", self.models[model_id].etag))
        return self.models[model_id]

    async def until_state(self, model_id: str, state: pb.ModelState.ValueType) -> None:
        """Wait until there is a model of this id in this state."""
        await self.until(lambda: model_id in self.models and self.models[model_id].state == state)

    async def until_removed(self, model_id: str) -> None:
        """Wait until there is no model of this id."""
        await self.until(lambda: model_id not in self.models)

    def bookmark(self) -> None:
        """Take a bookmark."""
        self.complete = True
        self._more.set()

    def change(self, change: str, model: pb.Model) -> None:
        """Take a change.

        Raises:
            AssertionError: It contradicts the events before it: one was lost, repeated or reordered.
        """
        before = self.models.get(model.id)
        if change == "ADDED":
            assert before is None, f"{model.id} is added twice"
            self.models[model.id] = model
        elif change == "MODIFIED":
            assert before is not None, f"{model.id} was never added"
            assert before != model, f"{model.id} is modified without a difference"
            self.models[model.id] = model
        else:
            assert change == "REMOVED"
            assert before == model, f"{model.id} was removed with other contents"
            del self.models[model.id]
        if self.complete:
            self.changes.append((change, model.id, model.etag))
        self._more.set()


@asynccontextmanager
async def following(follow: Callable[[Folded], Coroutine[Any, Any, None]]) -> AsyncIterator[Folded]:
    """Watch from the end of the snapshot to the end of the block; an error of the watch fails `until`."""
    folded = Folded()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(follow(folded))
        await folded.until(lambda: folded.complete)
        yield folded
        task.cancel()


def raw_watch(stub: ModelRegistryAsyncStub) -> Callable[[Folded], Coroutine[Any, Any, None]]:
    """A watch through the stub; its revisions must be consecutive."""

    async def follow(folded: Folded) -> None:
        last = ""
        async for step in stub.WatchModels(pb.WatchModelsRequest()):
            if step.bookmark or folded.complete:
                assert not last or step.revision == (last if step.bookmark else _next(last))
                last = step.revision
            else:
                assert not step.revision, "a snapshot has to be seen whole"
            if step.bookmark:
                folded.bookmark()
            else:
                folded.change(pb.WatchModelsResponse.Change.Name(step.change).removeprefix("CHANGE_"), step.model)

    return follow


def _next(revision: str) -> str:
    process, _, place = revision.rpartition("-")
    return f"{process}-{int(place) + 1}"


def client_watch(client: AsyncClient) -> Callable[[Folded], Coroutine[Any, Any, None]]:
    """A watch of the client, which resumes by itself after a restart of the gateway."""

    async def follow(folded: Folded) -> None:
        async with client.models.watch() as watch:
            async for event in watch:
                if isinstance(event, WatchBookmark):
                    folded.bookmark()
                else:
                    folded.change(event.change, event.model)

    return follow


def registered(models: dict[str, pb.Model]) -> dict[str, pb.Model]:
    """The registered models."""
    return {each: model for each, model in models.items() if model.source == ModelSource.MODEL_SOURCE_REGISTERED}
