"""Whether a tool call's arguments follow the tool's JSON Schema.

Both sides are hostile: the schema comes from a caller, the arguments from a model, and the check runs where every other
call waits for it. So nothing outside of the schema is ever read, patterns run on an engine without backtracking, and what
would take too long or nest too deeply is refused instead of tried: the schema with `SchemaError`, the arguments with a
sentence like any other that they do not follow it.

The draft is the one that `$schema` names, 2020-12 if it names none. Formats are checked, unknown ones pass.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import jsonschema_rs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from deltawire_server.upstream.request import ArgumentCheck

MAX_SCHEMA_BYTES = 256 * 1024
"""Of one schema's text. The largest that tools have in earnest, made from whole API descriptions, are a quarter of it."""

MAX_DEPTH = 100
"""Objects and arrays within each other, in a schema and in arguments; the validator goes down by recursion."""

MAX_NUMBER_LENGTH = 1000
"""Characters of one number in the arguments. Reading a number takes time by the square of its length."""

MAX_PATTERNS = 32
"""Of one schema. Each costs up to half a millisecond and `_PATTERN_BYTES` once."""

MAX_EFFORT = 50_000_000
"""How often a subschema may be tried on a value; what takes about half a second. Schemas that refer to one another, or demand
that nothing else be there, can multiply at every level."""

MAX_MESSAGE = 300
"""Characters of a sentence. It is for people, and for models to correct themselves by."""

_PATTERN_BYTES = 250_000
_SHOWN = 60  # characters of a value in a sentence
_USUAL_DEPTH = 4  # of arguments; a schema that is too much work for these is refused at once
_CACHED = 64
_VALUE = "\ufffc"  # stands for the value in the validator's sentences, which would repeat all of it


class SchemaError(ValueError):
    """A text is no schema that arguments can be held to; the message says why, and where if that is known."""


def argument_check(schema_text: str) -> ArgumentCheck:
    """Make the check for a tool's arguments. The last ones made are kept, since the same tools come with every request.

    Args:
        schema_text: The JSON text of an object.

    Returns:
        To be called with the JSON text of an object.

    Raises:
        SchemaError: It is no schema, is too large or too much work, or refers to what is not in it.
    """
    if len(schema_text) > MAX_SCHEMA_BYTES or len(schema_text.encode("utf-8", "surrogatepass")) > MAX_SCHEMA_BYTES:
        raise SchemaError(f"is larger than {MAX_SCHEMA_BYTES} bytes")
    return _compiled(schema_text)


@functools.lru_cache(maxsize=_CACHED)
def _compiled(schema_text: str) -> ArgumentCheck:
    depth, _ = _shape(schema_text)
    if depth > MAX_DEPTH:
        raise SchemaError(f"is nested more than {MAX_DEPTH} levels deep")
    try:
        # Numbers are not looked at here, and Python's may be too small for them.
        schema = json.loads(schema_text, parse_int=_ignored, parse_float=_ignored)
    except json.JSONDecodeError as error:
        raise SchemaError(f"is not JSON: {error.msg}") from None
    nodes = list(_nodes(schema))
    patterns = sum(_patterns(node) for node in nodes)
    if patterns > MAX_PATTERNS:
        raise SchemaError(f"has {patterns} patterns; at most {MAX_PATTERNS} are allowed")
    effort = _Effort(schema, nodes)
    effort.require_ends(nodes)
    if effort.of(_USUAL_DEPTH) > MAX_EFFORT:
        raise SchemaError("is too much work to check: its parts refer to one another again and again")
    try:
        validator = jsonschema_rs.validator_for(
            schema_text,
            validate_formats=True,
            mask=_VALUE,
            # Neither over HTTP nor from files: a reference would make the gateway read for the caller.
            offline=True,
            # Takes time by the length of pattern and text only. The price: look-around and back-references are refused.
            # The other engine's limit of steps is no bound on time, since one step may read the whole text.
            pattern_options=jsonschema_rs.RegexOptions(size_limit=_PATTERN_BYTES, dfa_size_limit=_PATTERN_BYTES),
        )
    except jsonschema_rs.ValidationError as error:
        raise SchemaError(_schema_sentence(error)) from None
    except ValueError as error:
        raise SchemaError(_shorten(f"is not JSON: {error}")) from None
    return _Check(validator, effort)


