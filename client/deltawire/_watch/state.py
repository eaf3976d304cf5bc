"""The state of a watch: returns each change once, whatever calls break and gateways restart in between.

Usage: `WatchState.begin()` for each call, `receive(message)` for each of its messages, `broke(error)` when it ends.

    how a call ended                                  what happens next
    REVISION_GONE                                     at once a new snapshot, of which only the differences are returned
    OK, UNAVAILABLE, ABORTED, RESOURCE_EXHAUSTED,     after a pause, the watch continues from the last revision, or from a
    DEADLINE_EXCEEDED; INTERNAL and UNKNOWN           new snapshot if the call ended within one
    without a reason: the connection was lost
    anything else                                     the watch ends: a retry would fail again

After REVISION_GONE there is no snapshot if the caller gave a revision without the models that it knew: removed models could not
be reported. The caller of `broke` checks first whether its own deadline has passed.
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
    """A model was added, modified or removed.

    Attributes:
        change: "ADDED": it exists, now or before the watch. "MODIFIED": a field of it changed, such as its state.
            "REMOVED": it no longer exists.
        model: Its current value; the last one if it was removed.
        revision: From where another watch can continue after this change; "" until a snapshot is complete.
    """

    change: ChangeKind
    model: Model
    revision: str


@dataclass(frozen=True, slots=True)
class WatchBookmark:
    """The changes returned so far add up to the state at `revision`. It is not a change itself.

    The first one follows the snapshot, or the missed changes of a watch that continues from a revision. One follows each lost
    connection, and about one per minute comes while nothing changes, so that a stored revision stays usable.

    Attributes:
        revision: From where another watch can continue: store it together with the models.
    """

    revision: str


WatchEvent: TypeAlias = ModelChange | WatchBookmark


class WatchState:
    """What a watch has returned, and from where its next call continues.

    Args:
        revision: From where to continue; "" begins with a snapshot.
        known: The models that the caller knows at `revision`. None means no models without a revision, and unknown with one.
        draw: Returns a number between two others, for pauses.
    """

    def __init__(
        self,
        revision: str = "",
        known: Iterable[Model] | None = None,
        draw: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._revision = revision
        self._known = {model.id: _copy(model) for model in known or ()}
        # Whether those are all that the caller knows. If not, the caller may know a model that is not among them.
        self._knows_all = known is not None or not revision
        # The ids in the snapshot that is coming; None if none is.
        self._listed: set[str] | None = None
        self._draw = draw
        self._longest = MIN_PAUSE

    def begin(self) -> WatchModelsRequest:
        """The request of the next call. An incomplete snapshot begins again; changes already returned are not repeated."""
        self._listed = None if self._revision else set()
        return WatchModelsRequest(revision=self._revision, batch_snapshot=not self._revision)

    def receive(self, message: WatchModelsResponse) -> list[WatchEvent]:
        """Take a message; returns the events that follow from it, in order.

        A change of a kind that this version does not know is skipped.
        """
        self._longest = MIN_PAUSE
        if message.bookmark:
            missing = [] if self._listed is None else sorted(self._known.keys() - self._listed)
            self._listed = None
            self._revision = message.revision
            removed = (ModelChange("REMOVED", self._known.pop(each), "") for each in missing)
            return [*removed, WatchBookmark(message.revision)]
        if self._listed is None:
            self._revision = message.revision
        kind = _KINDS.get(message.change)
        if kind is None:
            return []
        changes = (self._change(kind, model) for model in message.models or (message.model,))
        return [change for change in changes if change is not None]

    def broke(self, error: CallError | None) -> float | None:
        """Take the end of a call: its error, or None if its status was OK.

        Returns the seconds to wait before the next call: 0 to 10, or longer if the gateway asks for it. None means that the
        watch has ended: raise the error.
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
        """The change that a message means to the caller; None if the caller knows it already."""
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
    """A copy that the caller cannot change: later messages are compared with it."""
    copy = Model()
    copy.CopyFrom(model)
    return copy
