"""The changes of all models in their order, for any number of watchers.

There is one ring of the last changes, and a watcher is only a place in it: a slow one costs no memory and nobody else's
time, and is cut when the ring has gone round. A revision names a place in this process's ring; another process's is
unknown here, and so is one from before a restart.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltawire_server.errors import CallerError, GatewayError, Reason

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable

    from deltawire_server.registry.model import Model
    from deltawire_server.registry.store import ChangeKind

RING = 4096
"""Changes that are kept: a watcher that is away for a minute misses fewer even while everything is registered anew. Also
more than the models of any provider, which all change at once when it goes down."""

MAX_DIGITS = 18
"""In a place: more than there ever are, and read at once, however long what a caller sends is."""

BOOKMARK_SECONDS = 60.0
"""After so much silence a watcher hears that nothing has happened: it knows that it is still watching, and where."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a watch.

    Attributes:
        kind: What became of the model; `None` for a bookmark.
        model: As it is now, or was; `None` for a bookmark.
        revision: Where another watch can go on after this; empty within a snapshot.
    """

    kind: ChangeKind | None
    model: Model | None
    revision: str


class Feed:
    """Where changes are published and watched.

    Args:
        ring: Changes that are kept.
        bookmark_seconds: After so much silence a watcher hears a bookmark.
    """

    def __init__(self, *, ring: int = RING, bookmark_seconds: float = BOOKMARK_SECONDS) -> None:
        self._epoch = secrets.token_hex(4)
        self._ring: deque[tuple[ChangeKind, Model]] = deque(maxlen=ring)
        self._end = 0  # the place after the last change
        self._more = asyncio.Event()
        self._bookmark_seconds = bookmark_seconds
        self._closed = False
        self._interruptions = 0

    @property
    def revision(self) -> str:
        """The place after the last change."""
        return self._name(self._end)

    def publish(self, kind: ChangeKind, model: Model) -> None:
        """Tell all watchers of a change."""
        self._ring.append((kind, model))
        self._end += 1
        self._wake()

    def interrupt(self) -> None:
        """End all watches, for their callers to be judged anew. Who may watch on does so where it was."""
        self._interruptions += 1
        self._wake()

    def close(self) -> None:
        """End all watches: this process stops. Their callers go on elsewhere."""
        self._closed = True
        self._wake()

    async def watch(
        self, snapshot: Callable[[], Iterable[Model]], added: ChangeKind, revision: str = ""
    ) -> AsyncGenerator[Step]:
        """A snapshot, a bookmark, then every change as it comes; or what came after a revision, and then the same.

        Nothing is looked at before the first step is asked for. Leave it by `aclose`.

        Args:
            snapshot: All models as they are now; called at once, if at all.
            added: What a model of the snapshot is told as.
            revision: From an earlier step; empty for a snapshot.

        Raises:
            CallerError: REVISION_GONE, before any step.
            GatewayError: SLOW_WATCHER: more changes came than are kept before the next was asked for. ACCESS_CHANGED: it
                was interrupted. DRAINING: this process stops; also at once if it was closed before.
        """
        begun = self._interruptions
        self._hold_open(begun)
        if revision:
            place = self._place(revision)
            bookmark_at: int | None = self._end
        else:
            models, place = tuple(snapshot()), self._end
            bookmark_at = place
            for model in models:
                yield Step(added, model, "")
                self._hold_open(begun)
        while True:
            if place == bookmark_at:
                bookmark_at = None
                yield Step(None, None, self._name(place))
            elif place < self._end:
                self._hold_kept(place)
                kind, model = self._ring[place - self._end]
                place += 1
                yield Step(kind, model, self._name(place))
            elif not await self._wait():
                bookmark_at = place
            self._hold_open(begun)

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

    def _hold_open(self, begun: int) -> None:
        if self._closed:
            # What has not been told yet is not missed: whoever serves next gives a snapshot, since this process's
            # revisions end with it.
            raise GatewayError(
                Reason.DRAINING, "this process is shutting down; watch again, another one serves", retry_after=0.0
            )
        if begun != self._interruptions:
            raise GatewayError(
                Reason.ACCESS_CHANGED, "who may call has changed; watch again from the last revision", retry_after=0.0
            )

    def _hold_kept(self, place: int) -> None:
        if place < self._end - len(self._ring):
            raise GatewayError(
                Reason.SLOW_WATCHER,
                f"this watch was not read while more than {self._ring.maxlen} changes came, and some of them are gone;"
                " watch again without a revision, for a snapshot",
                metadata={"limit": str(self._ring.maxlen)},
            )

    def _name(self, place: int) -> str:
        return f"{self._epoch}-{place}"

    def _place(self, revision: str) -> int:
        epoch, _, number = revision.partition("-")
        if epoch == self._epoch and len(number) <= MAX_DIGITS and number.isascii() and number.isdigit():
            place = int(number)
            if self._end - len(self._ring) <= place <= self._end:
                return place
        raise CallerError(
            Reason.REVISION_GONE,
            "the watch cannot go on from that revision: too much has happened since, or it is of another process or a time"
            " before a restart; watch again without a revision, for a snapshot",
        )
