"""Tool calls: every rule of identity, every verdict, every limit, and anything at all."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltawire_server.sansio import tool_calls
from deltawire_server.sansio.characters import Halves
from deltawire_server.sansio.chunks import Function, ToolEntry
from deltawire_server.sansio.events import (
    Event,
    FailureReason,
    ToolCallArguments,
    ToolCallFailed,
    ToolCallStarted,
    ToolCallSucceeded,
)
from deltawire_server.sansio.json_object import find_problem
from deltawire_server.sansio.tool_calls import CallIds, ToolCallAssembler, ToolCallLimitError
from tests.support.recordings import counting_ids

if TYPE_CHECKING:
    from collections.abc import Sequence


def _entry(
    arguments: str | None = None, *, index: int | None = 0, call_id: str | None = None, name: str | None = None
) -> ToolEntry:
    return ToolEntry(index, call_id, Function(name, arguments))


def _assembler(
    *,
    incremental: bool = False,
    choice: int = 0,
    ids: CallIds | None = None,
    max_calls: int = 128,
    max_bytes: int = 1000,
    anomalies: Counter[str] | None = None,
) -> ToolCallAssembler:
    anomalies = Counter() if anomalies is None else anomalies
    return ToolCallAssembler(
        choice,
        {"f", "g", "get_weather", "needs"},
        ids or CallIds(counting_ids()),
        Halves(anomalies),
        anomalies,
        allows_empty=lambda name: name != "needs",
        incremental=incremental,
        max_calls=max_calls,
        max_call_bytes=max_bytes,
    )


def _run(*entries: ToolEntry, incremental: bool = False, cut: bool = False) -> list[Event]:
    """The events of one choice, each entry in a chunk of its own."""
    assembler = _assembler(incremental=incremental)
    events = [event for entry in entries for event in assembler.receive([entry])]
    return events + assembler.finish(cut=cut)


def _ok(arguments: str = "{}", *, index: int = 0, call_id: str = "a", name: str = "f") -> ToolCallSucceeded:
    return ToolCallSucceeded(0, index, call_id, name, arguments)


# --- which call is an entry about?


def test_an_id_seen_before_is_that_call() -> None:
    """A known id wins over another index and over another name."""
    assert _run(
        _entry("{", call_id="a", name="f"),
        _entry("{", index=1, call_id="b", name="g"),
        _entry("}", index=1, call_id="a"),
        _entry("}", index=0, call_id="b", name="h"),
    ) == [_ok(), _ok(index=1, call_id="b", name="g")]


def test_an_index_is_the_newest_call_on_it() -> None:
    """After a new call took over an index, what comes there without an id is about the newer one."""
    assert _run(_entry("{}", call_id="a", name="f"), _entry("{", call_id="b", name="g"), _entry("}")) == [
        _ok(),
        _ok(index=1, call_id="b", name="g"),
    ]


def test_another_id_on_a_used_index_is_a_new_call() -> None:
    """Ids never come in pieces: two ids are two calls, even before the first has a name."""
    assert _run(_entry(call_id="a"), _entry("{}", call_id="b", name="f")) == [
        ToolCallFailed(0, 0, "a", "", FailureReason.MISSING_NAME, "the model never named the tool", ""),
        _ok(index=1, call_id="b"),
    ]


def test_another_name_after_the_arguments_began_is_a_new_call() -> None:
    """A name cannot change once the arguments have begun: on the same index it is the next call."""
    assert _run(_entry("{}", call_id="a", name="f"), _entry("{}", name="g")) == [
        _ok(),
        _ok(index=1, call_id="<generated-0>", name="g"),
    ]


def test_the_same_name_after_the_arguments_began_is_a_repeat() -> None:
    """Id and name repeated in every fragment change nothing."""
    fragments = [_entry(fragment, call_id="a", name="f") for fragment in ['{"x"', ":", "1}"]]
    assert _run(*fragments) == [_ok('{"x":1}')]


def test_neither_id_nor_index_is_the_current_call() -> None:
    """What says nothing of its call is about the one that the last entry was about, whichever index that has."""
    assert _run(
        _entry(call_id="a", name="f"),
        _entry(index=1, call_id="b", name="g"),
        _entry("{", index=None),
        _entry(index=0),
        _entry('{"x":1}', index=None),
        _entry("}", index=1),
    ) == [_ok('{"x":1}'), _ok(index=1, call_id="b", name="g")]


def test_without_an_index_another_name_after_the_arguments_is_a_new_call() -> None:
    """A parser that counts nothing still begins a call with its name."""
    assert _run(_entry("{}", index=None, call_id="a", name="f"), _entry("{}", index=None, name="g")) == [
        _ok(),
        _ok(index=1, call_id="<generated-0>", name="g"),
    ]


def test_without_an_index_another_name_beside_a_new_id_is_a_new_call() -> None:
    """Two named calls without arguments and indexes are two, also if only the second has an id."""
    assert _run(_entry(index=None, name="f"), _entry(index=None, call_id="b", name="g")) == [
        _ok(call_id="<generated-0>"),
        _ok(index=1, call_id="b", name="g"),
    ]


def test_without_an_index_another_id_is_a_new_call() -> None:
    """Two ids are two calls, also of one tool."""
    assert _run(_entry(index=None, call_id="a", name="f"), _entry(index=None, call_id="b", name="f")) == [
        _ok(),
        _ok(index=1, call_id="b"),
    ]


def test_without_an_index_an_id_that_comes_late_is_the_current_calls() -> None:
    """An id beside nothing that contradicts the current call is its own."""
    assert _run(_entry(index=None, name="f"), _entry("{}", index=None, call_id="a")) == [_ok()]


def test_an_entry_that_says_nothing_begins_no_call() -> None:
    """Fillers leave no call behind; within a call they change nothing."""
    fillers = [_entry(), _entry("", index=None), _entry("", call_id="", name=""), ToolEntry(), ToolEntry(5)]
    assert _run(*fillers) == []
    assert _run(*fillers, _entry("{", call_id="a", name="f"), *fillers, _entry("}"), *fillers) == [_ok()]


def test_an_id_alone_begins_a_call() -> None:
    """An id says something: the call is reported, though it never got a name."""
    [failed] = _run(_entry(call_id="a"))
    assert isinstance(failed, ToolCallFailed)
    assert failed.reason is FailureReason.MISSING_NAME


@pytest.mark.parametrize("index", [-1, 2**31, 10**30])
def test_an_index_that_is_none_counts_as_left_out(index: int) -> None:
    """Negative and absurd indexes name no place."""
    assert _run(_entry(index=index, call_id="a", name="f"), _entry("{}", index=index)) == [_ok("{}")]


def test_the_engines_index_is_told_where_free() -> None:
    """The indexes of an answer that begins to count at 5 stay; a call that has no index follows the highest."""
    assert _run(
        _entry(index=5, call_id="a", name="f"),
        _entry(index=None, call_id="b", name="g"),
        _entry(index=6, call_id="c", name="f"),
        _entry(index=2, call_id="d", name="f"),
    ) == [
        _ok(index=2, call_id="d"),
        _ok(index=5, call_id="a"),
        _ok(index=6, call_id="b", name="g"),
        _ok(index=7, call_id="c"),
    ]


def test_fragments_on_an_index_follow_the_engines_count_not_the_told_one() -> None:
    """A call that is 1 because its index 0 was taken keeps getting what the engine sends on index 0."""
    assert _run(
        _entry("{}", call_id="a", name="f"),
        _entry(call_id="b", name="f"),
        _entry('{"x":', index=0),
        _entry("{}", index=1, call_id="c", name="g"),
        _entry("1}", index=0),
    ) == [_ok(), _ok('{"x":1}', index=1, call_id="b"), _ok(index=2, call_id="c", name="g")]


# --- ids that change with every fragment


def test_a_new_id_in_every_fragment_is_the_same_call() -> None:
    """As long as the JSON is not closed, a fragment without a name is about the call on its index, whatever its id."""
    anomalies: Counter[str] = Counter()
    assembler = _assembler(incremental=True, anomalies=anomalies)
    events = []
    for number, fragment in enumerate(['{"x":', "1", "}", ""]):
        name = "f" if number == 0 else None
        events += assembler.receive([_entry(fragment, call_id=f"id-{number}", name=name)])
    assert events == [
        ToolCallStarted(0, 0, "id-0", "f"),
        *[ToolCallArguments(0, 0, "id-0", fragment) for fragment in ['{"x":', "1", "}"]],
    ]
    assert assembler.finish(cut=False) == [_ok('{"x":1}', call_id="id-0")]
    assert anomalies == {"another id for the same tool call": 3}


def test_a_new_id_with_the_first_arguments_is_the_same_call() -> None:
    """The id that came with the name is the call's, and its arguments are not lost to a call without a name."""
    assert _run(_entry(call_id="a", name="f"), _entry('{"x":1}', call_id="b")) == [_ok('{"x":1}')]


