"""Arguments are checked against their schemas; neither can make the gateway read other files, hang or fail."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING, Any

import pytest

from deltawire_server.schemas import SchemaError, argument_check
from deltawire_server.schemas.check import MAX_DEPTH, MAX_NUMBER_LENGTH, MAX_PATTERNS, MAX_SCHEMA_BYTES
from deltawire_server.schemas.sentences import MAX_MESSAGE

if TYPE_CHECKING:
    from pathlib import Path

DRAFT_7 = "http://json-schema.org/draft-07/schema#"


def mismatch_of(schema: object, arguments: object) -> tuple[str, str] | None:
    """The result of the check; a text is JSON text."""
    held = argument_check(schema if isinstance(schema, str) else json.dumps(schema))
    return held(arguments if isinstance(arguments, str) else json.dumps(arguments))


def refused(schema: object) -> str:
    """The error message of an invalid schema."""
    with pytest.raises(SchemaError) as caught:
        argument_check(schema if isinstance(schema, str) else json.dumps(schema))
    return str(caught.value)


def of_a(schema: object) -> dict[str, Any]:
    """A schema for arguments with one property."""
    return {"type": "object", "properties": {"a": schema}}


MISMATCHES: dict[str, tuple[object, object, str, str]] = {
    "type": (of_a({"type": "integer"}), {"a": "Oslo"}, "/a", '"Oslo" is not of type "integer"'),
    "null": (of_a({"type": "integer"}), {"a": None}, "/a", 'null is not of type "integer"'),
    "true": (of_a({"type": "integer"}), {"a": True}, "/a", 'true is not of type "integer"'),
    "a fraction": (of_a({"type": "integer"}), {"a": 1.5}, "/a", '1.5 is not of type "integer"'),
    "an object": (of_a({"type": "integer"}), {"a": {"b": 1}}, "/a", 'this object is not of type "integer"'),
    "an array": (of_a({"type": "integer"}), {"a": [1]}, "/a", 'this array is not of type "integer"'),
    "required": ({"required": ["a"]}, {}, "", '"a" is a required property'),
    "nothing else": (
        {"properties": {"a": {}}, "additionalProperties": False}, {"a": 1, "b": 2}, "",
        "Additional properties are not allowed ('b' was unexpected)",
    ),
    "nothing at all": ({"additionalProperties": False}, {"b": 2}, "", "2 is not allowed here"),
    "an enum": (of_a({"enum": ["C", "F"]}), {"a": "K"}, "/a", '"K" is not one of "C" or "F"'),
    "a pattern": (of_a({"pattern": r"^\d+$"}), {"a": "x"}, "/a", '"x" does not match "^\\d+$"'),
    "a format": (of_a({"format": "date"}), {"a": "x"}, "/a", '"x" is not a "date"'),
    "a key": ({"propertyNames": {"maxLength": 1}}, {"ab": 1}, "", '"ab" is longer than 1 character'),
    "within": (
        of_a({"items": {"properties": {"x/y~": {"minimum": 1}}}}), {"a": [{}, {"x/y~": 0}]},
        "/a/1/x~1y~0", "0 is less than the minimum of 1",
    ),
    "$ref": (of_a({"$ref": "#/$defs/n"}) | {"$defs": {"n": {"type": "number"}}}, {"a": "x"}, "/a", '"x" is not of type "number"'),
    "an anchor": (
        of_a({"$ref": "#n"}) | {"$defs": {"x": {"$anchor": "n", "type": "number"}}}, {"a": "x"},
        "/a", '"x" is not of type "number"',
    ),
    "an id within": (
        of_a({"$ref": "n"}) | {"$id": "https://example.org/s", "$defs": {"x": {"$id": "n", "type": "number"}}}, {"a": "x"},
        "/a", '"x" is not of type "number"',
    ),
    "a reference into an id within": (
        of_a({"$ref": "n#/$defs/m"})
        | {"$id": "https://example.org/s", "$defs": {"x": {"$id": "n", "$defs": {"m": {"type": "number"}}}}},
        {"a": "x"}, "/a", '"x" is not of type "number"',
    ),
    "a reference into a list": (
        of_a({"$ref": "#/allOf/0"}) | {"allOf": [{"type": ["object", "number"]}]}, {"a": "x"},
        "/a", '"x" is not of types "number", "object"',
    ),
    "draft 7": (
        of_a({"items": [{"type": "integer"}]}) | {"$schema": DRAFT_7}, {"a": ["x"]}, "/a/0", '"x" is not of type "integer"',
    ),
    "a dependency of draft 7": (
        {"$schema": DRAFT_7, "dependencies": {"a": {"required": ["b"]}}}, {"a": 1}, "", '"b" is a required property',
    ),
    "more than a float": (of_a({"maximum": 5}), '{"a": 1e400}', "/a", "1E+400 is greater than the maximum of 5"),
    "nothing left over": (
        {"allOf": [of_a({})], "unevaluatedProperties": False}, {"b": 1},
        "", "Unevaluated properties are not allowed ('b' was unexpected)",
    ),
    "not": (of_a({"not": {"type": "string"}}), {"a": "x"}, "/a", '{"type":"string"} is not allowed for "x"'),
    "by pattern": ({"patternProperties": {"^a": {"type": "integer"}}}, {"ab": "x"}, "/ab", '"x" is not of type "integer"'),
}  # fmt: skip


@pytest.mark.parametrize(("schema", "arguments", "path", "sentence"), MISMATCHES.values(), ids=MISMATCHES.keys())
def test_invalid_arguments(schema: object, arguments: object, path: str, sentence: str) -> None:
    """The result has a JSON Pointer, and a message by which a model can correct the arguments."""
    assert mismatch_of(schema, arguments) == (path, sentence)


FITS: dict[str, tuple[object, object]] = {
    "nothing asked": ({}, {"a": 1}),
    "true": (of_a(True), {"a": 1}),
    "a whole number that is written as a fraction": (of_a({"type": "integer"}), '{"a": 1.0}'),
    "a number beyond every float": (of_a({"type": "integer"}), '{"a": 1e400}'),
    "a number of a thousand digits": (of_a({"type": "integer"}), f'{{"a": {"9" * MAX_NUMBER_LENGTH}}}'),
    "a fraction that is no float": (of_a({"multipleOf": 0.01}), '{"a": 19.99}'),
    "equal numbers": (of_a({"enum": [1.5, 2]}), '{"a": 2.0}'),
    "an unknown format": (of_a({"format": "int32"}), {"a": "x"}),
    "an unknown keyword": (of_a({"nullable": True}), {"a": None}),
    "an optional part": (of_a({"anyOf": [{"type": "string"}, {"type": "null"}]}), {"a": None}),
    "as deep as may be": ({}, '{"a":' * (MAX_DEPTH - 1) + "{}" + "}" * (MAX_DEPTH - 1)),
    "brackets in a text": (of_a({"type": "string"}), {"a": "[{" * 1000 + '\\"'}),
}


@pytest.mark.parametrize(("schema", "arguments"), FITS.values(), ids=FITS.keys())
def test_valid_arguments(schema: object, arguments: object) -> None:
    """There is no error for valid arguments."""
    assert mismatch_of(schema, arguments) is None


REFUSED: dict[str, tuple[object, str]] = {
    "no JSON": ("{", "is not JSON: "),
    "more than JSON": ("{}x", "is not JSON: "),
    "half a character": ('{"title": "\\ud800"}', "is not JSON: "),
    "no type": (
        of_a({"type": "strin"}),
        "is not a valid schema: \"strin\" is not valid under any of the schemas listed in the 'anyOf' keyword (at /properties/a/",
    ),
    "a bad pattern": (of_a({"pattern": "("}), 'is not a valid schema: "(" is no pattern that can be used; look-around'),
    "a bad pattern of names": ({"patternProperties": {"(": {}}}, 'is not a valid schema: "(" is no pattern'),
    "look-around": (of_a({"pattern": "^(?=a)"}), 'is not a valid schema: "^(?=a)" is no pattern that can be used; look-around'),
    "a back-reference": (of_a({"pattern": r"(a)\1"}), "is not a valid schema: "),
    "a pattern that becomes large": (of_a({"pattern": "(a{1000}){1000}"}), "is not a valid schema: "),
    "many patterns": ({"anyOf": [{"pattern": "x"}] * (MAX_PATTERNS + 1)}, f"has {MAX_PATTERNS + 1} patterns"),
    "many patterns of names": (
        {"patternProperties": {f"a{n}": {} for n in range(MAX_PATTERNS + 1)}}, f"has {MAX_PATTERNS + 1} patterns",
    ),
    "a reference to nothing": (of_a({"$ref": "#/$defs/x"}), "refers to '#/$defs/x', which does not exist: only"),
    "a reference through a text": (of_a({"$ref": "#/type/0"}), "refers to '#/type/0', which does not exist: only"),
    "an unknown anchor": (of_a({"$ref": "#x"}), "refers to '#x', which does not exist: only"),
    "an unknown draft": ({"$schema": "https://example.org/draft"}, "is not a valid schema: Unknown meta-schema"),
    "a draft that is no text": ({"$schema": 5}, 'is not a valid schema: 5 is not of type "string" (at /$schema)'),
    "itself": ({"$ref": "#"}, "refers to itself without end"),
    "each other": (
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"anyOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"},
        "refers to itself without end",
    ),
    "too large": ('{"title": "' + "é" * (MAX_SCHEMA_BYTES // 2) + '"}', f"is larger than {MAX_SCHEMA_BYTES} bytes"),
    "far too large": (" " * MAX_SCHEMA_BYTES + "{}", f"is larger than {MAX_SCHEMA_BYTES} bytes"),
    "too deep": ('{"not":' * 10_000 + "{}" + "}" * 10_000, f"is nested more than {MAX_DEPTH} levels deep"),
    "too deep and no JSON": ("[" * 10_000, f"is nested more than {MAX_DEPTH} levels deep"),
    "itself, deep within": (
        of_a(of_a(of_a(of_a(of_a(of_a({"$ref": "#/$defs/x"})))))) | {"$defs": {"x": {"not": {"$ref": "#/$defs/x"}}}},
        "refers to itself without end",
    ),
    "a long chain": (
        {"$ref": "#/$defs/0", "$defs": {"3000": {}} | {str(n): {"$ref": f"#/$defs/{n + 1}"} for n in range(3000)}},
        "refers from part to part too often",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("schema", "violation"), REFUSED.values(), ids=REFUSED.keys())
def test_an_invalid_schema(schema: object, violation: str) -> None:
    """The error has the problem and, if known, its path; it continues the name of a field."""
    sentence = refused(schema)
    assert sentence.startswith(violation)
    assert len(sentence) < 2 * MAX_MESSAGE


@pytest.mark.parametrize("keyword", ["$ref", "$dynamicRef"])
def test_references_to_outside_are_not_read(keyword: str, tmp_path: Path) -> None:
    """Neither an address nor a file is opened in any spelling, although both exist and would be valid."""
    (tmp_path / "schema.json").write_text("{}", encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        references = [
            f"http://{address}/schema.json", f"https://{address}/schema.json", f"//{address}/schema.json",
            f"file://{tmp_path}/schema.json", f"{tmp_path}/schema.json", "schema.json", "../schema.json#/a", "urn:x:y",
        ]  # fmt: skip
        for base in ({}, {"$id": f"file://{tmp_path}/"}, {"$id": f"http://{address}/"}):
            for reference in references:
                assert "only references to what is within" in refused(of_a({keyword: reference}) | base)
        assert "Unknown meta-schema" in refused({"$schema": f"http://{address}/schema.json"})
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.mark.parametrize("pattern", ["^(a+)+$", "(a|aa)+$", "(.*.*)*=x", r"^(\w+\s?)*$"])
def test_a_hostile_pattern_takes_linear_time(pattern: str) -> None:
    """Patterns that take exponential time with backtracking are checked against a text of 200,000 characters."""
    assert mismatch_of(of_a({"pattern": pattern}), {"a": "a" * 200_000 + "!\n"}) is not None


UNUSABLE: dict[str, tuple[str, str]] = {
    "a key twice": ('{"a": [{"b": 1, "c": 2, "b": 1}]}', 'the key "b" comes twice in one object'),
    "a number without end": ('{"a": ' + "1" * 1001 + "}", "a number has more than 1000 digits"),
    "a fraction without end": ('{"a": 0.' + "1" * 1001 + "}", "a number has more than 1000 digits"),
    "an exponent beyond all": ('{"a": 1e99999999999999999999}', "the number 1e99999999999999999999 is out of every range"),
    "a large exponent": ('{"a": 1e1001}', "the number 1e1001 is out of every range"),
    "a small exponent": ('{"a": 1e-1001}', "the number 1e-1001 is out of every range"),
    "too deep": ('{"a":' * 10_000 + "{}" + "}" * 10_000, "the arguments are nested more than 100 levels deep"),
    "half a character": ('{"a": "\\ud800"}', "the arguments have half of a surrogate pair, which is no character"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "sentence"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_arguments_that_cannot_be_checked_are_invalid(arguments: str, sentence: str) -> None:
    """Texts that parsers read differently, or not at all, fail the check."""
    assert mismatch_of(of_a({"enum": [1]}), arguments) == ("", sentence)


def doubling(levels: int) -> dict[str, Any]:
    """A schema in which each part applies the next one twice."""
    parts: dict[str, Any] = {str(n): {"allOf": [{"$ref": f"#/$defs/{n + 1}"}] * 2} for n in range(levels)}
    return {"$defs": parts | {str(levels): {}}, "$ref": "#/$defs/0"}


def left_over(levels: int) -> dict[str, Any]:
    """A schema with unevaluated properties at each level."""
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"allOf": [schema], "unevaluatedProperties": False}
    return schema


@pytest.mark.parametrize("schema", [doubling(60), left_over(30), of_a(doubling(60) | {"$id": "d"})])
def test_a_schema_of_exponential_work_is_refused(schema: dict[str, Any]) -> None:
    """The work of a small schema may be exponential; it is counted without running the check."""
    assert refused(schema).startswith("is too much work to check")


def test_the_same_schemas_with_less_work_are_accepted() -> None:
    """Small schemas of these forms are checked."""
    assert mismatch_of(doubling(10), {"a": 1}) is None
    assert mismatch_of(left_over(3), {}) is None


def test_a_tree_may_be_deep() -> None:
    """Each part applies to one place of the value, so the work is not multiplied."""
    node = of_a({"type": "integer"})
    node["properties"] |= {side: {"$ref": "#"} for side in ("left", "right")}
    value: dict[str, Any] = {"a": "x"}
    for _ in range(20):
        value = {"left": value, "right": {"a": 1}, "list": []}
    assert mismatch_of(node, value) == ("/left" * 20 + "/a", '"x" is not of type "integer"')


def test_a_tree_of_lists_may_have_the_maximum_depth() -> None:
    """The work of each level is counted once, beginning with the innermost."""
    node = {
        "$defs": {"node": of_a({"type": ["array", "null"], "items": {"$ref": "#/$defs/node"}})},
        "$ref": "#/$defs/node",
    }
    value: dict[str, Any] = {"a": 1}
    for _ in range(MAX_DEPTH // 2 - 1):
        value = {"a": [value]}
    path, _ = mismatch_of(node, value) or ("", "")
    assert path == "/a/0" * (MAX_DEPTH // 2 - 1) + "/a"


def test_a_path_of_many_references_is_counted() -> None:
    """Short chains of references, one in each level, may together be longer than Python's stack."""
    levels, links = 60, 10
    chain: dict[str, Any] = {
        f"{level}-{link}": {"$ref": f"#/$defs/{level}-{link + 1}"} for level in range(levels) for link in range(links)
    }
    chain |= {f"{level}-{links}": of_a({"$ref": f"#/$defs/{level + 1}-0"}) for level in range(levels)}
    schema = {"$ref": "#/$defs/0-0", "$defs": chain | {f"{levels}-0": {"type": "integer"}}}
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    assert mismatch_of(schema, value) is None


