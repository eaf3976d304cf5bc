"""From messages, broken calls and restarts to what a watch returns: each change once.

Three verbs: `WatchState.begin()` for each call, `receive(message)` for each of its messages, `broke(error)` when it ends.

    how a call ended                                  what then
    REVISION_GONE                                     at once a snapshot, returned as the differences to what was returned
    OK, UNAVAILABLE, ABORTED, RESOURCE_EXHAUSTED,     after a pause, on from the last revision; from a new snapshot if one
    DEADLINE_EXCEEDED; INTERNAL and UNKNOWN if the    was cut before its bookmark
    gateway gave no reason: the connection was lost
    anything else                                     it is over: trying again does not mend it

There is no snapshot after REVISION_GONE if nobody said what the caller knew at the revision that it gave: which of those
models are gone could not be told. Whether the caller's own deadline has passed is seen to before `broke` is asked.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, TypeAlias

import grpc

from deltawire.v1.model_registry_pb2 import Model, WatchModelsRequest, WatchModelsResponse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from deltawire._errors import CallError

ChangeKind: TypeAlias = Literal["ADDED", "MODIFIED", "REMOVED"]

# Seconds between calls. The longest that may be drawn doubles each time, the shortest is half of it: clients that were cut
# off together do not come back together.
MIN_PAUSE, MAX_PAUSE = 0.1, 10.0

_KINDS: Mapping[int, ChangeKind] = MappingProxyType(
    {
        WatchModelsResponse.CHANGE_ADDED: "ADDED",
        WatchModelsResponse.CHANGE_MODIFIED: "MODIFIED",
        WatchModelsResponse.CHANGE_REMOVED: "REMOVED",
    }
)
_PASSES = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        # Not the caller's: a limit of the gateway or of a proxy on how long a call may run.
        grpc.StatusCode.DEADLINE_EXCEEDED,
    }
)
_PASSES_WITHOUT_REASON = frozenset({grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN})


@dataclass(frozen=True, slots=True)
class ModelChange:
    """A model has come to be known, is different, or is gone.

    Attributes:
        change: "ADDED": it is there, since now or already. "MODIFIED": something of it is different, its state for
            example. "REMOVED": it is gone.
        model: As it is now; what it was, if it is gone.
        revision: Where another watch can go on after this change; "" as long as a snapshot is not complete.
    """

    change: ChangeKind
    model: Model
    revision: str


@dataclass(frozen=True, slots=True)
class WatchBookmark:
    """All that was told before, taken together, is the state of `revision`. No change.

    The first one says that the models there are have all been told; of a watch that went on from a revision, that what was
    missed has. One follows after each lost connection, and about once a minute while nothing changes, so that a stored
    revision does not grow old.
    """

    revision: str


WatchEvent: TypeAlias = ModelChange | WatchBookmark


class WatchState:
    """What a watch knows: what it has told, and where its next call goes on.

    Args:
        revision: Where to go on; "" begins with a snapshot.
        known: The models that the caller knows, as of `revision`. None means none if there is no revision, and that nobody
            says if there is one.
        draw: A number between two others, for pauses.
    """

    def __init__(
        self,
        revision: str = "",
        known: Iterable[Model] | None = None,
        draw: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._revision = revision
        self._known = {model.id: _copy(model) for model in known or ()}
        # Whether those are all that the caller knows. If not, a model that is not among them may still be old news.
        self._knows_all = known is not None or not revision
        # The ids in the snapshot that is coming; None if none is.
        self._listed: set[str] | None = None
        self._draw = draw
        self._longest = MIN_PAUSE

    def begin(self) -> WatchModelsRequest:
        """What to ask now. A snapshot that was cut begins anew; what it had told is not told again."""
        self._listed = None if self._revision else set()
        return WatchModelsRequest(revision=self._revision)

    def receive(self, message: WatchModelsResponse) -> list[WatchEvent]:
        """Take a message; what is to be told because of it comes back, in order, if anything is.

        A change of a kind that this version does not know is skipped.
        """
        self._longest = MIN_PAUSE
        if message.bookmark:
            gone = [] if self._listed is None else sorted(self._known.keys() - self._listed)
            self._listed = None
            self._revision = message.revision
            removed = (ModelChange("REMOVED", self._known.pop(each), "") for each in gone)
            return [*removed, WatchBookmark(message.revision)]
        if self._listed is None:
            self._revision = message.revision
        kind = _KINDS.get(message.change)
        change = None if kind is None else self._change(kind, message.model)
        return [] if change is None else [change]

    def broke(self, error: CallError | None) -> float | None:
        """Take the end of a call: its error, or None if its status was OK.

        Seconds to wait before the next call come back, 0 to 10, or longer if the gateway said so. None means that the
        watch is over: raise the error.
        """
        if error is None:
            return self._next_pause()
        if error.code is grpc.StatusCode.OUT_OF_RANGE:
            if not self._knows_all or not self._revision:
                return None
            self._revision = ""
            return 0.0
        if error.code in _PASSES or (error.code in _PASSES_WITHOUT_REASON and not error.reason):
            return max(self._next_pause(), error.retry_after or 0.0)
        return None

    def _change(self, kind: ChangeKind, model: Model) -> ModelChange | None:
        """What a message says, against what the caller knows; None if that is no news."""
        known = self._known.get(model.id)
        if kind == "REMOVED":
            if known is None and self._knows_all:
                return None
            self._known.pop(model.id, None)
        else:
            if self._listed is not None:
                self._listed.add(model.id)
            if known == model:
                return None
            if known is not None:
                kind = "MODIFIED"
            elif self._knows_all:
                kind = "ADDED"
            self._known[model.id] = _copy(model)
        return ModelChange(kind, model, "" if self._listed is not None else self._revision)

    def _next_pause(self) -> float:
        """Seconds to wait: more each time, until something is received."""
        self._longest = min(MAX_PAUSE, 2 * self._longest)
        return self._draw(self._longest / 2, self._longest)


def _copy(model: Model) -> Model:
    """A model that the caller cannot change: what was told is compared with what comes."""
    copy = Model()
    copy.CopyFrom(model)
    return copy