def test_a_new_id_and_the_same_name_in_every_fragment_is_the_same_call() -> None:
    """A repeated name is no new call while the JSON is open."""
    assert _run(_entry('{"x":', call_id="a", name="f"), _entry("1}", call_id="b", name="f")) == [_ok('{"x":1}')]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (_entry("{}", call_id="a", name="f"), _entry("{}", call_id="b", name="f")),
        (_entry(call_id="a", name="f"), _entry("{}", call_id="b", name="f")),
    ],
    ids=["closed", "not begun"],
)
def test_a_new_id_and_the_same_name_is_a_new_call_otherwise(first: ToolEntry, second: ToolEntry) -> None:
    """After a whole call, or one without arguments, the next call of the same tool is its own."""
    assert _run(first, second) == [_ok(), _ok(index=1, call_id="b")]


def test_a_call_that_is_announced_is_new_though_the_one_before_is_open() -> None:
    """A name without arguments begins a call: what the model left open has failed, and the next one is whole."""
    failed, succeeded = _run(
        _entry('{"x":', call_id="a", name="f"), _entry(call_id="b", name="f"), _entry("{}", call_id="b")
    )
    assert isinstance(failed, ToolCallFailed)
    assert succeeded == _ok(index=1, call_id="b")


def test_arguments_under_a_new_id_after_the_json_was_closed_are_a_call_without_a_name() -> None:
    """They are not added to a call that is whole."""
    assert _run(_entry("{}", call_id="a", name="f"), _entry('{"y":2}', call_id="b")) == [
        _ok(),
        ToolCallFailed(0, 1, "b", "", FailureReason.MISSING_NAME, "the model never named the tool", '{"y":2}'),
    ]


