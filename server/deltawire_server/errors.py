"""The errors of calls, by who has to act.

    DeltawireError          the error of a call: status code, reason, message, details
    ├── CallerError         the request is invalid or cannot be served: the caller has to change it
    ├── ProviderError       a provider failed: an error, a timeout, a malformed answer, or no connection
    ├── RegistryError       the registry failed: a name that is taken, an unavailable database
    └── GatewayError        this process refuses or fails: access, limits, shutdown, or a defect

This module is independent of gRPC: `rpc.status` converts an error to a status with details. A layer that catches an exception
of another library raises one of these from it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Code(enum.IntEnum):
    """The gRPC status codes that the gateway uses; the values are their numbers."""

    CANCELLED = 1
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


class Reason(enum.Enum):
    """`deltawire.v1.ErrorReason` without its prefix; the values are the proto's numbers, which a test checks."""

    INVALID_REQUEST = 1
    CONTEXT_LENGTH_EXCEEDED = 2
    MODEL_NOT_FOUND = 3
    MODEL_ALREADY_EXISTS = 4
    MODEL_WRONG_TYPE = 5
    PROVIDER_NOT_FOUND = 6
    PROVIDER_MISCONFIGURED = 7
    UPSTREAM_UNAUTHENTICATED = 8
    UPSTREAM_REJECTED = 9
    UPSTREAM_UNAVAILABLE = 10
    UPSTREAM_OVERLOADED = 11
    UPSTREAM_TIMEOUT = 12
    UPSTREAM_ERROR = 13
    UPSTREAM_MALFORMED = 14
    UPSTREAM_INCOMPLETE = 15
    UPSTREAM_ABORTED = 16
    TOO_MANY_STREAMS = 17
    SLOW_CALLER = 18
    STORE_UNAVAILABLE = 19
    DRAINING = 20
    INTERNAL = 21
    DURATION_LIMIT_EXCEEDED = 22
    MODEL_AMBIGUOUS = 23
    MODEL_NOT_SERVED = 24
    MODEL_DISCOVERED = 25
    UNAUTHENTICATED = 26
    PERMISSION_DENIED = 27
    ETAG_MISMATCH = 28
    REVISION_GONE = 29
    SLOW_WATCHER = 30
    ACCESS_CHANGED = 31
    IMAGE_UNAVAILABLE = 32
    FIELD_NOT_SUPPORTED = 33
    ENDPOINT_NOT_SUPPORTED = 34
    COMPLETION_ALREADY_EXISTS = 35
    COMPLETION_NOT_FOUND = 36
    COMPLETION_GONE = 37
    WRONG_REPLICA = 38
    ANSWER_TOO_LARGE = 39
    MEMORY_LIMIT_EXCEEDED = 40
    REGISTRY_FULL = 41


