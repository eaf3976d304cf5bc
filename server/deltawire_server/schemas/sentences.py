"""What is told, of a schema and of arguments: short whatever was sent, and with no more of it than helps."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import TYPE_CHECKING

from jsonschema_rs import ValidationErrorKind

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jsonschema_rs import ValidationError

MAX_MESSAGE = 300
"""Characters of a sentence. It is for people, and for models to correct themselves by."""

VALUE = "\ufffc"
"""Stands for the value in the validator's sentences, which would otherwise repeat all of it."""

_SHOWN = 60  # characters of a value in a sentence


def pointer(path: Iterable[str | int]) -> str:
    """A place as a JSON Pointer; "" is the whole."""
    return "".join(f"/{str(step).replace('~', '~0').replace('/', '~1')}" for step in path)


def sentence(error: ValidationError) -> str:
    """What is wrong with a value: the validator's words, and as much of the value as helps."""
    message = error.message
    if isinstance(error.kind, ValidationErrorKind.FalseSchema):
        message = f"{VALUE} is not allowed here"
    return shorten(message.replace(VALUE, shown(error.instance), 1))


def schema_sentence(error: ValidationError) -> str:
    """What is wrong with a schema, to go on after its field's name, and where if that is known."""
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
    """A value in a sentence."""
    if isinstance(value, dict):
        return "this object"
    if isinstance(value, list):
        return "this array"
    if isinstance(value, int | Decimal) and not isinstance(value, bool):
        return cut(str(value))
    if isinstance(value, str):
        value = cut(value)
    # A lone surrogate cannot go into a message.
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace").decode()


def cut(text: str) -> str:
    """As much of a text as a sentence can hold."""
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def shorten(text: str) -> str:
    """A sentence that is not too long."""
    return text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE - 1]}…"
