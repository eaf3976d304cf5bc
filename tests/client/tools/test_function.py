"""Functions become tools: their types are the schema, and what a model cannot call is refused where it is defined."""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic
import pytest
from pydantic import Field

from deltawire import Tool, ToolArgumentsError, function_tool
from deltawire._tools import docstring

if TYPE_CHECKING:
    from collections.abc import Callable


class Unit(enum.Enum):
    """Of temperatures."""

    CELSIUS = "C"
    FAHRENHEIT = "F"


@dataclasses.dataclass
class Place:
    """Where."""

    city: str
    height: float = 0.0


class Sender(pydantic.BaseModel):
    """Who."""

    name: str


class Odd:
    """Nothing that JSON has."""


class Thermometer:
    """Something with a method."""

    def read(self, place: Place, unit: Unit = Unit.CELSIUS) -> str:
        """Read it."""
        return f"{place.city} {unit.value}"

    def __call__(self, place: str) -> None: ...


@function_tool(strict=True)
def report(  # noqa: D417 (what types and names say need not be said again)
    city: str,
    json: Annotated[int, Field(ge=0, description="How many.")],
    unit: Unit = Unit.CELSIUS,
    place: Place | None = None,
    how: Literal["short", "long"] = "short",
    senders: list[Sender] = [],  # noqa: B006 (pydantic makes a new one for every call)
    by_day: dict[str, float] = {},  # noqa: B006
    when: dt.date | None = None,
    odd: Any = Odd(),  # noqa: ANN401, B008 (what JSON does not have)
) -> dict[str, Any]:
    """Report the weather of a city.

    It takes its time.

    Args:
        city: Which one,
            with its country.
        json: Said by its type already.
        unit (Unit): In what.

    Returns:
        city: Not a parameter's line.
    """
    assert (place, how, senders, by_day) == (Place("Bergen"), "short", [Sender(name="a")], {})
    assert isinstance(odd, Odd)
    return {"city": city, "json": json, "unit": unit, "when": when}


def test_the_definition() -> None:
    """Name, description, and a schema without titles, in which nothing else is allowed."""
    definition = report.definition
    assert (definition.name, definition.description) == (
        "report",
        "Report the weather of a city.",
    )
    assert definition.strict
    schema = json.loads(definition.input_schema)
    assert "title" not in definition.input_schema
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["city", "json"]
    properties = schema["properties"]
    assert properties["city"] == {"type": "string", "description": "Which one, with its country."}
    assert properties["json"] == {"type": "integer", "minimum": 0, "description": "How many."}
    assert properties["unit"] == {"$ref": "#/$defs/Unit", "default": "C", "description": "In what."}
    assert properties["how"] == {"enum": ["short", "long"], "type": "string", "default": "short"}
    assert properties["odd"] == {}
    assert schema["$defs"]["Unit"]["enum"] == ["C", "F"]
    assert list(properties) == ["city", "json", "unit", "place", "how", "senders", "by_day", "when", "odd"]


def test_arguments_become_what_the_types_say() -> None:
    """Enums, dates, dataclasses and models out of JSON; what is absent is the function's own default."""
    text = '{"city": "Oslo", "json": 3, "unit": "F", "place": {"city": "Bergen"}, "when": "2026-01-02", "senders": [{"name": "a"}]}'
    arguments = report.parse(text)
    assert arguments["unit"] is Unit.FAHRENHEIT
    assert arguments["place"] == Place("Bergen")
    assert arguments["when"] == dt.date(2026, 1, 2)
    assert arguments["senders"] == [Sender(name="a")]
    assert (arguments["how"], arguments["by_day"]) == ("short", {})
    assert isinstance(arguments["odd"], Odd)
    assert report.result_text(report(**arguments)) == '{"city":"Oslo","json":3,"unit":"F","when":"2026-01-02"}'


WRONG = {
    "{}": "city: Field required; json: Field required",
    '{"city": 1, "json": -1, "x": 2}': (
        "city: Input should be a valid string; json: Input should be greater than or equal to 0; "
        "x: Extra inputs are not permitted"
    ),
    '{"city": "a", "json": 1, "senders": [{}]}': "senders.0.name: Field required",
    "[]": "Input should be an object",
    '{"city"': "Invalid JSON: EOF while parsing an object at line 1 column 7",
    json.dumps({"city": "a", "json": 1} | {f"x{n}": 1 for n in range(100)}): "; ".join(
        f"x{n}: Extra inputs are not permitted" for n in range(5)
    ),
}


@pytest.mark.parametrize(("arguments", "sentence"), WRONG.items())
def test_arguments_that_do_not_fit(arguments: str, sentence: str) -> None:
    """Each problem by its place, in words for the model, and not more than it can use."""
    with pytest.raises(ToolArgumentsError) as caught:
        report.parse(arguments)
    assert str(caught.value) == sentence


