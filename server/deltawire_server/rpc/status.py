"""A failure as gRPC tells it: code, message, and google.rpc details in a trailer.

Trailers are headers, and headers have limits: a client drops a call whose trailers exceed 8 KiB by default, and shows that
instead of the failure. So a message is cut to a kibibyte, and details are kept small.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from deltawire_server.errors import Code, Reason

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from deltawire_server.errors import DeltawireError

DOMAIN = "deltawire"
REASON_TRAILER = "deltawire-reason"
DETAILS_TRAILER = "grpc-status-details-bin"

MAX_MESSAGE = 1024
"""Characters of a message; in a header each may take up to twelve bytes, since gRPC escapes what is not ASCII."""
MAX_VIOLATIONS = 16
MAX_DESCRIPTION = 96
"""Characters of a violation's description, if there are several; one alone may be as long as the message."""

_STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}


def grpc_code(code: Code) -> grpc.StatusCode:
    """The gRPC library's name for a code."""
    return _STATUS_CODES[code.value]


def shorten(text: str, limit: int) -> str:
    """At most `limit` characters, the last an ellipsis if something was cut."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def status_of(error: DeltawireError, request_id: str) -> status_pb2.Status:
    """A failure with its details: ErrorInfo always, BadRequest, RetryInfo, QuotaFailure or ResourceInfo where they say more."""
    message = shorten(error.message, MAX_MESSAGE)
    metadata = {key: shorten(value, MAX_DESCRIPTION) for key, value in error.metadata.items()}
    metadata["request_id"] = request_id
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.reason.name, domain=DOMAIN, metadata=metadata)]
    if error.violations:
        limit = MAX_DESCRIPTION if len(error.violations) > 1 else MAX_MESSAGE
        details.append(
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(
                        field=shorten(violation.field, MAX_DESCRIPTION),
                        description=shorten(violation.description, limit),
                    )
                    for violation in error.violations[:MAX_VIOLATIONS]
                ]
            )
        )
    if error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(error.retry_after * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if error.reason is Reason.TOO_MANY_STREAMS:
        violation = error_details_pb2.QuotaFailure.Violation(subject="gateway", description=message)
        details.append(error_details_pb2.QuotaFailure(violations=[violation]))
    if error.reason in (Reason.MODEL_NOT_FOUND, Reason.MODEL_ALREADY_EXISTS) and "model" in metadata:
        details.append(
            error_details_pb2.ResourceInfo(resource_type="deltawire.v1.Model", resource_name=metadata["model"])
        )
    packed: list[any_pb2.Any] = []
    for detail in details:
        wrapped = any_pb2.Any()
        wrapped.Pack(detail)
        packed.append(wrapped)
    return status_pb2.Status(code=error.code.value, message=message, details=packed)


def trailers_of(error: DeltawireError, request_id: str) -> tuple[tuple[str, str | bytes], ...]:
    """The trailing metadata of a failed call."""
    return (
        (REASON_TRAILER, error.reason.name),
        ("x-request-id", request_id),
        (DETAILS_TRAILER, status_of(error, request_id).SerializeToString()),
    )
