"""The tables of the registry, and the numbered migration steps that create them.

Released steps must not be edited, because existing databases have applied them. To change a table, append a step and update the
`Table`; a test compares the tables with the result of the steps.
"""

from __future__ import annotations

import time
from types import MappingProxyType
from typing import TYPE_CHECKING

from sqlalchemy import BigInteger, Column, ForeignKey, Integer, MetaData, Table, Text, func, insert, inspect, select

from deltawire_server.errors import Reason, RegistryError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import Connection

TABLES = MetaData()

SCHEMA_STEPS = Table(
    "schema_steps",
    TABLES,
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("applied_time", BigInteger, nullable=False),
)
"""The applied steps, with their times in microseconds since 1970."""

MODELS = Table(
    "models",
    TABLES,
    Column("id", Text, primary_key=True),
    Column("provider_id", Text, nullable=False),
    Column("provider_model_id", Text, nullable=False),
    Column("type", Text, nullable=False),
    Column("annotations", Text, nullable=False),
    Column("max_context_tokens", BigInteger),
    Column("engine_root", Text, nullable=False),
    Column("base_model", Text, nullable=False),
    Column("create_time", BigInteger, nullable=False),
    Column("update_time", BigInteger, nullable=False),
    Column("embedding_dimension", BigInteger),
    Column("revision", BigInteger, nullable=False),
    Column("owner", Text, nullable=False),
)
"""Registered models. `type` is the name in the enum, `annotations` a JSON object of strings; times are in microseconds since 1970.
`revision` is that of the row's last change."""

NAMES = Table(
    "names",
    TABLES,
    Column("name", Text, primary_key=True),
    Column("model_id", Text, ForeignKey("models.id", ondelete="CASCADE"), nullable=False),
    Column("position", Integer, nullable=False),
)
"""All ids (position 0) and aliases (from 1). The key makes each name unique."""

REVISION = Table(
    "registry_revision",
    TABLES,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("revision", BigInteger, nullable=False),
    Column("models", BigInteger, nullable=False),
    Column("aliases", BigInteger, nullable=False),
    Column("bytes", BigInteger, nullable=False),
)
"""One row, with the revision of the last change, and the size of all models, so that a write does not count them. Every write
changes it first, so writes are ordered by their revisions. A revision that is rolled back is used again, so there are no gaps.
Text is counted as stored: names in characters, annotations as JSON in ASCII."""

CHANGES = Table(
    "changes",
    TABLES,
    Column("revision", BigInteger, primary_key=True, autoincrement=False),
    Column("change", Text, nullable=False),
    Column("model_id", Text, nullable=False),
    Column("record", Text, nullable=False),
)
"""The last changes, for other processes. `change` is the name in the enum, `record` the model as JSON after the change, or before
its removal."""

STEPS: Mapping[int, tuple[str, ...]] = MappingProxyType(
    {
        1: (
            "CREATE TABLE schema_steps (version INTEGER NOT NULL PRIMARY KEY, applied_time BIGINT NOT NULL)",
            """
            CREATE TABLE models (
                id TEXT NOT NULL PRIMARY KEY,
                provider_id TEXT NOT NULL,
                provider_model_id TEXT NOT NULL,
                type TEXT NOT NULL,
                metadata TEXT NOT NULL,
                max_context_tokens BIGINT,
                root TEXT NOT NULL,
                parent TEXT NOT NULL,
                create_time BIGINT NOT NULL,
                update_time BIGINT NOT NULL
            )
            """,
            """
            CREATE TABLE names (
                name TEXT NOT NULL PRIMARY KEY,
                model_id TEXT NOT NULL REFERENCES models (id) ON DELETE CASCADE,
                position INTEGER NOT NULL
            )
            """,
            "CREATE INDEX names_by_model ON names (model_id)",
        ),
        2: (
            "ALTER TABLE models ADD COLUMN embedding_dimension BIGINT",
            "ALTER TABLE models ADD COLUMN revision BIGINT NOT NULL DEFAULT 1",
            "CREATE TABLE registry_revision (id INTEGER NOT NULL PRIMARY KEY, revision BIGINT NOT NULL)",
            "INSERT INTO registry_revision VALUES (1, 1)",
            """
            CREATE TABLE changes (
                revision BIGINT NOT NULL PRIMARY KEY,
                change TEXT NOT NULL,
                model_id TEXT NOT NULL,
                record TEXT NOT NULL
            )
            """,
        ),
        3: (
            "ALTER TABLE models RENAME COLUMN metadata TO annotations",
            "ALTER TABLE models RENAME COLUMN root TO engine_root",
            "ALTER TABLE models RENAME COLUMN parent TO base_model",
            "ALTER TABLE models ADD COLUMN owner TEXT NOT NULL DEFAULT ''",
            # Their records have the old names. Processes read all models again.
            "DELETE FROM changes",
        ),
        4: (
            "ALTER TABLE registry_revision ADD COLUMN models BIGINT NOT NULL DEFAULT 0",
            "ALTER TABLE registry_revision ADD COLUMN aliases BIGINT NOT NULL DEFAULT 0",
            "ALTER TABLE registry_revision ADD COLUMN bytes BIGINT NOT NULL DEFAULT 0",
            """
            UPDATE registry_revision SET
                models = (SELECT count(*) FROM models),
                aliases = (SELECT count(*) FROM names WHERE position > 0),
                bytes = (SELECT coalesce(sum(length(name)), 0) FROM names) + (
                    SELECT coalesce(sum(
                        length(id) + length(provider_id) + length(provider_model_id) + length(annotations)
                        + length(engine_root) + length(base_model) + length(owner)
                    ), 0) FROM models
                )
            """,
        ),
    }
)
"""The statements of each step, in ascending order."""

LATEST = max(STEPS)


def version_of(connection: Connection) -> int:
    """The last applied step; 0 for an empty database.

    Raises:
        RegistryError: STORE_UNAVAILABLE: a newer release has migrated the database.
    """
    if not inspect(connection).has_table(SCHEMA_STEPS.name):
        return 0
    version = connection.scalar(select(func.max(SCHEMA_STEPS.c.version))) or 0
    if version > LATEST:
        raise RegistryError(
            Reason.STORE_UNAVAILABLE,
            f"the registry's database is of version {version}, and this release knows up to {LATEST}: use a newer one",
        )
    return version


def migrate(connection: Connection) -> None:
    """Apply the missing steps. The caller holds the write lock, and commits all of them or none."""
    for version in range(version_of(connection) + 1, LATEST + 1):
        for statement in STEPS[version]:
            connection.exec_driver_sql(statement)
        connection.execute(insert(SCHEMA_STEPS).values(version=version, applied_time=time.time_ns() // 1000))
