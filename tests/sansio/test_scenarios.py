"""What the original adapter did with each stream, scenario by scenario: kept, or put right, the whole event list each time.

Names follow the table of the original's behaviour; a docstring begins with "Kept" or "Put right" and says how it was.
Everywhere the original's `start` is `Started`, `complete` is `ChoiceFinished` and `Completed`, and a `succeeded` call is
`ToolCallSucceeded`; its empty texts are left out.
"""

from __future__ import annotations

import pytest

from deltawire_server.errors import Reason
from deltawire_server.sansio.events import (
    ChoiceFinished,
    Completed,
    FailureReason,
    Fault,
    FinishedChoice,
    Provenance,
    ReasoningDelta,
    Refused,
    StopReason,
    TextDelta,
    ToolCallFailed,
    ToolCallSucceeded,
    Usage,
)
from tests.sansio.build import (
    DONE,
    FIRST_CALL,
    STARTED,
    calls,
    chunk,
    end,
    ending,
    entry,
    error,
    figures,
    part,
    read,
    text,
)

ROLE = chunk(part({"role": "assistant", "content": ""}))
INCOMPLETE = Fault(Reason.UPSTREAM_INCOMPLETE, "the stream ended without a finish reason for 1 of 1 choices")
CUT = "the answer was cut off before the call was whole"


def _ok(arguments: str = "{}", *, index: int = 0, call_id: str = "c1", name: str = "f") -> ToolCallSucceeded:
    return ToolCallSucceeded(0, index, call_id, name, arguments)


# --- text


def test_role_chunk_then_text_then_stop() -> None:
    """Kept: the text as it came, end of turn; the role chunk's empty text is left out."""
    assert read(ROLE, text("He"), text("llo"), end("stop"), DONE) == [
        STARTED,
        TextDelta(0, "He"),
        TextDelta(0, "llo"),
        *ending(StopReason.END_OF_TURN, "stop", text="Hello", chunks=2),
    ]


def test_text_in_the_chunk_with_stop() -> None:
    """Put right: it rode on `complete`; it is text like any other, and comes before the end."""
    assert read(text("He"), text("llo", finish="stop"), DONE) == [
        STARTED,
        TextDelta(0, "He"),
        TextDelta(0, "llo"),
        *ending(StopReason.END_OF_TURN, "stop", text="Hello", chunks=2),
    ]


def test_length() -> None:
    """Kept: out of tokens."""
    assert read(text("He"), end("length"), DONE) == [
        STARTED,
        TextDelta(0, "He"),
        *ending(StopReason.OUT_OF_TOKENS, "length", text="He", chunks=1),
    ]


def test_content_filter() -> None:
    """Put right: it was an end of turn; it has a stop reason of its own, beside the engine's word."""
    assert read(text("He"), end("content_filter"), DONE) == [
        STARTED,
        TextDelta(0, "He"),
        *ending(StopReason.CONTENT_FILTER, "content_filter", text="He", chunks=1),
    ]


def test_unknown_finish_reason() -> None:
    """Kept: an end of turn; the engine's word stands beside it."""
    assert read(text("He"), end("whim"), DONE) == [
        STARTED,
        TextDelta(0, "He"),
        *ending(StopReason.END_OF_TURN, "whim", text="He", chunks=1),
    ]


def test_empty_tool_calls_beside_content() -> None:
    """Kept: an empty list of entries is none."""
    assert read(calls(content="He"), end("stop"), DONE) == [
        STARTED,
        TextDelta(0, "He"),
        *ending(StopReason.END_OF_TURN, "stop", text="He", chunks=1),
    ]


def test_reasoning_content() -> None:
    """Put right: reasoning was dropped and an empty text sent in its place; it has events and a field of its own."""
    assert read(
        chunk(part({"reasoning_content": "Hm"})), chunk(part({"reasoning": "m."})), text("He", finish="stop"), DONE
    ) == [
        STARTED,
        ReasoningDelta(0, "Hm"),
        ReasoningDelta(0, "m."),
        TextDelta(0, "He"),
        *ending(StopReason.END_OF_TURN, "stop", text="He", reasoning="Hmm.", chunks=3),
    ]


# --- a call


def test_standard_vllm_call() -> None:
    """Kept: name first, two fragments, then `tool_calls`: one whole call, end of message."""
    assert read(
        calls(entry(call_id="c1", name="f")), calls(entry('{"x":')), calls(entry("1}")), end("tool_calls"), DONE
    ) == [
        STARTED,
        *ending(
            StopReason.END_OF_MESSAGE, "tool_calls", succeeded=(_ok('{"x":1}'),), executable=True, chunks=3
        ),
    ]  # fmt: skip


