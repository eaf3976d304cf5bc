"""The registry's tables, and the numbered steps that lead to them from an empty database.

A step is never edited once it has been released: databases out there have taken it. To change a table, append a step
and bring the `Table` below in line; a test holds that the steps lead to just these tables.
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
"""The steps taken, and when, in microseconds since 1970."""

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
"""Registered models. `type` is the enum's name, `annotations` a JSON object of strings; times: microseconds since 1970.
`revision` is that of the change that made the row what it is."""

NAMES = Table(
    "names",
    TABLES,
    Column("name", Text, primary_key=True),
    Column("model_id", Text, ForeignKey("models.id", ondelete="CASCADE"), nullable=False),
    Column("position", Integer, nullable=False),
)
"""Every id (position 0) and alias (from 1). Its key is what makes a name unique, whichever of the two it is."""

REVISION = Table(
    "registry_revision",
    TABLES,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("revision", BigInteger, nullable=False),
)
"""One row, with the revision of the last change. Every write begins by raising it, so that writes are in one order, which
is that of their revisions, and a revision that is rolled back is used again: there are no gaps."""

CHANGES = Table(
    "changes",
    TABLES,
    Column("revision", BigInteger, primary_key=True, autoincrement=False),
    Column("change", Text, nullable=False),
    Column("model_id", Text, nullable=False),
    Column("record", Text, nullable=False),
)
"""The last changes, for processes that have to catch up. `change` is the enum's name, `record` the model as JSON: after the
change, or before it if it was removed."""

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
            # Their records have the old names. Processes that miss them read all models anew.
            "DELETE FROM changes",
        ),
    }
)
"""What each step does, in ascending order."""

LATEST = max(STEPS)


def version_of(connection: Connection) -> int:
    """The last step that this database has taken; 0 for an empty one.

    Raises:
        RegistryError: It was taken further by a newer release, whose tables this one does not know.
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
    """Take the steps that are missing. The caller holds the write lock and commits all of them or none."""
    for version in range(version_of(connection) + 1, LATEST + 1):
        for statement in STEPS[version]:
            connection.exec_driver_sql(statement)
        connection.execute(insert(SCHEMA_STEPS).values(version=version, applied_time=time.time_ns() // 1000))
