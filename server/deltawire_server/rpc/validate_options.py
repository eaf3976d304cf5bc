"""Validates the options of requests: times, intervals and ids. `validate` handles the chat itself.

Functions for fields of a chat request add to the given violations; functions for other requests raise an error.
"""

from __future__ import annotations

import math
import re
from types import MappingProxyType
from typing import TYPE_CHECKING

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire_server.completions.options import StreamOptions
from deltawire_server.errors import Violation, invalid_request
from deltawire_server.upstream.request import Reasoning

if TYPE_CHECKING:
    from collections.abc import Mapping

    from google.protobuf.duration_pb2 import Duration

    from deltawire_server.rpc.violations import Violations

MAX_SOFT_TIME_LIMIT = 24 * 3600.0
"""Seconds: longer than any answer takes, and low enough to detect values in milliseconds."""
MIN_RETENTION = 1.0
"""Seconds: no client resumes sooner, and the first reader needs time to start."""

MAX_COALESCE_DELAY = 10.0
"""Seconds: a caller that can wait longer does not need a stream."""
MIN_HEARTBEAT = 0.1
"""Seconds: with a shorter interval, heartbeats would dominate the traffic."""
MAX_HEARTBEAT = 3600.0
"""Seconds: proxies close an idle stream long before."""

ID_RULE = 'must be 1 to 128 letters, digits, "-", "_", "." or ":"'

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

EFFORTS: Mapping[int, str] = MappingProxyType(
    {
        number: "" if name == "REASONING_EFFORT_UNSPECIFIED" else name.removeprefix("REASONING_EFFORT_").lower()
        for name, number in chat_pb.ReasoningEffort.items()
    }
)
"""The chat API's value for each effort; if empty, none is sent."""

_INCREMENTAL: Mapping[int, bool] = MappingProxyType(
    {
        chat_pb.TOOL_CALL_STREAMING_UNSPECIFIED: False,
        chat_pb.TOOL_CALL_STREAMING_ASSEMBLED: False,
        chat_pb.TOOL_CALL_STREAMING_INCREMENTAL: True,
    }
)


def reasoning(message: chat_pb.Reasoning, violations: Violations) -> Reasoning:
    """The reasoning options."""
    effort = EFFORTS.get(message.effort)
    if effort is None:
        known = ", ".join(chat_pb.ReasoningEffort.keys()[1:])
        violations.add("chat.reasoning.effort", f"{message.effort} is not supported: use one of {known}")
    if message.token_budget < 0:
        violations.add("chat.reasoning.token_budget", "must be 0 or more")
    return Reasoning(
        effort or "",
        message.token_budget if message.HasField("token_budget") else None,
        message.include if message.HasField("include") else None,
    )


def incremental_tool_calls(policy: chat_pb.ToolCallPolicy, violations: Violations) -> bool:
    """Whether tool calls are streamed while the model writes them."""
    incremental = _INCREMENTAL.get(policy.streaming)
    if incremental is None:
        known = ", ".join(chat_pb.ToolCallStreaming.keys()[1:])
        violations.add("chat.tool_call_policy.streaming", f"{policy.streaming} is not supported: use one of {known}")
    return bool(incremental)


def soft_time_limit(chat: chat_pb.ChatRequest, violations: Violations) -> float | None:
    """Seconds after which the answer ends with the text so far; `None` for no limit."""
    if not chat.HasField("soft_time_limit"):
        return None
    seconds = _seconds(chat.soft_time_limit)
    if not 0 < seconds <= MAX_SOFT_TIME_LIMIT:
        violations.add("chat.soft_time_limit", "must be above 0 and at most 24 hours")
    return seconds


def own_completion_id(text: str, violations: Violations) -> str:
    """The id that a caller chose for a new completion; empty if it chose none."""
    if text and not _ID.fullmatch(text):
        violations.add("chat.completion_id", f"{ID_RULE}; omit it to have one generated")
    return text


def completion_id(text: str, path: str) -> str:
    """Validate the id of an existing completion.

    Args:
        text: The id.
        path: The field of the request.

    Returns:
        The id; the completion may not exist.

    Raises:
        CallerError: INVALID_REQUEST: the id is missing or invalid.
    """
    if not text:
        raise invalid_request([Violation(path, "is required: Started.completion_id, or the caller's own")])
    if not _ID.fullmatch(text):
        raise invalid_request([Violation(path, ID_RULE)])
    return text


def resume(request: chat_pb.StreamChatCompletionRequest) -> tuple[str, int | None]:
    """Validate a request that resumes a retained stream.

    Args:
        request: A request with `resume` in `start`.

    Returns:
        The completion's id, and the sequence of the last message that the caller received; `None` to start at the first message.

    Raises:
        CallerError: INVALID_REQUEST: the id is missing or invalid, or the request has options, which only a new stream may have.
    """
    message = request.resume
    found = completion_id(message.completion_id, "resume.completion_id")
    # An empty message sets no option.
    if request.options.ByteSize():
        raise invalid_request([Violation("options", "must be omitted: a resumed stream keeps its options")])
    if message.last_sequence < 0:
        raise invalid_request(
            [Violation("resume.last_sequence", "must be 0 or more; leave it out for the first message")]
        )
    return found, message.last_sequence if message.HasField("last_sequence") else None


def stream_options(message: chat_pb.StreamOptions, max_retention: float) -> StreamOptions:
    """Validate the options of a new stream.

    Args:
        message: The options in the request.
        max_retention: The longest retention that the operator allows, in seconds.

    Raises:
        CallerError: INVALID_REQUEST with every invalid field.
    """
    if not message.ByteSize():
        return StreamOptions()
    violations: list[Violation] = []

    def within(name: str, lowest: float, highest: float, violation: str) -> float | None:
        if not message.HasField(name):  # type: ignore[arg-type]
            return None
        seconds = _seconds(getattr(message, name))
        if not lowest <= seconds <= highest:
            violations.append(Violation(f"options.{name}", violation))
        return seconds

    delay = within("max_coalesce_delay", 0.0, MAX_COALESCE_DELAY, "must be from 0 to 10 seconds")
    interval = within("heartbeat_interval", MIN_HEARTBEAT, MAX_HEARTBEAT, "must be from 0.1 seconds to an hour")
    if message.early_heartbeats and interval is None:
        violations.append(Violation("options.early_heartbeats", "needs heartbeat_interval: set it too"))
    limit = f"must be from {MIN_RETENTION:g} to {max_retention:g} seconds, this gateway's limit"
    if max_retention < MIN_RETENTION:
        limit = "must be omitted: this gateway does not retain streams"
    retention = within("retention", MIN_RETENTION, max_retention, limit)
    if violations:
        raise invalid_request(violations)
    return StreamOptions(message.usage_updates, delay, interval, message.early_heartbeats, retention)


def _seconds(duration: Duration) -> float:
    """A duration in seconds; NaN, which is in no range, if it is invalid in protobuf."""
    seconds, nanos = duration.seconds, duration.nanos
    if abs(nanos) >= 1_000_000_000 or seconds * nanos < 0:
        return math.nan
    return seconds + nanos / 1e9
