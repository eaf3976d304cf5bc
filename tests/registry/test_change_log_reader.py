"""Memory follows the database, for both databases and all writers; and what stores hear of each other."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from contextlib import aclosing, asynccontextmanager, closing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import structlog

from deltawire_server.errors import Reason, RegistryError
from deltawire_server.registry import change_log_reader, sqlite
from deltawire_server.registry import postgres as postgres_database
from deltawire_server.registry.change_log_reader import ChangeLogReader
from deltawire_server.registry.registered_index import RegisteredIndex
from deltawire_server.registry.store import Change, ChangeKind, Store
from tests.registry.databases import LLAMA, VECTORS, execute, plain
from tests.support.gateway import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from deltawire_server.registry.model import Model
    from tests.support.postgres import PostgresServer


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits longer between two attempts than tests want to."""
    monkeypatch.setattr(sqlite, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(postgres_database, "RECONNECT_SECONDS", 0.01)
    monkeypatch.setattr(change_log_reader, "RETRY_SECONDS", 0.01)


@pytest.fixture
def url(database_url: str) -> str:
    """Of each kind of database."""
    return database_url


@asynccontextmanager
async def opened(url: str, changes_kept: int = 100) -> AsyncIterator[Store]:
    """A store, as another process has it."""
    store = Store(url, busy_seconds=60, changes_kept=changes_kept)
    try:
        await store.open()
        yield store
    finally:
        await store.close()


@pytest.fixture
async def other(url: str) -> AsyncIterator[Store]:
    """Another process's store."""
    async with opened(url) as store:
        yield store


@pytest.fixture
async def store(url: str) -> AsyncIterator[Store]:
    """Ours."""
    async with opened(url) as store:
        yield store


class Memory:
    """What a follower keeps in step, and what it told."""

    def __init__(self, store: Store) -> None:
        self.known = RegisteredIndex()
        self.told: list[tuple[Model | None, Model | None]] = []
        self.follower = ChangeLogReader(store, self.known, lambda before, now: self.told.append((before, now)))

    @property
    def models(self) -> list[Model]:
        """By id."""
        return [model for _, model in sorted(self.known.models.items())]


@asynccontextmanager
async def following(store: Store) -> AsyncIterator[Memory]:
    """A memory that follows a store."""
    memory = Memory(store)
    await memory.follower.start()
    try:
        yield memory
    finally:
        await memory.follower.stop()


async def inserted(store: Store, model: Model) -> Model:
    """A model that is new, as it is kept."""
    kept = await store.insert(model)
    assert kept is not None
    return kept


async def updated(store: Store, before: Model, **changes: Any) -> Model:  # noqa: ANN401 (fields)
    """A model that is there, with changes, as it is kept."""
    kept = await store.update(before, replace(before, **changes))
    assert kept is not None
    return kept


async def test_changes_are_asked_for_at_first_and_after_each_of_another_process(store: Store, other: Store) -> None:
    """What happened before anybody listened was not heard, so the first look is due at once."""
    async with asyncio.timeout(60), aclosing(store.changes_elsewhere()) as changes:
        await anext(changes)
        for model in (LLAMA, VECTORS):
            kept = await inserted(other, model)
            seen: list[Change] | None = []
            while not seen:
                await anext(changes)
                seen = await store.changes_after(kept.revision - 1)
            assert seen == [Change(kept.revision, ChangeKind.ADDED, kept.id, kept)]


async def test_own_writes_do_no_harm(store: Store) -> None:
    """They may be heard or not, and writing goes on while listening."""
    async with asyncio.timeout(60), aclosing(store.changes_elsewhere()) as changes:
        await anext(changes)
        listening = asyncio.ensure_future(anext(changes))
        for number in range(10):
            await inserted(store, plain(f"model-{number}"))
        assert len((await store.load())[1]) == 10
        listening.cancel()
        with suppress(asyncio.CancelledError):
            await listening


@pytest.mark.parametrize("waiting", [False, True])
async def test_listening_ends_without_a_trace(url: str, waiting: bool) -> None:
    """Neither a task nor a thread nor a connection stays, in whatever it was interrupted."""
    tasks, threads = len(asyncio.all_tasks()), threading.active_count()
    async with opened(url) as store, aclosing(store.changes_elsewhere()) as changes:
        await anext(changes)
        if waiting:
            listening = asyncio.ensure_future(anext(changes))
            await inserted(store, LLAMA)
            listening.cancel()
            with suppress(asyncio.CancelledError):
                await listening
    assert len(asyncio.all_tasks()) == tasks
    # The thread that opened the file is the event loop's, and waits for more; a connection's is about to end.
    await until(lambda: threading.active_count() <= threads + 1)


async def test_memory_is_what_the_database_is(store: Store, other: Store) -> None:
    """From the start on, each change once and in its order, told after memory has it."""
    before = await inserted(other, LLAMA)
    async with following(store) as memory:
        assert memory.models == [before]
        assert memory.told == [(None, before)]
        added = await inserted(other, VECTORS)
        changed = await updated(other, before, aliases=("new",))
        removed = await other.delete("vectors")
        assert removed is not None
        taken = await inserted(other, plain("fast"))
        await until(lambda: memory.follower.revision == taken.revision)
        assert memory.models == [taken, changed]
        assert memory.told[1:] == [(None, added), (before, changed), (added, None), (None, taken)]
        assert memory.known.find("new") == changed
        assert memory.known.find("small") is None


async def test_own_changes_come_in_their_order(store: Store, other: Store) -> None:
    """One that others' come before is applied after those, and one that is known already is not applied again."""
    memory = Memory(store)
    await memory.follower.catch_up()
    theirs = await inserted(other, LLAMA)
    ours = await inserted(store, VECTORS)
    await memory.follower.applied(Change(ours.revision, ChangeKind.ADDED, ours.id, ours))
    assert memory.told == [(None, theirs), (None, ours)]
    next_of_ours = await updated(store, ours, base_model="new")
    change = Change(next_of_ours.revision, ChangeKind.MODIFIED, ours.id, next_of_ours)
    await memory.follower.applied(change)
    await memory.follower.applied(change)
    assert memory.told[2:] == [(ours, next_of_ours)]


async def test_a_change_of_ours_that_cannot_be_told_now_is_told_later(
    store: Store, other: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database has it, so the write has succeeded, whether or not the others' can be read this moment."""
    memory = Memory(store)
    await memory.follower.catch_up()
    theirs, ours = await inserted(other, LLAMA), await inserted(store, VECTORS)
    with monkeypatch.context() as patch:
        patch.setattr(store, "changes_after", unavailable)
        await memory.follower.applied(Change(ours.revision, ChangeKind.ADDED, ours.id, ours))
    assert memory.told == []
    await memory.follower.catch_up()
    assert memory.told == [(None, theirs), (None, ours)]


async def unavailable(*_: object) -> list[Change] | None:
    """A database that is away."""
    raise RegistryError(Reason.STORE_UNAVAILABLE, "away")


async def test_what_cannot_be_read_is_tried_again(store: Store, other: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for another change, which may never come."""
    failures = 0
    changes_after = store.changes_after

    async def fails_at_first(revision: int) -> list[Change] | None:
        nonlocal failures
        failures += 1
        return await (unavailable() if failures <= 3 else changes_after(revision))

    async with following(store) as memory:
        monkeypatch.setattr(store, "changes_after", fails_at_first)
        kept = await inserted(other, LLAMA)
        await until(lambda: memory.models == [kept])
    assert failures > 3


async def test_after_a_defect_everything_is_read_anew(
    store: Store, other: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever went wrong is logged, memory is right afterwards, and the following goes on."""
    first = await inserted(other, LLAMA)
    async with following(store) as memory:
        with monkeypatch.context() as patch, structlog.testing.capture_logs() as logs:
            patch.delattr(memory.known.__class__, "remove")
            second = await updated(other, first, aliases=("new",))
            await until(lambda: memory.models == [second])
        assert "the registry cannot follow its database" in [line["event"] for line in logs]
        third = await updated(other, second, aliases=())
        await until(lambda: memory.models == [third])
        assert memory.told == [(None, first), (first, second), (second, third)]
        assert memory.known.find("new") is None


async def test_who_has_missed_too_much_reads_everything(url: str, store: Store) -> None:
    """What is different is found by comparing, and told as if it had been heard: first what is gone."""
    gone = await inserted(store, plain("gone", "gone-alias"))
    same = await inserted(store, plain("same"))
    changed = await inserted(store, plain("changed"))
    memory = Memory(store)
    await memory.follower.catch_up()
    memory.told.clear()
    async with opened(url, changes_kept=1) as other:
        await other.delete("gone")
        now = await updated(other, changed, aliases=("gone",))
        new = await inserted(other, plain("new", "gone-alias"))
    with structlog.testing.capture_logs() as logs:
        await memory.follower.catch_up()
    assert [line["event"] for line in logs] == ["changes are missing: all models are read again"]
    assert memory.told == [(gone, None), (changed, now), (None, new)]
    assert memory.models == [now, new, same]
    assert memory.known.find("gone") == now
    assert memory.follower.revision == new.revision


async def test_a_damaged_change_takes_nothing_from_memory(url: str, store: Store, other: Store) -> None:
    """Its model is read from where models are."""
    memory = Memory(store)
    await memory.follower.catch_up()
    kept = await inserted(other, LLAMA)
    execute(url, "UPDATE changes SET record = '{'")
    await memory.follower.catch_up()
    assert memory.models == [kept]
    assert memory.told == [(None, kept)]


async def test_a_model_that_is_damaged_is_forgotten_and_one_that_is_mended_comes_back(
    url: str, store: Store, other: Store
) -> None:
    """Removing what nobody could read tells nobody, and what is registered in its place is new."""
    await inserted(other, LLAMA)
    execute(url, "UPDATE models SET annotations = '{'")
    memory = Memory(store)
    await memory.follower.catch_up()
    assert memory.models == []
    await other.delete("llama")
    again = await inserted(other, LLAMA)
    await memory.follower.catch_up()
    assert memory.told == [(None, again)]


async def test_stopping_what_was_never_started() -> None:
    """A registry whose database could not be opened is closed all the same."""
    await Memory(Store("sqlite://")).follower.stop()


async def test_a_copy_that_is_brought_back(sqlite_url: str) -> None:
    """Memory becomes what the copy is, while processes are at work."""
    async with opened(sqlite_url) as other, opened(sqlite_url) as store:
        old = await inserted(other, LLAMA)
        path = sqlite_url.removeprefix("sqlite:///")
        with closing(sqlite3.connect(":memory:")) as copy:
            with closing(sqlite3.connect(path)) as connection:
                connection.backup(copy)
            new = await updated(other, old, base_model="new")
            lost = await inserted(other, VECTORS)
            async with following(store) as memory:
                assert memory.models == [new, lost]
                with closing(sqlite3.connect(path)) as connection:
                    copy.backup(connection)
                await until(lambda: memory.models == [old])
                assert memory.told[2:] == [(lost, None), (new, old)]
                again = await inserted(other, VECTORS)
                await until(lambda: memory.models == [old, again])


async def test_a_file_that_cannot_be_looked_at_is_logged_once_and_followed_again(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be back at any time; what has changed by then is found."""
    broken = True
    attempts = 0

    class Broken:
        """What SQLite says in place of a number."""

        def __init__(self, store: Store) -> None:
            self._engine = store._database._engine

        def connect(self) -> object:
            nonlocal attempts
            attempts += 1
            if broken:
                raise OSError("away")
            return self._engine.connect()

    async with opened(sqlite_url) as store, opened(sqlite_url) as other:
        monkeypatch.setattr(store._database, "_engine", Broken(store))
        with structlog.testing.capture_logs() as logs:
            async with aclosing(store.changes_elsewhere()) as changes:
                await inserted(other, LLAMA)
                assert [await anext(changes) for _ in range(4)] == [False] * 4
                assert attempts == 4
                broken = False
                assert await anext(changes)
        monkeypatch.undo()
    assert [line["event"] for line in logs] == ["the database's changes cannot be seen"]


@pytest.mark.postgres
@pytest.mark.parametrize("kill", [False, True], ids=["stopped", "killed"])
async def test_following_goes_on_when_the_server_is_back(postgres: PostgresServer, kill: bool) -> None:
    """What was changed meanwhile is caught up with; the log says once that it is deaf, and once that it hears."""
    url = postgres.create_database()
    async with opened(url) as store, opened(url) as other, following(store) as memory:
        first = await inserted(other, LLAMA)
        await until(lambda: memory.models == [first])
        with structlog.testing.capture_logs() as logs:
            with postgres.down(kill=kill):
                # By the first to notice: the listener, or the reader of the last notification.
                await until(lambda: bool(logs))
                assert memory.models == [first]
            second = await inserted(other, VECTORS)
            await until(lambda: memory.models == [first, second])
            third = await updated(other, second, base_model="new")
            await until(lambda: memory.models == [first, third])
            await until(lambda: "the database announces changes again" in [line["event"] for line in logs])
        events = [line["event"] for line in logs]
        assert events.count("the database does not announce changes") == 1
        assert events.count("the database announces changes again") == 1


@pytest.mark.postgres
async def test_a_connection_that_says_nothing_is_tried_now_and_then(
    postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changes whose announcement is lost, as behind some poolers, are asked for; and one that is dead is made anew."""
    monkeypatch.setattr(postgres_database, "LISTEN_SECONDS", 0.01)
    url = postgres.create_database()
    async with opened(url) as store, aclosing(store.changes_elsewhere()) as changes, asyncio.timeout(60):
        for _ in range(3):
            await anext(changes)
        execute(
            postgres.url("postgres"),
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query IN ('LISTEN deltawire_registry', 'SELECT 1')",
        )
        for _ in range(3):
            await anext(changes)
