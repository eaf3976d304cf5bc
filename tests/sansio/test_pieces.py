"""No message above 4 MiB: whatever a stream holds, a gRPC client with default settings can receive each of its messages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import tool_pb2
from deltawire_server.sansio import pieces, tool_calls
from deltawire_server.sansio.events import (
    Alternative,
    ChoiceFinished,
    Completed,
    FailureReason,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    ToolCallArguments,
    ToolCallFailed,
    ToolCallStarted,
    ToolCallSucceeded,
)
from deltawire_server.sansio.reader import MAX_WHOLE_BYTES, Limits
from tests.sansio.build import DONE, Json, calls, chunk, end, entry, part, read, text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deltawire_server.sansio.events import Event

RECEIVE_LIMIT = 4 * 1024 * 1024
"""What a gRPC client receives in one message by default."""
MIB = 1024 * 1024


def _size(event: Event) -> int:  # noqa: C901 (one flat arm per event)
    """Bytes of an event's message, with the largest numbers that its envelope can have."""
    message = chat_pb.StreamChatCompletionResponse(sequence=2**63 - 1, choice_index=127)
    if isinstance(event, TextDelta | ReasoningDelta):
        delta = message.text_delta if isinstance(event, TextDelta) else message.reasoning_delta
        delta.text = event.text
        for token in event.logprobs:
            delta.logprobs.add(
                token=token.token,
                logprob=token.logprob,
                raw_bytes=token.raw_bytes,
                alternatives=[
                    chat_pb.TokenLogprob.Alternative(
                        token=other.token, logprob=other.logprob, raw_bytes=other.raw_bytes
                    )
                    for other in token.alternatives
                ],
            )
    elif isinstance(event, ToolCallStarted | ToolCallArguments | ToolCallSucceeded | ToolCallFailed):
        call = message.tool_call_delta
        call.index, call.call_id = 2**31 - 1, event.call_id
        call.parse_status = tool_pb2.TOOL_CALL_PARSE_STATUS_FAILED
        if isinstance(event, ToolCallArguments):
            call.arguments_fragment = event.fragment
        else:
            call.tool_name = event.tool_name
        if isinstance(event, ToolCallSucceeded):
            call.tool_call.CopyFrom(
                tool_pb2.ToolCall(call_id=event.call_id, tool_name=event.tool_name, arguments=event.arguments)
            )
        elif isinstance(event, ToolCallFailed):
            call.failure.reason = tool_pb2.ToolCallFailureReason.ValueType(event.reason.value)
            call.failure.message = event.message
            call.failure.raw_arguments = event.raw_arguments
            call.failure.byte_offset = 2**31 - 1
            call.failure.instance_path = event.instance_path or ""
    elif isinstance(event, ChoiceFinished):
        message.choice_finished.engine_finish_reason = event.engine_finish_reason
        if isinstance(event.matched_stop, str):
            message.choice_finished.matched_stop = event.matched_stop
    elif isinstance(event, Completed):
        for choice in event.choices:  # as it is sent without its messages
            whole = message.completed.choices.add(index=choice.index, engine_finish_reason=choice.engine_finish_reason)
            if isinstance(choice.matched_stop, str):
                whole.matched_stop = choice.matched_stop
    return message.ByteSize()


def _largest(events: Sequence[Event]) -> int:
    return max(map(_size, events))


