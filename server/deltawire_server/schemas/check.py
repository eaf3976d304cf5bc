"""A schema's text in, its check out."""

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
"""Of one schema's text; real ones have up to some tens of KiB. The Python standard library takes 10 ms to decode this much."""

MAX_SCHEMA_NODES = 4000
"""Objects and arrays of one schema; 16 other values count as one. Each takes 5 to 12 us to read and compile, in which other calls
wait, and up to 1.4 KB. A parameter with a type and a description is one, an optional one that pydantic wrote is four."""

MAX_REQUEST_NODES = 20_000
"""Objects and arrays of all schemas of one request: 128 tools with 30 optional parameters each. Other calls run in between."""

MAX_DEPTH = 100
"""Objects and arrays within each other, in a schema and in arguments; the validator goes down by recursion."""

MAX_NUMBER_LENGTH = 1000
"""Characters of one number in the arguments, and digits before or after its point if it is written out without an exponent.
Reading and dividing a number takes time by the square of its length."""

MAX_PATTERNS = 32
"""Of one schema. Each costs up to about a millisecond and `_PATTERN_BYTES`, once."""

MAX_EFFORT = 1_000_000
"""Units that the checks of one answer may take, all calls of all choices together; also what one schema may take for a single
value. A unit is about 20 ns, so all of them block other calls for 20 to 40 ms."""

MAX_CACHE_BYTES = 8 * 1024 * 1024
"""Memory of the checks that are kept, estimated: those of 128 tools with ten parameters each take a third of it."""

_VALUES_PER_NODE = 16
_PIECE = 1000  # nodes of schemas after which other tasks run
_PIECE_CHARACTERS_PER_NODE = 64  # to measure the text
_PATTERN_BYTES = 250_000
_NODE_BYTES = 1536  # of a compiled subschema, measured: 200 to 1,400
_TEXT_FACTOR = 4  # bytes for each of the schema's text, in the cache's key, in names and in enumerations

_CALL_EFFORT = 500
_VALUE_EFFORT = 40  # to parse it and to hand it to the validator
_TEXT_BYTES_PER_UNIT = 16  # of the arguments, for the same
_STEP_EFFORT = 75  # of `Effort.count`
_MAX_STEPS = 10_000  # of `Effort.count`, for one call
_MAX_EXPLANATION = 4_000  # of `Counted.explanation`: about 25 ms
_EXPLANATION_EFFORT = 300  # for each of it

_TOO_MUCH = "the arguments are too much work to check against the tool's schema"
_NO_PLACE = (
    "the arguments do not follow the tool's schema; with so many alternatives or values the place was not looked for"
)


async def compiled_checks(schemas: Mapping[str, str]) -> tuple[dict[str, SchemaCheck], dict[str, SchemaError]]:
    """Make the checks of one request's tools, while other tasks run in between.

    Args:
        schemas: The JSON texts, by the tools' names.

    Returns:
        The checks by the tools' names, and for those that cannot be checked, why. Refuse the request for them, or go on without.
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
            # Without its traceback, which refers to this frame, and that to it: all would wait for the garbage collector.
            errors[name] = error.with_traceback(None)
    return checks, errors


def argument_check(schema_text: str) -> SchemaCheck:
    """Make the check for a tool's arguments. The last ones made are kept, since the same tools come with every request.

    Args:
        schema_text: The JSON text of an object.

    Returns:
        To be called with the JSON text of an object.

    Raises:
        SchemaError: It is not a valid schema, is too large or too much work, or refers to what is not in it. Name the field
            and pass the message on.
    """
    return _cache.get(schema_text) or _compiled(schema_text, _count_nodes(schema_text))


def _count_nodes(schema_text: str) -> int:
    """Count what `MAX_SCHEMA_NODES` limits.

    Raises:
        SchemaError: There are too many, or the text is too large or too deep.
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
        # Numbers are not looked at here but for their size, and Python's `int` refuses to read very long ones.
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
    size = nodes * _NODE_BYTES + len(schema_text) * _TEXT_FACTOR + effort.patterns * _PATTERN_BYTES
    check = SchemaCheck(validator, effort, nodes, size)
    _cache.keep(schema_text, check)
    return check


@dataclass(frozen=True, slots=True)
class SchemaCheck:
    """The check of one schema; an `ArgumentCheck`.

    Attributes:
        validator: What checks.
        effort: How much work that is.
        nodes: Of the schema; see `MAX_SCHEMA_NODES`.
        size: Bytes that this takes in memory, estimated.
    """

    validator: jsonschema_rs.Validator
    effort: Effort
    nodes: int
    size: int

    def __call__(self, arguments: str, budget: CheckBudget | None = None) -> tuple[str, str] | None:
        """What is wrong with arguments: a JSON Pointer and a sentence; `None` if they follow the schema.

        Args:
            arguments: JSON text.
            budget: What is left for the answer's checks, in units; by default all that an answer may take.
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
            # Escapes in the text only make it longer.
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
        """The units that the check takes; `None` if they are more than what is left."""
        if self.effort.bound is not None:
            bound = self.effort.bound * values + self.effort.bytes_bound * size // BYTES
            if bound <= budget.left // 2:  # so that the next calls of the answer have some
                return bound
        counted = self._count(value, budget)
        return None if counted is None else counted.effort

    def _count(self, value: object, budget: CheckBudget, *, explained: bool = False) -> Counted | None:
        """Count the check in steps, which use up some of the budget themselves; `None` if it is more than what is left."""
        most_steps = min(_MAX_STEPS, budget.left // _STEP_EFFORT)
        try:
            counted = self.effort.count(value, most_steps, budget.left, explained=explained)
        except TooMuchError as error:
            budget.left -= min(budget.left, error.steps * _STEP_EFFORT)
            return None
        budget.left -= min(budget.left, counted.steps * _STEP_EFFORT)
        return counted

    def _explain(self, value: object, effort: int, budget: CheckBudget) -> tuple[str, str]:
        """Say what is wrong, if that is cheap: at most the check once more, and a list of errors."""
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
    """The last checks made, by the schema's text."""

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
        if schema_text in self._checks:  # two requests at once made it
            self.size -= self._checks[schema_text].size
        self._checks[schema_text] = check
        self.size += check.size
        while self.size > MAX_CACHE_BYTES:
            _, oldest = self._checks.popitem(last=False)
            self.size -= oldest.size


_cache = _Cache()


class _UnusableError(Exception):
    """The arguments cannot be checked; the message says why."""


def _rough(text: str) -> int | float:
    """About the size of an integer."""
    return int(text) if len(text) < 20 else float("inf")


class _Reading:
    """Reads arguments.

    Attributes:
        long_numbers: How many values the long numbers stand for, beyond themselves.
    """

    def __init__(self) -> None:
        self.long_numbers = 0

    def read(self, text: str) -> object:
        """The value of a JSON text.

        Raises:
            _UnusableError: Parsers read it differently, or it has a number that is too long.
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
        """The number as it is written: a float would make an infinity of 1e400, and 0.1 of 0.10000000000000000001."""
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
    """Parsers differ in which of several equal keys wins, so one of them would read what was not checked."""
    value = dict(pairs)
    if len(value) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise _UnusableError(f"the key {shown(key)} comes twice in one object")
    return value
