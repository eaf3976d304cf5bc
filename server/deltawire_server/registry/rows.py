"""Converts models to rows and back. Rows are validated, because other programs may write to the database."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from deltawire_server.registry.model import MAX_CONTEXT_TOKENS, Model, ModelType

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class DamagedRecordError(ValueError):
    """A record is not one that this release writes."""


def values_of(model: Model) -> dict[str, Any]:
    """The columns of a model's row.

    Raises:
        ValueError: The model has no times: only registered models are stored.
    """
    if model.create_time is None or model.update_time is None:
        raise ValueError(f"model {model.id!r} has no times: only registered models are stored")
    return {name: stored(getattr(model, name)) for name, (stored, _) in _COLUMNS.items()}


def model_of(values: Mapping[str, Any], aliases: Sequence[object]) -> Model:
    """The model of a row and its aliases.

    Raises:
        DamagedRecordError: The row is not one that this release writes.
    """
    try:
        fields = {name: read(values[name]) for name, (_, read) in _COLUMNS.items()}
        return Model(**fields, aliases=tuple(_text(alias) for alias in aliases))
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise DamagedRecordError(repr(error)) from error


def record_of(model: Model) -> str:
    """A model and its aliases as a text for the log of changes."""
    return json.dumps(values_of(model) | {"aliases": list(model.aliases)})


def model_of_record(record: object) -> Model:
    """The model of a text from `record_of`.

    Raises:
        DamagedRecordError: It is not a record that this release writes.
    """
    try:
        values = json.loads(_text(record))
        aliases = list(values.pop("aliases"))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise DamagedRecordError(repr(error)) from error
    return model_of(values, aliases)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    value.encode()  # raises for half a surrogate pair, which JSON allows and protobuf does not
    return value


def _count(value: object) -> int | None:
    """A number of tokens or dimensions, which has 32 bits in the API."""
    if value is not None and not (isinstance(value, int) and 0 <= value <= MAX_CONTEXT_TOKENS):
        raise ValueError(f"{value!r} is not a count")
    return value


def _annotations(text: object) -> dict[str, str]:
    annotations = json.loads(_text(text))
    if not isinstance(annotations, dict):
        raise TypeError("annotations is not a JSON object")
    return {_text(key): _text(value) for key, value in annotations.items()}


def _unchanged(value: Any) -> Any:  # noqa: ANN401 (a column of any type)
    return value


def _microseconds(time: datetime) -> int:
    return (time - _EPOCH) // _MICROSECOND


def _time(value: int) -> datetime:
    return _EPOCH + int(value) * _MICROSECOND


_COLUMNS: Mapping[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = MappingProxyType(
    {
        **dict.fromkeys(
            ("id", "provider_id", "provider_model_id", "engine_root", "base_model", "owner"), (_unchanged, _text)
        ),
        **dict.fromkeys(("max_context_tokens", "embedding_dimension"), (_unchanged, _count)),
        **dict.fromkeys(("create_time", "update_time"), (_microseconds, _time)),
        "type": (lambda kind: kind.name, ModelType.__getitem__),
        "annotations": (lambda annotations: json.dumps(dict(annotations)), _annotations),
        "revision": (_unchanged, int),
    }
)
"""How each field of a model is converted to its column, and back; the second raises for values that `values_of` never returns."""