CODES: Mapping[Reason, Code] = MappingProxyType(
    {
        Reason.INVALID_REQUEST: Code.INVALID_ARGUMENT,
        Reason.CONTEXT_LENGTH_EXCEEDED: Code.INVALID_ARGUMENT,
        Reason.MODEL_NOT_FOUND: Code.NOT_FOUND,
        Reason.MODEL_ALREADY_EXISTS: Code.ALREADY_EXISTS,
        Reason.MODEL_WRONG_TYPE: Code.FAILED_PRECONDITION,
        Reason.PROVIDER_NOT_FOUND: Code.NOT_FOUND,
        Reason.PROVIDER_MISCONFIGURED: Code.FAILED_PRECONDITION,
        Reason.UPSTREAM_UNAUTHENTICATED: Code.UNAUTHENTICATED,
        Reason.UPSTREAM_REJECTED: Code.INVALID_ARGUMENT,
        Reason.UPSTREAM_UNAVAILABLE: Code.UNAVAILABLE,
        Reason.UPSTREAM_OVERLOADED: Code.RESOURCE_EXHAUSTED,
        # Not UNAVAILABLE, which clients retry: the engine may still work on the request.
        Reason.UPSTREAM_TIMEOUT: Code.DEADLINE_EXCEEDED,
        # Not UNAVAILABLE: the request may be the cause of the engine's error, so clients must not retry it automatically.
        Reason.UPSTREAM_ERROR: Code.INTERNAL,
        Reason.UPSTREAM_MALFORMED: Code.INTERNAL,
        Reason.UPSTREAM_INCOMPLETE: Code.ABORTED,
        Reason.UPSTREAM_ABORTED: Code.ABORTED,
        Reason.TOO_MANY_STREAMS: Code.RESOURCE_EXHAUSTED,
        Reason.SLOW_CALLER: Code.RESOURCE_EXHAUSTED,
        Reason.STORE_UNAVAILABLE: Code.UNAVAILABLE,
        Reason.DRAINING: Code.UNAVAILABLE,
        Reason.INTERNAL: Code.INTERNAL,
        Reason.DURATION_LIMIT_EXCEEDED: Code.DEADLINE_EXCEEDED,
        Reason.MODEL_AMBIGUOUS: Code.FAILED_PRECONDITION,
        Reason.MODEL_NOT_SERVED: Code.FAILED_PRECONDITION,
        Reason.MODEL_DISCOVERED: Code.FAILED_PRECONDITION,
        Reason.UNAUTHENTICATED: Code.UNAUTHENTICATED,
        Reason.PERMISSION_DENIED: Code.PERMISSION_DENIED,
        Reason.ETAG_MISMATCH: Code.ABORTED,
        Reason.REVISION_GONE: Code.OUT_OF_RANGE,
        Reason.SLOW_WATCHER: Code.RESOURCE_EXHAUSTED,
        Reason.ACCESS_CHANGED: Code.ABORTED,
        Reason.IMAGE_UNAVAILABLE: Code.FAILED_PRECONDITION,
        Reason.FIELD_NOT_SUPPORTED: Code.INVALID_ARGUMENT,
        Reason.ENDPOINT_NOT_SUPPORTED: Code.UNIMPLEMENTED,
        Reason.COMPLETION_ALREADY_EXISTS: Code.ALREADY_EXISTS,
        Reason.COMPLETION_NOT_FOUND: Code.NOT_FOUND,
        Reason.COMPLETION_GONE: Code.OUT_OF_RANGE,
        Reason.WRONG_REPLICA: Code.FAILED_PRECONDITION,
        Reason.ANSWER_TOO_LARGE: Code.RESOURCE_EXHAUSTED,
        Reason.MEMORY_LIMIT_EXCEEDED: Code.RESOURCE_EXHAUSTED,
        Reason.REGISTRY_FULL: Code.RESOURCE_EXHAUSTED,
    }
)
"""The status code of each reason, if the answer has not begun."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One invalid field: `field` is its path in the request, such as ``chat.messages[2].tool.call_id``."""

    field: str
    description: str


class DeltawireError(Exception):
    """The error of a call.

    Args:
        reason: The machine-readable reason.
        message: The human-readable reason: one sentence that says what to do. It never contains a token or another caller's data.
        code: The status code; by default that of the reason in `CODES`.
        metadata: The values in the message, as documented in the proto's comment on the reason.
        violations: For INVALID_ARGUMENT, every invalid field.
        retry_after: Seconds after which the caller may retry; `None` if a retry does not help.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        code: Code | None = None,
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[Violation] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.code = CODES[reason] if code is None else code
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)
        self.retry_after = retry_after

    def again(self) -> Self:
        """A copy for another call: an exception that is raised twice accumulates both tracebacks."""
        return type(self)(
            self.reason,
            self.message,
            code=self.code,
            metadata=self.metadata,
            violations=self.violations,
            retry_after=self.retry_after,
        )


class CallerError(DeltawireError):
    """The request is invalid or cannot be served: the caller has to change it."""


class ProviderError(DeltawireError):
    """A provider failed: an error, a timeout, a malformed answer, or no connection."""


class RegistryError(DeltawireError):
    """The registry failed: a name that is taken, an unavailable database."""


class GatewayError(DeltawireError):
    """This process refuses or fails: access, limits, shutdown, or a defect."""


def internal_error(what: str = "", *, cause: BaseException | None = None) -> GatewayError:
    """The error of a call that failed because of a defect in the gateway. Only the log has the details.

    Args:
        what: A description of the defect for the log, if there is no exception.
        cause: The exception, if there is one.
    """
    error = GatewayError(Reason.INTERNAL, "internal error of the gateway: report it with the request id")
    error.__cause__ = RuntimeError(what) if cause is None else cause
    return error


def invalid_request(violations: Sequence[Violation]) -> CallerError:
    """The error of an invalid request: one message that lists all violations.

    Args:
        violations: At least one.
    """
    message = "; ".join(f"{violation.field}: {violation.description}" for violation in violations)
    return CallerError(Reason.INVALID_REQUEST, message, metadata={"field": violations[0].field}, violations=violations)
