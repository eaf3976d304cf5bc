"""A schema's text in, its check out."""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

import jsonschema_rs

from deltawire_server.schemas.effort import Effort
from deltawire_server.schemas.errors import SchemaError
from deltawire_server.schemas.sentences import VALUE, cut, pointer, schema_sentence, sentence, shorten, shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deltawire_server.upstream.request import ArgumentCheck

MAX_SCHEMA_BYTES = 256 * 1024
"""Of one schema's text: far more than a model can make use of. Time and memory grow with it."""

MAX_DEPTH = 100
"""Objects and arrays within each other, in a schema and in arguments; the validator goes down by recursion."""

MAX_NUMBER_LENGTH = 1000
"""Characters of one number in the arguments. Reading a number takes time by the square of its length."""

MAX_PATTERNS = 32
"""Of one schema. Each costs up to about a millisecond and `_PATTERN_BYTES`, once."""

MAX_EFFORT = 50_000_000
"""How often a subschema may be tried on a value; what takes about half a second. Schemas that refer to one another, or demand
that nothing else be there, can multiply at every level."""

_PATTERN_BYTES = 250_000
_USUAL_DEPTH = 4  # of arguments; a schema that is too much work for these is refused at once
_CACHED = 64


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
    effort = Effort(schema, nodes)
    effort.require_ends(nodes)
    if effort.of(_USUAL_DEPTH) > MAX_EFFORT:
        raise SchemaError("is too much work to check: its parts refer to one another again and again")
    try:
        validator = jsonschema_rs.validator_for(
            schema_text,
            validate_formats=True,
            mask=VALUE,
            # Neither over HTTP nor from files: a reference would make the gateway read for the caller.
            offline=True,
            # Takes time by the length of pattern and text only. The price: look-around and back-references are refused.
            # The other engine's limit of steps is no bound on time, since one step may read the whole text.
            pattern_options=jsonschema_rs.RegexOptions(size_limit=_PATTERN_BYTES, dfa_size_limit=_PATTERN_BYTES),
        )
    except jsonschema_rs.ValidationError as error:
        raise SchemaError(schema_sentence(error)) from None
    except ValueError as error:
        raise SchemaError(shorten(f"is not JSON: {error}")) from None
    return _Check(validator, effort)


class _Check:
    """The check of one schema; an `ArgumentCheck`."""

    def __init__(self, validator: jsonschema_rs.Validator, effort: Effort) -> None:
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
            return "", shorten(str(error))
        except jsonschema_rs.ValidationError as error:
            return pointer(error.instance_path), sentence(error)
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
        raise _UnusableError(f"the number {cut(text)} is out of every range") from None


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Parsers differ in which of several equal keys wins, so one of them would read what was not checked."""
    value = dict(pairs)
    if len(value) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise _UnusableError(f"the key {shown(key)} comes twice in one object")
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
