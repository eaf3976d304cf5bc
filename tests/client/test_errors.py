"""A failed call becomes the error that says what to do, with all that the gateway sent."""

from __future__ import annotations

import pickle
import re
from typing import TYPE_CHECKING

import grpc
import pytest
from google.rpc.status_pb2 import Status

import deltawire
from deltawire import (
    CallCancelledError,
    CallError,
    DeadlineExceededError,
    DeltawireError,
    ErrorReason,
    FieldViolation,
    InvalidRequestError,
    ModelNotFoundError,
    ProtocolError,
    UnavailableError,
)
from deltawire import _errors as errors
from deltawire._failure import Failure, failure_of
from tests.client.scripted import Fail

if TYPE_CHECKING:
    from deltawire._metadata import Metadata


class Failed:
    """A call that failed, as gRPC's exceptions show it."""

    def __init__(
        self,
        code: grpc.StatusCode | None,
        trailing: Metadata | None = (),
        initial: Metadata | None = None,
        details: str | None = "it failed",
    ) -> None:
        self._code, self._details, self._initial, self._trailing = code, details, initial, trailing

    def code(self) -> grpc.StatusCode | None:
        return self._code

    def details(self) -> str | None:
        return self._details

    def initial_metadata(self) -> Metadata | None:
        return self._initial

    def trailing_metadata(self) -> Metadata | None:
        return self._trailing


def error_of(fail: Fail, request_id: str = "") -> CallError:
    """The error for a call that failed like this."""
    return errors.error_for(failure_of(Failed(fail.code, fail.trailing()), request_id))


def test_every_reason_has_an_error_of_its_own() -> None:
    """The table is whole, no class stands for two reasons, and all of them are public."""
    assert set(errors.REASONS) == set(ErrorReason.values()) - {ErrorReason.ERROR_REASON_UNSPECIFIED}
    assert len(set(errors.REASONS.values())) == len(errors.REASONS)
    for kind in {*errors.REASONS.values(), *errors.CODES.values()}:
        assert getattr(deltawire, kind.__name__) is kind


def test_the_tree_at_the_top_is_the_tree() -> None:
    """Every class is drawn, under the class that it derives from."""
    path: list[str] = []
    drawn = set()
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"    ([│├└─ ]*)([A-Z]\w+)", line):
            depth = len(match[1]) // 4
            path[depth:] = [match[2]]
            drawn.add(match[2])
            kind = getattr(errors, match[2])
            if depth:
                assert kind.__bases__[0].__name__ == path[depth - 1], match[2]

    def below(kind: type[DeltawireError]) -> set[str]:
        return {kind.__name__}.union(*(below(each) for each in kind.__subclasses__()))

    assert drawn == below(DeltawireError)


@pytest.mark.parametrize("reason", [name for name in ErrorReason.keys() if not name.endswith("UNSPECIFIED")])  # noqa: SIM118
def test_the_reason_decides(reason: str) -> None:
    """The reason chooses the class, whatever the code."""
    error = error_of(Fail(grpc.StatusCode.UNKNOWN, reason.removeprefix("ERROR_REASON_")))
    assert type(error) is errors.REASONS[ErrorReason.Value(reason)]


def test_all_that_the_gateway_told() -> None:
    """Every detail arrives in a field; the request id of the details is the nearest to the log."""
    fail = Fail(
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_REQUEST",
        metadata={"field": "chat.messages", "request_id": "r1"},
        violations=[("chat.messages", "is empty"), ("chat.model", "is empty")],
        retry_after=1.5,
    )
    failed = Failed(fail.code, fail.trailing(), (("x-request-id", "from-headers"),), "two fields")
    error = errors.error_for(failure_of(failed, "sent"))
    assert isinstance(error, InvalidRequestError)
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert (error.reason, error.message) == ("INVALID_REQUEST", "two fields")
    assert error.metadata == {"field": "chat.messages", "request_id": "r1"}
    assert error.violations == (
        FieldViolation("chat.messages", "is empty"),
        FieldViolation("chat.model", "is empty"),
    )
    assert error.retry_after == 1.5
    assert error.request_id == "r1"
    assert error.initial_metadata == (("x-request-id", "from-headers"),)
    assert error.trailing_metadata == fail.trailing()
    assert len(error.status.details) == 3
    assert str(error) == "INVALID_ARGUMENT (INVALID_REQUEST): two fields"


def test_without_details_the_plain_trailer_decides() -> None:
    """And what details would have told is empty, not missing."""
    trailers = (("deltawire-reason", "MODEL_NOT_FOUND"), ("x-request-id", "r2"))
    error = error_of(Fail(grpc.StatusCode.NOT_FOUND, trailers=trailers), "sent")
    assert type(error) is ModelNotFoundError
    assert (error.metadata, error.violations, error.retry_after, error.status) == ({}, (), None, None)
    assert error.request_id == "r2"


