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
    """The arguments of a call do not fit the function; the message is a sentence that the model can read."""


class FunctionTool(Generic[P, R]):
    """A function with what a model has to know of it; made by `function_tool`. Calling it calls the function.

    Attributes:
        function: The function itself.
        definition: What the model receives: name, description and the JSON Schema of the parameters.
        is_async: Whether it has to be awaited.
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
        # Here, so that pydantic is needed by those only who make functions tools.
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
        """What the model calls it by."""
        return self.definition.name

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.function(*args, **kwargs)

    def parse(self, arguments: str) -> dict[str, Any]:
        """The arguments of a call, from JSON text into the types of the function's parameters; call `function` with them.

        Raises:
            ToolArgumentsError: They do not fit. The message names the first few problems: send it to the model.
        """
        from deltawire._tools.signature import ArgumentsError

        try:
            return self._signature.parse(arguments)
        except ArgumentsError as error:
            raise ToolArgumentsError(str(error)) from None

    def result_text(self, result: object) -> str:
        """A result as the model reads it: text as it is, everything else as JSON.

        Raises:
            TypeError: JSON has nothing for it.
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

    The parameters' types become the JSON Schema: whatever pydantic knows, `Literal`, enums, dataclasses, models and
    `Annotated[int, Field(description=..., ge=0)]` among them. The docstring's first paragraph becomes the description, the
    lines of its `Args:` section those of the parameters.

    Args:
        function: A function or a bound method, with `async` or without, all of whose parameters have types and names.
        name: What the model calls it by; the function's own name if not given.
        description: What it does and when to use it; from the docstring if not given.
        strict: Whether the engine must hold the arguments to the schema. None leaves it to the engine.

    Raises:
        TypeError: A model could not call it, or would not know how.
        ImportError: pydantic is not there: install the extra `tools`.

    Hand it to `chat.run_tools`; its `definition` is for `chat.create(tools=...)`.
    """

    def made(function: Callable[P, R]) -> FunctionTool[P, R]:
        return FunctionTool(function, name=name, description=description, strict=strict)

    return made if function is None else made(function)
