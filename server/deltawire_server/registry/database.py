"""The interface of the supported databases: opening, locking between writers, notifications of changes.

Implementations are in `sqlite` and `postgres`; both use SQLAlchemy's asynchronous engine. Every writing transaction first
acquires one lock, so that writes never conflict. Other processes are notified when a transaction is committed.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from sqlalchemy import Row, Select
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

BUSY_SECONDS = 10.0
"""How long a write waits for the writes of other processes. SQLite's lock is not fair, so a writer may fail to acquire it many
times while another process writes continuously."""

_SECRETS = re.compile(r"(?i)(\b\w*(?:pass|secret)\w*\s*=\s*|://[^\s/@]*:)(?:'(?:[^'\\]|\\.)*'|[^\s'@]+)")
"""Matches secrets in connection strings and URLs that a driver quotes."""


class Database(ABC):
    """The database of a registry.

    Args:
        engine: The engine with its driver; `close` closes it.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    @abstractmethod
    async def open(self) -> None:
        """Prepare the database for the first connection.

        Raises:
            SQLAlchemyError, OSError: The database cannot be used.
        """

    def is_away(self, error: BaseException) -> bool:  # noqa: ARG002 (a file is never away)
        """Whether an error means that the database cannot be reached now, so that a later attempt may succeed without a change."""
        return False

    @abstractmethod
    def reading(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """A transaction with a consistent snapshot of the database.

        Like `writing`, it raises SQLAlchemyError or OSError if the database cannot be used or does not answer.
        """

    @abstractmethod
    async def fetch(self, statement: Select[Any], values: Mapping[str, object]) -> Sequence[Row[Any]]:
        """The rows of one query, in a transaction of its own."""

    @abstractmethod
    def writing(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """A transaction that may write. It is committed on exit, and rolled back on exit with an exception.

        A commit notifies the other processes.
        """

    @abstractmethod
    async def lock_migrations(self, connection: AsyncConnection) -> None:
        """Within a writing transaction, acquire the lock for changes to tables."""

    @abstractmethod
    def changes_elsewhere(self) -> AsyncGenerator[bool]:
        """Yield true whenever other processes may have changed something, including once at the start; false if it cannot tell.

        Some of these may be spurious. Continues after an outage of the database, and ends only when it is closed.
        """

    async def close(self) -> None:
        """Close all connections."""
        await self._engine.dispose()


def cause_text(error: BaseException) -> str:
    """The text of a database error for the log: the first line of the driver's message, with secrets masked."""
    words = str(getattr(error, "orig", error)).partition("\n")[0]
    return _SECRETS.sub(r"\1***", words) or "no answer in time"
