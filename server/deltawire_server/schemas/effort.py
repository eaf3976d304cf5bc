"""Estimates the work of a check before it runs.

**Units.** One unit is about 20 ns: the time in which the validator applies an empty subschema. The weights below are measured.

**Two methods.** `Effort.bound` multiplies the maximum work along one path into a value by the number of values. It takes no time,
but it does not apply to recursive schemas, and it is far too high for schemas with many alternatives. `Effort.count` traverses
the arguments like the validator and caches the work of each pair of a subschema and a value, so it takes one step per pair, even
if the validator visits a pair more often.

Neither considers that the validator may stop early, so both are upper limits.
"""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

from deltawire_server.schemas.errors import SchemaError
from deltawire_server.schemas.references import References

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

MAX_CHAIN = 1000
"""Limit for the nested or referenced subschemas along one path, because the validator is recursive."""

MAX_EDGES = 20_000
"""Limit for the pairs of subschemas of which one contains or references the other; an anchor may have several targets."""

_SAME_VALUE = frozenset(("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas", "dependencies"))
"""The keywords whose subschemas apply to the same value."""

_REFERENCES = frozenset(("$ref", "$dynamicRef", "$recursiveRef"))

_UNEVALUATED_FACTOR = 4
"""The validator applies the adjacent keywords again to find unevaluated parts: measured two to three times."""

_COMPARED_FRACTION = 100  # 2 us
_COMPARED = 10
"""For the comparison of a value with each value of an enumeration that does not consist of texts only."""

BYTES = 16
"""The number of bytes that the weights of texts refer to."""

_PATTERN_BYTES_WEIGHT = 12 * BYTES  # 240 ns per byte, for a pattern with too many states for a DFA
_FORMAT_BYTES_WEIGHT = 2 * BYTES  # idn-hostname; and JSON in a text
_LENGTH_BYTES_WEIGHT = 1  # counting characters, hashing

_BYTES_WEIGHTS = {
    "pattern": _PATTERN_BYTES_WEIGHT,
    **dict.fromkeys(("format", "contentMediaType", "contentEncoding"), _FORMAT_BYTES_WEIGHT),
    **dict.fromkeys(("minLength", "maxLength", "uniqueItems", "enum", "const"), _LENGTH_BYTES_WEIGHT),
}

_UNIQUE_WEIGHT = 100  # per value in an array of up to 15 items, which are compared pairwise
_DIVISION_WEIGHT = 150
_LONG_DIVISION_WEIGHT = 20_000  # by a number of hundreds of digits

_HEAVY_KEYWORDS = frozenset(
    (
        *_BYTES_WEIGHTS, "dependentRequired", "dependentSchemas", "dependencies", "patternProperties", "multipleOf", "divisibleBy",
        "required",
    )
)  # fmt: skip
"""The keywords whose weight is not one unit."""

_OF_PARTS = frozenset(
    (
        "properties", "patternProperties", "additionalProperties", "propertyNames", "unevaluatedProperties",
        "prefixItems", "items", "additionalItems", "contains", "unevaluatedItems",
    )
)  # fmt: skip
"""The keywords whose subschemas apply to parts of the value."""

_PATH_KEYWORDS = _SAME_VALUE | _REFERENCES | _OF_PARTS
"""The keywords with subschemas."""