@pytest.mark.parametrize("arguments", [None, ""])
def test_call_without_arguments(arguments: str | None) -> None:
    """Kept: null or empty arguments become `{}`."""
    assert read(calls(entry(arguments, call_id="c1", name="f")), end("tool_calls"), DONE) == [
        STARTED,
        *ending(StopReason.END_OF_MESSAGE, "tool_calls", succeeded=(_ok("{}"),), executable=True, chunks=1),
    ]


def test_arguments_of_white_space() -> None:
    """Put right: white space is not JSON, and counts as missing arguments."""
    assert read(calls(entry(" ", call_id="c1", name="f")), end("tool_calls"), DONE) == [
        STARTED,
        *ending(StopReason.END_OF_MESSAGE, "tool_calls", succeeded=(_ok("{}"),), executable=True, chunks=1),
    ]


def test_arguments_in_the_chunk_with_the_finish_reason() -> None:
    """Kept: they belong to the call."""
    assert read(calls(entry('{"x":', call_id="c1", name="f")), calls(entry("1}"), finish="tool_calls"), DONE) == [
        STARTED,
        *ending(
            StopReason.END_OF_MESSAGE, "tool_calls", succeeded=(_ok('{"x":1}'),), executable=True, chunks=2
        ),
    ]  # fmt: skip


def test_stream_ends_without_finish_reason_with_a_call() -> None:
    """Put right: it was a silent success; the call is still reported, but as cut off, and a fault ends the answer."""
    failed = ToolCallFailed(0, 0, "c1", "f", FailureReason.TRUNCATED, CUT, "{}")
    assert read(calls(entry("{}", call_id="c1", name="f"))) == [
        STARTED,
        *ending(StopReason.UPSTREAM_INCOMPLETE, "", failed=(failed,), chunks=1, fault=INCOMPLETE),
    ]


def test_stream_ends_without_finish_reason_with_text() -> None:
    """Put right: it was an end of message; the text stays, a fault ends the answer."""
    assert read(text("He")) == [
        STARTED,
        TextDelta(0, "He"),
        *ending(StopReason.UPSTREAM_INCOMPLETE, "", text="He", chunks=1, fault=INCOMPLETE),
    ]


def test_empty_stream() -> None:
    """Put right: it was an end of message; nothing began, so the caller may try again."""
    message = "the provider closed the connection before it answered"
    assert read() == [Refused(Fault(Reason.UPSTREAM_UNAVAILABLE, message))]


def test_two_indexes_interleaved_higher_first() -> None:
    """Kept: arguments stay apart, verdicts come by ascending index."""
    assert read(
        calls(entry('{"y":', index=1, call_id="c2", name="g")),
        calls(entry('{"x":', index=0, call_id="c1", name="f")),
        calls(entry("2}", index=1)),
        calls(entry("1}", index=0)),
        end("tool_calls"),
        DONE,
    ) == [
        STARTED,
        *ending(
            StopReason.END_OF_MESSAGE,
            "tool_calls",
            succeeded=(_ok('{"x":1}'), _ok('{"y":2}', index=1, call_id="c2", name="g")),
            executable=True,
            chunks=4,
        ),
    ]


def test_malformed_arguments() -> None:
    """Put right: they were a success; the call has failed and says where, with the raw text."""
    message = "the arguments are not JSON: Expecting value"
    failed = ToolCallFailed(0, 0, "c1", "f", FailureReason.MALFORMED_JSON, message, '{"x": Oslo}', 6)
    assert read(calls(entry('{"x": Oslo}', call_id="c1", name="f")), end("tool_calls"), DONE) == [
        STARTED,
        *ending(StopReason.END_OF_MESSAGE, "tool_calls", failed=(failed,), chunks=1),
    ]


def test_truncated_arguments_under_length() -> None:
    """Put right: they were a success; the call was cut off."""
    failed = ToolCallFailed(0, 0, "c1", "f", FailureReason.TRUNCATED, CUT, '{"x": 1', 7)
    assert read(calls(entry('{"x": 1', call_id="c1", name="f")), end("length"), DONE) == [
        STARTED,
        *ending(StopReason.OUT_OF_TOKENS, "length", failed=(failed,), chunks=1),
    ]


