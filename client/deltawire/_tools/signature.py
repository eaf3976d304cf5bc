"""A function's parameters as JSON Schema, and its arguments from JSON. The only module that imports pydantic."""

from __future__ import annotations

import inspect
import json
import typing
from typing import TYPE_CHECKING, Any

try:
    from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model
    from pydantic.errors import PydanticUserError
    from pydantic.fields import FieldInfo
    from pydantic.json_schema import GenerateJsonSchema
except ImportError as error:
    message = "functions as tools need pydantic: pip install 'deltawire[tools]'"
    raise ImportError(message) from error

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pydantic.json_schema import JsonSchemaWarningKind
    from pydantic_core import ErrorDetails

MAX_ERRORS = 5
"""The maximum number of problems of one call in a message. The model needs the first ones; there may be thousands."""

_ANY: TypeAdapter[Any] = TypeAdapter(Any)


class ArgumentsError(ValueError):
    """Arguments with which the function cannot be called; the message is a sentence for the model."""


class Signature:
    """The arguments with which a function can be called.

    Args:
        function: A function or a bound method whose parameters all have types and can be given by name.
        descriptions: Descriptions of parameters by name, for those whose types have none.

    Raises:
        TypeError: It cannot be called by name, or a parameter has no usable type.
    """

    def __init__(self, function: Callable[..., Any], descriptions: Mapping[str, str]) -> None:
        self._name = function.__name__
        self._names: list[str] = []
        hints = self._hints(function)
        fields: dict[str, Any] = {}
        for number, parameter in enumerate(inspect.signature(function).parameters.values()):
            self._require_usable(parameter)
            hint = hints[parameter.name]
            default = ... if parameter.default is parameter.empty else parameter.default
            field = Field(default, alias=parameter.name)
            if parameter.name in descriptions and not _is_described(hint):
                field = Field(default, alias=parameter.name, description=descriptions[parameter.name])
            # Named by number, because pydantic reserves names such as "json" and "_id".
            fields[f"p{number}"] = (hint, field)
            self._names.append(parameter.name)
        try:
            self._model: type[BaseModel] = create_model("Arguments", __config__=ConfigDict(extra="forbid"), **fields)
            self._schema = self._model.model_json_schema(schema_generator=_SchemaWithoutTitles)
        except PydanticUserError as error:
            problem, _, _ = error.message.partition("\n")
            raise self._refusal(f"has a parameter whose type cannot be used: {problem}") from error
        for each in (self._schema, *self._schema.get("$defs", {}).values()):
            each.pop("title", None)

    @property
    def schema_text(self) -> str:
        """The JSON Schema of the arguments; "" if there are no parameters."""
        return json.dumps(self._schema, ensure_ascii=False) if self._names else ""

    def parse(self, arguments: str) -> dict[str, Any]:
        """The arguments by name, in the types of the parameters; an absent one is the parameter's default.

        Raises:
            ArgumentsError: They do not fit.
        """
        try:
            model = self._model.model_validate_json(arguments)
        except ValidationError as error:
            errors = error.errors(include_url=False, include_context=False)
            raise ArgumentsError("; ".join(map(_sentence, errors[:MAX_ERRORS]))) from None
        return {name: getattr(model, f"p{number}") for number, name in enumerate(self._names)}

    def _hints(self, function: Callable[..., Any]) -> dict[str, Any]:
        try:
            return typing.get_type_hints(function, include_extras=True)
        except (NameError, TypeError) as error:
            raise self._refusal(f"has types that cannot be found where it is defined: {error}") from error

    def _require_usable(self, parameter: inspect.Parameter) -> None:
        name = parameter.name
        if name in ("self", "cls"):
            raise self._refusal(f"is a method without its object ({name!r}): give the bound method")
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise self._refusal(f"takes any number of arguments ({str(parameter).partition(':')[0]}): name them")
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise self._refusal(f"takes {name!r} by position only, and a model gives arguments by name")
        if parameter.annotation is parameter.empty:
            raise self._refusal(f"does not say of what type {name!r} is")

    def _refusal(self, what: str) -> TypeError:
        return TypeError(f"{self._name!r} cannot be a tool: it {what}")


class _SchemaWithoutTitles(GenerateJsonSchema):
    """Omits titles: they repeat the names and cost tokens."""

    # A default that JSON cannot represent is omitted from the schema, and the function still uses it.
    ignored_warning_kinds: set[JsonSchemaWarningKind] = {"skipped-choice", "non-serializable-default"}  # noqa: RUF012

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ANN401, ARG002 (pydantic's own signature)
        return False


def json_text(name: str, value: object) -> str:
    """A function's result as text for the model: text unchanged, every other value as JSON.

    Args:
        name: The tool's name, for errors.
        value: The result.

    Raises:
        TypeError: JSON cannot represent it.
    """
    if isinstance(value, str):
        return value
    try:
        return _ANY.dump_json(value).decode()
    except ValueError as error:
        message = f"the result of the tool {name!r} must be text or something that JSON has: {error}"
        raise TypeError(message) from error


def _is_described(hint: object) -> bool:
    return any(isinstance(each, FieldInfo) and each.description for each in getattr(hint, "__metadata__", ()))


def _sentence(error: ErrorDetails) -> str:
    where = ".".join(map(str, error["loc"]))
    return f"{where}: {error['msg']}" if where else error["msg"]
