"""What the failure of a replica means for the others: is the call repeated at another one, is this one ejected?

A call is repeated at most once, and only if its answer had not begun and the failure says nothing about the request. An
ejected replica gets no calls for a while; see `replicas`.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from deltawire_server.errors import Reason

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_ATTEMPTS = 2
"""How many replicas one call asks at most: more would multiply the load of a fault that all replicas have."""


@dataclass(frozen=True, slots=True)
class Action:
    """What follows from a failure.

    Attributes:
        repeat: Ask one other replica, if the answer had not begun.
        eject: Send this replica no calls for a while, if the answer had not begun.
        eject_after_start: The same, if the answer had begun.
        answer: It shows that the replica works: it has read the request and blames it.
    """

    repeat: bool = False
    eject: bool = False
    eject_after_start: bool = False
    answer: bool = False


_NOTHING = Action()
_ANSWER = Action(answer=True)

ACTIONS: Mapping[Reason, Action] = MappingProxyType(
    {
        # The connection failed or broke before the first event, HTTP 408, 502, 503 and 504.
        Reason.UPSTREAM_UNAVAILABLE: Action(repeat=True, eject=True),
        # HTTP 429.
        Reason.UPSTREAM_OVERLOADED: Action(repeat=True, eject=True),
        # What came is no event stream. Later on it may be the model that exceeded a limit, which says nothing of the replica.
        Reason.UPSTREAM_MALFORMED: Action(repeat=True, eject=True),
        # A certificate, a host name, a token or a path that is wrong, perhaps at this replica only; no engine was asked.
        Reason.PROVIDER_MISCONFIGURED: Action(repeat=True, eject=True),
        # HTTP 500, an error event. Never repeated: the request may be what breaks the engine.
        Reason.UPSTREAM_ERROR: Action(eject=True, eject_after_start=True),
        # Silence. Never repeated: the engine may still generate, and the caller has waited long enough.
        Reason.UPSTREAM_TIMEOUT: Action(eject=True, eject_after_start=True),
        # The connection broke within the answer.
        Reason.UPSTREAM_INCOMPLETE: Action(eject_after_start=True),
        # An administrator of the engine aborted the request.
        Reason.UPSTREAM_ABORTED: _NOTHING,
        # The request has to change, or the model is not there: another replica would say the same.
        Reason.CONTEXT_LENGTH_EXCEEDED: _ANSWER,
        Reason.ENDPOINT_NOT_SUPPORTED: _ANSWER,
        Reason.MODEL_NOT_FOUND: _ANSWER,
        Reason.UPSTREAM_REJECTED: _ANSWER,
        Reason.UPSTREAM_UNAUTHENTICATED: _ANSWER,
        # The gateway's own; no replica has a part in them.
        Reason.ACCESS_CHANGED: _NOTHING,
        Reason.ANSWER_TOO_LARGE: _NOTHING,
        Reason.COMPLETION_ALREADY_EXISTS: _NOTHING,
        Reason.COMPLETION_GONE: _NOTHING,
        Reason.COMPLETION_NOT_FOUND: _NOTHING,
        Reason.DRAINING: _NOTHING,
        Reason.DURATION_LIMIT_EXCEEDED: _NOTHING,
        Reason.ETAG_MISMATCH: _NOTHING,
        Reason.FIELD_NOT_SUPPORTED: _NOTHING,
        Reason.IMAGE_UNAVAILABLE: _NOTHING,
        Reason.INTERNAL: _NOTHING,
        Reason.INVALID_REQUEST: _NOTHING,
        Reason.MEMORY_LIMIT_EXCEEDED: _NOTHING,
        Reason.MODEL_ALREADY_EXISTS: _NOTHING,
        Reason.MODEL_AMBIGUOUS: _NOTHING,
        Reason.MODEL_DISCOVERED: _NOTHING,
        Reason.MODEL_NOT_SERVED: _NOTHING,
        Reason.MODEL_WRONG_TYPE: _NOTHING,
        Reason.PERMISSION_DENIED: _NOTHING,
        Reason.PROVIDER_NOT_FOUND: _NOTHING,
        Reason.REVISION_GONE: _NOTHING,
        Reason.SLOW_CALLER: _NOTHING,
        Reason.SLOW_WATCHER: _NOTHING,
        Reason.STORE_UNAVAILABLE: _NOTHING,
        Reason.TOO_MANY_STREAMS: _NOTHING,
        Reason.UNAUTHENTICATED: _NOTHING,
        Reason.WRONG_REPLICA: _NOTHING,
        Reason.REGISTRY_FULL: _NOTHING,
    }
)
"""By reason; every reason has a row."""