def test_id_and_name_repeated_in_every_fragment() -> None:
    """Put right: they came out as `c1c1` and `ff`; a repeat changes nothing."""
    assert read(
        calls(entry('{"x":', call_id="c1", name="f")), calls(entry("1}", call_id="c1", name="f")), end("tool_calls"), DONE
    ) == [
        STARTED,
        *ending(
            StopReason.END_OF_MESSAGE, "tool_calls", succeeded=(_ok('{"x":1}'),), executable=True, chunks=2
        ),
    ]  # fmt: skip


def test_name_split_over_chunks() -> None:
    """Kept: the pieces are joined."""
    assert read(
        calls(entry(call_id="c1", name="get_")), calls(entry("{}", name="weather")), end("tool_calls"), DONE
    ) == [
        STARTED,
        *ending(
            StopReason.END_OF_MESSAGE, "tool_calls", succeeded=(_ok(name="get_weather"),), executable=True, chunks=2
        ),
    ]  # fmt: skip


def test_builtin_name_with_arguments_in_its_chunk() -> None:
    """Put right: it came out as `BuiltinTool.brave_search`; a name is a name."""
    assert read(calls(entry('{"query":"x"}', call_id="c1", name="brave_search")), end("tool_calls"), DONE) == [
        STARTED,
        *ending(
            StopReason.END_OF_MESSAGE,
            "tool_calls",
            succeeded=(_ok('{"query":"x"}', name="brave_search"),),
            executable=True,
            chunks=1,
        ),
    ]


def test_builtin_name_with_null_arguments_in_its_chunk() -> None:
    """Kept: as any other tool."""
    assert read(
        calls(entry(None, call_id="c1", name="brave_search")), calls(entry('{"query":"x"}')), end("tool_calls"), DONE
    ) == [
        STARTED,
        *ending(
            StopReason.END_OF_MESSAGE,
            "tool_calls",
            succeeded=(_ok('{"query":"x"}', name="brave_search"),),
            executable=True,
            chunks=2,
        ),
    ]


@pytest.mark.parametrize("call_id", [None, ""])
def test_missing_id(call_id: str | None) -> None:
    """Put right: the id was empty; one is made."""
    assert read(calls(entry("{}", call_id=call_id, name="f")), end("tool_calls"), DONE) == [
        STARTED,
        *ending(
            StopReason.END_OF_MESSAGE, "tool_calls", succeeded=(_ok(call_id=FIRST_CALL),), executable=True, chunks=1
        ),
    ]


def test_null_function() -> None:
    """Put right: it killed the stream; the entry says nothing and is passed over, its call goes on."""
    nothing = {"index": 0, "function": None}
    assert read(
        calls(nothing), calls(entry("{}", call_id="c1", name="f")), calls(nothing), end("tool_calls"), DONE
    ) == [
        STARTED,
        *ending(StopReason.END_OF_MESSAGE, "tool_calls", succeeded=(_ok(),), executable=True, chunks=3),
    ]  # fmt: skip


def test_null_index() -> None:
    """Put right: it raised at the end; without an index an entry is about the current call."""
    assert read(
        calls(entry('{"x":', index=None, call_id="c1", name="f")),
        calls(entry("1}", index=None)),
        calls(entry("{}", index=1, call_id="c2", name="g")),
        end("tool_calls"),
        DONE,
    ) == [
        STARTED,
        *ending(
            StopReason.END_OF_MESSAGE,
            "tool_calls",
            succeeded=(_ok('{"x":1}'), _ok(index=1, call_id="c2", name="g")),
            executable=True,
            chunks=3,
        ),
    ]


def test_text_and_a_call_in_one_chunk() -> None:
    """Put right: the text was lost; it is returned."""
    assert read(calls(entry("{}", call_id="c1", name="f"), content="Hi. "), end("tool_calls"), DONE) == [
        STARTED,
        TextDelta(0, "Hi. "),
        *ending(
            StopReason.END_OF_MESSAGE, "tool_calls", text="Hi. ", succeeded=(_ok(),), executable=True, chunks=1
        ),
    ]  # fmt: skip


def test_text_in_the_finish_chunk_with_tools() -> None:
    """Put right: it came after the calls; it comes before the verdicts, in the order in which it was written."""
    assert read(calls(entry("{}", call_id="c1", name="f")), text("Bye", finish="tool_calls"), DONE) == [
        STARTED,
        TextDelta(0, "Bye"),
        *ending(StopReason.END_OF_MESSAGE, "tool_calls", text="Bye", succeeded=(_ok(),), executable=True, chunks=2),
    ]


def test_finish_reason_stop_though_calls_exist() -> None:
    """Put right: it was an end of turn; the model waits for results, so it is an end of message, beside the word `stop`."""
    assert read(calls(entry("{}", call_id="c1", name="f")), end("stop"), DONE) == [
        STARTED,
        *ending(StopReason.END_OF_MESSAGE, "stop", succeeded=(_ok(),), executable=True, chunks=1),
    ]


