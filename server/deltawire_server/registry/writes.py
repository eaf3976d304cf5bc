"""Writes registrations: to the database first, then to memory."""

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
"""The remedy for a damaged record, which cannot be updated."""


class Writes:
    """The writes of a registry, one at a time. A write completes even if its caller is canceled.

    Args:
        store: The store, open until `finish` has returned.
        known: The registered models in memory.
        follower: Applies the writes to memory.
    """

    def __init__(self, store: Store, known: RegisteredIndex, follower: ChangeLogReader) -> None:
        self._store = store
        self._known = known
        self._follower = follower
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[object]] = set()

    async def insert(self, model: Model) -> Model:
        """Insert a model with both times; return the stored one, which may be an equal one of a concurrent call.

        Raises:
            RegistryError: MODEL_ALREADY_EXISTS, REGISTRY_FULL, STORE_UNAVAILABLE.
        """
        return await self._to_the_end(self._insert(model))

    async def update(self, model: Model) -> Model | None:
        """Replace the model of the same id and revision; return `None` if it was changed or removed: read it and retry.

        Raises:
            RegistryError: MODEL_ALREADY_EXISTS, REGISTRY_FULL, STORE_UNAVAILABLE.
        """
        return await self._to_the_end(self._update(model))

    async def delete(self, name: str, revision: int | None = None) -> Change | None:
        """Delete the model of this id or alias, and of this revision if given; return the change, or `None` if there was none.

        Raises:
            RegistryError: STORE_UNAVAILABLE.
        """
        return await self._to_the_end(self._delete(name, revision))

    async def finish(self) -> None:
        """Wait for the active writes."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _insert(self, model: Model) -> Model:
        async with self._lock:
            revision = -1
            while revision != self._follower.revision:
                # A concurrent call may have registered it while the provider was listed.
                stored = self._known.same(model)
                if stored is not None:
                    return stored
                revision = self._follower.revision
                kept = await self._store.insert(model)
                if kept is not None:
                    await self._follower.applied(Change(kept.revision, ChangeKind.ADDED, kept.id, kept))
                    return kept
                # A name is free in memory and not in the database: another process has registered it.
                await self._follower.catch_up()
            raise taken(model.id, model.id, "or an alias belongs to a record that cannot be read", UNREADABLE)

    async def _update(self, model: Model) -> Model | None:
        async with self._lock:
            revision = -1
            while revision != self._follower.revision:
                before = self._known.models.get(model.id)
                if before is None or before.revision != model.revision:
                    return None  # its own names may belong to other models
                self._known.free(model)
                revision = self._follower.revision
                kept = await self._store.update(before, model)
                if kept is not None:
                    await self._follower.applied(Change(kept.revision, ChangeKind.MODIFIED, kept.id, kept))
                    return kept
                # Another process has changed the model, or has registered a name.
                await self._follower.catch_up()
            raise taken(
                model.id, model.id, "cannot have an alias that belongs to a record that cannot be read", UNREADABLE
            )

    async def _delete(self, name: str, revision: int | None) -> Change | None:
        async with self._lock:
            # The database may have a model that is not in memory: of another process, or with a damaged record.
            change = await self._store.delete(name, revision)
            if change is not None:
                await self._follower.applied(change)
            else:
                # Memory may have a model that another process has changed or removed.
                await self._follower.catch_up()
            return change

    async def _to_the_end(self, write: Coroutine[object, object, T]) -> T:
        """Complete a write even if its caller is canceled, so that memory has every change of the database."""
        task = asyncio.create_task(write)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return await asyncio.shield(task)

    def _done(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            # Retrieve the exception so that asyncio does not log it if the caller was canceled.
            task.exception()