@pytest.mark.parametrize(
    "details",
    [
        b"\xff\xff not a status",
        "text instead of bytes",
    ],
)
def test_details_that_cannot_be_read_are_none(details: str | bytes) -> None:
    """The reason's own trailer still decides."""
    trailers = (("grpc-status-details-bin", details), ("deltawire-reason", "DRAINING"))
    error = error_of(Fail(grpc.StatusCode.UNAVAILABLE, trailers=trailers))
    assert type(error) is deltawire.DrainingError
    assert error.status is None


def test_a_detail_that_cannot_be_read_leaves_the_others() -> None:
    """One broken detail costs that detail."""
    fail = Fail(grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", metadata={"model": "x"}, violations=[("a", "b")])
    status = Status.FromString(dict(fail.trailing())["grpc-status-details-bin"])
    status.details[1].value = b"\xff"
    trailers = (("grpc-status-details-bin", status.SerializeToString()),)
    error = error_of(Fail(grpc.StatusCode.NOT_FOUND, trailers=trailers))
    assert type(error) is ModelNotFoundError
    assert error.metadata == {"model": "x"}
    assert error.violations == ()


def test_details_of_others_are_not_ours() -> None:
    """A proxy's own ErrorInfo has a reason of its own; it does not become one of ours."""
    fail = Fail(grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
    status = Status.FromString(dict(fail.trailing())["grpc-status-details-bin"])
    status.details[0].value = status.details[0].value.replace(b"deltawire", b"otherwire")
    status.details.add(type_url="type.googleapis.com/google.rpc.Help")
    trailers = (("grpc-status-details-bin", status.SerializeToString()),)
    error = error_of(Fail(grpc.StatusCode.NOT_FOUND, trailers=trailers))
    assert type(error) is CallError
    assert (error.reason, error.metadata) == ("", {})


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_without_a_reason_the_code_decides(code: grpc.StatusCode) -> None:
    """Any code that has a class of its own gets it, the rest the common one."""
    error = error_of(Fail(code, trailers=()), "sent")
    assert type(error) is errors.CODES.get(code, CallError)
    assert error.request_id == "sent"
    assert str(error) == f"{code.name}: it failed"


def test_reasons_of_a_later_version() -> None:
    """An unknown word is kept, and the code decides; so it is with the word that is never sent."""
    error = error_of(Fail(grpc.StatusCode.UNAVAILABLE, "FULL_MOON"))
    assert (type(error), error.reason) == (UnavailableError, "FULL_MOON")
    assert type(error_of(Fail(grpc.StatusCode.UNAVAILABLE, "UNSPECIFIED"))) is UnavailableError


def test_a_call_that_knows_nothing() -> None:
    """No code, no message, no metadata: still a failure that can be told."""
    failure = failure_of(Failed(None, None, None, None), "sent")
    assert (failure.code, failure.message, failure.request_id) == (grpc.StatusCode.UNKNOWN, "", "sent")


def test_the_fault_that_completed_tells() -> None:
    """It replaces code, reason and message, and nothing else."""
    failure = Failure(grpc.StatusCode.OK, "", request_id="r")
    told = errors.with_fault(failure, 10, ErrorReason.ERROR_REASON_UPSTREAM_INCOMPLETE, "gone")
    assert (told.code, told.reason, told.message) == (grpc.StatusCode.ABORTED, "UPSTREAM_INCOMPLETE", "gone")
    assert told.request_id == "r"
    later = errors.with_fault(failure, 99, 99, "?")  # type: ignore[arg-type]
    assert (later.code, later.reason) == (grpc.StatusCode.UNKNOWN, "")


def test_groups() -> None:
    """What to do next can be caught as a group."""
    assert issubclass(ModelNotFoundError, deltawire.RequestError)
    assert issubclass(deltawire.UpstreamTimeoutError, deltawire.ProviderError)
    assert issubclass(deltawire.DurationLimitExceededError, DeadlineExceededError)
    assert issubclass(CallCancelledError, CallError)
    assert not issubclass(ProtocolError, CallError)


def test_errors_travel_between_processes() -> None:
    """They survive pickling, so a pool's worker can raise them."""
    error = error_of(Fail(grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", metadata={"model": "x"}))
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 -- our own bytes
    assert type(copy) is ModelNotFoundError
    assert (copy.reason, copy.metadata, str(copy)) == (error.reason, error.metadata, str(error))
    broken = pickle.loads(pickle.dumps(ProtocolError("a gap", "r")))  # noqa: S301 -- our own bytes
    assert (str(broken), broken.request_id) == ("a gap", "r")
