"""Schemas of tools and what is checked against them."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from deltawire.v1 import chat_completion_pb2 as chat_pb
from tests.faults import script
from tests.hostile.attack import Attack, Prepared
from tests.hostile.attacks.building import answered, checked, stream
from tests.support.filters import filter_schema, filters
from tests.support.gateway import tool

_ANSWERED = frozenset({"OK", "INVALID_ARGUMENT"})


def chain(length: int, last: dict[str, Any], reference: str = "#/$defs/d{}", **extra: str) -> dict[str, Any]:
    """A chain of definitions, each `anyOf` of two references to the next; the last one is given."""
    definitions: dict[str, Any] = {}
    for number in range(length):
        following = {"$ref": reference.format(number + 1)}
        definitions[f"d{number}"] = {"anyOf": [following, following]}
        if extra:
            definitions[f"d{number}"] |= {name: value.format(number) for name, value in extra.items()}
    definitions[f"d{length}"] = last | {name: value.format(length) for name, value in extra.items()}
    return {"$ref": reference.format(0), "$defs": definitions}


NEVER = {"required": ["nope"]}


def _wrong(depth: int) -> str:
    return json.dumps(filters(depth, value=[]))


def _alternatives(value: object) -> Prepared:
    alternatives = [
        {"type": "object", "required": [f"k{number}"], "properties": {f"k{number}": {"type": "integer"}}}
        for number in range(900)
    ]
    schema = {"type": "object", "properties": {"a": {"oneOf": alternatives}}}
    return checked(schema, json.dumps({"a": value}))


def _chained(length: int) -> Prepared:
    return checked(chain(length, NEVER), "{}")


DRAFT_7 = {"$schema": "http://json-schema.org/draft-07/schema#"}


def old_chain(length: int) -> dict[str, Any]:
    """A chain through anchors of draft-07."""
    schema = DRAFT_7 | chain(length, NEVER, "#a{}", **{"$id": "#a{}"})
    return {"definitions": schema.pop("$defs")} | schema


def calls(schema: object, arguments: str, count: int) -> Prepared:
    """A completion whose one tool is called so often, each time with these arguments."""

    def events() -> list[bytes]:
        made = [script.call(number, arguments, call_id=f"call_{number}", name="get_weather") for number in range(count)]
        return script.events_of([script.ROLE, *made, script.FINISH, script.USAGE])

    return answered(
        events,
        tools=[tool(input_schema=json.dumps(schema))],
        tool_call_policy=chat_pb.ToolCallPolicy(validate_schema=True),
    )


def many_tools(count: int, schema: object) -> Prepared:
    """A request with so many tools, whose schemas differ in their titles."""
    return stream(
        tools=[tool(f"t{n}", input_schema=json.dumps({"title": f"{n}", "allOf": [schema]})) for n in range(count)],
        tool_call_policy=chat_pb.ToolCallPolicy(validate_schema=True),
    )


_EMPTY_ARRAYS = '{"a":[' + "[]," * 1_350_000 + "[]]}"

COSTLY: dict[str, tuple[object, object]] = {
    "an `enum` of 500 fractions and 1,000 values": (
        {"properties": {"a": {"items": {"enum": [n + 0.5 for n in range(500)]}}}},
        {"a": [499.5] * 1000},
    ),
    "a `const` of 1,000 values and 1,000 of those": (
        {"properties": {"a": {"items": {"const": [0] * 1000}}}},
        {"a": [[0] * 1000] * 50},
    ),
    "`uniqueItems` of 20,000 objects": (
        {"properties": {"a": {"uniqueItems": True}}},
        {"a": [{"b": n} for n in range(20_000)]},
    ),
    "a pattern with very many states and 1 MB": (
        {"properties": {"a": {"pattern": "[ab]*a[ab]{12}c"}}},
        {"a": "abaabbab" * 125_000},
    ),
    "`multipleOf` and 1,000 numbers of 900 digits": (
        {"properties": {"a": {"items": {"multipleOf": 0.01}}}},
        {"a": [int("1" * 900)] * 1000},
    ),
    "`format` of a text of 1 MB": (
        {"properties": {"a": {"anyOf": [{"format": "idn-hostname"}, {"format": "idn-email"}]}}},
        {"a": "é" * 500_000},
    ),
    "20 alternatives and a list of 5,000": (
        {"anyOf": [{"additionalProperties": False, "properties": {"a": {}}}] * 20},
        {f"a{n}": 1 for n in range(5000)},
    ),
}
"""Keywords that take much for each value."""

SCHEMAS = (
    *(
        Attack(
            f"a chain of {length} definitions, each `anyOf` of two references to the next",
            "schemas",
            partial(_chained, length),
            _ANSWERED,
        )
        for length in (12, 14, 17, 23, 28)
    ),
    Attack(
        "a filter of depth 6 with one wrong leaf", "schemas", lambda: checked(filter_schema(), _wrong(6)), _ANSWERED
    ),
    Attack(
        "a filter of depth 12 with wrong leaves", "schemas", lambda: checked(filter_schema(), _wrong(12)), _ANSWERED
    ),
    Attack("a chain of 14 through anchors of draft-07", "schemas", lambda: checked(old_chain(14), "{}"), _ANSWERED),
    Attack("a chain of 28 through anchors of draft-07", "schemas", lambda: checked(old_chain(28), "{}"), _ANSWERED),
    Attack(
        "a chain of 28 through addresses with a host in capitals",
        "schemas",
        lambda: checked(chain(28, NEVER, "http://X/d{}", **{"$id": "http://x/d{}"}), "{}"),
        _ANSWERED,
    ),
    Attack(
        "a reference with an index of 5,000 digits",
        "schemas",
        lambda: checked({"allOf": [{"$ref": "#/allOf/" + "9" * 5000}]}, "{}"),
        frozenset({"INVALID_ARGUMENT"}),
    ),
    Attack(
        "8,000 empty subschemas and arguments 91 deep",
        "schemas",
        lambda: checked({"anyOf": [{}] * 8000}, '{"a":' * 91 + "1" + "}" * 91),
        _ANSWERED,
    ),
    Attack(
        "3,900 references and arguments 91 deep",
        "schemas",
        lambda: checked(
            {"anyOf": [{"$ref": "#/$defs/x"}] * 3900, "$defs": {"x": {"type": "string"}}},
            '{"a":' * 91 + "1" + "}" * 91,
        ),
        _ANSWERED,
    ),
    Attack(
        "2,900 `$id`s and 1,000 references",
        "schemas",
        lambda: checked(
            {
                "$defs": {f"d{n}": {"$id": f"http://x/{n}"} for n in range(2900)},
                "anyOf": [{"$ref": f"http://x/{n}"} for n in range(1000)],
            },
            "{}",
        ),
        _ANSWERED,
    ),
    Attack(
        "128 tools of 150 subschemas each",
        "schemas",
        lambda: many_tools(128, {"properties": {f"p{n}": {"not": {"type": "null"}} for n in range(75)}}),
        frozenset({"INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION"}),
    ),
    Attack(
        "40 tools of 1,200 wrong subschemas each",
        "schemas",
        lambda: many_tools(40, {"anyOf": [{"type": "strin"}] * 1200}),
        frozenset({"INVALID_ARGUMENT"}),
    ),
    *(
        Attack(name, "schemas", partial(checked, schema, json.dumps(arguments)), _ANSWERED)
        for name, (schema, arguments) in COSTLY.items()
    ),
    Attack(
        "arguments of 4 MB of empty arrays", "schemas", lambda: checked({"required": ["b"]}, _EMPTY_ARRAYS), _ANSWERED
    ),
    Attack(
        "arguments of 4 MB of empty arrays that are not JSON",
        "schemas",
        lambda: checked({"required": ["b"]}, _EMPTY_ARRAYS[:-1]),
        _ANSWERED,
    ),
    Attack("128 calls with a failed chain of 14", "schemas", lambda: calls(chain(14, NEVER), "{}", 128), _ANSWERED),
    Attack("900 alternatives and an array of 20,000", "schemas", lambda: _alternatives([1] * 20_000), _ANSWERED),
    Attack(
        "900 alternatives and an object of 8,000 fields",
        "schemas",
        lambda: _alternatives({f"x{number}": 1 for number in range(8000)}),
        _ANSWERED,
    ),
    Attack("128 calls with a filter of depth 6", "schemas", lambda: calls(filter_schema(), _wrong(6), 128), _ANSWERED),
)