@pytest.mark.parametrize("character", ["x", "é", "日", "😀"])
@pytest.mark.parametrize("kind", [TextDelta, ReasoningDelta])
def test_a_large_delta_is_divided(character: str, kind: type[TextDelta | ReasoningDelta]) -> None:
    """A chunk with five million bytes is several deltas, on character boundaries, whose texts are the same together."""
    words = character * (5_000_000 // len(character.encode()))
    delta = {"content": words} if kind is TextDelta else {"reasoning": words}
    events = read(chunk(part(delta, finish="stop")), DONE)
    deltas = [event for event in events if isinstance(event, kind)]
    assert "".join(event.text for event in deltas) == words
    assert len(deltas) > 4
    assert _largest(events) <= MIB + 100
    assert isinstance(events[-1], Completed)
    assert events[-1].messages_omitted == (len(words) > MAX_WHOLE_BYTES)
    if not events[-1].messages_omitted:
        assert (events[-1].choices[0].text or events[-1].choices[0].reasoning) == words


def test_large_fragments_are_divided() -> None:
    """Of a call while it is written, and of one whose name comes after its arguments."""
    arguments = '{"x": "' + "y" * 3_000_000 + '"}'
    for before, after in [("f", None), (None, "f")]:
        events = read(
            calls(entry(arguments, call_id="a", name=before)),
            calls(entry(name=after)),
            end("stop"),
            DONE,
            incremental=True,
        )
        fragments = [event.fragment for event in events if isinstance(event, ToolCallArguments)]
        assert "".join(fragments) == arguments
        assert max(map(len, fragments)) <= pieces.PIECE_CHARACTERS
        assert _largest(events) <= RECEIVE_LIMIT


def test_large_fragments_before_a_limit_are_divided() -> None:
    """Also in the chunk that ends the answer because a call is too large."""
    entries = [entry("x" * 2_000_000, index=index, call_id=str(index), name="f") for index in range(2)]
    events = read(calls(*entries, entry("x" * 5_000_000, index=2, name="f")), incremental=True)
    assert _largest(events) <= RECEIVE_LIMIT
    assert sum(len(event.fragment) for event in events if isinstance(event, ToolCallArguments)) == 4_000_000


@pytest.mark.parametrize(
    ("name", "offered"), [("f", True), ("n" * 1_000_000, True), ("n" * 1_000_000, False), ("é" * 700_000, True)]
)
def test_a_verdict_on_the_largest_call_fits(name: str, offered: bool) -> None:
    """Name, arguments, ids, sentence and place together; one byte more ends the answer instead."""
    size = tool_calls.MAX_CALL_BYTES - 2 * len(name.encode()) - len('{"x":""}')
    fragments = ["y" * min(64 * 1024, size - start) for start in range(0, size, 64 * 1024)]
    call_id = "i" * tool_calls.MAX_ID_BYTES
    body = [
        calls(entry('{"x":"', call_id=call_id, name=name)),
        *[calls(entry(fragment)) for fragment in fragments],
        calls(entry('"}')),
    ]

    def failing(_: str) -> tuple[str, str]:
        return "/é" * 1_000_000, "é" * 1_000_000

    for checks in ({}, {name: failing}):
        events = read(
            *body, end("tool_calls"), DONE, offered=[name] if offered else [], checks=checks, incremental=True
        )
        assert 2_500_000 < _largest(events) <= RECEIVE_LIMIT
        assert isinstance(events[-1], Completed)
        assert events[-1].fault is None
    events = read(*body, calls(entry(" ")), offered=[name])
    assert _largest(events) <= RECEIVE_LIMIT
    assert isinstance(events[-1], Completed)
    assert events[-1].fault is not None


def test_a_limit_above_the_largest_has_no_effect() -> None:
    """No setting makes a message that cannot be received."""
    assert Limits(max_call_bytes=2**40).max_call_bytes == tool_calls.MAX_CALL_BYTES
    assert Limits(max_call_bytes=10).max_call_bytes == 10


def _logprobs(count: int, *, token: str = "a", alternatives: int = 0) -> Json:
    top = [{"token": token, "logprob": -1.5, "bytes": list(token.encode())}] * alternatives
    entry_ = {"token": token, "logprob": -0.5, "bytes": list(token.encode()), "top_logprobs": top}
    return {"content": [entry_] * count}


def test_many_log_probabilities_are_divided() -> None:
    """Each entry is sent once, in order; the text that they ride on is there once."""
    events = read(text("t" * 300_000, logprobs=_logprobs(5_000, alternatives=20), finish="stop"), DONE)
    deltas = [event for event in events if isinstance(event, TextDelta)]
    assert "".join(event.text for event in deltas) == "t" * 300_000
    assert sum(len(event.logprobs) for event in deltas) == 5_000
    assert _largest(events) <= RECEIVE_LIMIT


def test_a_token_that_is_too_large_is_cut() -> None:
    """What the model said is in the text; an entry of this size is no token's."""
    large = "😀" * 150_000
    events = read(text(large, logprobs=_logprobs(1, token=large, alternatives=1), finish="stop"), DONE)
    [token] = [token for event in events if isinstance(event, TextDelta) for token in event.logprobs]
    assert token == TokenLogprob("😀" * 1024, -0.5, large.encode()[:1024])
    assert _largest(events) <= RECEIVE_LIMIT


def test_a_small_event_cannot_hold_too_much() -> None:
    """The shortest entries there can be, in an event that is not divided."""
    smallest = '{"choices":[{"logprobs":{"content":[' + ",".join(["0"] * 131_000) + "]}}]}"
    assert len(smallest) <= pieces.PIECE_CHARACTERS
    broken = b'{"choices":[{"delta":{"content":"' + b"\xff" * 262_000 + b'"}}]}'
    assert len(broken) <= pieces.PIECE_CHARACTERS
    for payload in (smallest.encode(), broken):
        assert _largest(read(b"data: " + payload + b"\n\n", end("stop"), DONE)) <= RECEIVE_LIMIT


def test_many_choices_with_long_words_fit() -> None:
    """The last event, without its messages, when 128 choices name long stop texts and finish reasons."""
    parts = [part({}, choice=index, finish="é" * 5_000, stop_reason="x" * 4_096) for index in range(128)]
    assert _largest(read(chunk(*parts), DONE, choice_count=128)) < MIB


def test_what_is_small_is_left_alone() -> None:
    """The same objects, in the same order."""
    events: list[Event] = [
        TextDelta(0, "a", (TokenLogprob("a", None, b"a", (Alternative("b", None),)),)),
        ReasoningDelta(0, ""),
        ToolCallFailed(0, 0, "a", "f", FailureReason.TRUNCATED, "m", "{"),
    ]
    assert list(pieces.divide(events)) == events
    assert msgspec.json.encode(list(pieces.divide(events))) == msgspec.json.encode(events)
    assert pieces.split("") == [""]
