"""What a failed call tells: its status, the details in its trailers, and its metadata, read into one `Failure`.

Which error it becomes is said in `_errors`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import grpc
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from deltawire._completion import Answer

Metadata: TypeAlias = tuple[tuple[str, str | bytes], ...]

DOMAIN = "deltawire.dev"
DETAILS_TRAILER = "grpc-status-details-bin"
REASON_TRAILER = "deltawire-reason"
REQUEST_ID = "x-request-id"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A field of the request that breaks a rule: its path ("chat.messages[0]") and what is wrong with it."""

    field: str
    description: str


@dataclass(frozen=True, slots=True)
class Failure:
    """All that is known of a failed call; its error shows the same fields."""

    code: grpc.StatusCode
    message: str
    reason: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    violations: tuple[FieldViolation, ...] = ()
    retry_after: float | None = None
    request_id: str = ""
    initial_metadata: Metadata = ()
    trailing_metadata: Metadata = ()
    status: Any = None
    answer: Answer | None = None


class FailedCall(Protocol):
    """What a gRPC exception of either kind, blocking or asynchronous, tells at once."""

    def code(self) -> grpc.StatusCode | None:
        """The status code."""

    def details(self) -> str | None:
        """The status message."""

    def initial_metadata(self) -> Iterable[tuple[str, str | bytes]] | None:
        """The headers, if any came."""

    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None:
        """The trailers, if any came."""


def metadata_of(pairs: Iterable[tuple[str, str | bytes]] | None) -> Metadata:
    """Metadata of either kind of call as plain pairs of name and value."""
    return tuple((name, value) for name, value in pairs or ())


def metadata_text(metadata: Metadata, name: str) -> str:
    """The first value of this name as text; "" if there is none."""
    return next((value for key, value in metadata if key == name and isinstance(value, str)), "")


def failure_of(call: FailedCall, request_id: str) -> Failure:
    """Read all that a failed call tells.

    Args:
        call: The gRPC exception.
        request_id: The id that was sent, for when the call came back with none.

    What comes back is for `_errors.error_for`.
    """
    initial, trailing = metadata_of(call.initial_metadata()), metadata_of(call.trailing_metadata())
    failure = Failure(
        code=call.code() or grpc.StatusCode.UNKNOWN,
        message=call.details() or "",
        reason=metadata_text(trailing, REASON_TRAILER),
        request_id=metadata_text(initial, REQUEST_ID) or metadata_text(trailing, REQUEST_ID) or request_id,
        initial_metadata=initial,
        trailing_metadata=trailing,
        status=_status(trailing),
    )
    return failure if failure.status is None else _with_details(failure)


def _status(trailing: Metadata) -> Any:  # noqa: ANN401 -- google.rpc ships no types
    """The `google.rpc.Status` in the trailers; None if there is none or it cannot be read."""
    for name, value in trailing:
        if name == DETAILS_TRAILER and isinstance(value, bytes):
            try:
                return Status.FromString(value)
            except DecodeError:
                return None
    return None


def _with_details(failure: Failure) -> Failure:
    """The failure with what its status details add. Details of other domains and types are left in `status`."""
    info, bad_request, retry = ErrorInfo(), BadRequest(), RetryInfo()
    for detail in failure.status.details:
        try:
            if detail.Is(ErrorInfo.DESCRIPTOR) and not info.reason:
                detail.Unpack(info)
            elif detail.Is(BadRequest.DESCRIPTOR):
                detail.Unpack(bad_request)
            elif detail.Is(RetryInfo.DESCRIPTOR):
                detail.Unpack(retry)
        except DecodeError:
            continue
    ours = info.domain == DOMAIN
    metadata = dict(info.metadata) if ours else {}
    return replace(
        failure,
        reason=info.reason if ours else failure.reason,
        metadata=metadata,
        violations=tuple(FieldViolation(each.field, each.description) for each in bad_request.field_violations),
        retry_after=retry.retry_delay.ToTimedelta().total_seconds() if retry.HasField("retry_delay") else None,
        request_id=metadata.get("request_id") or failure.request_id,
    )
