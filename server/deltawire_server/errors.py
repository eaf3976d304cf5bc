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
    """`deltawire.v1.ErrorReason` without its prefix; the values are the proto's numbers, which a test checks.

    Attributes:
        code: The status code, if the answer has not begun.
    """

    code: Code

    def __new__(cls, number: int, code: Code) -> Self:
        """A member with its number as the value."""
        member = object.__new__(cls)
        member._value_ = number
        member.code = code
        return member

    INVALID_REQUEST = 1, Code.INVALID_ARGUMENT
    CONTEXT_LENGTH_EXCEEDED = 2, Code.INVALID_ARGUMENT
    MODEL_NOT_FOUND = 3, Code.NOT_FOUND
    MODEL_ALREADY_EXISTS = 4, Code.ALREADY_EXISTS
    MODEL_WRONG_TYPE = 5, Code.FAILED_PRECONDITION
    PROVIDER_NOT_FOUND = 6, Code.NOT_FOUND
    PROVIDER_MISCONFIGURED = 7, Code.FAILED_PRECONDITION
    UPSTREAM_UNAUTHENTICATED = 8, Code.UNAUTHENTICATED
    UPSTREAM_REJECTED = 9, Code.INVALID_ARGUMENT
    UPSTREAM_UNAVAILABLE = 10, Code.UNAVAILABLE
    UPSTREAM_OVERLOADED = 11, Code.RESOURCE_EXHAUSTED
    # Not UNAVAILABLE, which clients retry: the engine may still work on the request.
    UPSTREAM_TIMEOUT = 12, Code.DEADLINE_EXCEEDED
    # Not UNAVAILABLE: the request may be the cause of the engine's error, so clients must not retry it automatically.
    UPSTREAM_ERROR = 13, Code.INTERNAL
    UPSTREAM_MALFORMED = 14, Code.INTERNAL
    UPSTREAM_INCOMPLETE = 15, Code.ABORTED
    UPSTREAM_ABORTED = 16, Code.ABORTED
    TOO_MANY_STREAMS = 17, Code.RESOURCE_EXHAUSTED
    SLOW_CALLER = 18, Code.RESOURCE_EXHAUSTED
    STORE_UNAVAILABLE = 19, Code.UNAVAILABLE
    DRAINING = 20, Code.UNAVAILABLE
    INTERNAL = 21, Code.INTERNAL
    DURATION_LIMIT_EXCEEDED = 22, Code.DEADLINE_EXCEEDED
    MODEL_AMBIGUOUS = 23, Code.FAILED_PRECONDITION
    MODEL_NOT_SERVED = 24, Code.FAILED_PRECONDITION
    MODEL_DISCOVERED = 25, Code.FAILED_PRECONDITION
    UNAUTHENTICATED = 26, Code.UNAUTHENTICATED
    PERMISSION_DENIED = 27, Code.PERMISSION_DENIED
    ETAG_MISMATCH = 28, Code.ABORTED
    REVISION_GONE = 29, Code.OUT_OF_RANGE
    SLOW_WATCHER = 30, Code.RESOURCE_EXHAUSTED
    ACCESS_CHANGED = 31, Code.ABORTED
    IMAGE_UNAVAILABLE = 32, Code.FAILED_PRECONDITION
    FIELD_NOT_SUPPORTED = 33, Code.INVALID_ARGUMENT
    ENDPOINT_NOT_SUPPORTED = 34, Code.UNIMPLEMENTED
    COMPLETION_ALREADY_EXISTS = 35, Code.ALREADY_EXISTS
    COMPLETION_NOT_FOUND = 36, Code.NOT_FOUND
    COMPLETION_GONE = 37, Code.OUT_OF_RANGE
    WRONG_REPLICA = 38, Code.FAILED_PRECONDITION
    ANSWER_TOO_LARGE = 39, Code.RESOURCE_EXHAUSTED
    MEMORY_LIMIT_EXCEEDED = 40, Code.RESOURCE_EXHAUSTED
    REGISTRY_FULL = 41, Code.RESOURCE_EXHAUSTED
    CALLER_LIMIT_EXCEEDED = 42, Code.RESOURCE_EXHAUSTED


FOR_OPERATORS = frozenset(
    {
        Reason.PROVIDER_MISCONFIGURED,
        Reason.UPSTREAM_UNAVAILABLE,
        Reason.UPSTREAM_OVERLOADED,
        Reason.UPSTREAM_TIMEOUT,
        Reason.UPSTREAM_ERROR,
        Reason.UPSTREAM_MALFORMED,
        Reason.UPSTREAM_INCOMPLETE,
        Reason.UPSTREAM_ABORTED,
        Reason.TOO_MANY_STREAMS,
        Reason.MEMORY_LIMIT_EXCEEDED,
        Reason.STORE_UNAVAILABLE,
        Reason.REGISTRY_FULL,
    }
)
"""The reasons that an operator should look at: calls that fail with them are logged as warnings. The others are the caller's to
solve, except INTERNAL, which is logged as an error."""


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
        code: The status code; by default that of the reason.
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
        self.code = reason.code if code is None else code
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
