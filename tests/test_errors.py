"""Reasons and codes, and how they match the protos'."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from deltawire.v1 import error_reason_pb2
from deltawire_server.errors import Code, DeltawireError, Reason, Violation, invalid_request

PROTO = Path(__file__).parent.parent / "protos/deltawire/v1/error_reason.proto"


def test_reasons_are_the_protos() -> None:
    """By name and by number, all of them but UNSPECIFIED."""
    reasons = {f"ERROR_REASON_{reason.name}": reason.value for reason in Reason}
    assert reasons | {"ERROR_REASON_UNSPECIFIED": 0} == dict(error_reason_pb2.ErrorReason.items())


def test_codes_are_grpcs() -> None:
    """By name and by number."""
    assert {code.name: code.value for code in Code}.items() <= {
        code.name: code.value[0] for code in grpc.StatusCode
    }.items()


@pytest.mark.parametrize("reason", Reason)
def test_codes_are_those_of_the_protos_comments(reason: Reason) -> None:
    """The comment on each value begins with its code: what callers read is what they get."""
    before, _, _ = PROTO.read_text(encoding="utf-8").partition(f"  ERROR_REASON_{reason.name} =")
    comment = before.rpartition("\n\n")[2]
    assert comment.strip().startswith(f"// {reason.code.name}")


def test_a_failure() -> None:
    """An error has its arguments, and by default the code of its reason."""
    error = DeltawireError(Reason.SLOW_CALLER, "m", metadata={"a": "b"}, retry_after=1.0)
    assert (str(error), error.message, error.code) == ("m", "m", Code.RESOURCE_EXHAUSTED)
    assert (error.metadata, error.violations, error.retry_after) == ({"a": "b"}, (), 1.0)
    assert DeltawireError(Reason.UPSTREAM_TIMEOUT, "m", code=Code.ABORTED).code is Code.ABORTED


def test_an_invalid_request_lists_all_that_is_wrong() -> None:
    """The message has every field, the metadata the first."""
    error = invalid_request([Violation("a", "is bad"), Violation("b", "is worse")])
    assert error.message == "a: is bad; b: is worse"
    assert error.metadata == {"field": "a"}
    assert [violation.field for violation in error.violations] == ["a", "b"]
