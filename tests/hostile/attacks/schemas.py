"""Schemas of tools and what is checked against them."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from tests.hostile.attack import Attack, Prepared
from tests.hostile.attacks.building import checked

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


def filters(depth: int) -> str:
    """Arguments of the filter schema whose one leaf is wrong."""
    value: dict[str, Any] = {"field": "a", "value": []}
    for _ in range(depth):
        value = {"and": [value, value]}
    return json.dumps(value)


FILTER = {
    "type": "object",
    "$defs": {
        "filter": {
            "anyOf": [
                *(
                    {
                        "type": "object",
                        "properties": {name: {"type": "array", "items": {"$ref": "#/$defs/filter"}}},
                        "required": [name],
                    }
                    for name in ("and", "or", "xor")
                ),
                {"type": "object", "properties": {"not": {"$ref": "#/$defs/filter"}}, "required": ["not"]},
                {
                    "type": "object",
                    "properties": {"field": {"type": "string"}, "value": {"type": "string"}},
                    "required": ["field", "value"],
                },
            ]
        }
    },
    "$ref": "#/$defs/filter",
}
"""What search tools take: and, or, xor, not, and one kind of leaf."""

NEVER = {"required": ["nope"]}


def _chained(length: int) -> Prepared:
    return checked(chain(length, NEVER), "{}")


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
    Attack("a filter of depth 6 with one wrong leaf", "schemas", lambda: checked(FILTER, filters(6)), _ANSWERED),
    Attack(
        "a chain of 28 through anchors of draft-07",
        "schemas",
        lambda: checked(
            {"$schema": "http://json-schema.org/draft-07/schema#", **chain(28, NEVER, "#a{}", **{"$id": "#a{}"})}, "{}"
        ),
        _ANSWERED,
    ),
    Attack(
        "8,000 empty subschemas and arguments 91 deep",
        "schemas",
        lambda: checked({"anyOf": [{}] * 8000}, '{"a":' * 91 + "1" + "}" * 91),
        _ANSWERED,
    ),
)
