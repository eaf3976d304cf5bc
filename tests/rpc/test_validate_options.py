"""How a stream is to be told, and which completion is meant: what is refused, by which field."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.duration_pb2 import Duration

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire_server.completions.options import StreamOptions
from deltawire_server.errors import CallerError, Reason
from deltawire_server.rpc.validate_options import completion_id, resume, stream_options

if TYPE_CHECKING:
    from collections.abc import Callable

LIMIT = 600.0


def violations(check: Callable[..., object], *arguments: object) -> dict[str, str]:
    """The fields that are refused, with the violations."""
    with pytest.raises(CallerError) as caught:
        check(*arguments)
    assert caught.value.reason is Reason.INVALID_REQUEST
    return {violation.field: violation.description for violation in caught.value.violations}


def lasting(seconds: float) -> Duration:
    """A duration."""
    whole = int(seconds)
    return Duration(seconds=whole, nanos=round((seconds - whole) * 1e9))


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({}, StreamOptions()),
        ({"usage_updates": True}, StreamOptions(usage_updates=True)),
        ({"max_coalesce_delay": lasting(0)}, StreamOptions(max_coalesce_delay=0.0)),
        ({"max_coalesce_delay": lasting(10)}, StreamOptions(max_coalesce_delay=10.0)),
        ({"heartbeat_interval": lasting(0.1)}, StreamOptions(heartbeat_interval=0.1)),
        ({"heartbeat_interval": lasting(3600)}, StreamOptions(heartbeat_interval=3600.0)),
        (
            {"heartbeat_interval": lasting(1), "early_heartbeats": True},
            StreamOptions(heartbeat_interval=1.0, early_heartbeats=True),
        ),
        ({"retention": lasting(1)}, StreamOptions(retention=1.0)),
        ({"retention": lasting(LIMIT)}, StreamOptions(retention=LIMIT)),
    ],
    ids=repr,
)
def test_options(given: dict[str, Any], options: StreamOptions) -> None:
    """Each of them, up to its limits."""
    assert stream_options(chat_pb.StreamOptions(**given), LIMIT) == options


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"max_coalesce_delay": lasting(-0.1)}, "options.max_coalesce_delay"),
        ({"max_coalesce_delay": lasting(10.1)}, "options.max_coalesce_delay"),
        ({"max_coalesce_delay": Duration(seconds=1, nanos=-1)}, "options.max_coalesce_delay"),
        ({"heartbeat_interval": lasting(0)}, "options.heartbeat_interval"),
        ({"heartbeat_interval": lasting(0.09)}, "options.heartbeat_interval"),
        ({"heartbeat_interval": lasting(3600.1)}, "options.heartbeat_interval"),
        ({"heartbeat_interval": Duration(seconds=1, nanos=1_000_000_000)}, "options.heartbeat_interval"),
        ({"early_heartbeats": True}, "options.early_heartbeats"),
        ({"retention": lasting(0.999)}, "options.retention"),
        ({"retention": lasting(LIMIT + 0.001)}, "options.retention"),
    ],
    ids=repr,
)
def test_each_rule_of_options(given: dict[str, Any], field: str) -> None:
    """What breaks just one rule is refused for just that field."""
    assert [*violations(stream_options, chat_pb.StreamOptions(**given), LIMIT)] == [field]


def test_the_operators_limit_is_named() -> None:
    """So that a caller knows what to ask for."""
    given = chat_pb.StreamOptions(retention=lasting(61))
    assert "60 seconds" in violations(stream_options, given, 60.0)["options.retention"]


def test_all_that_is_wrong_with_options_is_told_at_once() -> None:
    """In the order of the message."""
    given = chat_pb.StreamOptions(
        max_coalesce_delay=lasting(11),
        heartbeat_interval=lasting(0),
        early_heartbeats=True,
        retention=lasting(0),
    )
    assert [*violations(stream_options, given, LIMIT)] == [
        "options.max_coalesce_delay",
        "options.heartbeat_interval",
        "options.retention",
    ]


def test_every_option_is_read() -> None:
    """A field that the protos get later has to be thought of."""
    assert {field.name for field in chat_pb.StreamOptions.DESCRIPTOR.fields} == {*StreamOptions.__slots__}


@pytest.mark.parametrize("text", ["cmpl-0123456789abcdef-01234567", "a", ".:_-", "Z" * 128])
def test_completion_ids(text: str) -> None:
    """Ours, and whatever callers may choose."""
    assert completion_id(text, "completion_id") == text


@pytest.mark.parametrize("text", ["", "a b", "ä", "a/b", "a\n", "Z" * 129])
def test_what_is_no_completion_id(text: str) -> None:
    """Missing, or of other characters."""
    assert [*violations(completion_id, text, "some.field")] == ["some.field"]


def asked(options: chat_pb.StreamOptions | None = None, **resumed: Any) -> chat_pb.StreamChatCompletionRequest:  # noqa: ANN401 (whatever the message takes)
    """A request that goes on with a stream."""
    return chat_pb.StreamChatCompletionRequest(resume=chat_pb.ResumePoint(**resumed), options=options)


@pytest.mark.parametrize(("after", "sequence"), [(None, None), (0, 0), (2**63 - 1, 2**63 - 1)])
def test_resume(after: int | None, sequence: int | None) -> None:
    """Zero is a message that came; absent is none."""
    request = asked(chat_pb.StreamOptions(), completion_id="my-1", last_sequence=after)
    assert resume(request) == ("my-1", sequence)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (asked(), "resume.completion_id"),
        (asked(completion_id="a b"), "resume.completion_id"),
        (asked(completion_id="a", last_sequence=-1), "resume.last_sequence"),
        (asked(chat_pb.StreamOptions(usage_updates=True), completion_id="a"), "options"),
        (asked(chat_pb.StreamOptions(max_coalesce_delay=Duration()), completion_id="a"), "options"),
    ],
)
def test_what_cannot_be_resumed(request_: chat_pb.StreamChatCompletionRequest, field: str) -> None:
    """No id, or options, which only a new stream has."""
    assert [*violations(resume, request_)] == [field]