@pytest.mark.parametrize(
    "fragments",
    [
        ['{"a": "}', '"', "}"],
        ['{"a": "\\', '"}', '"}'],
        ['{"a": "\\\\', '"', "}"],
        ['{"a": [{}', ", 1]", "}"],
        ["", '{"a', '": "[{"', "}"],
    ],
    ids=["brace in a string", "escaped quote over two", "escaped backslash", "nested", "key over two"],
)
def test_where_the_json_is_closed(fragments: list[str]) -> None:
    """Braces in strings, escapes and nested values close nothing, wherever the fragments are cut."""
    entries = [_entry(fragment, call_id=str(number)) for number, fragment in enumerate(fragments)]
    assert _run(_entry(call_id="a", name="f"), *entries) == [_ok("".join(fragments))]
    more = [*entries, _entry("{}", call_id="b", name="f")]
    assert _run(_entry(call_id="a", name="f"), *more) == [_ok("".join(fragments)), _ok(index=1, call_id="b")]


# --- ids


def test_an_id_is_settled_with_the_first_arguments() -> None:
    """An id that comes before them is the call's, one that comes after them finds the call but does not rename it."""
    assert _run(_entry(name="f"), _entry(call_id="a"), _entry("{}")) == [_ok()]
    assert _run(_entry("{", name="f"), _entry(call_id="a"), _entry("}", index=9, call_id="a")) == [
        _ok(call_id="<generated-0>")
    ]


