"""Converts errors to gRPC statuses: code, message, and google.rpc details in a trailer.

Clients limit the size of trailers, by default to 8 KiB, and a call that exceeds the limit fails with another error. So a message
is cut to 1 KiB, which is up to 3 KiB escaped, and the details to 3 KiB, which are 4 KiB in base64.
"""

from __future__ import annotations

import functools
import math
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
"""The delay for gRPC's own retries, which do not use RetryInfo; a negative value forbids retries."""

MAX_MESSAGE = 1024
"""Bytes of a message; in a header each may take three bytes, because gRPC escapes non-ASCII bytes."""
MAX_VIOLATIONS = 1152
"""Bytes of all violations together: about sixteen of usual length, or one as long as the message."""
MAX_DESCRIPTION = 96
"""Bytes of a violation's description, if there are several; one alone may be as long as the message."""

_TYPES = "type.googleapis.com/"

_STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}


def grpc_code(code: Code) -> grpc.StatusCode:
    """The gRPC library's constant for a code."""
    return _STATUS_CODES[code.value]


def shorten(text: str, limit: int) -> str:
    """Cut a text to at most `limit` bytes of UTF-8, with an ellipsis at the end if it was longer."""
    data = text.encode(errors="replace")
    if len(data) <= limit:
        return data.decode()
    return data[: limit - len("…".encode())].decode(errors="ignore") + "…"


def status_of(error: DeltawireError, request_id: str) -> status_pb2.Status:
    """The status of an error: always with ErrorInfo; with BadRequest, RetryInfo, QuotaFailure, ResourceInfo if they apply."""
    message = shorten(error.message, MAX_MESSAGE)
    metadata = {key: shorten(value, MAX_DESCRIPTION) for key, value in error.metadata.items()}
    metadata["request_id"] = request_id
    packed = [_packed(error_details_pb2.ErrorInfo(reason=error.reason.name, domain=DOMAIN, metadata=metadata))]
    if error.violations:
        packed.append(_packed(_bad_request(error.violations)))
    if error.retry_after is not None:
        packed.append(_retry_info(_milliseconds(error.retry_after)))
    if error.reason in (Reason.TOO_MANY_STREAMS, Reason.CALLER_LIMIT_EXCEEDED):
        packed.append(_quota_failure(metadata.get("caller", "gateway") or "this caller", message))
    if error.reason in (Reason.MODEL_NOT_FOUND, Reason.MODEL_ALREADY_EXISTS) and "model" in metadata:
        packed.append(
            _packed(error_details_pb2.ResourceInfo(resource_type="deltawire.v1.Model", resource_name=metadata["model"]))
        )
    return status_pb2.Status(code=error.code.value, message=message, details=packed)


def _milliseconds(seconds: float) -> int:
    """Rounded up, so that a retry does not come too early; but not for an error in the last digits."""
    return math.ceil(round(seconds * 1000, 6))


def _packed(detail: Message) -> any_pb2.Any:
    """As `Any.Pack` does, which takes three times as long: a full gateway refuses thousands of calls per second."""
    return any_pb2.Any(type_url=f"{_TYPES}{detail.DESCRIPTOR.full_name}", value=detail.SerializeToString())


@functools.lru_cache(maxsize=64)
def _retry_info(milliseconds: int) -> any_pb2.Any:
    delay = duration_pb2.Duration(seconds=milliseconds // 1000, nanos=milliseconds % 1000 * 10**6)
    return _packed(error_details_pb2.RetryInfo(retry_delay=delay))


@functools.lru_cache(maxsize=64)
def _quota_failure(subject: str, description: str) -> any_pb2.Any:
    violation = error_details_pb2.QuotaFailure.Violation(subject=subject, description=description)
    return _packed(error_details_pb2.QuotaFailure(violations=[violation]))


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
        (PUSHBACK_TRAILER, "-1" if error.retry_after is None else str(_milliseconds(error.retry_after))),
        (DETAILS_TRAILER, status_of(error, request_id).SerializeToString()),
    )
