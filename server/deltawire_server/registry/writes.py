"""Changes to what is registered: to the database first, and to memory when that has succeeded."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

from deltawire_server.registry.registered_index import taken
from deltawire_server.registry.store import Change, ChangeKind

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from deltawire_server.registry.change_log_reader import ChangeLogReader
    from deltawire_server.registry.model import Model
    from deltawire_server.registry.registered_index import RegisteredIndex
    from deltawire_server.registry.store import Store

T = TypeVar("T")

UNREADABLE = "unregister that one first, or choose another name"
"""What to do about a record that is damaged: it cannot be updated."""


class Writes:
    """The writes of a registry, one after the other and each as a whole.

    Args:
        store: Open before the first write, until `finish` has returned.
        known: What is in memory.
        follower: Brings the writes into it.
    """

    def __init__(self, store: Store, known: RegisteredIndex, follower: ChangeLogReader) -> None:
        self._store = store
        self._known = known
        self._follower = follower
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[object]] = set()

    async def insert(self, model: Model) -> Model:
        """Keep a model, with both times set; gives back the one that is kept, which may be another's of just now.

        Raises:
            RegistryError: MODEL_ALREADY_EXISTS, STORE_UNAVAILABLE.
        """
        return await self._to_the_end(self._insert(model))

    async def update(self, model: Model) -> Model | None:
        """Put a model in the place of the one of the same id and revision; `None` if others have changed that meanwhile.

        Raises:
            RegistryError: MODEL_ALREADY_EXISTS, STORE_UNAVAILABLE.
        """
        return await self._to_the_end(self._update(model))

    async def delete(self, name: str, revision: int | None = None) -> bool:
        """Forget the model of this id or alias; whether there was one, of this revision if one is given.

        Raises:
            RegistryError: STORE_UNAVAILABLE.
        """
        return await self._to_the_end(self._delete(name, revision))

    async def finish(self) -> None:
        """Wait for the writes under way."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _insert(self, model: Model) -> Model:
        async with self._lock:
            revision = -1
            while revision != self._follower.revision:
                # Someone may have been faster while the provider was asked.
                stored = self._known.same(model)
                if stored is not None:
                    return stored
                revision = self._follower.revision
                kept = await self._store.insert(model)
                if kept is not None:
                    await self._follower.applied(Change(kept.revision, ChangeKind.ADDED, kept.id, kept))
                    return kept
                # The names were free in memory: another process has registered meanwhile, and may have unregistered since.
                await self._follower.catch_up()
            raise taken(model.id, model.id, "or an alias belongs to a record that cannot be read", UNREADABLE)

    async def _update(self, model: Model) -> Model | None:
        async with self._lock:
            revision = -1
            while revision != self._follower.revision:
                if not self._is_current(model):
                    return None
                self._known.free(model)
                revision = self._follower.revision
                kept = await self._store.update(model)
                if kept is not None:
                    await self._follower.applied(Change(kept.revision, ChangeKind.MODIFIED, kept.id, kept))
                    return kept
                # Another process has changed the model or has taken a name meanwhile, and may have given it up since.
                await self._follower.catch_up()
            raise taken(
                model.id, model.id, "cannot have an alias that belongs to a record that cannot be read", UNREADABLE
            )

    def _is_current(self, model: Model) -> bool:
        """Whether a model is unchanged in memory; otherwise its names must not be compared with those of others."""
        known = self._known.models.get(model.id)
        return known is not None and known.revision == model.revision

    async def _delete(self, name: str, revision: int | None) -> bool:
        async with self._lock:
            # The database decides: it may hold what another process registered, or a record too damaged for memory.
            change = await self._store.delete(name, revision)
            if change is not None:
                await self._follower.applied(change)
                return True
            # Memory may hold what another process has just removed or changed.
            await self._follower.catch_up()
            return False

    async def _to_the_end(self, write: Coroutine[object, object, T]) -> T:
        """Complete a write even if its caller is cancelled, so that memory has every change of the database."""
        task = asyncio.create_task(write)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return await asyncio.shield(task)

    def _done(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            # Retrieve the exception so that asyncio does not log it if the caller was cancelled.
            task.exception()
