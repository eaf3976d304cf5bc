"""What differs between the databases: how to open one, how writers wait for each other, how others are told.

Both are used through SQLAlchemy's asynchronous engine. A transaction that writes begins by taking the one lock that all
writers take, so that no two of them ever meet; what it announces, others hear once it has been committed.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from contextlib import aclosing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import create_engine, event, make_url
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.ext.asyncio import create_async_engine

from deltawire_server.telemetry import get_logger

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from contextlib import AbstractAsyncContextManager

    from sqlalchemy import URL, Connection
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.pool import ConnectionPoolEntry

BUSY_SECONDS = 5.0
"""How long a write waits for another process's: a thousand times what one takes, and still short for a caller."""

POLL_SECONDS = 0.2
"""How often an SQLite file is looked at for what other processes changed: a tenth of a millisecond's work, and changes are
known everywhere well within a second."""

CHANNEL = "deltawire_registry"
"""On which PostgreSQL tells of changes; only the revision is said."""

LISTEN_SECONDS = 5.0
"""How long a listening connection is believed without a word: one that a firewall dropped would be silent for ever."""

MIGRATION_LOCK = 0x64656C7461
"""The number of the advisory lock that processes which open one PostgreSQL database at a time hold in turn."""

_log = get_logger(__name__)


class Database(ABC):
    """A database that holds a registry.

    Args:
        url: With its driver.
    """

    def __init__(self, url: URL, **options: object) -> None:
        self._url = url
        # Parameters are callers' notes: they have no business in the log.
        self._engine = create_async_engine(url, hide_parameters=True, **options)

    @abstractmethod
    async def open(self) -> None:
        """Whatever has to be done before the first connection.

        Raises:
            SQLAlchemyError, OSError: It cannot be used.
        """

    @abstractmethod
    def reading(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """A transaction that sees one state of the database, whatever others write meanwhile."""

    @abstractmethod
    def writing(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """A transaction that may write; committed on leaving, rolled back on leaving with an exception."""

    @abstractmethod
    async def lock_migrations(self, connection: AsyncConnection) -> None:
        """Within a writing transaction, wait until no other process changes tables."""

    @abstractmethod
    async def announce(self, connection: AsyncConnection, revision: int) -> None:
        """Within a writing transaction, have the others told of its revision once it is committed."""

    @abstractmethod
    def changes_elsewhere(self) -> AsyncGenerator[None]:
        """Something may have changed, each time: also when nothing has. Ends only by being closed; never fails."""

    async def close(self) -> None:
        """Close all connections."""
        await self._engine.dispose()


def database_of(url: str, busy_seconds: float = BUSY_SECONDS) -> Database:
    """The database behind an SQLAlchemy URL; `open` it, `close` it in the end.

    Args:
        url: "sqlite:////var/lib/deltawire/registry.db", "sqlite://" for one in memory that dies with the process, or
            "postgresql://user:password@host/name".
        busy_seconds: How long a write waits for another process's.

    Raises:
        ValueError: The URL is none, or of another database, or its driver is not installed. It is not repeated: it may
            hold a password.
    """
    try:
        parsed = make_url(url)
    except SQLAlchemyError as error:
        raise ValueError('the database URL is none; an example is "sqlite:////var/lib/registry.db"') from error
    kind = parsed.get_backend_name()
    if kind == "sqlite":
        return SqliteDatabase(parsed.set(drivername="sqlite+aiosqlite"), busy_seconds)
    if kind == "postgresql":
        try:
            return PostgresDatabase(parsed.set(drivername="postgresql+psycopg"), busy_seconds)
        except ModuleNotFoundError as error:
            raise ValueError(f"PostgreSQL needs {error.name}: pip install 'deltawire[postgres]'") from error
    raise ValueError(f"the registry keeps its models in SQLite or PostgreSQL, not in {kind}")


class SqliteDatabase(Database):
    """A file that several processes on one machine may share, or a database in memory."""

    def __init__(self, url: URL, busy_seconds: float) -> None:
        super().__init__(url, connect_args={"timeout": busy_seconds})
        self._busy_seconds = busy_seconds
        # Shares the engine's connections; its transactions take the write lock at once, since one that begins by
        # reading and is overtaken fails without waiting.
        self._writer = self._engine.execution_options(deltawire_write=True)
        event.listen(self._engine.sync_engine, "connect", _prepare)
        event.listen(self._engine.sync_engine, "begin", _begin)

    async def open(self) -> None:
        """Make the file and its folder if there are none."""
        if self._path is not None:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # The asynchronous driver's thread may outlive a connection that fails, and even the event loop, and then it
        # complains. So whether there is a database to connect to is found out without it.
        await asyncio.to_thread(self._probe)

    def reading(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """A snapshot, from its first look on."""
        return self._engine.begin()

    def writing(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """With the file's one write lock from the begin."""
        return self._writer.begin()

    async def lock_migrations(self, connection: AsyncConnection) -> None:
        """The write lock is enough."""

    async def announce(self, connection: AsyncConnection, revision: int) -> None:
        """Others look by themselves."""

    async def changes_elsewhere(self) -> AsyncGenerator[None]:
        """Looks at the number that SQLite changes for a connection when another one has committed."""
        if self._in_memory:
            await asyncio.Event().wait()  # nobody else can reach it
        version: object = None
        while True:
            with suppress(SQLAlchemyError, OSError):
                async with self._engine.connect() as connection:
                    while True:
                        async with connection.begin():
                            seen = (await connection.exec_driver_sql("PRAGMA data_version")).scalar()
                        if version is not None and seen != version:
                            yield
                        version = seen
                        await asyncio.sleep(POLL_SECONDS)
            version = None
            await asyncio.sleep(POLL_SECONDS)
            yield

    @property
    def _in_memory(self) -> bool:
        return self._url.database in (None, "", ":memory:") or "mode=memory" in str(self._url.query)

    @property
    def _path(self) -> Path | None:
        """The file; `None` for a database in memory, and for SQLite's own "file:" URI, which may ask for anything."""
        database = self._url.database or ""
        return None if self._in_memory or database.startswith("file:") else Path(database)

    def _probe(self) -> None:
        engine = create_engine(
            self._url.set(drivername="sqlite"), connect_args={"timeout": self._busy_seconds, "isolation_level": None}
        )
        try:
            with engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA schema_version")
                if self._path is not None:
                    _use_log(connection)
        finally:
            engine.dispose()


def _use_log(connection: Connection) -> None:
    """Let readers and a writer of several processes not wait for each other: the file remembers it."""
    if connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal":
        return
    # Processes that do this at once are told "locked" and not made to wait. It is as good if another one does it, or
    # if none can, because the file may only be read.
    with suppress(OperationalError):
        connection.exec_driver_sql("PRAGMA journal_mode = WAL")


def _prepare(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    # Left to itself the driver begins transactions late and not at all for tables, so half a migration could stay.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin(connection: Connection) -> None:
    write = connection.get_execution_options().get("deltawire_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


class PostgresDatabase(Database):
    """A PostgreSQL database, which any number of gateways on any machine may share."""

    def __init__(self, url: URL, busy_seconds: float) -> None:
        timeout = max(1, round(busy_seconds))
        milliseconds = max(1, round(busy_seconds * 1000))
        super().__init__(
            url,
            # A connection that a restart of the database has cut is not handed out.
            pool_pre_ping=True,
            connect_args={
                "connect_timeout": timeout,
                "options": f"-c lock_timeout={milliseconds} -c statement_timeout={2 * milliseconds}",
            },
        )
        self._timeout = timeout
        self._reader = self._engine.execution_options(isolation_level="REPEATABLE READ")

    async def open(self) -> None:
        """The database has to be there; its tables are made by the store."""

    def reading(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """A snapshot, from its first query on."""
        return self._reader.begin()

    def writing(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """Each statement sees what was committed before it; the first one takes the lock."""
        return self._engine.begin()

    async def lock_migrations(self, connection: AsyncConnection) -> None:
        """An advisory lock: tables that do not exist yet cannot be locked."""
        await connection.exec_driver_sql("SELECT pg_advisory_xact_lock(%(lock)s)", {"lock": MIGRATION_LOCK})

    async def announce(self, connection: AsyncConnection, revision: int) -> None:
        """PostgreSQL sends it with the commit."""
        await connection.exec_driver_sql(
            "SELECT pg_notify(%(channel)s, %(revision)s)", {"channel": CHANNEL, "revision": str(revision)}
        )

    async def changes_elsewhere(self) -> AsyncGenerator[None]:
        """Listens on a connection of its own, which is made anew when it breaks."""
        while True:
            async with aclosing(self._announcements()) as announcements:
                async for _ in announcements:
                    yield
            await asyncio.sleep(1.0)
            yield  # something may have been missed

    async def _announcements(self) -> AsyncGenerator[None]:
        """Until the connection breaks."""
        import psycopg  # only who uses PostgreSQL has it

        try:
            dsn = self._url.set(drivername="postgresql").render_as_string(hide_password=False)
            async with await psycopg.AsyncConnection.connect(
                dsn, autocommit=True, connect_timeout=self._timeout
            ) as connection:
                await connection.execute(f"LISTEN {CHANNEL}")
                yield  # what happened before this was not heard
                while True:
                    async for _ in connection.notifies(timeout=LISTEN_SECONDS, stop_after=1):
                        yield
                    await connection.execute("SELECT 1")  # fails if it is not there any more
        except (psycopg.Error, OSError) as error:
            _log.warning("the database does not announce changes", error=str(error).partition("\n")[0])
