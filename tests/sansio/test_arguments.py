"""Is a text one JSON object, and if not, where does it stop being one? The strict grammar, nothing computed."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltawire_server.sansio.events import FailureReason
from deltawire_server.sansio.json_object import MAX_EXPLAINED, find_problem
from deltawire_server.sansio.tool_calls import MAX_BRACKETS, _Brackets

FINE = {
    "empty": "{}",
    "white space around and within": ' \t\r\n{ \n"a"\t: 1 , "b" : [ ] }\r\n',
    "every kind of value": '{"a": null, "b": true, "c": false, "d": "x", "e": -1.5e+10, "f": [1, {}], "g": {"h": []}}',
    "duplicate keys": '{"a": 1, "a": 2}',
    "an empty key": '{"": 0}',
    "a huge integer": '{"a": ' + "9" * 100_000 + "}",
    "a huge exponent": '{"a": 1e999999, "b": -1e-999999}',
    "negative zero": '{"a": -0, "b": -0.0}',
    "NaN in a string": '{"a": "NaN, Infinity, -Infinity", "NaN": 1}',
    "constants in a string with escapes": '{"a": "\\" NaN \\\\", "b": "\\\\"}',
    "characters of several bytes": '{"é": "日本 🚀"}',
    "every escape": r'{"a": "\" \\ \/ \b \f \n \r \t \u00e9 \ud83d\ude80"}',
    "an escaped lone surrogate": r'{"a": "\ud800"}',
    "a lone surrogate": '{"a": "\ud800"}',
    "characters above the controls": '{"a": "\x7f\x80\u2028\ufeff"}',
    "nested": '{"a":' * 50 + "0" + "}" * 50,
}


@pytest.mark.parametrize("text", FINE.values(), ids=FINE.keys())
def test_takes(text: str) -> None:
    """A JSON object has no problem."""
    assert find_problem(text) is None


BAD = {
    "nothing": ("", "Expecting value", 0),
    "a word": ("x", "Expecting value", 0),
    "an open object": ("{", "Expecting property name enclosed in double quotes", 1),
    "an open string": ('{"a": "b', "Unterminated string starting at", 6),
    "an open array": ('{"a": [1', "Expecting ',' delimiter", 8),
    "no value": ('{"a":}', "Expecting value", 5),
    "no colon": ('{"a" 1}', "Expecting ':' delimiter", 5),
    "no comma": ('{"a": 1 "b": 2}', "Expecting ',' delimiter", 8),
    "single quotes": ("{'a': 1}", "Expecting property name enclosed in double quotes", 1),
    "a bare word": ('{"city": Oslo,,}', "Expecting value", 9),
    "another object after it": ('{"a": 1}{"a": 1}', "Extra data", 8),
    "text after it": ('{"a": 1} x', "Extra data", 9),
    "a closing brace too many": ('{"a": 1}}', "Extra data", 8),
    "a NUL after it": ("{}\x00", "Extra data", 2),
    "a no-break space after it": ("{}\u00a0", "Extra data", 2),
    "a BOM": ("\ufeff{}", "Unexpected UTF-8 BOM (decode using utf-8-sig)", 0),
    "a leading zero": ('{"a": 01}', "Expecting ',' delimiter", 7),
    "a plus": ('{"a": +1}', "Expecting value", 6),
    "a point without digits": ('{"a": 1.}', "Expecting ',' delimiter", 7),
    "a hexadecimal number": ('{"a": 0x1}', "Expecting ',' delimiter", 7),
    "digits of another script": ('{"a": \u0661}', "Expecting value", 6),
    "a line end in a string": ('{"a": "\n"}', "Invalid control character at", 7),
    "a tab in a string": ('{"a": "\t"}', "Invalid control character at", 7),
    "a NUL in a string": ('{"a": "\x00"}', "Invalid control character at", 7),
    "an unknown escape": ('{"a": "\\x41"}', "Invalid \\escape", 7),
    "a short escape": ('{"a": "\\u12"}', "Invalid \\uXXXX escape", 8),
    "NaN": ('{"a": NaN}', "NaN is not JSON", 6),
    "Infinity": ('{"a": [1, Infinity]}', "Infinity is not JSON", 10),
    "minus Infinity": ('{"a": -Infinity}', "-Infinity is not JSON", 6),
    "NaN alone": ("NaN", "NaN is not JSON", 0),
    "NaN after one in a string": ('{"NaN": "\\"NaN", "b": NaN}', "NaN is not JSON", 22),
    "the first of several constants": ('{"a": -Infinity, "b": NaN}', "-Infinity is not JSON", 6),
    "NaN in an open object": ('{"a": NaN, "b', "NaN is not JSON", 6),
    "NaN as a key": ("{NaN: 1}", "Expecting property name enclosed in double quotes", 1),
    # The place is given in bytes of UTF-8.
    "after two bytes": ('{"é": x}', "Expecting value", 7),
    "after three bytes": ('{"日": x}', "Expecting value", 8),
    "after four bytes": ('{"🚀": x}', "Expecting value", 9),
    "after a lone surrogate": ('{"\ud800": x}', "Expecting value", 8),
    "NaN after four bytes": ('{"🚀": NaN}', "NaN is not JSON", 9),
}


@pytest.mark.parametrize(("text", "message", "offset"), BAD.values(), ids=BAD.keys())
def test_does_not_take(text: str, message: str, offset: int) -> None:
    """What no strict parser would take is malformed; the message names the fault, the offset its place in bytes."""
    problem = find_problem(text)
    assert problem is not None
    assert problem.reason is FailureReason.MALFORMED_JSON
    assert message in problem.message
    assert problem.byte_offset == offset


@pytest.mark.parametrize("text", ["[]", '"x"', "1", "-1.5", "null", "true", '["a", {"b": 1}]', ' "{}" '])
def test_takes_no_other_value(text: str) -> None:
    """JSON of another type is distinguished from malformed text: all of it parses, so there is no place to give."""
    problem = find_problem(text)
    assert problem is not None
    assert (problem.reason, problem.byte_offset) == (FailureReason.NOT_AN_OBJECT, None)


@pytest.mark.parametrize("text", ['{"a":' + "[" * 1_000_000, '{"a":' + "[" * 1_000_000 + "]" * 1_000_000 + "}"])
def test_nesting_beyond_all_measure_is_malformed(text: str) -> None:
    """A model that opens brackets for ever fails its own call, not the program."""
    problem = find_problem(text)
    assert problem is not None
    assert problem.reason is FailureReason.MALFORMED_JSON
    assert problem.byte_offset is None
    assert "nested too deeply" in problem.message


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.dictionaries(st.text(), _JSON, max_size=4), st.booleans(), st.sampled_from([None, 1, "\t"]))
def test_takes_whatever_a_serialiser_writes(
    value: dict[str, object], ascii_only: bool, indent: int | str | None
) -> None:
    """Any object written by a JSON library is fine, and every proper beginning of its compact form is not."""
    assert find_problem(json.dumps(value, ensure_ascii=ascii_only, indent=indent)) is None
    compact = json.dumps(value, ensure_ascii=ascii_only)
    for length in range(len(compact)):
        problem = find_problem(compact[:length])
        assert problem is not None
        assert problem.reason is FailureReason.MALFORMED_JSON


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.text(st.sampled_from('{}[]":,\\ NaInfty-0.1e\né\ud800'), max_size=20))
def test_never_raises_and_points_into_the_text(text: str) -> None:
    """Any text gives an answer, and a place within it."""
    problem = find_problem(text)
    if problem is not None and problem.byte_offset is not None:
        assert 0 <= problem.byte_offset <= len(text.encode("utf-8", "surrogatepass"))


LARGE: dict[str, tuple[str, str, int]] = {
    "a bare word": ('{"a": "' + "x" * MAX_EXPLAINED + '", "b": y}', "invalid character", MAX_EXPLAINED + 15),
    "characters of several bytes": ('{"a": "' + "é" * MAX_EXPLAINED + '", "b": y}', "invalid character", 2 * MAX_EXPLAINED + 15),
    "halves of pairs": ('{"a": "' + "\ud800\\udc00" * MAX_EXPLAINED + '", "b": y}', "invalid character", 9 * MAX_EXPLAINED + 15),
    "an open array": ('{"a": [' + "[]," * MAX_EXPLAINED, "Input data was truncated", 7 + 3 * MAX_EXPLAINED),
    "NaN": ('{"a": [' + "[]," * MAX_EXPLAINED + "NaN]}", "invalid character", 7 + 3 * MAX_EXPLAINED),
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_large_texts_are_not_parsed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects are made of what is wrong only where it is short; the place is exact all the same."""
    text, message, offset = LARGE[name]
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("parsed"))
    problem = find_problem(text)
    assert problem is not None
    assert (problem.reason, problem.byte_offset) == (FailureReason.MALFORMED_JSON, offset)
    assert problem.message == f"the arguments are not JSON: {message}"