def test_a_call_without_arguments_takes_an_id_up_to_its_end() -> None:
    """No event names it yet, so an id may come at any time."""
    assert _run(_entry(name="f"), _entry(call_id="a"), incremental=True) == [ToolCallStarted(0, 0, "a", "f"), _ok()]


@pytest.mark.parametrize("call_id", [None, ""])
def test_a_missing_id_is_generated(call_id: str | None) -> None:
    """Null and empty ids are none; each call gets one of its own."""
    assert _run(
        _entry("{}", call_id=call_id, name="f"), _entry("{}", index=1, call_id=call_id, name="g")
    ) == [_ok(call_id="<generated-0>"), _ok(index=1, call_id="<generated-1>", name="g")]  # fmt: skip


def test_ids_are_unique_in_the_whole_answer() -> None:
    """The second choice's call with the first one's id gets another; an engine's id that was generated already, too."""
    ids = CallIds(counting_ids())
    verdicts = []
    for choice, call_id in enumerate(["a", "a", "<generated-0>"]):
        assembler = _assembler(choice=choice, ids=ids)
        assembler.receive([_entry("{}", call_id=call_id, name="f")])
        verdicts += assembler.finish(cut=False)
    assert [call.call_id for call in verdicts if isinstance(call, ToolCallSucceeded)] == [
        "a",
        "<generated-0>",
        "<generated-1>",
    ]


def test_ids_are_taken_to_the_letter() -> None:
    """Whatever an engine calls its calls: spaces, other scripts, anything."""
    for call_id in ["functions.get_weather:0", " ", "ü\n", "<generated-0>"]:
        assert _run(_entry("{}", call_id=call_id, name="f")) == [_ok(call_id=call_id)]


def test_a_generated_id_says_what_it_is() -> None:
    """Its own prefix and 24 hexadecimal digits, others every time."""
    generated = {tool_calls.generate_call_id() for _ in range(50)}
    assert len(generated) == 50
    assert all(re.fullmatch(r"call_[0-9a-f]{24}", call_id) for call_id in generated)
    assert re.fullmatch(r"call_[0-9a-f]{24}", CallIds().settle(""))


# --- names


@pytest.mark.parametrize(
    ("pieces", "name"),
    [
        (["get_", "weather"], "get_weather"),
        (["get_", "get_weather"], "get_weather"),
        (["f", "f", "f"], "f"),
        (["", "f", ""], "f"),
        (["g", "et_", "wea", "ther"], "get_weather"),
    ],
    ids=["pieces", "grows", "repeats", "empty pieces", "many pieces"],
)
def test_a_name_may_come_in_any_way(pieces: list[str], name: str) -> None:
    """A repeat changes nothing, one that extends what is there replaces it, another is its next piece."""
    assert _run(*[_entry(call_id="a", name=piece) for piece in pieces], _entry("{}")) == [_ok(name=name)]


def test_a_name_after_the_arguments_releases_what_came() -> None:
    """Arguments before the name are kept, returned in one piece with the name, then as they come."""
    entries = [_entry('{"x"', call_id="a"), _entry(":"), _entry(name="f"), _entry("1}")]
    assert _run(*entries, incremental=True) == [
        ToolCallStarted(0, 0, "a", "f"),
        ToolCallArguments(0, 0, "a", '{"x":'),
        ToolCallArguments(0, 0, "a", "1}"),
        _ok('{"x":1}'),
    ]


# --- events while a call is written


def test_a_call_is_told_from_its_first_arguments_on() -> None:
    """Started when id and name are settled, a piece for each fragment, the verdict at the end."""
    assembler = _assembler(incremental=True)
    assert assembler.receive([_entry(call_id="a", name="f")]) == []
    assert assembler.receive([_entry("{")]) == [ToolCallStarted(0, 0, "a", "f"), ToolCallArguments(0, 0, "a", "{")]
    assert assembler.receive([_entry(""), _entry("}")]) == [ToolCallArguments(0, 0, "a", "}")]
    assert assembler.finish(cut=False) == [_ok()]


def test_a_call_that_is_never_named_is_told_only_by_its_verdict() -> None:
    """Without a name there is nothing to start."""
    assert _run(_entry("{}", call_id="a"), incremental=True) == [
        ToolCallFailed(0, 0, "a", "", FailureReason.MISSING_NAME, "the model never named the tool", "{}")
    ]


