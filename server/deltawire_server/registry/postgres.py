"""The registry in PostgreSQL, which any number of gateways on any machine may share. Importing it needs psycopg.

Everything is set within a transaction, and nothing on a connection: a pooler in between may give each transaction another.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import psycopg
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
"""How long a listening connection may be silent before it is checked: one that a firewall dropped stays silent forever."""

RECONNECT_SECONDS = 0.5
"""Between attempts to listen again: soon enough to hear of changes within a second of the database's return."""

MIGRATION_LOCK = 0x64656C7461
"""The number of the advisory lock that processes which open one database at a time hold in turn."""

_log = get_logger(__name__)


class PostgresDatabase(Database):
    """A PostgreSQL database.

    A transaction that gets no answer, from a server that hangs or a network that swallows, is given up after twice
    `busy_seconds`, and ten seconds more in which psycopg tries to have the server end it.
    """

    def __init__(self, url: URL, busy_seconds: float) -> None:
        if "connect_timeout" not in url.query:
            # For each of the hosts that a URL may name; psycopg takes less than two seconds as two.
            url = url.update_query_dict({"connect_timeout": str(max(2, round(busy_seconds)))})
        super().__init__(
            create_async_engine(
                url,
                # Parameters are callers' data, which must not be logged.
                hide_parameters=True,
                # A connection that a restart of the database has cut is not handed out.
                pool_pre_ping=True,
                # What is prepared belongs to a connection; these statements are too few and too short to need it.
                connect_args={"prepare_threshold": None},
            )
        )
        self._url = url
        self._lock_milliseconds = max(1, round(busy_seconds * 1000))
        self._answer_seconds = 2 * busy_seconds
        self._reader = self._engine.execution_options(isolation_level="REPEATABLE READ")

    async def open(self) -> None:
        """The database has to be there; its tables are made by the store."""

    def reading(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """A snapshot, from its first query on."""
        return self._transaction(self._reader)

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncConnection]:
        """Each statement sees what was committed before it; the first one takes the lock."""
        async with self._transaction(self._engine) as connection:
            await connection.exec_driver_sql(
                # The second for the others' sake: a gateway that hangs, or whose machine is gone, keeps the lock no longer.
                "SELECT set_config('lock_timeout', %(wait)s, true),"
                " set_config('idle_in_transaction_session_timeout', %(idle)s, true)",
                {"wait": f"{self._lock_milliseconds}ms", "idle": f"{2 * self._lock_milliseconds}ms"},
            )
            yield connection

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
        deaf = False
        while True:
            try:
                _, parameters = self._engine.dialect.create_connect_args(self._url)
                async with await psycopg.AsyncConnection.connect(**parameters, autocommit=True) as connection:
                    await self._ask(connection, f"LISTEN {CHANNEL}")
                    if deaf:
                        _log.info("the database announces changes again")
                    deaf = False
                    while True:
                        # At first, since what happened before was not heard; and after a silence, in which a pooler
                        # may have kept the announcements from us.
                        yield
                        async for _ in connection.notifies(timeout=LISTEN_SECONDS, stop_after=1):
                            pass
                        await self._ask(connection, "SELECT 1")  # fails if the connection is not there any more
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