def test_finish_reason_tool_calls_with_no_call() -> None:
    """Put right: it was an end of message with nothing to wait for; it is an end of turn."""
    assert read(text("He"), end("tool_calls"), DONE) == [
        STARTED,
        TextDelta(0, "He"),
        *ending(StopReason.END_OF_TURN, "tool_calls", text="He", chunks=1),
    ]


# --- around the end


def test_usage_chunk_after_the_finish() -> None:
    """Put right: it ended the stream with a warning and was lost; it is the exact usage."""
    assert read(text("He", finish="stop"), chunk(usage=figures(7, 3)), DONE) == [
        STARTED,
        TextDelta(0, "He"),
        *ending(StopReason.END_OF_TURN, "stop", text="He", usage=Usage(3, Provenance.EXACT, 7)),
    ]


def test_usage_chunk_before_the_finish() -> None:
    """Put right: it ended the stream in silence, calls lost; it is read, and the stream goes on."""
    assert read(
        calls(entry("{}", call_id="c1", name="f")), chunk(usage=figures(7, 3)), end("tool_calls"), DONE
    ) == [
        STARTED,
        *ending(
            StopReason.END_OF_MESSAGE,
            "tool_calls",
            succeeded=(_ok(),),
            executable=True,
            usage=Usage(3, Provenance.LOWER_BOUND, 7),
        ),
    ]  # fmt: skip


def test_empty_chunk_before_the_finish() -> None:
    """Put right: it ended the stream in silence, calls lost; it is passed over."""
    assert read(calls(entry("{}", call_id="c1", name="f")), chunk(), end("tool_calls"), DONE) == [
        STARTED,
        *ending(StopReason.END_OF_MESSAGE, "tool_calls", succeeded=(_ok(),), executable=True, chunks=1),
    ]


def test_two_finish_chunks() -> None:
    """Put right: there were two ends and the calls twice; there is one, and its word is the last."""
    assert read(calls(entry("{}", call_id="c1", name="f")), end("tool_calls"), end("stop"), DONE) == [
        STARTED,
        *ending(StopReason.END_OF_MESSAGE, "stop", succeeded=(_ok(),), executable=True, chunks=1),
    ]


def test_tool_delta_after_the_finish() -> None:
    """Put right: a call that came after the finish reason was lost; it is one of the answer's."""
    assert read(
        calls(entry("{}", call_id="c1", name="f")), end("tool_calls"), calls(entry("{}", index=1, name="g")), DONE
    ) == [
        STARTED,
        *ending(
            StopReason.END_OF_MESSAGE,
            "tool_calls",
            succeeded=(_ok(), _ok(index=1, call_id=FIRST_CALL, name="g")),
            executable=True,
            chunks=2,
        ),
    ]  # fmt: skip


def test_two_choices_in_one_chunk() -> None:
    """Put right: only the first was read, and a lone choice 1 was taken for choice 0; each has its index."""
    assert read(
        chunk(part({"content": "a"}, choice=1), part({"content": "b"}, choice=0)),
        text("A", choice=1, finish="stop"),
        end("length", choice=0),
        DONE,
        choice_count=2,
    ) == [
        STARTED,
        TextDelta(1, "a"),
        TextDelta(0, "b"),
        TextDelta(1, "A"),
        ChoiceFinished(0, StopReason.OUT_OF_TOKENS, "length"),
        ChoiceFinished(1, StopReason.END_OF_TURN, "stop"),
        Completed(
            Usage(3, Provenance.ESTIMATED),
            (
                FinishedChoice(0, "b", "", (), (), StopReason.OUT_OF_TOKENS, "length", False),
                FinishedChoice(1, "aA", "", (), (), StopReason.END_OF_TURN, "stop", False),
            ),
        ),
    ]


def test_call_to_a_tool_that_was_not_offered() -> None:
    """Put right: it was passed on as a success; it has failed, with everything that the model said."""
    message = "'nuke' is not one of the request's tools"
    failed = ToolCallFailed(0, 0, "c1", "nuke", FailureReason.UNKNOWN_TOOL, message, "{}")
    assert read(calls(entry("{}", call_id="c1", name="nuke")), end("tool_calls"), DONE) == [
        STARTED,
        *ending(StopReason.END_OF_MESSAGE, "tool_calls", failed=(failed,), chunks=1),
    ]


