"""Builds the API's messages from values of callers, and names the field whose value does not fit.

protobuf's own error is "Value out of range: -1", and it accepts bytes as text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message as ProtoMessage

M = TypeVar("M", bound=ProtoMessage)
# A FieldDescriptor; which class that is depends on how protobuf is built.
Field: TypeAlias = Any

_SHOWN = 80  # characters of a value that does not fit
# What a field takes, by protobuf's C++ type of it.
_TAKES: Mapping[int, str] = MappingProxyType(
    {
        FieldDescriptor.CPPTYPE_INT32: f"a whole number from {-(2**31)} to {2**31 - 1}",
        FieldDescriptor.CPPTYPE_INT64: f"a whole number from {-(2**63)} to {2**63 - 1}",
        FieldDescriptor.CPPTYPE_FLOAT: "a finite number",
        FieldDescriptor.CPPTYPE_DOUBLE: "a finite number",
        FieldDescriptor.CPPTYPE_BOOL: "True or False",
        FieldDescriptor.CPPTYPE_STRING: "text that can be sent as UTF-8",
        FieldDescriptor.CPPTYPE_ENUM: "one of the API's values",
    }
)


class FieldValueError(ValueError):
    """A value of the right type that a field cannot hold.

    Attributes:
        field: The caller's name of the field.
        problem: The rest of the sentence: the value, and what the field takes.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(field, problem)
        self.field = field
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}"


def made(kind: type[M], given: Mapping[str, Any], names: Mapping[str, str] = MappingProxyType({})) -> M:
    """A message of the API.

    Args:
        kind: The kind of message.
        given: Values by the names of its fields; None is the same as not given.
        names: The caller's names of fields, where they differ.

    Raises:
        FieldValueError: A field cannot hold its value.
        TypeError: A value has another type than its field; the message begins with the field's name, too.
    """
    fields = kind.DESCRIPTOR.fields_by_name
    called = {name: names.get(name, name) for name in given}
    values = {name: _usable(fields[name], value, called[name]) for name, value in given.items() if value is not None}
    try:
        message = kind(**values)
        _require_finite(message, values)
    except (TypeError, ValueError, OverflowError):
        for name, value in values.items():
            for piece in _pieces(value):
                _try(kind, fields[name], piece, called[name])
        raise  # pragma: no cover -- what is wrong together is wrong alone
    return message


def _require_finite(message: ProtoMessage, names: Iterable[str]) -> None:
    """Check the numbers in these fields: the gateway would only say that they are out of range.

    Raises:
        ValueError: One is infinite or NaN.
    """
    for name in names:
        value = getattr(message, name)
        for each in value.values() if isinstance(value, Mapping) else (value,):
            if isinstance(each, float) and not math.isfinite(each):
                raise ValueError(each)


def _usable(field: Field, value: Any, name: str) -> Any:  # noqa: ANN401 -- whatever callers give
    """A value that can be looked at more than once, and has nothing that protobuf would misread.

    Raises:
        TypeError: One value where there should be several, or bytes for a text.
    """
    if isinstance(value, Iterable) and field.is_repeated and not isinstance(value, str | bytes | Mapping):
        value = list(value)
    elif field.is_repeated and not (_is_map(field) and isinstance(value, Mapping)):
        # A text would be taken for its letters.
        message = f"{name}: {_shown(value)} is not {'a mapping' if _is_map(field) else 'a list'}"
        raise TypeError(message)
    if field.type == FieldDescriptor.TYPE_STRING:
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, bytes):
                message = f"{name}: {_problem(field, each)}"
                raise TypeError(message)
    return value


def _pieces(value: Any) -> Iterator[Any]:  # noqa: ANN401 -- whatever callers give
    """A field's value in pieces that its message takes one by one, so that a wrong one can be shown alone."""
    if isinstance(value, Mapping):
        yield from ({key: each} for key, each in value.items())
    elif isinstance(value, list):
        yield from ([each] for each in value)
    else:
        yield value


def _try(kind: type[ProtoMessage], field: Field, piece: Any, name: str) -> None:  # noqa: ANN401
    """Refuse a piece that its field does not take, in the caller's words."""
    try:
        _require_finite(kind(**{field.name: piece}), (field.name,))
    except TypeError as error:
        message = f"{name}: {_problem(field, piece)}"
        raise TypeError(message) from error
    except (ValueError, OverflowError) as error:
        raise FieldValueError(name, _problem(field, piece)) from error


def _problem(field: Field, piece: object) -> str:
    """What is wrong with a value that its field does not take."""
    if isinstance(piece, Mapping) and _is_map(field):
        key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
        return f"{_shown(piece)} does not give {_takes(value)} for {_takes(key)}"
    shown = piece[0] if isinstance(piece, list) else piece
    return f"{_shown(shown)} is not {_takes(field)}"


def _takes(field: Field) -> str:
    """What a field takes."""
    if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        return f"a {field.message_type.name}"
    return _TAKES[field.cpp_type]


def _is_map(field: Field) -> bool:
    """Whether a field holds values by keys."""
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


def _shown(value: object) -> str:
    """A value in a message, cut if it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
