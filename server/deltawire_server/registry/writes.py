"""Changes to what is registered: to the database first, and to memory when that has succeeded."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

from deltawire_server.registry.known import taken

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from deltawire_server.registry.known import Known
    from deltawire_server.registry.model import Model
    from deltawire_server.registry.store import Store

T = TypeVar("T")


class Writes:
    """The writes of a registry, one after the other and each as a whole.

    Args:
        store: Open before the first write, until `finish` has returned.
        known: What is in memory; from now on only this changes it.
    """

    def __init__(self, store: Store, known: Known) -> None:
        self._store = store
        self._known = known
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[object]] = set()

    async def insert(self, model: Model) -> Model:
        """Keep a model, with both times set; gives back the one that is kept, which may be another's of just now.

        Raises:
            RegistryError: MODEL_ALREADY_EXISTS, STORE_UNAVAILABLE.
        """
        return await self._to_the_end(self._insert(model))

    async def delete(self, name: str) -> bool:
        """Forget the model of this id or alias; whether there was one.

        Raises:
            RegistryError: STORE_UNAVAILABLE.
        """
        return await self._to_the_end(self._delete(name))

    async def finish(self) -> None:
        """Wait for the writes under way."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _insert(self, model: Model) -> Model:
        async with self._lock:
            # Someone may have been faster while the provider was asked.
            stored = self._known.same(model)
            if stored is not None:
                return stored
            if await self._store.insert(model):
                self._known.add(model)
                return model
            # The names were free in memory: another process on this database has registered in the meantime.
            self._known.load(await self._store.list())
            stored = self._known.same(model)
            if stored is not None:
                return stored
            raise taken(model.id, model.id, "or an alias belongs to a record that cannot be read")

    async def _delete(self, name: str) -> bool:
        async with self._lock:
            # The database decides: it may hold what another process registered, or a record too damaged for memory.
            deleted = await self._store.delete(name)
            known = self._known.find(name)
            if known is not None:
                self._known.remove(known)
            return deleted is not None or known is not None

    async def _to_the_end(self, write: Coroutine[object, object, T]) -> T:
        """Do a write as a whole even if its caller gives up: memory must not miss what the database has."""
        task = asyncio.create_task(write)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return await asyncio.shield(task)

    def _done(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            # Looked at here in case nobody waits any more.
            task.exception()
