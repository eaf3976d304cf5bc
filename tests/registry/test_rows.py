from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from deltawire_server.registry.rows import DamagedRecordError, model_of, model_of_record, record_of, values_of
from tests.registry.databases import LLAMA, VECTORS, plain

if TYPE_CHECKING:
    from deltawire_server.registry.model import Model

KEPT = replace(LLAMA, revision=7)


@pytest.mark.parametrize("model", [KEPT, replace(VECTORS, revision=2**62), plain("bare")], ids=lambda model: model.id)
def test_a_model_comes_back(model: Model) -> None:
    """From a row as from the text of a change, whole."""
    assert model_of(values_of(model), model.aliases) == model
    assert model_of_record(record_of(model)) == model


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("id", b"llama"),
        ("id", None),
        ("provider_id", b"\xff"),
        ("provider_model_id", 1),
        ("engine_root", None),
        ("base_model", "\ud800"),
        ("type", "ORACLE"),
        ("type", 1),
        ("type", ["LLM"]),
        ("annotations", "{"),
        ("annotations", "[]"),
        ("annotations", b"{}"),
        ("annotations", None),
        ("annotations", '{"a": 1}'),
        ("annotations", '{"a": "\\ud800"}'),
        ("annotations", '{"\\udfff": "a"}'),
        ("annotations", "[" * 100_000),
        ("max_context_tokens", "many"),
        ("max_context_tokens", 2**31),
        ("max_context_tokens", -1),
        ("embedding_dimension", 1.5),
        ("embedding_dimension", 2**31),
        ("create_time", "yesterday"),
        ("create_time", 2**63 - 1),
        ("update_time", -(2**63)),
        ("update_time", float("inf")),
        ("update_time", None),
        ("revision", "newest"),
        ("revision", None),
    ],
)
def test_what_no_release_writes_is_damaged(column: str, value: object) -> None:
    """Whatever a column holds, no other failure comes of it, and no model that the wire cannot carry."""
    with pytest.raises(DamagedRecordError):
        model_of(values_of(KEPT) | {column: value}, KEPT.aliases)


@pytest.mark.parametrize("column", values_of(KEPT))
def test_a_column_that_is_missing_is_damage(column: str) -> None:
    """Nothing is made up for it."""
    values = values_of(KEPT)
    del values[column]
    with pytest.raises(DamagedRecordError):
        model_of(values, KEPT.aliases)


@pytest.mark.parametrize("aliases", [[b"small"], ["small", None], ["\ud800"]])
def test_an_alias_that_is_no_text_is_damage(aliases: list[object]) -> None:
    """Names are what callers write."""
    with pytest.raises(DamagedRecordError):
        model_of(values_of(KEPT), aliases)


@pytest.mark.parametrize(
    "record",
    [
        *(None, b"{}", "", "{", "[]", "1", "{}", "[" * 100_000, '{"aliases": []}'),
        *(json.dumps(values_of(KEPT) | {"aliases": aliases}) for aliases in (None, [1], 7)),
    ],
)
def test_a_text_that_no_release_writes_is_damaged(record: object) -> None:
    """A change that cannot be read is told from one that can."""
    with pytest.raises(DamagedRecordError):
        model_of_record(record)


@pytest.mark.parametrize("missing", ["create_time", "update_time"])
def test_only_registered_models_have_rows(missing: str) -> None:
    """A model without times is a discovered one, and storing it a defect of ours."""
    with pytest.raises(ValueError, match="has no times"):
        values_of(replace(LLAMA, **{missing: None}))  # type: ignore[arg-type]