class _Check:
    """The check of one schema; an `ArgumentCheck`."""

    def __init__(self, validator: jsonschema_rs.Validator, effort: _Effort) -> None:
        self._validator = validator
        self._effort = effort

    def __call__(self, arguments: str) -> tuple[str, str] | None:
        depth, values = _shape(arguments)
        if depth > MAX_DEPTH:
            return "", f"the arguments are nested more than {MAX_DEPTH} levels deep"
        try:
            too_much = self._effort.of(depth) * values > MAX_EFFORT
        except SchemaError:
            too_much = True
        if too_much:
            return "", "the arguments are too much work to check against the tool's schema"
        try:
            value = json.loads(
                arguments, parse_int=_integer, parse_float=_number, object_pairs_hook=_object_without_repeats
            )
            self._validator.validate(value)
        except _UnusableError as error:
            return "", _shorten(str(error))
        except jsonschema_rs.ValidationError as error:
            return _pointer(error.instance_path), _sentence(error)
        except UnicodeEncodeError:
            return "", "the arguments have half of a surrogate pair, which is no character"
        return None


class _UnusableError(Exception):
    """The arguments cannot be checked; the message is the sentence to tell."""


def _ignored(_: str) -> int:
    return 0


def _integer(text: str) -> int:
    if len(text) > MAX_NUMBER_LENGTH:
        raise _UnusableError(f"a number has more than {MAX_NUMBER_LENGTH} digits")
    return int(text)


def _number(text: str) -> Decimal:
    """As it is written: a float would make an infinity of 1e400, and 0.1 of 0.10000000000000000001."""
    if len(text) > MAX_NUMBER_LENGTH:
        raise _UnusableError(f"a number has more than {MAX_NUMBER_LENGTH} digits")
    try:
        return Decimal(text)
    except InvalidOperation:
        raise _UnusableError(f"the number {_cut(text)} is out of every range") from None


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Parsers differ in which of several equal keys wins, so one of them would read what was not checked."""
    value = dict(pairs)
    if len(value) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise _UnusableError(f"the key {_shown(key)} comes twice in one object")
    return value


_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[{]|[\]}]|,', re.DOTALL)


def _shape(text: str) -> tuple[int, int]:
    """How many objects and arrays of a JSON text stand within each other, and about how many values there are."""
    depth = deepest = 0
    values = 1
    for token in _TOKEN.finditer(text):
        match text[token.start()]:
            case "[" | "{":
                depth += 1
                values += 1
                deepest = max(deepest, depth)
            case "]" | "}":
                depth -= 1
            case ",":
                values += 1
    return deepest, values


def _nodes(schema: object) -> Iterator[dict[str, Any]]:
    """All objects within a schema, itself included."""
    waiting = [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
            waiting.extend(node.values())
        elif isinstance(node, list):
            waiting.extend(node)


def _patterns(node: dict[str, Any]) -> int:
    by_pattern = node.get("patternProperties")
    return isinstance(node.get("pattern"), str) + (len(by_pattern) if isinstance(by_pattern, dict) else 0)


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


class _Effort:
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


def _pointer(path: Iterable[str | int]) -> str:
    return "".join(f"/{str(step).replace('~', '~0').replace('/', '~1')}" for step in path)


def _sentence(error: jsonschema_rs.ValidationError) -> str:
    """What is wrong with a value: the validator's words, and as much of the value as helps."""
    message = error.message
    if isinstance(error.kind, jsonschema_rs.ValidationErrorKind.FalseSchema):
        message = f"{_VALUE} is not allowed here"
    return _shorten(message.replace(_VALUE, _shown(error.instance), 1))


def _schema_sentence(error: jsonschema_rs.ValidationError) -> str:
    message = _sentence(error)
    if isinstance(error.kind, jsonschema_rs.ValidationErrorKind.Format) and error.kind.format == "regex":
        message = (
            f"{_shown(error.instance)} is no pattern that can be used; "
            "look-around and back-references are not supported, nor repetitions that make it too large"
        )
    elif isinstance(error.kind, jsonschema_rs.ValidationErrorKind.Referencing):
        found, _, _ = message.partition(" is not present in a registry")
        message = f"{_cut(found)}: only references to what is within the schema are followed"
    where = _pointer(error.instance_path)
    return f"is not a valid schema: {message}" + (f" (at {_cut(where)})" if where else "")


def _shown(value: object) -> str:
    """A value in a sentence."""
    if isinstance(value, dict):
        return "this object"
    if isinstance(value, list):
        return "this array"
    if isinstance(value, int | Decimal) and not isinstance(value, bool):
        return _cut(str(value))
    if isinstance(value, str):
        value = _cut(value)
    # A lone surrogate cannot go into a message.
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace").decode()


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE - 1]}…"
