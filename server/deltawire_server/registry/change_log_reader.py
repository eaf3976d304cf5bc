"""Applies the database's changes to memory. Other processes may write to the same database.

Changes are applied once each, in the order of their revisions, including this process's own writes. If changes are missing, all
models are read again and compared with memory.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import TYPE_CHECKING

from deltawire_server.errors import RegistryError
from deltawire_server.metrics.table import REGISTRY_CHANGES
from deltawire_server.pacing import give_way
from deltawire_server.registry.store import Change, ChangeKind
from deltawire_server.telemetry import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from deltawire_server.registry.model import Model
    from deltawire_server.registry.registered_index import RegisteredIndex
    from deltawire_server.registry.store import Store

CHANGES_AT_ONCE = 100
"""Changes that are applied before other tasks run: a few milliseconds of work."""

RETRY_SECONDS = 1.0
"""Between attempts to read changes that could not be read."""

_log = get_logger(__name__)


class ChangeLogReader:
    """Applies changes to the index in memory.

    Args:
        store: The open store.
        known: The index in memory; only this object changes it from now on.
        on_change: Called with each registration before and after a change, when memory has it; `None` if there is none.
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
        """The revision of the last change in memory."""
        self.behind_since: float | None = None
        """Since when changes could not be read, on the monotonic clock; `None` while they are."""

    async def start(self) -> None:
        """Read everything, then follow until `stop`.

        Raises:
            RegistryError: The database cannot be read.
        """
        async with self._lock:
            await self._reload()
        self._task = asyncio.create_task(self._follow(), name="follow the registry's database")

    async def stop(self) -> None:
        """Stop following the database."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def catch_up(self) -> None:
        """Apply the changes of other processes.

        Raises:
            RegistryError: The database cannot be read.
        """
        async with self._lock:
            await self._catch_up()

    async def applied(self, change: Change) -> None:
        """Apply a change of this process, after earlier changes of others. It is already committed, so this does not fail."""
        async with self._lock:
            if change.revision > self.revision + 1:
                try:
                    await self._catch_up()
                except RegistryError as error:
                    # The change is applied when it is read together with the others.
                    _log.warning("a change will be applied later", model=change.model_id, error=error.message)
            elif change.revision == self.revision + 1:
                self._apply(change)

    async def _follow(self) -> None:
        async with aclosing(self._store.changes_elsewhere()) as changes:
            async for seen in changes:
                if seen:
                    await self._catch_up_at_last()
                else:
                    self.behind_since = self.behind_since or time.monotonic()

    async def _catch_up_at_last(self) -> None:
        while True:
            try:
                await self.catch_up()
            except RegistryError:  # logged where it happened
                self.behind_since = self.behind_since or time.monotonic()
            except Exception:  # noqa: BLE001 (a defect must not end the following for good)
                _log.exception("the registry cannot follow its database")
                self.revision = 0  # the state of memory is uncertain: read everything again
            else:
                self.behind_since = None
                return
            await asyncio.sleep(RETRY_SECONDS)

    async def _catch_up(self) -> None:
        while True:
            changes = await self._store.changes_after(self.revision)
            if changes is None:
                _log.warning("changes are missing: all models are read again", revision=self.revision)
                await self._reload()
                return
            if not changes:
                return
            for change in changes:
                self._apply(change)

    async def _reload(self) -> None:
        revision, models = await self._store.load(self._known.models)
        before = dict(self._known.models)
        # Removed models first, because other models may have their names now.
        steps: list[tuple[Model | None, Model | None]] = [
            (before[model_id], None) for model_id in sorted(before.keys() - {model.id for model in models})
        ]
        steps += [(before.get(model.id), model) for model in models if model is not before.get(model.id)]
        # At startup, or after a defect, when the state of memory is uncertain.
        anew = self.revision == 0
        if anew:
            self._known.load(models)
        # Otherwise one model at a time, so that unchanged models can be called meanwhile.
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
        REGISTRY_CHANGES.labels(change.kind.name.lower()).inc()
        before = self._known.models.get(change.model_id)
        now = None if change.kind is ChangeKind.REMOVED else change.model
        self.revision = change.revision
        if before is not None:
            self._known.remove(before)
        if now is not None:
            self._known.add(now)
        if before is not None or now is not None:
            self._on_change(before, now)
