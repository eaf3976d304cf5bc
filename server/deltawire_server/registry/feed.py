"""All models as callers see them, and the log of their changes, for any number of watchers.

The log always keeps the last change of each existing model, so it is also the table of the models: no other copy of it is kept. It
also keeps `SUPERSEDED_BYTES` of earlier changes. A watcher is a position in the log: a slow watcher costs no memory and does not
delay others. A watcher that has not read an earlier change when it is dropped receives the current model instead. So a watcher
that reads misses nothing, even if all models of a provider change at once. Of removed models the log keeps `REMOVED_BYTES`; a
watcher that missed more must start again.

A revision is a position in the log of this process. Revisions of another process, or from before a restart, are invalid here.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

from deltawire_server.errors import CallerError, GatewayError, Reason
from deltawire_server.registry.store import ChangeKind

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from deltawire_server.registry.model import Model

SUPERSEDED_BYTES = 4 * 1024 * 1024
"""Limit for the memory of changes before the last ones: some thousands of typical changes."""

REMOVED_BYTES = 32 * 1024 * 1024
"""Limit for the memory of removed models: enough for a provider with 40,000 models. Existing models are not included."""

MAX_DIGITS = 18
"""Limit for the digits of a place in a revision that a caller sends."""

BOOKMARK_SECONDS = 60.0
"""Seconds without changes after which a watcher receives a bookmark with the current revision."""

_MIN_DROPPED = 1024
"""Number of dropped entries at which the log is first rewritten without them, which takes microseconds."""

_PLACE = attrgetter("place")
_ID = attrgetter("id")


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a watch.

    Attributes:
        kind: How the model changed; `None` for a bookmark.
        model: The model after the change, or before its removal; `None` for a bookmark.
        revision: The revision to resume after this step; empty within a snapshot.
    """

    kind: ChangeKind | None
    model: Model | None
    revision: str


@dataclass(slots=True)
class _Entry:
    """A change of a model.

    Attributes:
        place: The place after this change.
        kind: How the model changed.
        model: The model after the change, or before its removal; `None` once the entry is dropped.
        added: The place after the model was added; 0 if it is unknown.
        size: Bytes of memory, if the entry is not the last one of an existing model.
    """

    place: int
    kind: ChangeKind
    model: Model | None
    added: int
    size: int = 0


