"""Whether a tool's JSON Schema allows a call without arguments, which is treated as an empty object."""

from __future__ import annotations

import json
from urllib.parse import unquote

MAX_NODES = 1000
"""Limit for the subschemas visited. Only those for the same value are visited, of which real schemas have few."""


def allows_empty_object(schema_text: str) -> bool:
    """Whether a schema allows `{}`, according to the keywords that this function evaluates.

    These are the keywords that require something of an object, also within `allOf`, `anyOf`, `oneOf` and local references; all
    others are ignored. The work is linear in the text, plus at most `MAX_NODES` subschemas.

    Args:
        schema_text: JSON text; empty for no schema.

    Returns:
        False also if the schema cannot be evaluated: a call without arguments must not succeed then.
    """
    if not schema_text.strip():
        return True
    try:
        # As floats, because numbers are only compared with 0 and Python rejects very long integers.
        return _Evaluation(json.loads(schema_text, parse_int=float)).allows()
    except (ValueError, LookupError, RecursionError):
        return False


class _Evaluation:
    """One evaluation of a schema."""

    def __init__(self, root: object) -> None:
        self._root = root
        self._nodes = 0

    def allows(self) -> bool:
        return self._allows(self._root)

    def _allows(self, schema: object) -> bool:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise ValueError("the schema has too many parts")
        if not isinstance(schema, dict):
            return schema is not False
        minimum = schema.get("minProperties")
        kind = schema.get("type", "object")
        return (
            not schema.get("required")
            and not (isinstance(minimum, float) and minimum > 0)
            and "object" in (kind if isinstance(kind, list) else [kind])
            and ("const" not in schema or schema["const"] == {})
            and ("enum" not in schema or {} in _items(schema, "enum"))
            and all(self._allows(part) for part in _items(schema, "allOf"))
            and all(
                any(self._allows(part) for part in _items(schema, keyword))
                for keyword in ("anyOf", "oneOf")
                if _items(schema, keyword)
            )
            and ("$ref" not in schema or self._allows(self._find(schema["$ref"])))
        )

    def _find(self, reference: object) -> object:
        """The subschema for a JSON Pointer in a fragment."""
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise ValueError("the reference leads out of the schema, or to an anchor")
        node = self._root
        for step in unquote(reference).split("/")[1:]:
            key = step.replace("~1", "/").replace("~0", "~")
            if isinstance(node, list):
                node = node[int(key)]
            elif isinstance(node, dict):
                node = node[key]
            else:
                raise ValueError("the reference leads into something without parts")
        return node


def _items(schema: dict[str, object], keyword: str) -> list[object]:
    """The items of a keyword whose value is a list."""
    parts = schema.get(keyword)
    return parts if isinstance(parts, list) else []
