"""A failed call as one `Failure`: its status, the details in its trailers, and its metadata.

`_errors` maps it to an exception.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, cast

import grpc
from google.protobuf.message import DecodeError

from deltawire._metadata import Metadata, metadata_of, metadata_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from deltawire._answer import Answer

DOMAIN = "deltawire.dev"
DETAILS_TRAILER = "grpc-status-details-bin"
REASON_TRAILER = "deltawire-reason"
REQUEST_ID = "x-request-id"
# The status message of a call that gRPC ends because this program closes the channel.
_CHANNEL_CLOSED = "Channel closed!"
# Those of a call that gRPC ends because its timeout passed: without a response, and within a stream.
_TIMEOUT_PASSED = frozenset({"Deadline Exceeded", "Stream removed (Deadline Exceeded)"})


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A field of the request that breaks a rule: its path ("chat.messages[0]") and what is wrong with it."""

    field: str
    description: str


@dataclass(frozen=True, slots=True)
class Failure:
    """All that is known of a failed call; its error shows the same fields.

    `is_closed` says that this program closed the client or its channel; the gateway did not end the call.
    """

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
    is_closed: bool = False


class FailedCall(Protocol):
    """What a gRPC exception of either kind, blocking or asyncio, says without waiting."""

    def code(self) -> grpc.StatusCode | None:
        """The status code."""

    def details(self) -> str | None:
        """The status message."""

    def initial_metadata(self) -> Iterable[tuple[str, str | bytes]] | None:
        """The headers, if any were received."""

    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None:
        """The trailers, if any were received."""


class ClosedCall:
    """A `FailedCall` that gRPC did not make, or ended, because this program closed the channel."""

    def code(self) -> grpc.StatusCode:
        """CANCELLED, as gRPC says of a call that was active when its channel was closed."""
        return grpc.StatusCode.CANCELLED

    def details(self) -> str:
        """The status message of such a call."""
        return _CHANNEL_CLOSED

    def initial_metadata(self) -> Metadata:
        """Empty."""
        return ()

    def trailing_metadata(self) -> Metadata:
        """Empty."""
        return ()


def failed_call(error: Exception) -> FailedCall:
    """What a gRPC exception says of its call.

    Args:
        error: An `RpcError`, or what gRPC raises for a call on a closed channel: ValueError from the blocking kind,
            UsageError from the asyncio kind.

    Raises:
        Exception: The same one, if it is neither, for example an interceptor's own ValueError.
    """
    if isinstance(error, grpc.RpcError):
        # Frames of its traceback refer to the call. A connection stays open until its calls are freed, even if it was
        # closed, so an error that is kept must not refer to one.
        # The blocking kind's exception is the call itself, which its type does not say.
        return cast("FailedCall", error.with_traceback(None))
    text = str(error).lower()
    if "channel" in text and ("closed" in text or "closing" in text):
        return ClosedCall()
    raise error


def failure_of(call: FailedCall, request_id: str) -> Failure:
    """Read everything that a failed call says.

    Args:
        call: The gRPC exception.
        request_id: The id that was sent, in case the response has none.

    Pass the result to `_errors.error_for`.
    """
    initial, trailing = metadata_of(call.initial_metadata()), metadata_of(call.trailing_metadata())
    code, message = call.code() or grpc.StatusCode.UNKNOWN, call.details() or ""
    is_closed = code is grpc.StatusCode.CANCELLED and _CHANNEL_CLOSED in message
    if is_closed:
        message = "the client was closed, or the channel that it was given"
    elif code is grpc.StatusCode.DEADLINE_EXCEEDED and message in _TIMEOUT_PASSED:
        message = "the timeout passed"
    failure = Failure(
        code=code,
        message=message,
        reason=metadata_text(trailing, REASON_TRAILER),
        request_id=metadata_text(initial, REQUEST_ID) or metadata_text(trailing, REQUEST_ID) or request_id,
        initial_metadata=initial,
        trailing_metadata=trailing,
        status=_status(trailing),
        is_closed=is_closed,
    )
    return failure if failure.status is None else _with_details(failure)


def _status(trailing: Metadata) -> Any:  # noqa: ANN401 -- google.rpc ships no types
    """The `google.rpc.Status` in the trailers; None if there is none or it cannot be read."""
    for name, value in trailing:
        if name == DETAILS_TRAILER and isinstance(value, bytes):
            # Imported here because most programs never see such a trailer.
            from google.rpc.status_pb2 import Status

            try:
                return Status.FromString(value)
            except DecodeError:
                return None
    return None


def _with_details(failure: Failure) -> Failure:
    """The failure with what its status details add. Details of other domains and types are left in `status`."""
    from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo

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
