"""The limits of schemas and checks leave real tools alone, the largest there are."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deltawire_server.schemas import argument_check, compiled_checks
from deltawire_server.schemas.check import MAX_EFFORT
from deltawire_server.upstream.request import CheckBudget
from tests.support.filters import filter_schema


def optional(kind: str) -> dict[str, Any]:
    """A parameter that may be null, as pydantic writes it."""
    return {
        "anyOf": [{"type": kind}, {"type": "null"}],
        "default": None,
        "title": "A title",
        "description": "What it is. " * 5,
    }


def tool(parameters: int) -> dict[str, Any]:
    """The schema of a function with so many parameters."""
    names = [f"parameter_{number}" for number in range(parameters)]
    return {"type": "object", "title": "Arguments", "properties": {name: optional("string") for name in names},
            "required": names[:2], "additionalProperties": False}  # fmt: skip


def address(number: int) -> dict[str, Any]:
    """A definition of an API."""
    return {
        "type": "object",
        "properties": {
            "street": {"type": "string", "minLength": 1, "maxLength": 200},
            "zip": {"type": "string", "pattern": "^[0-9]{5}$"} if number == 0 else {"type": "string", "maxLength": 5},
            "country": {"type": "string", "enum": ["NO", "SE", "DK"]},
            "lines": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
        },
        "required": ["street"],
    }


API = {
    "type": "object",
    "properties": {f"field_{n}": {"$ref": f"#/$defs/d{n % 40}"} if n % 3 else optional("integer") for n in range(300)},
    "$defs": {f"d{n}": address(n) for n in range(40)},
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["name"],
        }
    },
    "$ref": "#/$defs/node",
}
EVENTS = {
    "type": "object",
    "properties": {
        "events": {
            "type": "array",
            "items": {
                "oneOf": [
                    {
                        "type": "object",
                        "properties": {
                            "kind": {"const": f"kind_{n}"},
                            "at": {"type": "string", "format": "date-time"},
                            "count": {"type": "integer", "minimum": 0},
                        },
                        "required": ["kind", "at"],
                    }
                    for n in range(10)
                ]
            },
        }
    },
}
CONDITIONS = {
    "type": "object",
    "properties": {"kind": {"enum": ["card", "bank"]}, "amount": {"type": "number", "multipleOf": 0.01, "minimum": 0}},
    "allOf": [
        {"if": {"properties": {"kind": {"const": kind}}}, "then": {"required": [field]}}
        for kind, field in (("card", "number"), ("bank", "iban"))
    ],
    "unevaluatedProperties": {"type": "string"},
}
FILTER = filter_schema(
    {
        "type": "object",
        "properties": {"field": {"type": "string"}, "op": {"enum": ["=", "<", ">"]}, "value": {}},
        "required": ["field", "op"],
        "additionalProperties": False,
    }
)


def tree(depth: int) -> dict[str, Any]:
    """A tree of 3 branches at each level."""
    return {"name": "n", "children": [tree(depth - 1) for _ in range(3)] if depth else []}


def filters(depth: int) -> dict[str, Any]:
    """A filter with alternatives at each level and as many leaves as a person would never write."""
    leaf = {"field": "a", "op": "=", "value": 1}
    return {"and": [{"not": {"or": [filters(depth - 2), leaf]}}, leaf, leaf]} if depth > 0 else leaf


REAL: dict[str, tuple[Any, Any]] = {
    "many optional parameters": (tool(300), {f"parameter_{n}": "x" for n in range(300)}),
    "an API": (API, {f"field_{n}": {"street": "s", "lines": ["a"]} if n % 3 else 5 for n in range(300)}),
    "a tree": (TREE, tree(6)),
    "a filter": (FILTER, filters(10)),
    "a deep filter": (FILTER, filters(24)),
    "a list of events": (
        EVENTS, {"events": [{"kind": f"kind_{n % 10}", "at": "2026-01-01T00:00:00Z", "count": n} for n in range(100)]},
    ),
    "conditions": (CONDITIONS, {"kind": "card", "amount": 19.99, "number": "4111"}),
    "a large enumeration": (
        {"properties": {"city": {"enum": [f"city number {n}" for n in range(5000)]}}}, {"city": "city number 4999"},
    ),
    "numbers": ({"properties": {"a": {"items": {"type": "number", "maximum": 1}}}}, {"a": [n / 7000 for n in range(7000)]}),
    "a table": (
        {"properties": {"rows": {"items": {"type": "array", "items": {"type": ["string", "number", "null"]}}}}},
        {"rows": [["a", 1.5, None, "text"] for _ in range(2000)]},
    ),
    "a document": (tool(5), {"parameter_0": 'A line of text,\nwith "quotes" [x].\n' * 30_000, "parameter_1": "é" * 300_000}),
    "a name by pattern": (
        {"properties": {"name": {"pattern": "^[a-z][a-z0-9-]{0,62}$"}, "url": {"format": "uri"}}},
        {"name": "a-name", "url": "https://example.org/a?b=c#d"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_real_arguments_pass(name: str) -> None:
    """And several calls in one answer do."""
    schema, arguments = REAL[name]
    made = argument_check(json.dumps(schema))
    budget = CheckBudget(MAX_EFFORT)
    assert made(json.dumps(arguments), budget) is None
    assert budget.left >= MAX_EFFORT // 3, f"took {MAX_EFFORT - budget.left}"


async def test_128_tools_of_30_optional_parameters() -> None:
    """As many as the chat API takes, each larger than usual, in one request; and a call of each in one answer."""
    checks, errors = await compiled_checks({f"t{n}": json.dumps(tool(30) | {"title": f"t{n}"}) for n in range(128)})
    assert not errors
    budget = CheckBudget(MAX_EFFORT)
    for made in checks.values():
        assert made(json.dumps({f"parameter_{n}": "x" for n in range(10)}), budget) is None