def test_deep_arguments_for_alternatives_of_trees_are_too_much_work() -> None:
    """If each level has five alternatives, the work is exponential in the depth, and the error says so."""
    operation = {"properties": {side: {"$ref": "#/$defs/term"} for side in ("left", "right")}}
    schema = {"$defs": {"term": {"anyOf": [operation] * 5}}, **of_a({"$ref": "#/$defs/term"})}
    value: dict[str, Any] = {}
    for _ in range(30):
        value = {"left": value}
    assert mismatch_of(schema, {"a": {"left": {"right": {}}}}) is None
    assert mismatch_of(schema, {"a": value}) == (
        "",
        "the arguments are too much work to check against the tool's schema",
    )


def test_messages_show_long_values_shortened() -> None:
    """The length of a message is limited for every error."""
    long = "é" * 30_000
    path, sentence = mismatch_of(of_a({"type": "integer"}), {"a": long}) or ("", "")
    assert (path, sentence) == ("/a", f'"{"é" * 59}…" is not of type "integer"')
    for schema, arguments in [
        ({"additionalProperties": False, "properties": {"a": {}}}, {long: 1}),
        (of_a({"enum": [long]}), {"a": 1}),
        (of_a({"maximum": 1}), f'{{"a": {"9" * 1000}}}'),
    ]:
        _, sentence = mismatch_of(schema, arguments) or ("", "")
        assert 0 < len(sentence) <= MAX_MESSAGE
    assert len(refused(of_a({"type": long}))) < 2 * MAX_MESSAGE


def test_checks_are_cached() -> None:
    """The same text gives the same check without compiling it again."""
    text = json.dumps(of_a({"type": "integer", "title": "kept"}))
    assert argument_check(text) is argument_check(text)
