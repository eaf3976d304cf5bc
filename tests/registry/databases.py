"""Databases as other programs see them, and models to put into them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import NullPool, create_engine, make_url

from deltawire_server.registry.model import Model, ModelType

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Engine

NOW = datetime(2026, 3, 4, 5, 6, 7, 123456, tzinfo=UTC)
LLAMA = Model(
    "llama",
    "vllm",
    "org/llama",
    ModelType.LLM,
    ("small", "fast"),
    {"owner": "we", "note": "grüße\x00"},
    max_context_tokens=4096,
    engine_root="/models/llama",
    base_model="base",
    create_time=NOW,
    update_time=NOW.replace(year=2027),
)
VECTORS = Model(
    "vectors",
    "vllm",
    "org/vectors",
    ModelType.EMBEDDING,
    max_context_tokens=2**31 - 1,
    create_time=NOW,
    update_time=NOW,
    embedding_dimension=2**31 - 1,
)


def plain(model_id: str, *aliases: str) -> Model:
    """A model about which little is known."""
    return Model(model_id, "vllm", model_id, aliases=aliases, create_time=NOW, update_time=NOW)


def engine_of(url: str) -> Engine:
    """Another program's way to a database; keeps no connection."""
    parsed = make_url(url)
    driver = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg"}[parsed.get_backend_name()]
    return create_engine(parsed.set(drivername=driver), poolclass=NullPool)


def execute(url: str, *statements: str) -> list[tuple[Any, ...]]:
    """Have another program do something in one transaction; the rows of the last statement, if it has any."""
    rows: list[tuple[Any, ...]] = []
    with engine_of(url).begin() as connection:
        for statement in statements:
            result = connection.exec_driver_sql(statement)
            rows = [tuple(row) for row in result] if result.returns_rows else []
    return rows


def whole(url: str) -> Iterator[str]:
    """What is wrong with a registry's database; nothing if it is as our transactions leave it."""
    models = dict(execute(url, "SELECT id, revision FROM models"))
    names = execute(url, "SELECT name, model_id, position FROM names ORDER BY model_id, position")
    revisions = [revision for (revision,) in execute(url, "SELECT revision FROM changes ORDER BY revision")]
    ((last,),) = execute(url, "SELECT revision FROM registry_revision")
    if {name for name, _, position in names if position == 0} != models.keys():
        yield "ids are not the first of the names"
    for model_id in models:
        if [position for _, owner, position in names if owner == model_id] != list(
            range(sum(owner == model_id for _, owner, _ in names))
        ):
            yield f"names of {model_id} are missing"
    if revisions != list(range(last - len(revisions) + 1, last + 1)):
        yield f"revisions {revisions} do not lead to {last}"
    if any(revision > last for revision in models.values()):
        yield "a model is newer than the registry"