def test_what_is_json_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read to its end and nothing is made of it; halves of pairs in large texts are part of JSON."""
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("parsed"))
    assert find_problem('{"a": [' + "[]," * 1_000_000 + "[]]}") is None
    assert find_problem('{"a": "' + "\ud800" * MAX_EXPLAINED + r"\ud800\\ud800" + '"}') is None
    problem = find_problem(" [" + "1," * MAX_EXPLAINED + "1]")
    assert problem is not None
    assert problem.reason is FailureReason.NOT_AN_OBJECT
    for text in ('{"a":' * 1_000_000, '{"\ud800":' * 1_000_000):
        deep = find_problem(text)
        assert deep is not None
        assert deep.message == "the arguments are nested too deeply to be parsed"


@given(
    st.lists(st.sampled_from(['"', "\\", "{", "}", "[", "]", "a", '\\"', ","]), max_size=30),
    st.lists(st.integers(0, 30)),
)
def test_brackets_are_read_in_any_pieces(tokens: list[str], cuts: list[int]) -> None:
    """Whether the outermost one has been closed does not depend on where the text is cut."""
    text = "".join(tokens)
    depth, quoted, closed, escaped = 0, False, False, False
    for character in text:
        if escaped and character in '"\\':
            escaped = False
            continue
        escaped = False  # outside of strings nothing else is escaped, and within them it does not matter
        if character == "\\":
            escaped = True
        elif character == '"':
            quoted = not quoted
        elif not quoted and character in "{}[]":
            depth += 1 if character in "{[" else -1
            closed = closed or depth <= 0
    brackets = _Brackets()
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for begin, end in itertools.pairwise(edges):
        brackets.receive(text[begin:end])
    assert brackets.closed == closed


def test_brackets_are_read_up_to_a_number() -> None:
    """What has more of them counts as open."""
    brackets = _Brackets()
    for piece in ("{", "[]" * MAX_BRACKETS, "}"):
        brackets.receive(piece)
    assert not brackets.closed
    assert brackets._brackets == MAX_BRACKETS


def test_deep_text_with_halves_of_pairs() -> None:
    """Python's parser, which reads those, has a limit of depth of its own, which is far higher from 3.12 on."""
    problem = find_problem('{"\ud800":' * 5000)
    assert problem is not None
    assert problem.message in (
        "the arguments are nested too deeply to be parsed",
        "the arguments are not JSON: Expecting value",
    )
