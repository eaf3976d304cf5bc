"""Registered models in a database: SQLite, in a file that several processes may share.

Each write is one transaction. That a name has one owner is the database's own constraint, so it holds between processes
too. Whatever the database cannot do is a `RegistryError` with STORE_UNAVAILABLE whose cause is in the log and not in
the message: the message goes to callers, who have no business with paths and SQL.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import create_engine, delete, event, insert, make_url, select
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import create_async_engine

from deltawire_server.errors import Reason, RegistryError
from deltawire_server.registry.model import MAX_CONTEXT_TOKENS, Model, ModelType
from deltawire_server.registry.schema import LATEST, MODELS, NAMES, migrate, version_of
from deltawire_server.telemetry import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sqlalchemy import URL, Connection, Row
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.pool import ConnectionPoolEntry

_log = get_logger(__name__)

BUSY_SECONDS = 5.0
"""How long a write waits for another process's: a thousand times what one takes, and still short for a caller."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class Store:
    """The database of registered models. `open` it before anything else, `close` it in the end.

    Args:
        url: An SQLAlchemy URL, "sqlite:////var/lib/deltawire/registry.db" for example; "sqlite://" lives in memory and
            dies with the process.
        busy_seconds: How long a write waits for another process's.

    Raises:
        ValueError: The URL is none, or of another database than SQLite.
    """

    def __init__(self, url: str, *, busy_seconds: float = BUSY_SECONDS) -> None:
        self._url = _sqlite_url(url)
        self._engine = create_async_engine(self._url, connect_args={"timeout": busy_seconds}, hide_parameters=True)
        # Shares the engine's connections; its transactions take the write lock at once, since one that begins by
        # reading and is overtaken fails without waiting.
        self._writer = self._engine.execution_options(deltawire_write=True)
        event.listen(self._engine.sync_engine, "connect", _prepare)
        event.listen(self._engine.sync_engine, "begin", _begin)

    async def open(self) -> None:
        """Make the file and its folder if there are none, and bring the tables up to date; then call the others.

        A database that is up to date is not written to.

        Raises:
            RegistryError: It cannot be opened, or is of a newer release.
        """
        with _translated("open"):
            _make_folder(self._url)
            _probe(self._url)
            async with self._engine.begin() as connection:
                version = await connection.run_sync(version_of)
            if version < LATEST:
                async with self._writer.begin() as connection:
                    await connection.run_sync(migrate)

    async def close(self) -> None:
        """Close all connections. Nothing else may be called afterwards."""
        await self._engine.dispose()

    async def list(self) -> list[Model]:
        """All models that can be read, by ascending id. A damaged record is logged and left out.

        Raises:
            RegistryError: The database cannot be read.
        """
        with _translated("list"):
            async with self._engine.begin() as connection:
                rows = (await connection.execute(select(MODELS).order_by(MODELS.c.id))).all()
                names = (await connection.execute(select(NAMES).order_by(NAMES.c.model_id, NAMES.c.position))).all()
        aliases: dict[str, list[str]] = {}
        for name in names:
            if name.name != name.model_id:
                aliases.setdefault(name.model_id, []).append(name.name)
        return [model for row in rows if (model := _model(row, aliases.get(row.id, ()))) is not None]

    async def insert(self, model: Model) -> bool:
        """Keep a model under its id and aliases.

        Args:
            model: With both times set.

        Returns:
            Whether it is kept; `False` if a name of it has an owner, and then nothing has changed: `list` tells who.

        Raises:
            RegistryError: The database cannot be written.
        """
        with _translated("insert"):
            try:
                async with self._writer.begin() as connection:
                    await connection.execute(insert(MODELS).values(**_values(model)))
                    await connection.execute(
                        insert(NAMES),
                        [
                            {"name": name, "model_id": model.id, "position": position}
                            for position, name in enumerate(model.names)
                        ],
                    )
            except IntegrityError:
                return False
        return True

    async def delete(self, name: str) -> str | None:
        """Forget the model of this id or alias, damaged or not, with all its names.

        Returns:
            Its id; `None` if no model has this name.

        Raises:
            RegistryError: The database cannot be written.
        """
        with _translated("delete"):
            async with self._writer.begin() as connection:
                return await connection.run_sync(_delete, name)


