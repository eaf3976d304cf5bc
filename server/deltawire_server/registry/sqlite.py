"""SQLite: a file that gateways on one machine may share, or a database in memory, which ends with the process."""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import AsyncAdaptedQueuePool, create_engine, event
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.util import await_only, greenlet_spawn

from deltawire_server.registry.database import Database, cause_text
from deltawire_server.settings.values import is_in_memory
from deltawire_server.telemetry import get_logger

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from sqlalchemy import URL, Connection, Row, Select
    from sqlalchemy.engine.interfaces import DBAPIConnection, Dialect, ExceptionContext
    from sqlalchemy.ext.asyncio import AsyncConnection
    from sqlalchemy.pool import ConnectionPoolEntry

POLL_SECONDS = 0.2
"""Interval between checks for changes of other processes. A check takes 0.1 ms."""

PRIVATE = 0o600
"""The mode of the file: other users of the machine must not read registrations."""

_log = get_logger(__name__)


class SqliteDatabase(Database):
    """A file that several processes on one machine may share, or a database in memory."""

    def __init__(self, url: URL, busy_seconds: float) -> None:
        self._url = url
        self._busy_seconds = busy_seconds
        self._file: tuple[int, int] | None = None  # device and number of the one that was opened
        # A database in memory belongs to one connection, which transactions use in turn.
        pool = {"poolclass": AsyncAdaptedQueuePool, "pool_size": 1, "max_overflow": 0} if self._in_memory else {}
        # Parameters are callers' data, which must not be logged.
        super().__init__(create_async_engine(url, hide_parameters=True, connect_args={"timeout": busy_seconds}, **pool))
        # It shares the engine's connections. Its transactions acquire the write lock first, because one that reads first fails
        # without waiting if another transaction has written meanwhile.
        self._writer = self._engine.execution_options(deltawire_write=True)
        event.listen(self._engine.sync_engine, "do_connect", _connect)
        event.listen(self._engine.sync_engine, "connect", _prepare)
        event.listen(self._engine.sync_engine, "begin", _begin)
        if self._in_memory:
            event.listen(self._engine.sync_engine, "handle_error", _keep)

    async def open(self) -> None:
        """Create the file and its folder if they do not exist."""
        if self._in_memory:
            return
        if self._path is not None:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _make_private(self._path)
        # If a connection fails, the thread of the asynchronous driver may outlive the event loop and print an error. So the
        # first connection is made without this driver.
        await asyncio.to_thread(self._probe)
        self._file = self._file_now()

    def reading(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """A snapshot as of its first query."""
        return self._engine.begin()

    async def fetch(self, statement: Select[Any], values: Mapping[str, object]) -> Sequence[Row[Any]]:
        """As `reading`."""
        async with self.reading() as connection:
            rows: Sequence[Row[Any]] = (await connection.execute(statement, values)).all()
            return rows

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that begins with the write lock of the file. Other processes poll for it."""
        self._check_file()
        async with self._writer.begin() as connection:
            yield connection

    async def lock_migrations(self, connection: AsyncConnection) -> None:
        """No effect: the write lock is sufficient."""

    async def changes_elsewhere(self) -> AsyncGenerator[bool]:
        """Poll the data version, which changes for a connection when another one commits."""
        if self._in_memory:
            await asyncio.Event().wait()  # no other process can access it
        blind = False
        while True:
            try:
                async with self._engine.connect() as connection:
                    version: object = None
                    while True:
                        self._check_file()
                        seen = await _to_the_end(_data_version(connection))
                        blind = False
                        if seen != version:
                            version = seen
                            yield True
                        await asyncio.sleep(POLL_SECONDS)
            except (SQLAlchemyError, OSError) as error:
                if not blind:
                    _log.warning("the database's changes cannot be seen", error=cause_text(error))
                blind = True
                yield False
            await asyncio.sleep(POLL_SECONDS)

    @property
    def _in_memory(self) -> bool:
        return is_in_memory(self._url)

    @property
    def _path(self) -> Path | None:
        """The file; `None` for a database in memory, and for a "file:" URI, which may have any options."""
        database = self._url.database or ""
        return None if self._in_memory or database.startswith("file:") else Path(database)

    def _file_now(self) -> tuple[int, int] | None:
        """The device and number of the file at the path."""
        if self._path is None:
            return None
        status = self._path.stat()
        return status.st_dev, status.st_ino

    def _check_file(self) -> None:
        """Check that the file was not removed or replaced: writes to a removed file would be lost.

        Raises:
            OSError: It was.
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
    """Create the file with mode `PRIVATE`; log a warning if an existing one has another. SQLite's -wal and -shm get its mode.

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
    """Set the journal mode in which readers and a writer do not wait for each other. The file stores it."""
    if connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal":
        return
    # Processes that do this at the same time get "locked" instead of waiting. That is harmless: another process sets it, or
    # none can, because the file is read-only.
    with suppress(OperationalError):
        connection.exec_driver_sql("PRAGMA journal_mode = WAL")


async def _data_version(connection: AsyncConnection) -> object:
    async with connection.begin():
        return (await connection.exec_driver_sql("PRAGMA data_version")).scalar()


async def _to_the_end(query: Coroutine[object, object, object]) -> object:
    """Wait for a short query, even if the task is canceled: the driver's thread would otherwise answer to a closed event loop."""
    running = asyncio.create_task(query)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


def _connect(dialect: Dialect, _: object, arguments: Sequence[Any], options: Mapping[str, Any]) -> object:
    return await_only(_connected(greenlet_spawn(dialect.connect, *arguments, **options)))


async def _connected(connect: Coroutine[object, object, DBAPIConnection]) -> DBAPIConnection:
    """Connect, even if the task is canceled meanwhile: the driver would leave the connection open."""
    connecting = asyncio.create_task(connect)
    try:
        return await asyncio.shield(connecting)
    except asyncio.CancelledError:
        # In a task of its own, because this one may be canceled again.
        await asyncio.shield(asyncio.create_task(_closed(connecting)))
        raise


async def _closed(connecting: asyncio.Task[DBAPIConnection]) -> None:
    await asyncio.wait([connecting])
    if connecting.exception() is None:
        await greenlet_spawn(connecting.result().close)


def _prepare(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    # By default, the driver begins no transaction for changes of tables, so a failed migration would be half done.
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
    # Otherwise a canceled call would close its connection, and the database in memory with it.
    context.is_disconnect = False


def _begin(connection: Connection) -> None:
    write = connection.get_execution_options().get("deltawire_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