def test_the_choice_is_named() -> None:
    """Every event says which choice it belongs to."""
    assembler = _assembler(incremental=True, choice=4)
    events = [*assembler.receive([_entry("{}", call_id="a", name="f")]), *assembler.finish(cut=False)]
    assert events == [
        ToolCallStarted(4, 0, "a", "f"),
        ToolCallArguments(4, 0, "a", "{}"),
        ToolCallSucceeded(4, 0, "a", "f", "{}"),
    ]


# --- verdicts

_CUT = "the answer was cut off before the call was whole"


def _failed(
    reason: FailureReason, message: str, raw: str = "", offset: int | None = None, name: str = "f"
) -> ToolCallFailed:
    return ToolCallFailed(0, 0, "a", name, reason, message, raw, offset)


_COMMA = "the arguments are not JSON: Expecting ',' delimiter"
_VALUE = "the arguments are not JSON: Expecting value"
_ARRAY = "the arguments are JSON, but not an object"

VERDICTS = {
    "no arguments": (_entry(call_id="a", name="f"), _ok("{}"), _failed(FailureReason.TRUNCATED, _CUT)),
    "only white space": (
        _entry(" \t\r\n", call_id="a", name="f"), _ok("{}"), _failed(FailureReason.TRUNCATED, _CUT, " \t\r\n"),
    ),
    "an object": (
        _entry(' {"x": 1}\n', call_id="a", name="f"),
        _ok(' {"x": 1}\n'),
        _failed(FailureReason.TRUNCATED, _CUT, ' {"x": 1}\n'),
    ),
    "half an object": (
        _entry('{"x": 1', call_id="a", name="f"),
        _failed(FailureReason.MALFORMED_JSON, _COMMA, '{"x": 1', 7),
        _failed(FailureReason.TRUNCATED, _CUT, '{"x": 1', 7),
    ),
    "no object": (
        _entry("[]", call_id="a", name="f"),
        _failed(FailureReason.NOT_AN_OBJECT, _ARRAY, "[]"),
        _failed(FailureReason.TRUNCATED, _CUT, "[]"),
    ),
    "an unknown tool": (
        _entry("[", call_id="a", name="h"),
        _failed(FailureReason.UNKNOWN_TOOL, "'h' is not one of the request's tools", "[", 1, "h"),
        _failed(FailureReason.UNKNOWN_TOOL, "'h' is not one of the request's tools", "[", 1, "h"),
    ),
    "no name": (
        _entry("[", call_id="a"),
        _failed(FailureReason.MISSING_NAME, "the model never named the tool", "[", 1, ""),
        _failed(FailureReason.MISSING_NAME, "the model never named the tool", "[", 1, ""),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("entry", "whole", "cut"), VERDICTS.values(), ids=VERDICTS.keys())
def test_verdict(entry: ToolEntry, whole: Event, cut: Event) -> None:
    """Each failure gives the first reason that applies; in a cut turn the call that was being written is TRUNCATED."""
    assert _run(entry) == [whole]
    assert _run(entry, cut=True) == [cut]


def test_in_a_cut_turn_only_the_current_call_and_what_does_not_parse_is_truncated() -> None:
    """Whole calls before it have succeeded; one that parses as another value is NOT_AN_OBJECT."""
    verdicts = _run(
        _entry('{"x":1}', index=0, call_id="a", name="f"),
        _entry('{"x":', index=1, call_id="b", name="f"),
        _entry("[1]", index=2, call_id="c", name="f"),
        _entry(index=3, call_id="d", name="f"),
        _entry("{}", index=4, call_id="e", name="f"),
        cut=True,
    )
    assert [call.reason if isinstance(call, ToolCallFailed) else None for call in verdicts] == [
        None,
        FailureReason.TRUNCATED,
        FailureReason.NOT_AN_OBJECT,
        FailureReason.TRUNCATED,
        FailureReason.TRUNCATED,
    ]


def test_the_current_call_is_the_last_one_that_got_something() -> None:
    """An index going back makes the earlier call the one that was being written."""
    verdicts = _run(
        _entry("{", index=0, call_id="a", name="f"),
        _entry("{}", index=1, call_id="b", name="g"),
        _entry("}", index=0),
        cut=True,
    )
    assert verdicts == [
        ToolCallFailed(0, 0, "a", "f", FailureReason.TRUNCATED, _CUT, "{}"),
        _ok(index=1, call_id="b", name="g"),
    ]


def test_no_arguments_where_the_schema_requires_some() -> None:
    """An empty object that the schema does not allow is not made up; a cut answer is TRUNCATED as before."""
    entry = _entry(call_id="a", name="needs")
    message = "the model gave no arguments, and the tool's schema requires some"
    assert _run(entry) == [_failed(FailureReason.MALFORMED_JSON, message, name="needs")]
    assert _run(entry, _entry(" ")) == [_failed(FailureReason.MALFORMED_JSON, message, " ", name="needs")]
    assert _run(entry, cut=True) == [_failed(FailureReason.TRUNCATED, _CUT, name="needs")]
    assert _run(entry, _entry("{}")) == [_ok("{}", name="needs")]


def test_a_check_cannot_make_a_failure_large() -> None:
    """Its sentence is cut, and its place becomes the part around it."""
    path = "/" + "a" * 1000 + "/" + "b" * 1000

    def check(_: str) -> tuple[str, str]:
        return path, "x" * 5000

    assembler = ToolCallAssembler(
        0, {"f"}, CallIds(), Halves(Counter()), Counter(), allows_empty=lambda _: True, checks={"f": check}
    )
    assembler.receive([_entry("{}", call_id="a", name="f")])
    [failed] = assembler.finish(cut=False)
    assert isinstance(failed, ToolCallFailed)
    assert (failed.instance_path, failed.message) == ("/" + "a" * 1000, "x" * 1024)


# --- text that is not Unicode


def test_halves_in_arguments_are_joined_by_call() -> None:
    """The second half may come after another call's fragments; a call's last half becomes U+FFFD."""
    anomalies: Counter[str] = Counter()
    assembler = _assembler(incremental=True, anomalies=anomalies)
    events = assembler.receive(
        [
            _entry('{"x":"\ud83d', index=0, call_id="a", name="f"),
            _entry('{"x":"', index=1, call_id="b", name="g"),
            _entry('\ude00"}', index=0),
            _entry("\ud83d", index=1),
        ]
    )
    assert [event.fragment for event in events if isinstance(event, ToolCallArguments)] == ['{"x":"', '{"x":"', '😀"}']
    last = assembler.finish(cut=False)
    assert last[:2] == [_ok('{"x":"😀"}'), ToolCallArguments(0, 1, "b", "\ufffd")]
    assert isinstance(last[2], ToolCallFailed)
    assert last[2].raw_arguments == '{"x":"\ufffd'
    assert anomalies == {"broken character": 1}


def test_halves_in_a_name_are_joined() -> None:
    """A name is mended when it is settled."""
    [failed] = _run(_entry(call_id="a", name="a\ud83d"), _entry("{}", name="\ude00\ud83d"))
    assert isinstance(failed, ToolCallFailed)
    assert (failed.tool_name, failed.reason) == ("a😀\ufffd", FailureReason.UNKNOWN_TOOL)


# --- limits


def test_an_id_that_is_too_long_is_replaced() -> None:
    """It still finds the call."""
    anomalies: Counter[str] = Counter()
    assembler = _assembler(anomalies=anomalies)
    long = "x" * 257
    assembler.receive([_entry("{", call_id=long, name="f"), _entry("}", index=7, call_id=long)])
    assert assembler.finish(cut=False) == [_ok(call_id="<generated-0>")]
    assert anomalies == {"tool call id too long": 1}


def test_a_long_name_is_shortened_in_the_sentence() -> None:
    """The name itself is passed on whole."""
    name = "h" * 100
    [failed] = _run(_entry("{}", call_id="a", name=name))
    assert isinstance(failed, ToolCallFailed)
    assert failed.tool_name == name
    assert failed.message == f"'{'h' * 64}…' is not one of the request's tools"


def test_too_many_calls() -> None:
    """The call beyond the limit ends the reading; the others get verdicts, and the events of the chunk before it are kept."""
    assembler = _assembler(incremental=True, max_calls=2)
    entries = [_entry("{}", index=index, call_id=str(index), name="f") for index in range(3)]
    with pytest.raises(ToolCallLimitError, match="the answer has more than 2 tool calls") as raised:
        assembler.receive(entries)
    assert raised.value.events == [
        ToolCallStarted(0, 0, "0", "f"),
        ToolCallArguments(0, 0, "0", "{}"),
        ToolCallStarted(0, 1, "1", "f"),
        ToolCallArguments(0, 1, "1", "{}"),
    ]
    assert assembler.finish(cut=True) == [
        _ok(call_id="0"),
        ToolCallFailed(0, 1, "1", "f", FailureReason.TRUNCATED, _CUT, "{}"),
    ]


@pytest.mark.parametrize("fragment", ["x" * 9, "é" * 5, "x" * 7 + "\ud800x"], ids=["ASCII", "two bytes", "surrogate"])
def test_a_call_too_large(fragment: str) -> None:
    """Arguments and twice the name are counted in bytes, over all fragments; the fragment beyond the limit is not kept."""
    assembler = _assembler(incremental=True, max_bytes=11)
    assembler.receive([_entry(call_id="a", name="f")])
    assembler.receive([_entry("{")])
    with pytest.raises(ToolCallLimitError, match="tool call 0 is larger than 11 bytes") as raised:
        assembler.receive([_entry(fragment)])
    assert raised.value.events == []
    [failed] = assembler.finish(cut=True)
    assert isinstance(failed, ToolCallFailed)
    assert (failed.reason, failed.raw_arguments) == (FailureReason.TRUNCATED, "{")


def test_a_call_of_just_the_limit() -> None:
    """The limit itself is allowed."""
    assembler = _assembler(max_bytes=11)
    assembler.receive([_entry('{"x": 10}', call_id="a", name="f")])
    assert assembler.finish(cut=False) == [_ok('{"x": 10}')]


# --- anything at all

_ENTRIES = st.builds(
    ToolEntry,
    index=st.none() | st.integers(-1, 3),
    id=st.none() | st.sampled_from(["", "a", "b", "c", "<generated-0>"]),
    function=st.none()
    | st.builds(
        Function,
        name=st.none() | st.sampled_from(["", "f", "g", "h", "get_", "weather", "get_weather"]),
        arguments=st.none() | st.sampled_from(["", "{", "}", "{}", '{"x":', "1", " ", "[", "é", "NaN"]),
    ),
)


def _read(entries: Sequence[Sequence[ToolEntry]], *, incremental: bool, cut: bool) -> tuple[list[Event], list[Event]]:
    """What came while the calls were written, and what came at the end."""
    assembler = _assembler(incremental=incremental)
    return [event for chunk in entries for event in assembler.receive(chunk)], assembler.finish(cut=cut)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(st.lists(st.lists(_ENTRIES, max_size=3), max_size=8), st.booleans())
def test_whatever_comes_every_call_is_judged_once(entries: list[list[ToolEntry]], cut: bool) -> None:
    """Nothing raises; each call gets one verdict, in ascending order, under one id that no other has, after its pieces."""
    emitted, last = _read(entries, incremental=True, cut=cut)
    verdicts = [event for event in last if isinstance(event, ToolCallSucceeded | ToolCallFailed)]
    started = [event for event in [*emitted, *last] if isinstance(event, ToolCallStarted)]
    pieces = [event for event in emitted if isinstance(event, ToolCallArguments)]
    assert [*emitted, *last] == [
        *[event for event in emitted if isinstance(event, ToolCallStarted | ToolCallArguments)],
        *last,
    ]
    indexes = [call.index for call in verdicts]
    assert indexes == sorted(set(indexes))
    assert len({call.call_id for call in verdicts}) == len(verdicts)
    assert all(call.call_id for call in verdicts)
    settled = {call.index: (call.call_id, call.tool_name) for call in verdicts}
    assert max(Counter(event.index for event in started).values(), default=1) == 1
    assert {event.index: (event.call_id, event.tool_name) for event in started} == {
        index: (call_id, name) for index, (call_id, name) in settled.items() if name
    }
    for call in verdicts:
        raw = "".join(piece.fragment for piece in pieces if piece.index == call.index)
        if isinstance(call, ToolCallSucceeded):
            assert call.arguments == (raw if raw.strip() else "{}")
            assert find_problem(call.arguments) is None
        elif call.reason is not FailureReason.MISSING_NAME:
            assert call.raw_arguments == raw
    begun: set[int] = set()
    for event in [*emitted, *last]:
        if isinstance(event, ToolCallStarted):
            begun.add(event.index)
        elif isinstance(event, ToolCallArguments):
            assert event.index in begun
            assert event.call_id == settled[event.index][0]
    whole = {call.index for call in verdicts if isinstance(call, ToolCallSucceeded)}
    kept = sum(len(piece.fragment) for piece in pieces if piece.index in whole)
    kept += sum(len(call.raw_arguments) for call in verdicts if isinstance(call, ToolCallFailed))
    assert kept == sum(len(entry.function.arguments or "") for chunk in entries for entry in chunk if entry.function)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.lists(st.lists(_ENTRIES, max_size=3), max_size=8), st.booleans())
