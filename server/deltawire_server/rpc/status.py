"""A failure as gRPC tells it: code, message, and google.rpc details in a trailer.

Trailers are headers, and headers have limits: a client drops a call whose trailers exceed 8 KiB by default, and shows that
instead of the failure. So a message is cut to a kibibyte, which escaped may take three, and the details to three, which
in base64 take four.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from deltawire_server.errors import Code, Reason

if TYPE_CHECKING:
    from collections.abc import Sequence

    from google.protobuf.message import Message

    from deltawire_server.errors import DeltawireError, Violation

DOMAIN = "deltawire.dev"
REASON_TRAILER = "deltawire-reason"
DETAILS_TRAILER = "grpc-status-details-bin"
PUSHBACK_TRAILER = "grpc-retry-pushback-ms"
"""When to retry, for gRPC's own retries, which do not read RetryInfo; below 0 is never."""

MAX_MESSAGE = 1024
"""Bytes of a message; in a header each may take three, since gRPC escapes what is not ASCII."""
MAX_VIOLATIONS = 1152
"""Bytes of all violations together: about sixteen of the usual ones, or one as long as the message."""
MAX_DESCRIPTION = 96
"""Bytes of a violation's description, if there are several; one alone may be as long as the message."""

_STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}


def grpc_code(code: Code) -> grpc.StatusCode:
    """The gRPC library's name for a code."""
    return _STATUS_CODES[code.value]


def shorten(text: str, limit: int) -> str:
    """At most `limit` bytes of UTF-8, at the end an ellipsis if something was cut."""
    data = text.encode(errors="replace")
    if len(data) <= limit:
        return data.decode()
    return data[: limit - len("…".encode())].decode(errors="ignore") + "…"


def status_of(error: DeltawireError, request_id: str) -> status_pb2.Status:
    """A failure with its details: ErrorInfo always, BadRequest, RetryInfo, QuotaFailure or ResourceInfo where they say more."""
    message = shorten(error.message, MAX_MESSAGE)
    metadata = {key: shorten(value, MAX_DESCRIPTION) for key, value in error.metadata.items()}
    metadata["request_id"] = request_id
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.reason.name, domain=DOMAIN, metadata=metadata)]
    if error.violations:
        details.append(_bad_request(error.violations))
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


def _bad_request(violations: Sequence[Violation]) -> error_details_pb2.BadRequest:
    limit = MAX_DESCRIPTION if len(violations) > 1 else MAX_MESSAGE
    message = error_details_pb2.BadRequest()
    for violation in violations:
        message.field_violations.add(
            field=shorten(violation.field, MAX_DESCRIPTION), description=shorten(violation.description, limit)
        )
        if message.ByteSize() > MAX_VIOLATIONS:
            del message.field_violations[-1]
            break
    return message


def trailers_of(error: DeltawireError, request_id: str) -> tuple[tuple[str, str | bytes], ...]:
    """The trailing metadata of a failed call."""
    return (
        (REASON_TRAILER, error.reason.name),
        ("x-request-id", request_id),
        (PUSHBACK_TRAILER, "-1" if error.retry_after is None else str(round(error.retry_after * 1000))),
        (DETAILS_TRAILER, status_of(error, request_id).SerializeToString()),
    )
