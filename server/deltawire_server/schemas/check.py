"""Compiles the text of a schema to a check of arguments."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

import jsonschema_rs

from deltawire_server.pacing import give_way
from deltawire_server.schemas.effort import BYTES, Effort, TooMuchError, length_of_number
from deltawire_server.schemas.errors import SchemaError
from deltawire_server.schemas.sentences import VALUE, cut, pointer, schema_sentence, sentence, shorten, shown
from deltawire_server.schemas.shape import shape
from deltawire_server.upstream.request import CheckBudget

if TYPE_CHECKING:
    from collections.abc import Mapping

    from deltawire_server.schemas.effort import Counted

MAX_SCHEMA_BYTES = 256 * 1024
"""Limit for the text of a schema. Real ones have up to tens of KiB; the standard library decodes 256 KiB in 10 ms."""

MAX_SCHEMA_NODES = 4000
"""Limit for the objects and arrays of a schema; 16 other values count as one. Each takes 5 to 12 us to parse and compile, which
blocks other calls, and up to 1.4 KB. A parameter with a type and a description is one, an optional one of pydantic is four."""

MAX_REQUEST_NODES = 20_000
"""Limit for the objects and arrays of all schemas of a request: 128 tools with 30 optional parameters each."""

MAX_DEPTH = 100
"""Limit for the nesting depth of schemas and arguments, because the validator is recursive."""

MAX_NUMBER_LENGTH = 1000
"""Limit for the characters of a number in the arguments, and for its digits before or after the decimal point without an exponent.
Parsing and dividing take quadratic time."""

MAX_PATTERNS = 32
"""Limit for the patterns of a schema. Compiling one takes up to about 1 ms and `_PATTERN_BYTES`."""

MAX_EFFORT = 1_000_000
"""Limit for the units of work of the checks of one answer, for all calls of all choices together; also for one schema and a single
value. A unit is about 20 ns, so an answer blocks other calls for at most 20 to 40 ms."""

MAX_CACHE_BYTES = 8 * 1024 * 1024
"""Limit for the estimated memory of cached checks. Those of 128 tools with ten parameters each take a third of it."""

_VALUES_PER_NODE = 16
_PIECE = 1000  # nodes of schemas after which other tasks get a turn
_PIECE_CHARACTERS_PER_NODE = 64  # for measuring the text
_PATTERN_BYTES = 250_000
_NODE_BYTES = 1536  # of a compiled subschema, measured: 200 to 1,400
_TEXT_FACTOR = 4  # bytes per character of the schema, for the cache key, names and enumerations

_CALL_EFFORT = 500
_VALUE_EFFORT = 40  # for parsing and conversion
_TEXT_BYTES_PER_UNIT = 16  # of the arguments, for parsing
_STEP_EFFORT = 75  # per step of `Effort.count`
_MAX_STEPS = 10_000  # limit for the steps of `Effort.count` for one call
_MAX_EXPLANATION = 4_000  # limit for `Counted.explanation`: about 25 ms
_EXPLANATION_EFFORT = 300  # per unit of `Counted.explanation`

_TOO_MUCH = "the arguments are too much work to check against the tool's schema"
_NO_PLACE = (
    "the arguments do not follow the tool's schema; with so many alternatives or values the place was not looked for"
)


async def compiled_checks(schemas: Mapping[str, str]) -> tuple[dict[str, SchemaCheck], dict[str, SchemaError]]:
    """Compile the checks for the tools of a request. Other tasks get turns.

    Args:
        schemas: The JSON texts by tool name.

    Returns:
        The checks, and the errors of the schemas that cannot be compiled, each by tool name. The caller refuses the request, or
        does not check these tools.
    """
    checks: dict[str, SchemaCheck] = {}
    errors: dict[str, SchemaError] = {}
    left, piece = MAX_REQUEST_NODES, 0
    for name, schema_text in schemas.items():
        try:
            check = _cache.get(schema_text)
            if check is None:
                if piece > _PIECE:
                    piece = 0
                    await give_way()
                piece += len(schema_text) // _PIECE_CHARACTERS_PER_NODE
                nodes = _count_nodes(schema_text)
            else:
                nodes = check.nodes
            if nodes > left:
                raise SchemaError(
                    f"is too large together with those before it: the schemas of all checked tools may have at most "
                    f"{MAX_REQUEST_NODES} objects and arrays; offer fewer tools"
                )
            left -= nodes
            if check is None:
                piece += nodes
                check = _compiled(schema_text, nodes)
            checks[name] = check
        except SchemaError as error:
            # Without the traceback, which is a reference cycle with this frame.
            errors[name] = error.with_traceback(None)
    return checks, errors


def argument_check(schema_text: str) -> SchemaCheck:
    """Compile the check for a tool's arguments. The most recent checks are cached.

    Args:
        schema_text: The JSON text of an object.

    Returns:
        The check; call it with the JSON text of an object.

    Raises:
        SchemaError: The schema is invalid, too large, too much work, or has a reference to outside of it. Report the message
            with the name of the field.
    """
    return _cache.get(schema_text) or _compiled(schema_text, _count_nodes(schema_text))


def _count_nodes(schema_text: str) -> int:
    """Count the nodes that `MAX_SCHEMA_NODES` limits.

    Raises:
        SchemaError: There are too many nodes, or the text is too large or too deep.
    """
    if len(schema_text) > MAX_SCHEMA_BYTES or len(schema_text.encode("utf-8", "surrogatepass")) > MAX_SCHEMA_BYTES:
        raise SchemaError(f"is larger than {MAX_SCHEMA_BYTES} bytes")
    measured = shape(schema_text, _VALUES_PER_NODE * MAX_SCHEMA_NODES)
    nodes = MAX_SCHEMA_NODES + 1
    if measured is not None:
        if measured.depth > MAX_DEPTH:
            raise SchemaError(f"is nested more than {MAX_DEPTH} levels deep")
        nodes = measured.containers + (measured.values - measured.containers) // _VALUES_PER_NODE
    if nodes > MAX_SCHEMA_NODES:
        raise SchemaError(
            f"is too large: it may have at most {MAX_SCHEMA_NODES} objects and arrays, of which {_VALUES_PER_NODE} other "
            "values count as one; leave out what the model does not need"
        )
    return nodes


def _compiled(schema_text: str, nodes: int) -> SchemaCheck:
    try:
        # Only the magnitude of numbers is used here, and Python's `int` rejects very long ones.
        effort = Effort(json.loads(schema_text, parse_int=_rough))
    except json.JSONDecodeError as error:
        raise SchemaError(f"is not JSON: {error.msg}") from None
    if effort.patterns > MAX_PATTERNS:
        raise SchemaError(f"has {effort.patterns} patterns; at most {MAX_PATTERNS} are allowed")
    if effort.least > MAX_EFFORT:
        raise SchemaError(
            "is too much work to check: its parts refer to one another again and again, or its enum or const is large"
        )
    try:
        validator = jsonschema_rs.validator_for(
            schema_text,
            validate_formats=True,
            mask=VALUE,
            # No references over HTTP or to files, which would give callers access to the gateway's network and files.
            offline=True,
            # A regex engine in linear time; look-around and back-references are not supported.
            # The step limit of the other engine does not bound the time, because one step may read the whole text.
            pattern_options=jsonschema_rs.RegexOptions(size_limit=_PATTERN_BYTES, dfa_size_limit=_PATTERN_BYTES),
        )
    except jsonschema_rs.ValidationError as error:
        raise SchemaError(schema_sentence(error)) from None
    except ValueError as error:
        raise SchemaError(shorten(f"is not JSON: {error}")) from None
    size = nodes * _NODE_BYTES + len(schema_text) * _TEXT_FACTOR + effort.patterns * _PATTERN_BYTES
    check = SchemaCheck(validator, effort, nodes, size)
    _cache.keep(schema_text, check)
    return check


@dataclass(frozen=True, slots=True)
class SchemaCheck:
    """The check for one schema; an `ArgumentCheck`.

    Attributes:
        validator: The compiled validator.
        effort: The estimator of its work.
        nodes: Number of nodes of the schema; see `MAX_SCHEMA_NODES`.
        size: Estimated memory in bytes.
    """

    validator: jsonschema_rs.Validator
    effort: Effort
    nodes: int
    size: int

    def __call__(self, arguments: str, budget: CheckBudget | None = None) -> tuple[str, str] | None:
        """Check arguments; return a JSON Pointer and a message, or `None` if they are valid.

        Args:
            arguments: JSON text.
            budget: The remaining units of the answer; by default a full budget.
        """
        budget = budget or CheckBudget(MAX_EFFORT)
        text_effort = _CALL_EFFORT + len(arguments) // _TEXT_BYTES_PER_UNIT
        if not budget.take(text_effort):
            return "", _TOO_MUCH
        measured = shape(arguments, budget.left // _VALUE_EFFORT)
        if measured is None or not budget.take(measured.values * _VALUE_EFFORT):
            return "", _TOO_MUCH
        if measured.depth > MAX_DEPTH:
            return "", f"the arguments are nested more than {MAX_DEPTH} levels deep"
        reading = _Reading()
        try:
            value = reading.read(arguments)
            values = measured.values + reading.long_numbers
            # The decoded texts are not longer, because escapes only lengthen a text.
            size = len(arguments) if arguments.isascii() else 4 * len(arguments)
            effort = self._effort_of(value, values, size, budget)
            if effort is None or not budget.take(effort):
                return "", _TOO_MUCH
            if self.validator.is_valid(value):
                return None
            return self._explain(value, effort + values * _VALUE_EFFORT, budget)
        except _UnusableError as error:
            return "", shorten(str(error))
        except UnicodeEncodeError:
            return "", "the arguments have half of a surrogate pair, which is no character"

    def _effort_of(self, value: object, values: int, size: int, budget: CheckBudget) -> int | None:
        """The units of the check; `None` if the budget is too small."""
        if self.effort.bound is not None:
            bound = self.effort.bound * values + self.effort.bytes_bound * size // BYTES
            if bound <= budget.left // 2:  # so that some is left for further calls of the answer
                return bound
        counted = self._count(value, budget)
        return None if counted is None else counted.effort

    def _count(self, value: object, budget: CheckBudget, *, explained: bool = False) -> Counted | None:
        """Count the units of the check, which takes units itself; `None` if the budget is too small."""
        most_steps = min(_MAX_STEPS, budget.left // _STEP_EFFORT)
        try:
            counted = self.effort.count(value, most_steps, budget.left, explained=explained)
        except TooMuchError as error:
            budget.left -= min(budget.left, error.steps * _STEP_EFFORT)
            return None
        budget.left -= min(budget.left, counted.steps * _STEP_EFFORT)
        return counted

    def _explain(self, value: object, effort: int, budget: CheckBudget) -> tuple[str, str]:
        """The path and the message of the problem, if the work for them is within the budget."""
        if self.effort.has_alternatives:
            counted = self._count(value, budget, explained=True)
            if counted is None or counted.explanation > _MAX_EXPLANATION:
                return "", _NO_PLACE
            effort = counted.effort + counted.explanation * _EXPLANATION_EFFORT
        if budget.take(effort):
            try:
                self.validator.validate(value)
            except jsonschema_rs.ValidationError as error:
                return pointer(error.instance_path), sentence(error)
        return "", _NO_PLACE


class _Cache:
    """The most recently used checks by the text of the schema."""

    def __init__(self) -> None:
        self._checks: OrderedDict[str, SchemaCheck] = OrderedDict()
        self.size = 0

    def get(self, schema_text: str) -> SchemaCheck | None:
        check = self._checks.get(schema_text)
        if check is not None:
            self._checks.move_to_end(schema_text)
        return check

    def keep(self, schema_text: str, check: SchemaCheck) -> None:
        if check.size > MAX_CACHE_BYTES:
            return
        if schema_text in self._checks:  # two concurrent requests compiled it
            self.size -= self._checks[schema_text].size
        self._checks[schema_text] = check
        self.size += check.size
        while self.size > MAX_CACHE_BYTES:
            _, oldest = self._checks.popitem(last=False)
            self.size -= oldest.size


_cache = _Cache()


class _UnusableError(Exception):
    """The arguments cannot be checked; the message has the reason."""


def _rough(text: str) -> int | float:
    """The integer, or infinity for a long one."""
    return int(text) if len(text) < 20 else float("inf")


class _Reading:
    """Parses arguments.

    Attributes:
        long_numbers: The additional cost of long numbers, as a number of values.
    """

    def __init__(self) -> None:
        self.long_numbers = 0

    def read(self, text: str) -> object:
        """Parse a JSON text.

        Raises:
            _UnusableError: The text has duplicate keys or a number that is too long.
        """
        return json.loads(
            text, parse_int=self._integer, parse_float=self._number, object_pairs_hook=_object_without_repeats
        )

    def _integer(self, text: str) -> int:
        if len(text) > MAX_NUMBER_LENGTH:
            raise _UnusableError(f"a number has more than {MAX_NUMBER_LENGTH} digits")
        self.long_numbers += len(text) // 8
        return int(text)

    def _number(self, text: str) -> Decimal:
        """The exact number: as a float, 1e400 would be infinity and 0.10000000000000000001 would be 0.1."""
        if len(text) > MAX_NUMBER_LENGTH:
            raise _UnusableError(f"a number has more than {MAX_NUMBER_LENGTH} digits")
        try:
            number = Decimal(text)
        except InvalidOperation:
            raise _UnusableError(f"the number {cut(text)} is out of every range") from None
        if abs(number.adjusted()) > MAX_NUMBER_LENGTH:
            raise _UnusableError(f"the number {cut(text)} is out of every range")
        self.long_numbers += length_of_number(number)
        return number


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object; reject duplicate keys, because parsers differ in which of them they use."""
    value = dict(pairs)
    if len(value) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise _UnusableError(f"the key {shown(key)} comes twice in one object")
    return value
