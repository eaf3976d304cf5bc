"""How much work a check may be, counted before it is done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from deltawire_server.schemas.errors import SchemaError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_SAME_VALUE = ("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas", "dependencies")
"""The keywords whose subschemas are tried on the same value."""

_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")

_WITHIN = (
    (("properties", "additionalProperties"), max),
    (("patternProperties", "propertyNames", "unevaluatedProperties"), sum),
    (("prefixItems", "items", "additionalItems"), max),
    (("contains", "unevaluatedItems"), sum),
)
"""The keywords whose subschemas are tried on a value's parts: of the first kind one is on each part, of the second all."""

_UNEVALUATED_FACTOR = 4
"""To find what is left over, the validator tries the neighbouring keywords again: two to three times were measured."""


class Effort:
    """The most subschemas of a schema that may be tried on the parts along one path into a value.

    It is counted as a validator goes that remembers nothing: where two parts refer to the same third, that counts twice.
    """

    def __init__(self, schema: object, nodes: Iterable[dict[str, Any]]) -> None:
        self._root = schema
        self._anchors: dict[str, list[object]] = {}
        self._resources: dict[str, list[object]] = {}
        self._known: dict[tuple[int, int], int] = {}
        self._under_way: set[tuple[int, int]] = set()
        for node in nodes:
            for keyword in ("$anchor", "$dynamicAnchor"):
                if isinstance(name := node.get(keyword), str):
                    self._anchors.setdefault(name, []).append(node)
            for keyword in ("$id", "id"):
                if isinstance(name := node.get(keyword), str):
                    self._resources.setdefault(_last_segment(name), []).append(node)

    def of(self, depth: int) -> int:
        """For values of this depth.

        Raises:
            SchemaError: It cannot be counted.
        """
        effort = 0
        for levels in range(depth + 1):  # in turn, so that what a level within needs is known already
            effort = self._counted(self._root, levels)
        return effort

    def require_ends(self, nodes: Iterable[dict[str, Any]]) -> None:
        """Find references that lead back to where they are without going into the value.

        Raises:
            SchemaError: There is one.
        """
        for node in nodes:
            self._counted(node, 0)

    def _counted(self, node: object, depth: int) -> int:
        try:
            return self._of(node, depth)
        except RecursionError:
            raise SchemaError("refers from part to part too often") from None
        finally:
            self._under_way.clear()

    def _of(self, node: object, depth: int) -> int:
        if not isinstance(node, dict):
            return 1
        key = (id(node), depth)
        if key in self._known:
            return self._known[key]
        if key in self._under_way:
            raise SchemaError("refers to itself without end")
        self._under_way.add(key)
        effort = 1 + sum(self._of(part, depth) for part in self._on_the_same_value(node))
        if depth > 0:
            for keywords, combined in _WITHIN:
                efforts = [self._within(node[keyword], depth - 1, keyword) for keyword in keywords if keyword in node]
                effort += combined(efforts or [0])
        if "unevaluatedProperties" in node or "unevaluatedItems" in node:
            effort *= _UNEVALUATED_FACTOR
        self._under_way.remove(key)
        self._known[key] = effort
        return effort

    def _on_the_same_value(self, node: dict[str, Any]) -> Iterator[object]:
        for keyword in _SAME_VALUE:
            value = node.get(keyword)
            if isinstance(value, list):
                yield from value
            elif keyword in ("dependentSchemas", "dependencies") and isinstance(value, dict):
                yield from value.values()
            elif value is not None:
                yield value
        for keyword in _REFERENCES:
            if isinstance(reference := node.get(keyword), str):
                yield from self._targets(reference)

    def _within(self, value: object, depth: int, keyword: str) -> int:
        if keyword == "properties" and isinstance(value, dict):
            return max((self._of(part, depth) for part in value.values()), default=0)
        if keyword == "patternProperties" and isinstance(value, dict):
            return sum(self._of(part, depth) for part in value.values())
        if isinstance(value, list):
            return max((self._of(part, depth) for part in value), default=0)
        return self._of(value, depth)

    def _targets(self, reference: str) -> Iterator[object]:
        """What a reference may mean. Whether it means anything at all is for the validator to say."""
        document, _, fragment = reference.partition("#")
        named = self._resources.get(_last_segment(document), [])
        for start in (
            named if document else [self._root, *(part for parts in self._resources.values() for part in parts)]
        ):
            if not fragment:
                yield start
                if not document:
                    return
            elif fragment.startswith("/"):
                target = _at(start, fragment)
                if target is not None:
                    yield target
        if fragment and not fragment.startswith("/"):
            yield from self._anchors.get(fragment, [])


def _last_segment(uri: str) -> str:
    return uri.rstrip("#").rsplit("/", 1)[-1]


def _at(value: object, pointer: str) -> object | None:
    """What stands at a JSON Pointer in a URI's fragment."""
    for step in unquote(pointer).split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(value, dict):
            value = value.get(name)
        elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            return None
    return value
