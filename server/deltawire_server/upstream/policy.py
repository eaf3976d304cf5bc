"""Maps each failure of a replica to what follows: a retry at another replica, an ejection of this one.

A call is retried at most once, and only if its answer had not begun and the request cannot be the cause. An ejected replica
receives no calls for some time; see `replicas`.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from deltawire_server.errors import Reason

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_ATTEMPTS = 2
"""Attempts per call: more would multiply the load if all replicas have the same fault."""


@dataclass(frozen=True, slots=True)
class Action:
    """What follows from a failure.

    Attributes:
        repeat: Retry at one other replica, if the answer had not begun.
        eject: Eject this replica, if the answer had not begun.
        eject_after_start: Eject this replica, if the answer had begun.
        answer: The failure shows that the replica works: it processed the request and rejected it.
    """

    repeat: bool = False
    eject: bool = False
    eject_after_start: bool = False
    answer: bool = False


_NOTHING = Action()

_ANSWERS = (
    *(Reason.CONTEXT_LENGTH_EXCEEDED, Reason.ENDPOINT_NOT_SUPPORTED, Reason.MODEL_NOT_FOUND),
    *(Reason.UPSTREAM_REJECTED, Reason.UPSTREAM_UNAUTHENTICATED),
)
"""The request must change, or the model does not exist: another replica would answer the same."""

_OWN = (
    *(Reason.ACCESS_CHANGED, Reason.ANSWER_TOO_LARGE, Reason.COMPLETION_ALREADY_EXISTS, Reason.COMPLETION_GONE),
    Reason.CALLER_LIMIT_EXCEEDED,
    *(Reason.COMPLETION_NOT_FOUND, Reason.DRAINING, Reason.DURATION_LIMIT_EXCEEDED, Reason.ETAG_MISMATCH),
    *(Reason.FIELD_NOT_SUPPORTED, Reason.IMAGE_UNAVAILABLE, Reason.INTERNAL, Reason.INVALID_REQUEST),
    *(Reason.MEMORY_LIMIT_EXCEEDED, Reason.MODEL_ALREADY_EXISTS, Reason.MODEL_AMBIGUOUS, Reason.MODEL_DISCOVERED),
    *(Reason.MODEL_NOT_SERVED, Reason.MODEL_WRONG_TYPE, Reason.PERMISSION_DENIED, Reason.PROVIDER_NOT_FOUND),
    *(Reason.REVISION_GONE, Reason.SLOW_CALLER, Reason.SLOW_WATCHER, Reason.STORE_UNAVAILABLE),
    *(Reason.TOO_MANY_STREAMS, Reason.UNAUTHENTICATED, Reason.WRONG_REPLICA, Reason.REGISTRY_FULL),
)
"""The gateway's own reasons, which do not depend on a replica."""

ACTIONS: Mapping[Reason, Action] = MappingProxyType(
    {
        # No connection, a lost connection before the first event, HTTP 408, 502, 503 and 504.
        Reason.UPSTREAM_UNAVAILABLE: Action(repeat=True, eject=True),
        # HTTP 429.
        Reason.UPSTREAM_OVERLOADED: Action(repeat=True, eject=True),
        # Not an event stream. After the start, the output may have exceeded a limit, which is not the replica's fault.
        Reason.UPSTREAM_MALFORMED: Action(repeat=True, eject=True),
        # A wrong certificate, host name, token or path, possibly at this replica only; the request reached no engine.
        Reason.PROVIDER_MISCONFIGURED: Action(repeat=True, eject=True),
        # HTTP 500, an error event. Never repeated: the request may have caused it.
        Reason.UPSTREAM_ERROR: Action(eject=True, eject_after_start=True),
        # A timeout. Never repeated: the engine may still generate, and the caller's time is used up.
        Reason.UPSTREAM_TIMEOUT: Action(eject=True, eject_after_start=True),
        # The connection was lost within the answer.
        Reason.UPSTREAM_INCOMPLETE: Action(eject_after_start=True),
        # An administrator of the engine aborted the request.
        Reason.UPSTREAM_ABORTED: _NOTHING,
        **dict.fromkeys(_ANSWERS, Action(answer=True)),
        **dict.fromkeys(_OWN, _NOTHING),
    }
)
"""By reason; every reason has a row."""
