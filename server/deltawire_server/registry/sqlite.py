"""SQLite: a file that the gateways of one machine share, or a database in memory that dies with its process."""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import AsyncAdaptedQueuePool, create_engine, event
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.ext.asyncio import create_async_engine

from deltawire_server.registry.database import Database, cause_text
from deltawire_server.settings.values import is_in_memory
from deltawire_server.telemetry import get_logger

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator
    from contextlib import AbstractAsyncContextManager

    from sqlalchemy import URL, Connection
    from sqlalchemy.engine.interfaces import DBAPIConnection, ExceptionContext
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.pool import ConnectionPoolEntry

POLL_SECONDS = 0.2
"""How often an SQLite file is looked at for what other processes changed: a tenth of a millisecond's work, and changes are
known everywhere well within a second."""

PRIVATE = 0o600
"""The mode of an SQLite file: other users of the machine must not read what callers register."""

_log = get_logger(__name__)


class SqliteDatabase(Database):
    """A file that several processes on one machine may share, or a database in memory."""

    def __init__(self, url: URL, busy_seconds: float) -> None:
        self._url = url
        self._busy_seconds = busy_seconds
        self._file: tuple[int, int] | None = None  # device and number of the one that was opened
        # A database in memory is one connection's: transactions take it in turn.
        pool = {"poolclass": AsyncAdaptedQueuePool, "pool_size": 1, "max_overflow": 0} if self._in_memory else {}
        # Parameters are callers' notes: they have no business in the log.
        super().__init__(create_async_engine(url, hide_parameters=True, connect_args={"timeout": busy_seconds}, **pool))
        # Shares the engine's connections; its transactions take the write lock at once, since one that begins by
        # reading and is overtaken fails without waiting.
        self._writer = self._engine.execution_options(deltawire_write=True)
        event.listen(self._engine.sync_engine, "connect", _prepare)
        event.listen(self._engine.sync_engine, "begin", _begin)
        if self._in_memory:
            event.listen(self._engine.sync_engine, "handle_error", _keep)

    async def open(self) -> None:
        """Make the file and its folder if there are none."""
        if self._in_memory:
            return
        if self._path is not None:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _make_private(self._path)
        # The asynchronous driver's thread may outlive a connection that fails, and even the event loop, and then it
        # complains. So whether there is a database to connect to is found out without it.
        await asyncio.to_thread(self._probe)
        self._file = self._file_now()

    def reading(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """A snapshot, from its first look on."""
        return self._engine.begin()

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncConnection]:
        """With the file's one write lock from the begin."""
        self._check_file()
        async with self._writer.begin() as connection:
            yield connection

    async def lock_migrations(self, connection: AsyncConnection) -> None:
        """The write lock is enough."""

    async def announce(self, connection: AsyncConnection, revision: int) -> None:
        """Others look by themselves."""

    async def changes_elsewhere(self) -> AsyncGenerator[None]:
        """Looks at the number that SQLite changes for a connection when another one has committed."""
        if self._in_memory:
            await asyncio.Event().wait()  # no other process can access it
        blind = False
        while True:
            try:
                async with self._engine.connect() as connection:
                    version: object = None
                    while True:
                        self._check_file()
                        async with connection.begin():
                            seen = (await connection.exec_driver_sql("PRAGMA data_version")).scalar()
                        blind = False
                        if seen != version:
                            version = seen
                            yield
                        await asyncio.sleep(POLL_SECONDS)
            except (SQLAlchemyError, OSError) as error:
                if not blind:
                    _log.warning("the database's changes cannot be seen", error=cause_text(error))
                blind = True
            await asyncio.sleep(POLL_SECONDS)

    @property
    def _in_memory(self) -> bool:
        return is_in_memory(self._url)

    @property
    def _path(self) -> Path | None:
        """The file; `None` for a database in memory, and for SQLite's own "file:" URI, which may ask for anything."""
        database = self._url.database or ""
        return None if self._in_memory or database.startswith("file:") else Path(database)

    def _file_now(self) -> tuple[int, int] | None:
        """What is at the path now."""
        if self._path is None:
            return None
        status = self._path.stat()
        return status.st_dev, status.st_ino

    def _check_file(self) -> None:
        """Check that the file is still the one that was opened: writes to a removed file would be lost with the process.

        Raises:
            OSError: It is not.
        """
        try:
            same = self._file_now() == self._file
        except FileNotFoundError:
            same = False
        if not same:
            raise OSError(
                f"{self._path} was removed or replaced while it was in use: put it back, or restart the gateway"
            )

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


def _make_private(path: Path) -> None:
    """Create the file for this user alone, or warn of one that others may use. SQLite gives -wal and -shm the same mode.

    Raises:
        OSError: It cannot be created.
    """
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, PRIVATE))
    except FileExistsError:
        for file in (path, Path(f"{path}-wal"), Path(f"{path}-shm")):
            with suppress(FileNotFoundError):
                if file.stat().st_mode & 0o777 & ~PRIVATE:
                    _log.warning("other users of this machine can access the database: chmod 600", path=str(file))


def _use_log(connection: Connection) -> None:
    """Let readers and a writer of several processes not wait for each other: the file remembers it."""
    if connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal":
        return
    # Processes that do this at the same time get "locked" instead of waiting. That is harmless: another process sets it, or
    # none can, because the file is read-only.
    with suppress(OperationalError):
        connection.exec_driver_sql("PRAGMA journal_mode = WAL")


def _prepare(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    # Left to itself the driver begins transactions late and not at all for tables, so half a migration could stay.
    connection.isolation_level = None
    # Invalid UTF-8 would fail the whole query; returned as bytes, it makes only one record damaged.
    connection.driver_connection.text_factory = _text_or_bytes
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _text_or_bytes(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _keep(context: ExceptionContext) -> None:
    # A call that is given up would take its connection along, and the database in memory with it.
    context.is_disconnect = False


def _begin(connection: Connection) -> None:
    write = connection.get_execution_options().get("deltawire_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