def test_assembled_and_incremental_give_the_same_verdicts(entries: list[list[ToolEntry]], cut: bool) -> None:
    """Whether pieces are returned changes no verdict, no id and no order; assembled, nothing else is returned."""
    emitted, assembled = _read(entries, incremental=False, cut=cut)
    _, incremental = _read(entries, incremental=True, cut=cut)
    assert emitted == []
    assert assembled == [event for event in incremental if not isinstance(event, ToolCallStarted)]


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.lists(_ENTRIES, max_size=10), st.data(), st.booleans())
def test_the_number_of_entries_in_a_chunk_means_nothing(
    entries: list[ToolEntry], data: st.DataObject, cut: bool
) -> None:
    """Entries give the same whether they come in one chunk, in a chunk each, or anything between."""
    alone = _read([[entry] for entry in entries], incremental=True, cut=cut)
    positions = sorted(data.draw(st.sets(st.integers(0, len(entries)), max_size=4)))
    bounds = [0, *positions, len(entries)]
    grouped = _read([entries[start:end] for start, end in itertools.pairwise(bounds)], incremental=True, cut=cut)
    assert grouped == alone


_CALLS = st.lists(
    st.tuples(st.sampled_from(["f", "g"]), st.lists(st.sampled_from(['{"k":', "1", "}", "é"]), max_size=4)), max_size=4
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(_CALLS, st.sampled_from(["index", "id", "both"]), st.data())
def test_interleaved_calls_stay_apart(written: list[tuple[str, list[str]]], keyed: str, data: st.DataObject) -> None:
    """Calls whose fragments are mixed in any way come out whole, distinguished by index, by id, or by both."""
    queues = []
    for number, (name, fragments) in enumerate(written):
        index = number if keyed != "id" else None
        call_id = f"c{number}" if keyed != "index" else None
        queues.append([_entry(index=index, call_id=f"c{number}", name=name)])
        queues[-1] += [_entry(fragment, index=index, call_id=call_id) for fragment in fragments]
    # The first entries come in order, so that the calls are counted in order without indexes too.
    entries = [queue.pop(0) for queue in queues]
    while any(queues):
        entries.append(data.draw(st.sampled_from([queue for queue in queues if queue])).pop(0))
    verdicts = _run(*entries)
    assert [
        (call.index, call.call_id, call.tool_name, call.arguments if isinstance(call, ToolCallSucceeded) else call.raw_arguments)
        for call in verdicts
        if isinstance(call, ToolCallSucceeded | ToolCallFailed)
    ] == [
        (number, f"c{number}", name, "".join(fragments) or "{}") for number, (name, fragments) in enumerate(written)
    ]  # fmt: skip
