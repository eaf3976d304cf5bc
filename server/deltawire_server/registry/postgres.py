"""The registry in PostgreSQL, which any number of gateways on several machines may share. The import requires psycopg.

All settings are made within a transaction, because a pooler may use another connection for each transaction.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from contextlib import aclosing, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeAlias

import psycopg
from sqlalchemy import CursorResult, bindparam, func, select, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from deltawire_server.registry.database import Database, cause_text
from deltawire_server.registry.tables import REVISION
from deltawire_server.telemetry import get_logger

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from sqlalchemy import URL, Executable, Row, Select
    from sqlalchemy.ext.asyncio import AsyncEngine

CHANNEL = "deltawire_registry"
"""The channel of notifications, whose payload names the process that has written."""

ANSWER_SECONDS = 3.0
"""How long a query that waits for no lock may take. Behind a pooler, a database that is away is only a query without an answer."""

LISTEN_SECONDS = 5.0
"""Silence after which a listening connection is checked: a connection that a firewall dropped stays silent forever."""

PROBE_SECONDS = 1.0
"""How long the notification may take that shows whether any arrive: otherwise a millisecond."""

POLL_SECONDS = 0.5
"""Interval between checks for changes where no notifications arrive. A check takes a millisecond."""

RECONNECT_SECONDS = 0.5
"""Interval between attempts to listen again."""

_ANSWER = "FATAL:"
"""In an error of a connection that the server itself refused. psycopg does not have the code of such an answer."""

_FOR_NOW = re.compile(r"the database system is|too many|remaining connection slots")
"""In such an answer, if a later one may be another: the server starts, stops, recovers, or has no free connection."""

_MISTAKE = re.compile(r"\binvalid\b")
"""In an error of libpq about the URL, such as `invalid port number`."""

MIGRATION_LOCK = 0x64656C7461
"""The number of the advisory lock for migrations."""

_PROBE = select(func.pg_notify(CHANNEL, bindparam("name")))
_REVISION = select(REVISION.c.revision)

_Begun: TypeAlias = tuple[AsyncConnection, CursorResult[Any]]
"""A connection, and the result of its first statement."""

_log = get_logger(__name__)


class PostgresDatabase(Database):
    """A PostgreSQL database.

    A query without an answer fails after `ANSWER_SECONDS`, and a transaction that waits for a lock after twice `busy_seconds`.
    """

    def __init__(self, url: URL, busy_seconds: float) -> None:
        if "connect_timeout" not in url.query:
            # It applies to each host of the URL.
            url = url.update_query_dict({"connect_timeout": str(round(ANSWER_SECONDS))})
        super().__init__(
            create_async_engine(
                url,
                # Parameters are callers' data, which must not be logged.
                hide_parameters=True,
                # Prepared statements belong to a connection, which a pooler may exchange.
                connect_args={"prepare_threshold": None},
            )
        )
        self._url = url
        self._answer_seconds = 2 * busy_seconds
        self._reader = self._engine.execution_options(isolation_level="REPEATABLE READ")
        self._fetcher = self._engine.execution_options(isolation_level="AUTOCOMMIT")
        self._name = secrets.token_hex(8)
        wait = max(1, round(busy_seconds * 1000))
        # The second setting releases the lock of a gateway that hangs or whose machine fails. The notification is delivered on
        # commit.
        self._begin = (
            f"SELECT set_config('lock_timeout', '{wait}ms', true),"
            f" set_config('idle_in_transaction_session_timeout', '{2 * wait}ms', true),"
            f" pg_notify('{CHANNEL}', '{self._name}')"
        )
        self._ending: set[asyncio.Task[None]] = set()

    def is_away(self, error: BaseException) -> bool:
        """Its server does not answer, or refuses connections for now, unlike to a wrong password or name."""
        if isinstance(error, DBAPIError):
            error = error.orig or error
        if isinstance(error, psycopg.OperationalError):
            text = str(error)
            return _FOR_NOW.search(text) is not None if _ANSWER in text else _MISTAKE.search(text) is None
        return isinstance(error, OSError)

    async def open(self) -> None:
        """No effect: the database must exist, and the store creates the tables."""

    def reading(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """A snapshot as of its first query."""
        return self._transaction(self._reader, "SELECT 1")

    def writing(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """Each statement sees all changes committed before it; the first one of the store acquires the lock."""
        return self._transaction(self._engine, self._begin)

    async def fetch(self, statement: Select[Any], values: Mapping[str, object]) -> Sequence[Row[Any]]:
        """Without the round trips that begin and end a transaction."""
        connection, result = await self._begun(self._fetcher, statement, values)
        try:
            return result.all()
        finally:
            await connection.close()

    async def lock_migrations(self, connection: AsyncConnection) -> None:
        """Acquire an advisory lock, because tables that do not exist yet cannot be locked."""
        await connection.exec_driver_sql("SELECT pg_advisory_xact_lock(%(lock)s)", {"lock": MIGRATION_LOCK})

    async def changes_elsewhere(self) -> AsyncGenerator[bool]:
        """Listen on a separate connection, or poll if a pooler keeps notifications back; start again after a failure."""
        deaf = False
        while True:
            try:
                async with aclosing(self._announced()) as announced:
                    async for _ in announced:
                        if deaf:
                            _log.info("the database announces changes again")
                        deaf = False
                        yield True
                async with aclosing(self._polled()) as polled:
                    async for _ in polled:
                        deaf = False
                        yield True
            except (psycopg.Error, SQLAlchemyError, OSError) as error:
                if not deaf:
                    _log.warning("the database does not announce changes", error=cause_text(error))
                deaf = True
                yield False
            await asyncio.sleep(RECONNECT_SECONDS)

    async def _announced(self) -> AsyncGenerator[None]:
        """Yield at first and for each notification of another process; end if there cannot be any."""
        _, parameters = self._engine.dialect.create_connect_args(self._url)
        async with await psycopg.AsyncConnection.connect(
            **parameters, autocommit=True, prepare_threshold=None
        ) as connection:
            await self._ask(connection, f"LISTEN {CHANNEL}")
            # A pooler in transaction mode accepts LISTEN, and delivers no notification while the connection is idle. It is sent
            # over another connection, because one that sends it itself would receive it.
            await self.fetch(_PROBE, {"name": self._name})
            if not [each async for each in connection.notifies(timeout=PROBE_SECONDS, stop_after=1)]:
                return
            while True:
                # At first because of changes before LISTEN; and after a silence, because a connection may have been lost.
                yield
                async for notification in connection.notifies(timeout=LISTEN_SECONDS):
                    if notification.payload != self._name:
                        break
                await self._ask(connection, "SELECT 1")  # raises if the connection is closed

    async def _polled(self) -> AsyncGenerator[None]:
        """Yield at first and when the revision has changed."""
        _log.warning(
            "notifications of the database do not arrive, as behind a pooler in transaction mode: it is polled",
            interval=POLL_SECONDS,
        )
        revision: object = None
        while True:
            seen = (await self.fetch(_REVISION, {}))[0].revision
            if seen != revision:
                revision = seen
                yield
            await asyncio.sleep(POLL_SECONDS)

    @asynccontextmanager
    async def _transaction(self, engine: AsyncEngine, begin: str) -> AsyncIterator[AsyncConnection]:
        async with asyncio.timeout(self._answer_seconds):
            connection, _ = await self._begun(engine, text(begin))
            try:
                yield connection
                await connection.commit()
            finally:
                await connection.close()

    async def _begun(
        self, engine: AsyncEngine, first: Executable, values: Mapping[str, object] | None = None
    ) -> _Begun:
        """A connection, and the result of its first statement, which waits for no lock."""
        for last in (False, True):
            try:
                return await self._answered(_execute(engine, first, values))
            except DBAPIError as error:
                # A restart of the database has closed the connections of the pool: all of them are replaced.
                if last or not error.connection_invalidated:
                    raise
        raise AssertionError  # pragma: no cover (the last attempt returns or raises)

    async def _answered(self, running: Coroutine[object, object, _Begun]) -> _Begun:
        """Wait for an answer, but not for psycopg's attempt to cancel a query at a server that does not answer.

        Raises:
            TimeoutError: There was none within `ANSWER_SECONDS`.
        """
        task = asyncio.create_task(running)
        try:
            done, _ = await asyncio.wait([task], timeout=ANSWER_SECONDS)
        except asyncio.CancelledError:
            self._abandon(task)
            raise
        if not done:
            self._abandon(task)
            raise TimeoutError
        return task.result()

    def _abandon(self, task: asyncio.Task[_Begun]) -> None:
        task.cancel()
        ending = asyncio.create_task(_end(task))
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)

    async def close(self) -> None:
        """Close all connections; those of a server that does not answer, as soon as it does or the process ends."""
        if self._ending:
            await asyncio.wait(self._ending, timeout=ANSWER_SECONDS)
        await super().close()

    async def _ask(self, connection: psycopg.AsyncConnection, statement: str) -> None:
        async with asyncio.timeout(self._answer_seconds):
            await connection.execute(statement)


async def _execute(engine: AsyncEngine, statement: Executable, values: Mapping[str, object] | None) -> _Begun:
    connection = await engine.connect()
    try:
        return connection, await connection.execute(statement, values)
    except BaseException:
        await connection.close()
        raise


async def _end(task: asyncio.Task[_Begun]) -> None:
    """Wait for a canceled task, and return its connection if it was answered at the same moment."""
    with suppress(Exception, asyncio.CancelledError):
        connection, _ = await task
        await connection.close()
