"""Metadata of settings fields: the field of a key, the values that it accepts, and whether it is a secret."""

from __future__ import annotations

from collections import abc
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Literal, Union, get_args, get_origin

from pydantic import SecretStr

from deltawire_server.settings.model import SECTIONS

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

KeyPath = tuple[str, ...]
"""The path of a key from the root: ("server", "listen"), ("providers", "vllm", "base_url")."""


def field_at(path: KeyPath) -> FieldInfo | None:
    """The field at a path, or `None` if there is none.

    Args:
        path: From the root, with any provider id.
    """
    depth = 3 if path[0] == "providers" else 2
    if len(path) != depth or path[0] not in SECTIONS:
        return None
    return SECTIONS[path[0]].model_fields.get(path[-1])


def is_secret(field: FieldInfo) -> bool:
    """Whether a field's value, or the values in it, must not be printed."""
    return SecretStr in {*_kinds(field), *get_args(field.annotation)}


def is_table(field: FieldInfo) -> bool:
    """Whether a field is a table, which only the settings file can set."""
    return abc.Mapping in _kinds(field)


def expectation(field: FieldInfo) -> str:
    """The values that a field accepts, to follow "must be": "a whole number from 1 to 65536"."""
    if field.title:
        return field.title
    kinds = _kinds(field)
    if bool in kinds:
        return "true, false or the path of a CA file" if Path in kinds else "true or false"
    if int in kinds:
        return f"a whole number{_limits(field)}"
    if float in kinds:
        return f"a number of seconds{_limits(field)}"
    if Path in kinds:
        return "the path of a file, in quotes"
    words = [kind for kind in kinds if isinstance(kind, str)]
    return f"one of {', '.join(words)}" if words else "a string, in quotes"


def _kinds(field: FieldInfo) -> list[object]:
    """The alternatives of a field's type, without `None`: the values of literals, the origins of generics."""
    annotation = field.annotation
    origin = get_origin(annotation)
    if origin is Literal:
        return list(get_args(annotation))
    members = get_args(annotation) if origin in {Union, UnionType} else (annotation,)
    found: list[object] = []
    for member in members:
        bare = get_args(member)[0] if get_origin(member) is Annotated else member
        if bare is not type(None):
            found.append(get_origin(bare) or bare)
    return found


def _limits(field: FieldInfo) -> str:
    bounds = {
        name: getattr(constraint, name)
        for constraint in field.metadata
        for name in ("gt", "ge", "le")
        if getattr(constraint, name, None) is not None
    }
    low = f"above {bounds['gt']:.0f} and up" if "gt" in bounds else f"from {bounds['ge']:.0f}"
    return f" {low} to {bounds['le']:.0f}"
