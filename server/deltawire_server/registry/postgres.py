"""The registry in PostgreSQL, which any number of gateways on several machines may share. The import requires psycopg.

All settings are made within a transaction, because a pooler may use another connection for each transaction.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import psycopg
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine

from deltawire_server.registry.database import Database, cause_text
from deltawire_server.telemetry import get_logger

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator
    from contextlib import AbstractAsyncContextManager

    from sqlalchemy import URL
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

CHANNEL = "deltawire_registry"
"""The channel of notifications, whose payload is the revision."""

LISTEN_SECONDS = 5.0
"""Silence after which a listening connection is checked: a connection that a firewall dropped stays silent forever."""

RECONNECT_SECONDS = 0.5
"""Interval between attempts to listen again."""

_ANSWER = "FATAL:"
"""In an error of a connection that the server itself refused. psycopg does not have the code of such an answer."""

_FOR_NOW = re.compile(r"the database system is|too many|remaining connection slots")
"""In such an answer, if a later one may be another: the server starts, stops, recovers, or has no free connection."""

MIGRATION_LOCK = 0x64656C7461
"""The number of the advisory lock for migrations."""

_log = get_logger(__name__)


class PostgresDatabase(Database):
    """A PostgreSQL database.

    A transaction without an answer fails after twice `busy_seconds`, and up to ten seconds more for psycopg's attempt to cancel it
    on the server.
    """

    def __init__(self, url: URL, busy_seconds: float) -> None:
        if "connect_timeout" not in url.query:
            # It applies to each host of the URL; for psycopg, the minimum is two seconds.
            url = url.update_query_dict({"connect_timeout": str(max(2, round(busy_seconds)))})
        super().__init__(
            create_async_engine(
                url,
                # Parameters are callers' data, which must not be logged.
                hide_parameters=True,
                # Do not use a connection that a restart of the database has closed.
                pool_pre_ping=True,
                # Prepared statements belong to a connection, which a pooler may exchange.
                connect_args={"prepare_threshold": None},
            )
        )
        self._url = url
        self._lock_milliseconds = max(1, round(busy_seconds * 1000))
        self._answer_seconds = 2 * busy_seconds
        self._reader = self._engine.execution_options(isolation_level="REPEATABLE READ")

    def is_away(self, error: BaseException) -> bool:
        """Its server does not answer, or refuses connections for now, unlike to a wrong password or name."""
        if isinstance(error, DBAPIError):
            error = error.orig or error
        if isinstance(error, psycopg.OperationalError):
            return _ANSWER not in str(error) or _FOR_NOW.search(str(error)) is not None
        return isinstance(error, OSError)

    async def open(self) -> None:
        """No effect: the database must exist, and the store creates the tables."""

    def reading(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """A snapshot as of its first query."""
        return self._transaction(self._reader)

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncConnection]:
        """Each statement sees all changes committed before it; the first one of the store acquires the lock."""
        async with self._transaction(self._engine) as connection:
            await connection.exec_driver_sql(
                # The second setting releases the lock of a gateway that hangs or whose machine fails.
                "SELECT set_config('lock_timeout', %(wait)s, true),"
                " set_config('idle_in_transaction_session_timeout', %(idle)s, true)",
                {"wait": f"{self._lock_milliseconds}ms", "idle": f"{2 * self._lock_milliseconds}ms"},
            )
            yield connection

    async def lock_migrations(self, connection: AsyncConnection) -> None:
        """Acquire an advisory lock, because tables that do not exist yet cannot be locked."""
        await connection.exec_driver_sql("SELECT pg_advisory_xact_lock(%(lock)s)", {"lock": MIGRATION_LOCK})

    async def announce(self, connection: AsyncConnection, revision: int) -> None:
        """Send a notification, which PostgreSQL delivers on commit."""
        await connection.exec_driver_sql(
            "SELECT pg_notify(%(channel)s, %(revision)s)", {"channel": CHANNEL, "revision": str(revision)}
        )

    async def changes_elsewhere(self) -> AsyncGenerator[None]:
        """Listen on a separate connection, and reconnect if it fails."""
        deaf = False
        while True:
            try:
                _, parameters = self._engine.dialect.create_connect_args(self._url)
                async with await psycopg.AsyncConnection.connect(
                    **parameters, autocommit=True, prepare_threshold=None
                ) as connection:
                    await self._ask(connection, f"LISTEN {CHANNEL}")
                    if deaf:
                        _log.info("the database announces changes again")
                    deaf = False
                    while True:
                        # First because of changes before LISTEN; and after a silence, because a pooler may have withheld
                        # notifications.
                        yield
                        async for _ in connection.notifies(timeout=LISTEN_SECONDS, stop_after=1):
                            pass
                        await self._ask(connection, "SELECT 1")  # raises if the connection is closed
            except (psycopg.Error, OSError) as error:
                if not deaf:
                    _log.warning("the database does not announce changes", error=cause_text(error))
                deaf = True
            await asyncio.sleep(RECONNECT_SECONDS)

    @asynccontextmanager
    async def _transaction(self, engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
        async with asyncio.timeout(self._answer_seconds), engine.begin() as connection:
            yield connection

    async def _ask(self, connection: psycopg.AsyncConnection, statement: str) -> None:
        async with asyncio.timeout(self._answer_seconds):
            await connection.execute(statement)
