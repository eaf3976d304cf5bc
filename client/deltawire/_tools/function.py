"""A Python function that a model may call."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, overload

from deltawire._tools.docstring import description_of, parameters_of
from deltawire.v1.tool_pb2 import Tool

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
R = TypeVar("R")


class ToolArgumentsError(ValueError):
    """The arguments of a call do not fit the function. Send the message to the model as the result of the call."""


class FunctionTool(Generic[P, R]):
    """A function and its definition for a model, as `function_tool` returns it. Calling it calls the function.

    Attributes:
        function: The function itself.
        definition: The `Tool` that the model receives: name, description and the JSON Schema of the parameters.
        is_async: Whether the function must be awaited.
    """

    def __init__(
        self, function: Callable[P, R], *, name: str | None, description: str | None, strict: bool | None
    ) -> None:
        self.function: Callable[P, R] = function
        if not (inspect.isfunction(function) or inspect.ismethod(function)):
            message = f"a tool is a function or a bound method, not {type(function).__name__}: define one that calls it"
            raise TypeError(message)
        if name is None:
            name = function.__name__
            if not name.isidentifier():
                message = "a function without a name needs name="
                raise TypeError(message)
        # Imported here, so that only programs with functions as tools need pydantic.
        from deltawire._tools.signature import Signature

        self._signature = Signature(function, parameters_of(function.__doc__))
        self.definition = Tool(
            name=name,
            description=description_of(function.__doc__) if description is None else description,
            input_schema=self._signature.schema_text,
            strict=strict,
        )
        self.is_async = inspect.iscoroutinefunction(function)

    @property
    def name(self) -> str:
        """The tool's name."""
        return self.definition.name

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.function(*args, **kwargs)

    def parse(self, arguments: str) -> dict[str, Any]:
        """The arguments of a call, from JSON text into the types of the function's parameters; call `function` with them.

        Raises:
            ToolArgumentsError: They do not fit. The message has the first five problems: send it to the model.
        """
        from deltawire._tools.signature import ArgumentsError

        try:
            return self._signature.parse(arguments)
        except ArgumentsError as error:
            raise ToolArgumentsError(str(error)) from None

    def result_text(self, result: object) -> str:
        """A result as text for the model: text unchanged, every other value as JSON. Pass it to `tool`.

        Raises:
            TypeError: JSON cannot represent it.
            ValueError: It is text with lone surrogates, which cannot be sent.
        """
        from deltawire._tools.signature import json_text

        text = json_text(self.name, result)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            message = f"the result of the tool {self.name!r} cannot be sent as UTF-8: {error}"
            raise ValueError(message) from error
        return text

    def __repr__(self) -> str:
        return f"FunctionTool({self.name})"


@overload
def function_tool(
    function: Callable[P, R],
    /,
    *,
    name: str | None = None,
    description: str | None = None,
    strict: bool | None = None,
) -> FunctionTool[P, R]: ...
@overload
def function_tool(
    *, name: str | None = None, description: str | None = None, strict: bool | None = None
) -> Callable[[Callable[P, R]], FunctionTool[P, R]]: ...
def function_tool(
    function: Callable[P, R] | None = None,
    /,
    *,
    name: str | None = None,
    description: str | None = None,
    strict: bool | None = None,
) -> FunctionTool[P, R] | Callable[[Callable[P, R]], FunctionTool[P, R]]:
    """Make a tool of a function, as `@function_tool`, `@function_tool(strict=True)` or `function_tool(function)`.

    The JSON Schema is derived from the types of the parameters: all that pydantic supports, such as `Literal`, enums,
    dataclasses, models and `Annotated[int, Field(description=..., ge=0)]`. The description is the docstring's first
    paragraph; those of the parameters are the lines of its `Args:` section.

    Args:
        function: A function or a bound method, with `async` or without, all of whose parameters have types and names.
        name: The tool's name; by default the function's own.
        description: What it does and when to use it; by default from the docstring.
        strict: Whether the engine must make the arguments follow the schema. None leaves it to the engine.

    Raises:
        TypeError: A model cannot call it, for example because of `*args` or a parameter without a type.
        ImportError: pydantic is not installed: install the extra `tools`.

    Pass the result to `chat.run_tools`, or its `definition` to `chat.create(tools=...)`.
    """

    def made(function: Callable[P, R]) -> FunctionTool[P, R]:
        return FunctionTool(function, name=name, description=description, strict=strict)

    return made if function is None else made(function)