class TooMuchError(Exception):
    """Counting exceeds the limit for steps, or the result exceeds the limit for units.

    Attributes:
        steps: The number of steps.
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps


class Counted(NamedTuple):
    """The work of a check.

    Attributes:
        effort: The units.
        steps: The number of steps of counting.
        explanation: If requested, the size of the largest possible list of errors, in units times values: if an `anyOf` or
            `oneOf` fails, the validator keeps all errors of all branches, each with a copy of its value.
    """

    effort: int
    steps: int
    explanation: int


class _Node:
    """The cost of a subschema. One without subschemas is a leaf; equal leaves are shared."""

    __slots__ = (
        "additional", "alternatives", "bound", "bytes_bound", "bytes_weight", "contains", "every", "factor", "has_parts",
        "inner", "is_leaf", "items", "names", "patterns", "prefix", "properties", "same", "unique", "weight",
    )  # fmt: skip

    def __init__(self, weight: int, bytes_weight: int, *, is_leaf: bool = False) -> None:
        self.is_leaf = is_leaf
        self.has_parts = False  # whether a subschema applies to a part of the value
        self.weight = weight
        self.bytes_weight = bytes_weight
        self.bound = weight
        self.bytes_bound = bytes_weight
        self.factor = 1
        self.unique = False
        self.alternatives = False
        self.same: list[_Node] = []  # applied to the same value; leaves are included in the weight instead
        self.properties: dict[str, _Node] = {}
        self.patterns = 0  # regular expressions applied to each name
        self.every: list[_Node] = []  # applied to each value of an object
        self.additional: _Node | None = None  # applied to values without an entry in `properties`
        self.names: _Node | None = None
        self.prefix: list[_Node] = []
        self.items: _Node | None = None  # applied to the items after the prefix
        self.contains: list[_Node] = []  # applied to each item
        self.inner: list[_Node] = []  # all of these that are not leaves


class Effort:
    """Estimates the work of checks against one schema.

    Args:
        schema: The whole schema, parsed. Numbers with a fraction are `float`.

    Raises:
        SchemaError: The schema has infinite recursion, too long a chain of references, or an unsupported reference.

    Attributes:
        patterns: Number of its regular expressions.
        bound: Units per value; `None` for a recursive schema.
        least: The same, with only one level of recursion.
        bytes_bound: Units per `BYTES` bytes of the arguments; valid if `bound` is not `None`.
        has_alternatives: Whether it has `anyOf` or `oneOf`.
    """

    def __init__(self, schema: object) -> None:
        self._references = References(schema)
        self.patterns = self._references.patterns
        self._leaves: dict[tuple[int, int], _Node] = {}
        self._nodes: dict[int, _Node] = {}
        self._waiting: list[tuple[_Node, dict[str, Any]]] = []
        self._edges = 0
        self._root = self._node(schema)
        while self._waiting:
            self._fill(*self._waiting.pop())
        nodes = list(self._nodes.values())
        _, endless = _inside_out(nodes, lambda node: node.same)
        if endless:
            raise SchemaError("refers to itself without end")
        order, recursive = _inside_out(nodes, lambda node: node.inner)
        for node in order:
            _bound(node)
        self.least = self._root.bound
        self.bound = None if recursive else self._root.bound
        self.bytes_bound = self._root.bytes_bound
        self.has_alternatives = any(node.alternatives for node in nodes)
        # The rest has no part of the schema except the names of properties.
        del self._references, self._leaves, self._nodes, self._waiting

    def count(self, value: object, most_steps: int, most: int, *, explained: bool = False) -> Counted:
        """Count the work of a check.

        Args:
            value: The arguments, parsed.
            most_steps: Limit for the pairs of a subschema and a value; each takes about 1 us.
            most: Limit for the units.
            explained: Whether to estimate the list of errors too.

        Raises:
            TooMuchError: A limit is exceeded.
        """
        counter = _Counter(most_steps, most, explained=explained)
        try:
            effort = counter.count(self._root, value)
        except RecursionError:
            raise TooMuchError(counter.steps) from None
        return Counted(effort, counter.steps, counter.explanation)

    def _node(self, schema: object) -> _Node:
        if not isinstance(schema, dict):
            return _ANY
        if _PATH_KEYWORDS.isdisjoint(schema) and "uniqueItems" not in schema:
            weights = _weights(schema)
            return self._leaves.get(weights) or self._leaves.setdefault(weights, _Node(*weights, is_leaf=True))
        node = self._nodes.get(id(schema))
        if node is None:
            node = self._nodes[id(schema)] = _Node(*_weights(schema))
            node.unique = schema.get("uniqueItems") is True
            self._waiting.append((node, schema))
        return node

    def _part(self, of: _Node, schema: object) -> _Node:
        """A subschema within another."""
        self._edges += 1
        if self._edges > MAX_EDGES:
            raise SchemaError("has too many references to anchors of the same name")
        node = self._node(schema)
        if not node.is_leaf:
            of.inner.append(node)
        return node

    def _fill(self, node: _Node, schema: dict[str, Any]) -> None:
        for keyword, value in schema.items():
            if keyword in _SAME_VALUE:
                for part in _listed(value, named=keyword.startswith("dependen")):
                    self._add_same(node, part)
                node.alternatives |= keyword in ("anyOf", "oneOf")
            elif keyword in _REFERENCES and isinstance(value, str):
                for part in self._references.targets(value):
                    self._add_same(node, part)
            elif keyword in _OF_PARTS:
                node.has_parts = True
                self._fill_parts(node, keyword, value)
        if "unevaluatedProperties" in schema or "unevaluatedItems" in schema:
            node.factor = _UNEVALUATED_FACTOR

    def _fill_parts(self, node: _Node, keyword: str, value: object) -> None:
        match keyword, value:
            case "properties", dict():
                node.properties = {name: self._part(node, part) for name, part in value.items()}
            case "patternProperties", dict():
                node.patterns = len(value)
                node.every.extend([self._part(node, part) for part in value.values()])
            case "properties" | "patternProperties", _:
                pass  # invalid, which the validator reports
            case "unevaluatedProperties", _:
                node.every.append(self._part(node, value))
            case "additionalProperties", _:
                node.additional = self._part(node, value)
            case "propertyNames", _:
                node.names = self._part(node, value)
            case "contains" | "unevaluatedItems", _:
                node.contains.append(self._part(node, value))
            case _, list():
                node.prefix.extend([self._part(node, part) for part in value])
            case _:
                node.items = self._part(node, value)

    def _add_same(self, node: _Node, schema: object) -> None:
        part = self._part(node, schema)
        if part.is_leaf:
            node.weight += part.weight
            node.bytes_weight += part.bytes_weight
        else:
            node.same.append(part)


_LOOKS_PER_STEP = 8
"""Number of parts of a value that are iterated over in the time of one step."""


class _Counter:
    """Counts the work of the check of one value."""

    def __init__(self, most_steps: int, most: int, *, explained: bool) -> None:
        self.steps = 0
        self._explained = explained
        self.explanation = 0
        self._most_steps = most_steps
        self._most = most
        self._known: dict[tuple[int, int], int] = {}
        self._sizes: dict[int, int] = {}
        self._lengths: dict[int, int] = {}

    def count(self, node: _Node, value: object) -> int:
        """The units for applying a subschema to a value."""
        self.steps += 1
        key = (id(node), id(value))
        if key in self._known:
            return self._known[key]
        effort = node.weight
        for part in node.same:
            effort += self.count(part, value)
        if isinstance(value, dict):
            effort += self._of_object(node, value)
        elif isinstance(value, list):
            effort += self._of_array(node, value)
        elif isinstance(value, str):
            effort += node.bytes_weight * (len(value) if value.isascii() else 4 * len(value)) // BYTES
        elif isinstance(value, Decimal):
            length = self._lengths.get(id(value))
            if length is None:
                length = self._lengths[id(value)] = length_of_number(value)
            effort += node.weight * length
        else:
            effort += node.weight * length_of_number(value)
        effort *= node.factor
        if self.steps > self._most_steps or effort > self._most:
            raise TooMuchError(self.steps)
        if node.alternatives and self._explained:
            self.explanation = max(self.explanation, effort * (3 + self._size(value)))
        self._known[key] = effort
        return effort

    def _of_object(self, node: _Node, value: dict[str, Any]) -> int:
        effort = len(value)
        if len(node.properties) < len(value):
            own = [(part, value[name]) for name, part in node.properties.items() if name in value]
        else:
            own = [(node.properties[name], part) for name, part in value.items() if name in node.properties]
        self._look_at(min(len(node.properties), len(value)))
        for property_node, part in own:
            effort += self.count(property_node, part)
        if node.every or node.additional is not None or node.names is not None or node.patterns:
            self._look_at(len(value))
            for name, part in value.items():
                if node.additional is not None:
                    effort += self.count(node.additional, part)
                for every in node.every:
                    effort += self.count(every, part)
                if node.names is not None:
                    effort += self.count(node.names, name)
                if node.patterns:
                    effort += node.patterns * (1 + _PATTERN_BYTES_WEIGHT * 4 * len(name) // BYTES)
        return effort

    def _of_array(self, node: _Node, value: list[Any]) -> int:
        effort = len(value)
        for prefix, part in zip(node.prefix, value, strict=False):
            effort += self.count(prefix, part)
        rest = node.contains if node.items is None else [node.items, *node.contains]
        if rest:
            self._look_at(len(value))
        for each in rest:
            for part in value if each is not node.items else value[len(node.prefix) :]:
                effort += self.count(each, part)
        if node.unique:
            effort += _UNIQUE_WEIGHT * self._size(value)
        return effort

    def _look_at(self, number: int) -> None:
        """Add steps for the iteration over parts of a value, which takes time even if no subschema applies to them."""
        self.steps += number // _LOOKS_PER_STEP
        if self.steps > self._most_steps:
            raise TooMuchError(self.steps)

    def _size(self, value: object) -> int:
        """Number of values; each KiB of text counts as one more."""
        if isinstance(value, str):
            return 1 + len(value) // 1024
        if not isinstance(value, dict | list):
            return 1
        size = self._sizes.get(id(value))
        if size is None:
            self._look_at(len(value))
            size = 1 + sum(map(self._size, value.values() if isinstance(value, dict) else value))
            self._sizes[id(value)] = size
        return size


def length_of_number(value: object) -> int:
    """The additional work of a long number, as a multiple of that of a short one, each time a subschema is applied."""
    if isinstance(value, Decimal):
        return (len(value.as_tuple().digits) + abs(value.adjusted())) // 8
    return value.bit_length() // 32 if isinstance(value, int) else 0


def _listed(value: object, *, named: bool) -> Iterable[object]:
    """The subschemas of a keyword: one, a list of them, or one for each name."""
    if isinstance(value, list):
        return value
    return value.values() if named and isinstance(value, dict) else (value,)


def _weights(schema: dict[str, Any]) -> tuple[int, int]:
    """The units for applying a subschema without its parts: to any value, and per `BYTES` bytes of a text."""
    weight = 1 + len(schema)
    bytes_weight = 0
    if _HEAVY_KEYWORDS.isdisjoint(schema):
        return weight, bytes_weight
    for keyword, value in schema.items():
        bytes_weight += _BYTES_WEIGHTS.get(keyword, 0)
        if keyword in ("enum", "const"):
            weight += _comparison(value)
        elif keyword in ("dependentRequired", "dependentSchemas", "dependencies") and isinstance(value, dict):
            weight += len(value)
        elif keyword == "patternProperties" and isinstance(value, dict):
            weight += len(value)
            bytes_weight += _PATTERN_BYTES_WEIGHT * len(value)
        elif keyword == "uniqueItems":
            weight += _UNIQUE_WEIGHT
        elif keyword in ("multipleOf", "divisibleBy") and isinstance(value, int | float):
            weight += _DIVISION_WEIGHT if 1e-15 < abs(value) < 1e15 else _LONG_DIVISION_WEIGHT
        elif keyword == "required":
            weight += 3
    return weight, bytes_weight


def _comparison(value: object) -> int:
    """The units for comparing with a value or each value of a list; 1 for texts only, which are hashed."""
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(part, str) for part in value)):
        return 1
    weight = 0
    waiting = [value]
    while waiting:
        part = waiting.pop()
        weight += _COMPARED_FRACTION if isinstance(part, float) else _COMPARED
        if isinstance(part, dict | list):
            waiting.extend(part.values() if isinstance(part, dict) else part)
    return weight


def _inside_out(nodes: list[_Node], parts: Callable[[_Node], list[_Node]]) -> tuple[list[_Node], bool]:
    """The nodes in topological order, parts first, and whether there is a cycle.

    Raises:
        SchemaError: A path is too long.
    """
    # Most nodes have no parts and need no search.
    order = [node for node in nodes if not parts(node)]
    seen = set(order)
    path = dict[_Node, Iterator[_Node]]()
    cyclic = False
    for first in nodes:
        if first in seen:
            continue
        seen.add(first)
        path[first] = iter(parts(first))
        while path:
            above = next(reversed(path))
            for node in path[above]:
                if node in path:
                    cyclic = True
                elif node not in seen:
                    seen.add(node)
                    path[node] = iter(parts(node))
                    if len(path) > MAX_CHAIN:
                        raise SchemaError("refers from part to part too often")
                    break
            else:
                del path[above]
                order.append(above)
    return order, cyclic


def _bound(node: _Node) -> None:
    """Set the maximum work along one path into a value from that of the parts. A part without it counts with its own weight."""
    bound, bytes_bound = node.weight, node.bytes_weight
    every: Iterable[_Node] = node.same
    if node.has_parts:
        every = [*node.same, *node.every, *node.contains, *([] if node.names is None else [node.names])]
        for either, other in ((node.properties.values(), node.additional), (node.prefix, node.items)):
            parts = [*either, other or _NOTHING]
            bound += max([part.bound for part in parts])
            bytes_bound += max([part.bytes_bound for part in parts])
    for part in every:
        bound += part.bound
        bytes_bound += part.bytes_bound
    node.bound = bound * node.factor
    node.bytes_bound = bytes_bound * node.factor


_NOTHING = _Node(0, 0, is_leaf=True)
_ANY = _Node(1, 0, is_leaf=True)
