"""A failure as status and trailers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from deltawire_server.errors import Code, DeltawireError, Reason, Violation, invalid_request
from deltawire_server.rpc.status import (
    MAX_DESCRIPTION,
    MAX_MESSAGE,
    MAX_VIOLATIONS,
    grpc_code,
    shorten,
    status_of,
    trailers_of,
)

if TYPE_CHECKING:
    from google.protobuf.message import Message


def details(error: DeltawireError) -> dict[str, Message]:
    """The details of a failure's status, by their types' short names."""
    found: dict[str, Message] = {}
    for packed in status_of(error, "r").details:
        name = packed.TypeName().removeprefix("google.rpc.")
        found[name] = getattr(error_details_pb2, name).FromString(packed.value)
    return found


def violations(*given: Violation) -> list[tuple[str, str]]:
    """The field violations as they are sent."""
    bad_request = details(invalid_request(given))["BadRequest"]
    assert isinstance(bad_request, error_details_pb2.BadRequest)
    return [(violation.field, violation.description) for violation in bad_request.field_violations]


@pytest.mark.parametrize("code", Code)
def test_codes(code: Code) -> None:
    """Each has grpc's own."""
    assert grpc_code(code) is grpc.StatusCode[code.name]


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_is_told_in_details_and_trailers(reason: Reason) -> None:
    """ErrorInfo always, with our domain and the request id; the trailer says the same word."""
    error = DeltawireError(reason, "m", metadata={"k": "v"})
    status = status_of(error, "r")
    assert (status.code, status.message) == (error.code.value, "m")
    info = error_details_pb2.ErrorInfo(
        reason=reason.name, domain="deltawire.dev", metadata={"k": "v", "request_id": "r"}
    )
    assert details(error)["ErrorInfo"] == info
    assert trailers_of(error, "r") == (
        ("deltawire-reason", reason.name),
        ("x-request-id", "r"),
        ("grpc-retry-pushback-ms", "-1"),
        ("grpc-status-details-bin", status.SerializeToString()),
    )


def test_only_what_says_more() -> None:
    """No other details than those that there is something for."""
    assert details(DeltawireError(Reason.INTERNAL, "m")).keys() == {"ErrorInfo"}
    assert details(DeltawireError(Reason.MODEL_NOT_FOUND, "m")).keys() == {"ErrorInfo"}


@pytest.mark.parametrize(("seconds", "text"), [(0.0, "0s"), (1.5, "1.500s"), (3600.0, "3600s")])
def test_retry(seconds: float, text: str) -> None:
    """RetryInfo, also for at once."""
    info = details(DeltawireError(Reason.DRAINING, "m", retry_after=seconds))["RetryInfo"]
    assert isinstance(info, error_details_pb2.RetryInfo)
    assert info.retry_delay.ToJsonString() == text


@pytest.mark.parametrize("reason", [Reason.MODEL_NOT_FOUND, Reason.MODEL_ALREADY_EXISTS])
def test_resource(reason: Reason) -> None:
    """Which model it is about."""
    assert details(DeltawireError(reason, "m", metadata={"model": "x"}))["ResourceInfo"] == (
        error_details_pb2.ResourceInfo(resource_type="deltawire.v1.Model", resource_name="x")
    )


def test_quota() -> None:
    """What there is too much of."""
    quota = details(DeltawireError(Reason.TOO_MANY_STREAMS, "m"))["QuotaFailure"]
    assert isinstance(quota, error_details_pb2.QuotaFailure)
    assert [(violation.subject, violation.description) for violation in quota.violations] == [("gateway", "m")]


def test_one_violation_may_be_as_long_as_the_message() -> None:
    """With the longest path too."""
    assert violations(Violation("f" * 200, "d" * 5000)) == [
        ("f" * (MAX_DESCRIPTION - 3) + "…", "d" * (MAX_MESSAGE - 3) + "…")
    ]


def test_several_violations_are_shorter() -> None:
    """Each in its place."""
    first, second = violations(Violation("a", "d" * 5000), Violation("b", "short"))
    assert first == ("a", "d" * (MAX_DESCRIPTION - 3) + "…")
    assert second == ("b", "short")


def test_many_violations_are_as_many_as_fit() -> None:
    """The first ones."""
    sent = violations(
        *(Violation(f"chat.messages[{number}].user.content", "needs at least one part") for number in range(500))
    )
    assert 10 < len(sent) < 30
    assert [field for field, _ in sent] == [f"chat.messages[{number}].user.content" for number in range(len(sent))]
    error = invalid_request([Violation("f" * 90, "d" * 90)] * 100)
    assert details(error)["BadRequest"].ByteSize() <= MAX_VIOLATIONS


def test_long_metadata_is_cut() -> None:
    """A caller's model name may be anything."""
    info = details(DeltawireError(Reason.MODEL_NOT_FOUND, "m", metadata={"model": "x" * 5000}))["ErrorInfo"]
    assert isinstance(info, error_details_pb2.ErrorInfo)
    assert len(info.metadata["model"].encode()) == MAX_DESCRIPTION


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("", ""),
        ("0123456789", "0123456789"),
        ("0123456789x", "0123456…"),
        ("ééééé", "ééééé"),
        ("éééééé", "ééé…"),
        ("日日日日", "日日…"),
        ("\ud800", "?"),
        ("\ud800" * 20, "???????…"),
    ],
)
def test_shorten(text: str, cut: str) -> None:
    """At most ten bytes of whole characters, and always text that can be sent."""
    assert shorten(text, 10) == cut
    assert len(cut.encode()) <= 10


def test_a_status_can_be_read_again() -> None:
    """As clients do."""
    packed = dict(trailers_of(DeltawireError(Reason.INTERNAL, "é" * 5000), "r"))["grpc-status-details-bin"]
    assert isinstance(packed, bytes)
    assert status_pb2.Status.FromString(packed).message.startswith("éé")