def test_error_event_amid_the_stream() -> None:
    """Put right: it was an exception after half an answer; the answer ends with what came, and a fault."""
    fault = Fault(Reason.UPSTREAM_ERROR, "broken", 500, "InternalServerError")
    assert read(text("He"), error(), DONE) == [
        STARTED,
        TextDelta(0, "He"),
        *ending(StopReason.ERROR, "", text="He", chunks=1, fault=fault),
    ]


# --- the original's own tests


def test_original_4_empty_buffer() -> None:
    """Kept: empty content and `stop` give the beginning and the end, and no spurious call."""
    assert read(text("", finish="stop"), DONE) == [STARTED, *ending(StopReason.END_OF_TURN, "stop")]


def test_original_5_streaming_arguments() -> None:
    """Kept: one call with verbatim arguments; put right: id and name once, though both were repeated."""
    arguments = '{"number": 28, "power": 3}'
    assert read(
        calls(entry("", index=1, call_id="tc_1", name="power")),
        calls(entry(arguments, index=1, call_id="tc_1", name="power")),
        end("tool_calls"),
        DONE,
        offered=["power"],
    ) == [
        STARTED,
        *ending(
            StopReason.END_OF_MESSAGE,
            "tool_calls",
            succeeded=(_ok(arguments, index=1, call_id="tc_1", name="power"),),
            executable=True,
            chunks=2,
        ),
    ]


def test_original_6_multiple_calls() -> None:
    """Kept: two calls by their indexes; put right: their empty ids are made up."""
    first, second = '{"number": 28, "power": 3}', '{"first_number": 4, "second_number": 7}'
    assert read(
        calls(entry(first, index=1, call_id="", name="power")),
        calls(entry(second, index=2, call_id="", name="multiple")),
        end("tool_calls"),
        DONE,
        offered=["power", "multiple"],
    ) == [
        STARTED,
        *ending(
            StopReason.END_OF_MESSAGE,
            "tool_calls",
            succeeded=(
                _ok(first, index=1, call_id="<generated-0>", name="power"),
                _ok(second, index=2, call_id="<generated-1>", name="multiple"),
            ),
            executable=True,
            chunks=2,
        ),
    ]


def test_original_7_no_choices() -> None:
    """Put right: it was a beginning without an end; an answer without a choice never began."""
    message = "the stream ended without a choice"
    assert read(chunk(), DONE) == [Refused(Fault(Reason.UPSTREAM_MALFORMED, message))]


def test_original_9_arguments_in_the_last_chunk() -> None:
    """Kept: the call is the one event between the beginning and the end."""
    arguments = '{"arg1": 0, "arg2": 100}'
    assert read(
        calls(entry(None, call_id="mock_id", name="mock_tool")),
        calls(entry(arguments), finish="tool_calls"),
        DONE,
        offered=["mock_tool"],
    ) == [
        STARTED,
        *ending(
            StopReason.END_OF_MESSAGE,
            "tool_calls",
            succeeded=(_ok(arguments, call_id="mock_id", name="mock_tool"),),
            executable=True,
            chunks=2,
        ),
    ]


def test_original_10_no_finish_reason() -> None:
    """Put right: a call without a finish reason was a success; it is reported before the end as not executable."""
    arguments = '{"arg1": 0, "arg2": 100}'
    failed = ToolCallFailed(0, 0, "mock_id", "mock_tool", FailureReason.TRUNCATED, CUT, arguments)
    assert read(calls(entry(arguments, call_id="mock_id", name="mock_tool")), offered=["mock_tool"]) == [
        STARTED,
        *ending(StopReason.UPSTREAM_INCOMPLETE, "", failed=(failed,), chunks=1, fault=INCOMPLETE),
    ]


def test_original_11_tool_without_arguments() -> None:
    """Kept: empty arguments are `{}`; put right: only if the turn ended by itself, else arguments may be missing."""
    only = calls(entry("", call_id="mock_id", name="mock_tool"))
    failed = ToolCallFailed(0, 0, "mock_id", "mock_tool", FailureReason.TRUNCATED, CUT, "")
    assert read(only, offered=["mock_tool"]) == [
        STARTED,
        *ending(StopReason.UPSTREAM_INCOMPLETE, "", failed=(failed,), chunks=1, fault=INCOMPLETE),
    ]
    assert read(only, end("tool_calls"), DONE, offered=["mock_tool"]) == [
        STARTED,
        *ending(
            StopReason.END_OF_MESSAGE,
            "tool_calls",
            succeeded=(_ok(call_id="mock_id", name="mock_tool"),),
            executable=True,
            chunks=1,
        ),
    ]