class Feed:
    """The models and their changes.

    Args:
        superseded_bytes: See `SUPERSEDED_BYTES`.
        removed_bytes: See `REMOVED_BYTES`; the last removed model is always kept.
        bookmark_seconds: See `BOOKMARK_SECONDS`.
    """

    def __init__(
        self,
        *,
        superseded_bytes: int = SUPERSEDED_BYTES,
        removed_bytes: int = REMOVED_BYTES,
        bookmark_seconds: float = BOOKMARK_SECONDS,
    ) -> None:
        self._epoch = secrets.token_hex(4)
        self._log: list[_Entry] = []  # by ascending place, with dropped entries
        self._current: dict[str, _Entry] = {}  # the last one of each existing model, by its id
        self._ids: list[str] | None = None  # of existing models, sorted, for pages; `None` if they have changed
        self._removed: dict[str, _Entry] = {}  # the last one of each removed model, the oldest first
        self._superseded: deque[_Entry] = deque()  # all others, the oldest first
        self._superseded_size = 0
        self._superseded_bytes = superseded_bytes
        self._removed_size = 0
        self._removed_bytes = removed_bytes
        self._start = 0  # changes up to this place are incomplete
        self._end = 0  # the place after the last change
        self._more = asyncio.Event()
        self._bookmark_seconds = bookmark_seconds
        self._closed = False
        self._interruptions = 0

    @property
    def revision(self) -> str:
        """The place after the last change."""
        return self._name(self._end, self._end)

    @property
    def entries(self) -> int:
        """The number of kept changes."""
        return len(self._current) + len(self._removed) + len(self._superseded)

    def ids_after(self, model_id: str, count: int) -> list[str]:
        """The first ids of models after an id, in ascending order: `count` of them, or fewer at the end."""
        if self._ids is None:
            self._ids = sorted(self._current)
        first = bisect_right(self._ids, model_id)
        return self._ids[first : first + count]

    def get(self, model_id: str) -> Model | None:
        """The model of this id; `None` if there is none."""
        entry = self._current.get(model_id)
        return None if entry is None else entry.model

    def models(self) -> list[Model]:
        """All models, in no order."""
        return [entry.model for entry in self._current.values() if entry.model is not None]

    def publish(self, kind: ChangeKind, model: Model) -> None:
        """Emit a change to all watchers; it supersedes the last one of the same model."""
        self._end += 1
        before = self._current.get(model.id)
        if before is None and (before := self._removed.pop(model.id, None)) is not None:
            self._removed_size -= before.size
        added = self._end if kind is ChangeKind.ADDED else before.added if before is not None else 0
        entry = _Entry(self._end, kind, model, added)
        self._log.append(entry)
        if before is not None:
            self._supersede(before)
        if kind is ChangeKind.REMOVED:
            self._current.pop(model.id, None)
            self._ids = None
            self._remove(entry, model.id)
        else:
            if model.id not in self._current:
                self._ids = None
            self._current[model.id] = entry
        # Rare enough to cost little per change; the log stays below about twice its entries.
        if len(self._log) > _MIN_DROPPED + 2 * self.entries:
            self._log = [each for each in self._log if each.model is not None]
        self._wake()

    def interrupt(self) -> None:
        """End all watches, so that their callers are authorized again. Authorized callers may resume at their revision."""
        self._interruptions += 1
        self._wake()

    def close(self) -> None:
        """End all watches on shutdown. Their callers watch again on another process."""
        self._closed = True
        self._wake()

    async def watch(self, revision: str = "", scope: str = "") -> AsyncGenerator[Step]:
        """All models as ADDED, a bookmark, then the changes as they come; or the changes after a revision, and then the same.

        If a watcher is so far behind that earlier changes of a model are dropped, the last one stands for them. ADDED then
        replaces what the watcher may have of the model, and REMOVED may be of one that it never received; MODIFIED is always
        of one that it has.

        The snapshot is taken when the first step is requested. End the watch with `aclose`.

        Args:
            revision: From an earlier step; empty for a snapshot.
            scope: Identifies the models that the watcher is shown, without `-`. It is part of the revisions: one of another
                scope is gone, because the watcher has other models then.

        Raises:
            CallerError: REVISION_GONE, before any step.
            GatewayError: SLOW_WATCHER: more models were removed than are kept before the next step was asked for.
                ACCESS_CHANGED: it was interrupted. DRAINING: this process stops; also at once if it was closed before.
        """
        begun = self._interruptions
        self._check_open(begun)
        # `complete` is the last place up to which the watcher had received everything: what was added since may be new to it.
        if revision:
            place, complete = self._place(revision, scope)
            bookmark_at: int | None = self._end
        else:
            bookmark_at = complete = place = self._end
            for model in sorted(self.models(), key=_ID):
                yield Step(ChangeKind.ADDED, model, "")
                self._check_open(begun)
        while True:
            if place != bookmark_at:
                self._check_kept(place)
            entry = self._next(place)
            if entry is None:
                complete = place
            if bookmark_at is not None and (entry is None or entry.place > bookmark_at):
                # What was changed again since is superseded: the watch may have passed this place.
                place, bookmark_at = max(place, bookmark_at), None
                yield Step(None, None, self._name(place, complete, scope))
            elif entry is not None:
                is_new = entry.kind is ChangeKind.MODIFIED and entry.added > complete
                if entry.place == self._end or (place == complete and entry.place == place + 1):
                    complete = entry.place
                place = entry.place
                kind = ChangeKind.ADDED if is_new else entry.kind
                yield Step(kind, entry.model, self._name(place, complete, scope))
            elif not await self._wait():
                bookmark_at = place
            self._check_open(begun)

    async def _wait(self) -> bool:
        """Wait for a change; `False` if none came for so long that a bookmark is due."""
        more = self._more
        try:
            async with asyncio.timeout(self._bookmark_seconds):
                await more.wait()
        except TimeoutError:
            return False
        return True

    def _wake(self) -> None:
        self._more.set()
        self._more = asyncio.Event()

    def _check_open(self, begun: int) -> None:
        if self._closed:
            # Unsent changes are not lost: revisions are invalid in other processes, so the next one sends a snapshot.
            raise GatewayError(
                Reason.DRAINING,
                "this gateway process is shutting down: watch again on a new connection",
                retry_after=0.0,
            )
        if begun != self._interruptions:
            raise GatewayError(
                Reason.ACCESS_CHANGED,
                "the access settings have changed: watch again from the last revision",
                retry_after=0.0,
            )

    def _next(self, place: int) -> _Entry | None:
        """The first entry after a place; `None` if there is none."""
        for index in range(bisect_right(self._log, place, key=_PLACE), len(self._log)):
            if self._log[index].model is not None:
                return self._log[index]
        return None

    def _supersede(self, entry: _Entry) -> None:
        """Keep a change that is no longer the last one of its model, and drop the oldest ones above the limit."""
        entry.size = _memory_of(entry.model)
        self._superseded.append(entry)
        self._superseded_size += entry.size
        while self._superseded_size > self._superseded_bytes:
            oldest = self._superseded.popleft()
            self._superseded_size -= oldest.size
            oldest.model = None

    def _remove(self, entry: _Entry, model_id: str) -> None:
        """Keep the last change of a removed model, and drop the oldest ones above the limit."""
        entry.size = _memory_of(entry.model)
        self._removed[model_id] = entry
        self._removed_size += entry.size
        while self._removed_size > self._removed_bytes and len(self._removed) > 1:
            oldest = self._removed.pop(next(iter(self._removed)))
            self._removed_size -= oldest.size
            self._start = oldest.place
            oldest.model = None

    def _check_kept(self, place: int) -> None:
        if place < self._start:
            raise GatewayError(
                Reason.SLOW_WATCHER,
                f"since the last message of this watch, more models were removed than the {self._removed_bytes} bytes of removed"
                " models that are kept: watch again without a revision, for a snapshot",
                metadata={"limit_bytes": str(self._removed_bytes)},
            )

    def _name(self, place: int, complete: int, scope: str = "") -> str:
        name = f"{self._epoch}{scope}-{place}"
        return name if place == complete else f"{name}-{complete}"

    def _place(self, revision: str, scope: str) -> tuple[int, int]:
        epoch, *numbers = revision.split("-", maxsplit=2)
        well_formed = all(len(each) <= MAX_DIGITS and each.isascii() and each.isdigit() for each in numbers)
        if epoch == self._epoch + scope and numbers and well_formed:
            place, complete = int(numbers[0]), int(numbers[-1])
            if self._start <= place <= self._end and complete <= place:
                return place, complete
        raise CallerError(
            Reason.REVISION_GONE,
            "the watch cannot resume at this revision: it is too old, from another process or before a restart, or of other models"
            " than this caller has now: watch again without a revision, for a snapshot",
        )


def _memory_of(model: Model | None) -> int:
    """About how many bytes of memory a model takes."""
    if model is None:
        return 0
    texts = (*model.names, *model.target, model.engine_root, model.base_model, model.owner)
    notes = (*model.annotations, *model.annotations.values())
    return sum(map(sys.getsizeof, (model, model.aliases, model.annotations, *texts, *notes)))
