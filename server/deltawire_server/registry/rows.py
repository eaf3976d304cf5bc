"""Models as rows and back. Nothing that a row holds is believed: another program may have put it there."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from deltawire_server.registry.model import MAX_CONTEXT_TOKENS, Model, ModelType

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class DamagedRecordError(ValueError):
    """A record is not one that this release writes."""


def values_of(model: Model) -> dict[str, Any]:
    """The columns of a model's row.

    Raises:
        ValueError: It has no times: only registered models are stored.
    """
    if model.create_time is None or model.update_time is None:
        raise ValueError(f"model {model.id!r} has no times: only registered models are stored")
    return {
        "id": model.id,
        "provider_id": model.provider_id,
        "provider_model_id": model.provider_model_id,
        "type": model.type.name,
        "annotations": json.dumps(dict(model.annotations)),
        "max_context_tokens": model.max_context_tokens,
        "engine_root": model.engine_root,
        "base_model": model.base_model,
        "create_time": (model.create_time - _EPOCH) // _MICROSECOND,
        "update_time": (model.update_time - _EPOCH) // _MICROSECOND,
        "embedding_dimension": model.embedding_dimension,
        "revision": model.revision,
        "owner": model.owner,
    }


def model_of(values: Mapping[str, Any], aliases: Sequence[object]) -> Model:
    """The model of a row and its aliases.

    Raises:
        DamagedRecordError: The row is not one that this release writes.
    """
    try:
        return Model(
            id=_text(values["id"]),
            provider_id=_text(values["provider_id"]),
            provider_model_id=_text(values["provider_model_id"]),
            type=ModelType[values["type"]],
            aliases=tuple(_text(alias) for alias in aliases),
            annotations=_annotations(values["annotations"]),
            max_context_tokens=_count(values["max_context_tokens"]),
            engine_root=_text(values["engine_root"]),
            base_model=_text(values["base_model"]),
            create_time=_EPOCH + int(values["create_time"]) * _MICROSECOND,
            update_time=_EPOCH + int(values["update_time"]) * _MICROSECOND,
            embedding_dimension=_count(values["embedding_dimension"]),
            revision=int(values["revision"]),
            owner=_text(values["owner"]),
        )
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise DamagedRecordError(repr(error)) from error


def record_of(model: Model) -> str:
    """A model with its aliases as the text that the list of changes keeps."""
    return json.dumps(values_of(model) | {"aliases": list(model.aliases)})


def model_of_record(record: object) -> Model:
    """The model of such a text.

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
        raise TypeError(f"{value!r} is no text")
    value.encode()  # fails for half a surrogate pair, which JSON can spell and the wire cannot hold
    return value


def _count(value: object) -> int | None:
    """Tokens, or a dimension: what the wire holds in 32 bits."""
    if value is not None and not (isinstance(value, int) and 0 <= value <= MAX_CONTEXT_TOKENS):
        raise ValueError(f"{value!r} is no count")
    return value


def _annotations(text: object) -> dict[str, str]:
    annotations = json.loads(_text(text))
    if not isinstance(annotations, dict):
        raise TypeError("annotations is not a JSON object")
    return {_text(key): _text(value) for key, value in annotations.items()}
