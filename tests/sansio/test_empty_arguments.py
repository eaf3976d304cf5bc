"""Whether a schema allows a call without arguments."""

from __future__ import annotations

import json

import jsonschema_rs
import pytest

from deltawire_server.sansio.empty_arguments import allows_empty_object

ALLOWED: list[object] = [
    {},
    True,
    {"type": "object"},
    {"type": ["object", "null"]},
    {"type": "object", "properties": {"a": {"type": "string"}}},
    {"required": []},
    {"minProperties": 0},
    {"properties": {"a": {"required": ["b"], "type": "object"}}},
    {"allOf": [{}, {"type": "object"}]},
    {"anyOf": [{"required": ["a"]}, {"properties": {}}]},
    {"oneOf": [{"required": ["a"]}, {}]},
    {"anyOf": [{"type": "null"}, {"type": "object"}]},
    {"const": {}},
    {"enum": [{}, {"a": 1}]},
    {"$ref": "#/$defs/A", "$defs": {"A": {"type": "object"}}},
    {"$ref": "#/$defs/a~1b~0%20c", "$defs": {"a/b~ c": {}}},
    {"$ref": "#/allOf/1", "allOf": [{}, {}]},
    {"properties": {"child": {"$ref": "#"}}},
]
REFUSED: list[object] = [
    False,
    {"required": ["a"]},
    {"minProperties": 1},
    {"type": "string"},
    {"type": ["string", "null"]},
    {"allOf": [{}, {"required": ["a"]}]},
    {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
    {"oneOf": [{"required": ["a"]}, {"type": "array"}]},
    {"const": {"a": 1}},
    {"enum": [{"a": 1}]},
    {"$ref": "#/$defs/A", "$defs": {"A": {"required": ["a"]}}},
    {"allOf": [{"anyOf": [{"allOf": [{"required": ["a"]}]}]}]},
]


@pytest.mark.parametrize(("schema", "allowed"), [*[(one, True) for one in ALLOWED], *[(one, False) for one in REFUSED]])
def test_says_what_a_validator_says(schema: object, allowed: bool) -> None:
    """For the keywords that require something of an object."""
    assert allows_empty_object(json.dumps(schema)) is allowed
    assert jsonschema_rs.validator_for(json.dumps(schema)).is_valid({}) is allowed


def test_without_a_schema_everything_is_allowed() -> None:
    """The empty text stands for a tool without arguments."""
    assert allows_empty_object("")
    assert allows_empty_object(" ")


UNREADABLE = {
    "no JSON": "{",
    "a reference to itself": '{"$ref": "#"}',
    "references in a circle": '{"$ref": "#/a", "a": {"$ref": "#/b"}, "b": {"$ref": "#/a"}}',
    "a reference to nothing": '{"$ref": "#/a"}',
    "a reference to a missing list item": '{"$ref": "#/allOf/x", "allOf": []}',
    "a reference into a text": '{"$ref": "#/type/x", "type": "object"}',
    "a reference to another document": '{"$ref": "https://example.com/s.json"}',
    "a reference to an anchor": '{"$ref": "#a"}',
    "a reference that is no text": '{"$ref": 7}',
    "nested too deeply": '{"allOf":[' * 50_000 + "]}" * 50_000,
    "multiplying": '{"allOf":[{"$ref":"#/$defs/a"},{"$ref":"#/$defs/a"}],"$defs":{"a":{"allOf":['
    + ",".join(['{"$ref":"#/$defs/b"}'] * 100)
    + ']},"b":{"allOf":['
    + ",".join(["{}"] * 100)
    + "]}}}",
}


@pytest.mark.parametrize("schema", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_what_cannot_be_read_to_its_end_allows_nothing(schema: str) -> None:
    """A call with made-up arguments must not look complete, and the work is bounded."""
    assert not allows_empty_object(schema)


def test_numbers_of_any_length_are_read() -> None:
    """Python refuses to read very long integers, which are no reason to fail a call."""
    assert allows_empty_object('{"maxProperties": ' + "9" * 10_000 + "}")
    assert not allows_empty_object('{"minProperties": ' + "9" * 10_000 + "}")
