"""Two registries that share a PostgreSQL behind pgbouncer in transaction mode."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest
import structlog

from deltawire_server.errors import Reason, RegistryError
from deltawire_server.registry import postgres as postgres_module
from deltawire_server.registry.change_log_reader import ChangeLogReader
from deltawire_server.registry.registered_index import RegisteredIndex
from deltawire_server.registry.store import Store
from deltawire_server.registry.writes import Writes
from tests.registry.databases import plain
from tests.support.pooler import Pooler, pooler

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from tests.support.postgres import PostgresServer

pytestmark = pytest.mark.postgres

LIMIT = 60.0
BUSY_SECONDS = 5.0


class Side:
    """One registry: its database, its memory and its writes."""

    def __init__(self, url: str) -> None:
        self.store = Store(url, busy_seconds=BUSY_SECONDS)
        self.known = RegisteredIndex()
        self.reader = ChangeLogReader(self.store, self.known)
        self.writes = Writes(self.store, self.known, self.reader)


@contextlib.asynccontextmanager
async def side(url: str) -> AsyncIterator[Side]:
    """A registry that is open."""
    opened = Side(url)
    await opened.store.open()
    await opened.reader.start()
    try:
        yield opened
    finally:
        await opened.writes.finish()
        await opened.reader.stop()
        await opened.store.close()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition that nothing announces."""
    async with asyncio.timeout(LIMIT):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.fixture
def direct(postgres: PostgresServer) -> str:
    """A database without a pooler."""
    return postgres.create_database()


@pytest.fixture
def pool(tmp_path: Path, direct: str) -> Iterator[Pooler]:
    """A pgbouncer in front of it."""
    with pooler(tmp_path / "pgbouncer", direct) as running:
        yield running


async def test_changes_reach_the_other_registry(pool: Pooler) -> None:
    """By polling, which the log says once; no statement fails because it was prepared on another connection."""
    with structlog.testing.capture_logs() as logs:
        async with side(pool.url) as one, side(pool.url) as two:
            async with asyncio.timeout(LIMIT):
                await asyncio.gather(
                    *(
                        mine.writes.insert(plain(f"{number}-{name}"))
                        for number in range(20)
                        for name, mine in (("a", one), ("b", two))
                    )
                )
            await until(lambda: len(one.known.models) == len(two.known.models) == 40)
            assert one.known.models == two.known.models
            await until(lambda: len([log for log in logs if "it is polled" in log["event"]]) == 2)
    assert [log for log in logs if log["log_level"] == "error"] == []


async def test_notifications_arrive_without_a_pooler(direct: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe does not take a server for a pooler, and own writes are no news."""
    monkeypatch.setattr(postgres_module, "LISTEN_SECONDS", LIMIT)
    with structlog.testing.capture_logs() as logs:
        async with side(direct) as one, side(direct) as two:
            for number in range(5):
                await one.writes.insert(plain(str(number)))
                await until(lambda number=number: str(number) in two.known.models)  # type: ignore[misc]
    assert logs == []


async def test_a_pooler_that_is_killed(pool: Pooler) -> None:
    """Writes fail while it is away, at once; later ones succeed, and the other registry has them."""
    async with side(pool.url) as one, side(pool.url) as two:
        await one.writes.insert(plain("before"))
        pool.stop()
        with pytest.raises(RegistryError) as caught:
            await one.writes.insert(plain("lost"))
        assert caught.value.reason is Reason.STORE_UNAVAILABLE
        await until(lambda: two.reader.behind_since is not None)
        pool.start()
        await one.writes.insert(plain("after"))
        await until(lambda: "after" in two.known.models)
        assert sorted(two.known.models) == ["after", "before"]
        await until(lambda: two.reader.behind_since is None)


async def test_a_server_that_is_away_behind_the_pooler(pool: Pooler, postgres: PostgresServer) -> None:
    """The pooler keeps the queries; they fail all the same, and the registries go on when the server is back."""
    async with side(pool.url) as one, side(pool.url) as two:
        await one.writes.insert(plain("before"))
        with postgres.down():
            with pytest.raises(RegistryError):
                await one.writes.insert(plain("lost"))
            await until(lambda: two.reader.behind_since is not None)
        async with asyncio.timeout(LIMIT):
            while "after" not in one.known.models:
                with contextlib.suppress(RegistryError):  # until the pooler has noticed
                    await one.writes.insert(plain("after"))
        await until(lambda: "after" in two.known.models)


async def test_a_pooler_that_is_silent(pool: Pooler) -> None:
    """A query without an answer fails after a few seconds, and none waits for it afterwards."""
    async with side(pool.url) as one:
        await one.writes.insert(plain("before"))
        with pool.frozen():
            with pytest.raises(RegistryError) as caught:
                await one.writes.insert(plain("lost"))
            assert isinstance(caught.value.__cause__, TimeoutError)
        async with asyncio.timeout(LIMIT):
            await one.writes.insert(plain("after"))