def test_a_function_without_parameters() -> None:
    """Has no schema, and takes none."""

    @function_tool
    def now() -> str:
        return "noon"

    assert now.definition == Tool(name="now")
    assert now.parse("{}") == {}
    assert now() == "noon"
    with pytest.raises(ToolArgumentsError, match="x: Extra inputs are not permitted"):
        now.parse('{"x": 1}')


def test_a_bound_method() -> None:
    """Is a function like any other, under a name of its own if one is given."""
    tool = function_tool(Thermometer().read, name="thermometer", description="Reads.")
    assert (tool.name, tool.definition.description) == ("thermometer", "Reads.")
    assert not tool.definition.HasField("strict")
    assert tool.function(**tool.parse('{"place": {"city": "Oslo"}}')) == "Oslo C"
    assert repr(tool) == "FunctionTool(thermometer)"


def test_whether_it_waits() -> None:
    """Known from the definition."""

    async def slow() -> None: ...

    assert function_tool(slow).is_async
    assert not report.is_async


def anything(*things: int) -> None:
    """Cannot be a tool."""


def anything_by_name(**things: int) -> None:
    """Cannot be a tool."""


def by_position(thing: int, /) -> None:
    """Cannot be a tool."""


def untyped(thing) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    """Cannot be a tool."""


def odd(thing: Odd) -> None:
    """Cannot be a tool."""


def calling_back(thing: Callable[[], None]) -> None:
    """Cannot be a tool."""


def unknown(thing: Nowhere) -> None:  # type: ignore[name-defined]  # noqa: F821
    """Cannot be a tool."""


REFUSED: dict[str, tuple[Any, str]] = {
    "any number": (anything, r"'anything' cannot be a tool: it takes any number of arguments \(\*things\): name them"),
    "any names": (anything_by_name, r"takes any number of arguments \(\*\*things\)"),
    "by position": (by_position, "takes 'thing' by position only"),
    "no type": (untyped, "does not say of what type 'thing' is"),
    "an odd type": (odd, "has a parameter whose type cannot be used: .*Odd"),
    "a type that is not there": (unknown, "has types that cannot be found where it is defined: name 'Nowhere'"),
    "one for type checkers": (calling_back, "has types that cannot be found"),
    "no object": (Thermometer.read, "'read' cannot be a tool: it is a method without its object"),
    "an object": (Thermometer(), "a tool is a function or a bound method, not Thermometer"),
    "a class": (Place, "a tool is a function or a bound method, not type"),
    "built in": (print, "not builtin_function_or_method"),
    "no name": (lambda: None, "needs name="),
}


@pytest.mark.parametrize(("function", "why"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_a_tool(function: Any, why: str) -> None:  # noqa: ANN401 (whatever callers may try)
    """Is told where it is defined, and not when a model calls it."""
    with pytest.raises(TypeError, match=why):
        function_tool(function)


def test_a_type_without_a_schema() -> None:
    """Pydantic may know how to read a value and not how to write its schema."""

    def tool(thing: Any) -> None: ...  # noqa: ANN401 (replaced)

    tool.__annotations__["thing"] = type(test_a_type_without_a_schema)
    with pytest.raises(TypeError, match="has a parameter whose type cannot be used"):
        function_tool(tool)


def test_results() -> None:
    """Text as it is, everything else as JSON; what is neither is the function's mistake."""
    assert report.result_text('"as it is"') == '"as it is"'
    assert report.result_text(None) == "null"
    assert report.result_text([Place("é"), Unit.CELSIUS]) == '[{"city":"é","height":0.0},"C"]'
    with pytest.raises(TypeError, match="must be text or something that JSON has"):
        report.result_text(Odd())


def test_docstrings() -> None:
    """Only the section of Google's style is read, up to the next; others are left alone."""
    assert docstring.description_of(None) == ""
    assert docstring.description_of("One\n    sentence.\n\n    And more.") == "One sentence."
    assert docstring.parameters_of(None) == {}
    assert docstring.parameters_of("Does.\n\n:param a: Sphinx.") == {}
    text = """Does.

    Args:
        ignored
        a:
            Below,

            and on.
        b (int, optional): Beside.

    Raises:
        c: No.
    """
    assert docstring.parameters_of(text) == {"a": "Below, and on.", "b": "Beside."}
    assert docstring.parameters_of("Does.\n\nArgs:\n  a: One.") == {"a": "One."}


PYDANTIC_IS_ABSENT = """
import sys
sys.modules["pydantic"] = None
import deltawire
assert deltawire.tool_definition("f").name == "f"
try:
    deltawire.function_tool(lambda: None, name="f")
except ImportError as error:
    print(error)
"""


def test_pydantic_is_imported_only_for_functions() -> None:
    """The client works without it, and says what to install when it is needed."""
    done = subprocess.run([sys.executable, "-c", PYDANTIC_IS_ABSENT], capture_output=True, text=True, check=True)
    assert done.stdout == "functions as tools need pydantic: pip install 'deltawire[tools]'\n"
    code = "import sys, deltawire, deltawire._cli; print('pydantic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
