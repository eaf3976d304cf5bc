"""Keeps memory in step with the database, in which other processes write too.

Changes are applied in the order of their revisions, each once, whoever made them: this process's own writes come the same
way. Whoever cannot have all of them reads everything anew, and finds out what is different by comparing.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING

from deltawire_server.errors import RegistryError
from deltawire_server.pacing import give_way
from deltawire_server.registry.store import Change, ChangeKind
from deltawire_server.telemetry import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from deltawire_server.registry.model import Model
    from deltawire_server.registry.registered_index import RegisteredIndex
    from deltawire_server.registry.store import Store

CHANGES_AT_ONCE = 100
"""Changes that are applied without giving way to other tasks: some milliseconds of work."""

RETRY_SECONDS = 1.0
"""Between attempts to read changes that could not be read."""

_log = get_logger(__name__)


class ChangeLogReader:
    """Applies changes to what is known.

    Args:
        store: Open.
        known: What is in memory; from now on only this changes it.
        on_change: Called with each registration as it was and as it is, once memory has it; `None` where it is not there.
    """

    def __init__(
        self,
        store: Store,
        known: RegisteredIndex,
        on_change: Callable[[Model | None, Model | None], None] = lambda _, __: None,
    ) -> None:
        self._store = store
        self._known = known
        self._on_change = on_change
        self._lock = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self.revision = 0
        """Of the last change that memory has."""

    async def start(self) -> None:
        """Read everything, then follow until `stop`.

        Raises:
            RegistryError: The database cannot be read.
        """
        await self._reload()
        self._task = asyncio.create_task(self._follow(), name="follow the registry's database")

    async def stop(self) -> None:
        """Follow no longer."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def catch_up(self) -> None:
        """Apply what others have changed.

        Raises:
            RegistryError: The database cannot be read.
        """
        async with self._lock:
            await self._catch_up()

    async def applied(self, change: Change) -> None:
        """Apply a change of our own, after those that others made before it. The database has it: this cannot fail."""
        async with self._lock:
            if change.revision > self.revision + 1:
                try:
                    await self._catch_up()
                except RegistryError as error:
                    # Ours is told when it is read with the others'.
                    _log.warning("a change is known later", model=change.model_id, error=error.message)
            elif change.revision == self.revision + 1:
                self._apply(change)

    async def _follow(self) -> None:
        async with aclosing(self._store.changes_elsewhere()) as changes:
            async for _ in changes:
                await self._catch_up_at_last()

    async def _catch_up_at_last(self) -> None:
        while True:
            try:
                await self.catch_up()
            except RegistryError:
                pass  # logged where it happened
            except Exception:  # noqa: BLE001 (a defect must not end the following for good)
                _log.exception("the registry cannot follow its database")
                self.revision = 0  # nobody knows what memory has: everything is read anew
            else:
                return
            await asyncio.sleep(RETRY_SECONDS)

    async def _catch_up(self) -> None:
        while True:
            changes = await self._store.changes_after(self.revision)
            if changes is None:
                _log.warning("changes are missing: everything is read anew", revision=self.revision)
                await self._reload()
                return
            if not changes:
                return
            for change in changes:
                self._apply(change)

    async def _reload(self) -> None:
        revision, models = await self._store.load(self._known.models)
        before = dict(self._known.models)
        # Those that were removed first: their names may be others' now.
        steps: list[tuple[Model | None, Model | None]] = [
            (before[model_id], None) for model_id in sorted(before.keys() - {model.id for model in models})
        ]
        steps += [(before.get(model.id), model) for model in models if model is not before.get(model.id)]
        # At the start, or after a defect, when it is not known what memory has.
        anew = self.revision == 0
        if anew:
            self._known.load(models)
        # Else one model at a time, so that whatever did not change can be called meanwhile.
        for count, (old, new) in enumerate(steps):
            if count % CHANGES_AT_ONCE == CHANGES_AT_ONCE - 1:
                await give_way()
            if old is not None and not anew:
                self._known.remove(old)
            if new is not None and not anew:
                self._known.add(new)
            self._on_change(old, new)
        self.revision = revision

    def _apply(self, change: Change) -> None:
        before = self._known.models.get(change.model_id)
        now = None if change.kind is ChangeKind.REMOVED else change.model
        self.revision = change.revision
        if before is not None:
            self._known.remove(before)
        if now is not None:
            self._known.add(now)
        if before is not None or now is not None:
            self._on_change(before, now)
