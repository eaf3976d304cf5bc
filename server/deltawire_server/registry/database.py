"""What differs between the databases: how to open one, how writers wait for each other, how others are told.

Both are used through SQLAlchemy's asynchronous engine. A transaction that writes begins by taking the one lock that all
writers take, so that no two of them ever meet; what it announces, others hear once it has been committed. They are
in `sqlite` and `postgres`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from contextlib import AbstractAsyncContextManager

    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

BUSY_SECONDS = 10.0
"""How long a write waits for those of other processes: SQLite gives its lock in no order, so that one that waits while another
process writes without a pause may be passed over many times."""

_SECRETS = re.compile(r"(?i)(\b\w*(?:pass|secret)\w*\s*=\s*|://[^\s/@]*:)(?:'(?:[^'\\]|\\.)*'|[^\s'@]+)")
"""Where a connection string or a URL that a driver quotes has a secret."""


class Database(ABC):
    """A database that holds a registry.

    Args:
        engine: With its driver; closed with this.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    @abstractmethod
    async def open(self) -> None:
        """Whatever has to be done before the first connection.

        Raises:
            SQLAlchemyError, OSError: It cannot be used.
        """

    @abstractmethod
    def reading(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """A transaction that sees one state of the database, whatever others write meanwhile.

        It raises SQLAlchemyError or OSError, as `writing` does, if the database cannot be used or does not answer.
        """

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
        """Something may have changed since it was last asked, each time: also when nothing has, and at first.

        Goes on when the database is back from wherever it was; ends only by being closed.
        """

    async def close(self) -> None:
        """Close all connections."""
        await self._engine.dispose()


def said(error: BaseException) -> str:
    """What a database's failure says, for the log: the first line of its driver's words, with secrets masked."""
    words = str(getattr(error, "orig", error)).partition("\n")[0]
    return _SECRETS.sub(r"\1***", words) or "no answer in time"