def _sqlite_url(url: str) -> URL:
    try:
        parsed = make_url(url)
    except SQLAlchemyError as error:
        # Not the URL itself: another database's may hold a password.
        raise ValueError('the database URL is none; an example is "sqlite:////var/lib/registry.db"') from error
    if parsed.get_backend_name() != "sqlite":
        raise ValueError(f"the registry keeps its models in SQLite, not in {parsed.get_backend_name()}")
    return parsed.set(drivername="sqlite+aiosqlite")


def _make_folder(url: URL) -> None:
    database = url.database or ":memory:"
    # "file:" is SQLite's own URI, which may ask for a read-only or an in-memory database.
    if database != ":memory:" and not database.startswith("file:"):
        Path(database).parent.mkdir(mode=0o700, parents=True, exist_ok=True)


def _probe(url: URL) -> None:
    # The asynchronous driver's thread may outlive a connection that fails, and even the event loop, and then it
    # complains. So whether there is a database to connect to is found out without it.
    engine = create_engine(url.set(drivername="sqlite"))
    try:
        with engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA schema_version")
    finally:
        engine.dispose()


def _prepare(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    # Left to itself the driver begins transactions late and not at all for tables, so half a migration could stay.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys = ON")
    # Readers and a writer of several processes do not wait for each other.
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.close()


def _begin(connection: Connection) -> None:
    write = connection.get_execution_options().get("deltawire_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _delete(connection: Connection, name: str) -> str | None:
    model_id = connection.scalar(select(NAMES.c.model_id).where(NAMES.c.name == name))
    if model_id is not None:
        connection.execute(delete(NAMES).where(NAMES.c.model_id == model_id))
        connection.execute(delete(MODELS).where(MODELS.c.id == model_id))
    return model_id


@contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except (SQLAlchemyError, OSError) as error:
        _log.error("database unusable", call=what, error=str(getattr(error, "orig", error)))
        raise RegistryError(
            Reason.STORE_UNAVAILABLE,
            "the registry's database cannot be used now; models that are known already can still be called",
            retry_after=1.0,
        ) from error


def _values(model: Model) -> dict[str, object]:
    if model.create_time is None or model.update_time is None:
        raise ValueError(f"model {model.id!r} has no times: only registered models are stored")
    return {
        "id": model.id,
        "provider_id": model.provider_id,
        "provider_model_id": model.provider_model_id,
        "type": model.type.name,
        "metadata": json.dumps(dict(model.metadata)),
        "max_context_tokens": model.max_context_tokens,
        "root": model.root,
        "parent": model.parent,
        "create_time": (model.create_time - _EPOCH) // _MICROSECOND,
        "update_time": (model.update_time - _EPOCH) // _MICROSECOND,
    }


def _model(row: Row[tuple[object, ...]], aliases: Sequence[str]) -> Model | None:
    # SQLite keeps in any column whatever another program puts there, so each value is looked at.
    try:
        return Model(
            id=_text(row.id),
            provider_id=_text(row.provider_id),
            provider_model_id=_text(row.provider_model_id),
            type=ModelType[row.type],
            aliases=tuple(_text(alias) for alias in aliases),
            metadata=_metadata(row.metadata),
            max_context_tokens=_tokens(row.max_context_tokens),
            root=_text(row.root),
            parent=_text(row.parent),
            create_time=_EPOCH + int(row.create_time) * _MICROSECOND,
            update_time=_EPOCH + int(row.update_time) * _MICROSECOND,
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        _log.warning("damaged record left out", model=row.id, error=repr(error))
        return None


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _tokens(value: object) -> int | None:
    if value is not None and not (isinstance(value, int) and 0 <= value <= MAX_CONTEXT_TOKENS):
        raise ValueError(f"{value!r} is no number of tokens")
    return value


def _metadata(text: str) -> dict[str, str]:
    metadata = json.loads(text)
    if not isinstance(metadata, dict):
        raise TypeError("metadata is no JSON object")
    return {key: _text(value) for key, value in metadata.items()}
