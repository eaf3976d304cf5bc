"""The schema of a filter, as search tools take it: it refers to itself from every branch of an `anyOf`."""

from __future__ import annotations

from typing import Any

LEAF = {
    "type": "object",
    "properties": {"field": {"type": "string"}, "value": {"type": "string"}},
    "required": ["field", "value"],
}


def filter_schema(leaf: dict[str, Any] = LEAF) -> dict[str, Any]:
    """And, or, xor, not, and one kind of leaf.

    Args:
        leaf: The leaf's schema.
    """
    itself = {"$ref": "#/$defs/filter"}
    lists = [
        {"type": "object", "properties": {name: {"type": "array", "items": itself}}, "required": [name]}
        for name in ("and", "or", "xor")
    ]
    negation = {"type": "object", "properties": {"not": itself}, "required": ["not"]}
    return {"$defs": {"filter": {"anyOf": [*lists, negation, leaf]}}, **itself}


def filters(depth: int, **leaf: object) -> dict[str, Any]:
    """A filter of so many levels, with two branches at each.

    Args:
        depth: Levels above the leaves.
        leaf: Fields of the leaves; by default they follow `LEAF`.
    """
    node: dict[str, Any] = {"field": "a", "value": "x", **leaf}
    for _ in range(depth):
        node = {"and": [node, node]}
    return node
