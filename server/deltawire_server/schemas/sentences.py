"""The error messages for schemas and arguments, of bounded length, with only short excerpts of the input."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import TYPE_CHECKING

from jsonschema_rs import ValidationErrorKind

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jsonschema_rs import ValidationError

MAX_MESSAGE = 300
"""Limit for a message in characters. Messages are for people, and for models to correct their arguments."""

VALUE = "\ufffc"
"""The placeholder for the value in the validator's messages, which would otherwise have the whole value."""

_SHOWN = 60  # characters of a value in a message


def pointer(path: Iterable[str | int]) -> str:
    """Convert a path to a JSON Pointer; "" is the whole document."""
    return "".join(f"/{str(step).replace('~', '~0').replace('/', '~1')}" for step in path)


def sentence(error: ValidationError) -> str:
    """The message for an invalid value: the validator's message with a short form of the value."""
    message = error.message
    if isinstance(error.kind, ValidationErrorKind.FalseSchema):
        message = f"{VALUE} is not allowed here"
    return shorten(message.replace(VALUE, shown(error.instance), 1))


def schema_sentence(error: ValidationError) -> str:
    """The message for an invalid schema, with the path if known. It continues the name of the field."""
    message = sentence(error)
    if isinstance(error.kind, ValidationErrorKind.Format) and error.kind.format == "regex":
        message = (
            f"{shown(error.instance)} is no pattern that can be used; "
            "look-around and back-references are not supported, nor repetitions that make it too large"
        )
    elif isinstance(error.kind, ValidationErrorKind.Referencing):
        found, _, _ = message.partition(" is not present in a registry")
        message = f"{cut(found)}: only references to what is within the schema are followed"
    where = pointer(error.instance_path)
    return f"is not a valid schema: {message}" + (f" (at {cut(where)})" if where else "")


def shown(value: object) -> str:
    """The short form of a value in a message."""
    if isinstance(value, dict):
        return "this object"
    if isinstance(value, list):
        return "this array"
    if isinstance(value, int | Decimal) and not isinstance(value, bool):
        return cut(str(value))
    if isinstance(value, str):
        value = cut(value)
    # A lone surrogate is not valid in a protobuf string.
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace").decode()


def cut(text: str) -> str:
    """The beginning of a text, for a message."""
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def shorten(text: str) -> str:
    """Truncate a message."""
    return text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE - 1]}…"
