"""What is SQLite's own or PostgreSQL's own: URLs, files, memory, and how each may be unusable."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
import traceback
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import structlog
from sqlalchemy.exc import SQLAlchemyError

from deltawire_server.errors import Reason, RegistryError
from deltawire_server.registry import sqlite
from deltawire_server.registry.database import cause_text
from deltawire_server.registry.store import Store
from tests.registry.databases import LLAMA, engine_of, execute, plain, whole
from tests.support.gateway import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.postgres import PostgresServer


@pytest.fixture
async def store(url: str) -> AsyncIterator[Store]:
    """In a file."""
    store = Store(url, busy_seconds=0.2)
    await store.open()
    yield store
    await store.close()


@pytest.fixture
async def memory() -> AsyncIterator[Store]:
    """In memory."""
    store = Store("sqlite://")
    await store.open()
    yield store
    await store.close()


def path_of(url: str) -> Path:
    """The database file."""
    return Path(url.removeprefix("sqlite:///"))


async def unusable(store: Store, *secrets: str) -> None:
    """Hold that all calls say STORE_UNAVAILABLE and when to try again, and neither what of the operator's is meant."""
    calls = (
        store.load(),
        store.changes_after(1),
        store.insert(plain("other")),
        store.update(replace(LLAMA, revision=2), LLAMA),
        store.delete("llama"),
    )
    for failure in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(failure, RegistryError)
        assert failure.reason is Reason.STORE_UNAVAILABLE
        assert failure.retry_after == 1.0
        assert not [secret for secret in ("sql", "SELECT", *secrets) if secret in str(failure)]


@pytest.mark.parametrize(
    "url",
    [
        "mysql://me:secret@db/models",
        "registry.db",
        "",
        "postgresql://me@db:secret/",
    ],
)
def test_other_urls_are_refused_without_being_repeated(url: str) -> None:
    """A mistake in the settings is found at once; a URL may hold a password, so neither message nor cause does."""
    with pytest.raises(ValueError, match=r"SQLite|URL") as failure:
        Store(url)
    told = "".join(traceback.format_exception(failure.value)).partition("ValueError: ")[2]
    assert "secret" not in told


def test_postgresql_without_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """The failure says what to install: who uses SQLite does not need it."""
    monkeypatch.delitem(sys.modules, "deltawire_server.registry.postgres", raising=False)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ValueError, match=r"pip install 'deltawire\[postgres\]'") as failure:
        Store("postgresql://me:secret@db/models")
    assert "secret" not in str(failure.value)


@pytest.mark.parametrize("scheme", ["sqlite", "sqlite+aiosqlite"])
async def test_creates_the_folder_and_the_file(tmp_path: Path, scheme: str) -> None:
    """A first start needs no preparation; both spellings of the URL are taken."""
    store = Store(f"{scheme}:///{tmp_path}/a/b/registry.db")
    await store.open()
    await store.close()
    assert (tmp_path / "a/b/registry.db").is_file()


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///file::memory:?mode=memory&uri=true"])
async def test_lives_in_memory_if_asked(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL without a file makes no file, and works for the process's life."""
    monkeypatch.chdir(tmp_path)
    store = Store(url)
    await store.open()
    kept = await store.insert(LLAMA)
    assert kept is not None
    assert await store.load() == (kept.revision, [kept])
    assert await store.delete("fast")
    assert await store.load() == (kept.revision + 1, [])
    await store.close()
    assert not any(tmp_path.iterdir())  # noqa: ASYNC240 (one look)


async def test_calls_that_meet_in_memory(memory: Store) -> None:
    """There is one connection, and they take it in turn."""
    calls = [memory.insert(plain(f"model-{number}")) for number in range(10)]
    kept = await asyncio.gather(*calls, *(memory.load() for _ in range(10)))
    assert all(each is not None for each in kept)
    assert len((await memory.load())[1]) == 10


async def test_a_call_that_is_given_up_does_not_cost_the_memory(memory: Store) -> None:
    """Wherever it was: the database is that one connection's."""
    kept = await memory.insert(LLAMA)
    assert kept is not None
    for turns in range(60):
        call = asyncio.create_task(memory.changes_after(kept.revision))
        for _ in range(turns):
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait([call])
        assert await memory.load() == (kept.revision, [kept])


async def test_nobody_else_changes_a_database_in_memory(memory: Store) -> None:
    """A listener gets no notification, and can be stopped."""
    listening = asyncio.ensure_future(anext(memory.changes_elsewhere()))
    await memory.insert(LLAMA)
    assert not listening.done()
    listening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await listening


async def test_a_file_that_is_no_database_is_unavailable(url: str) -> None:
    """The file of something else is not overwritten."""
    path = path_of(url)
    path.parent.mkdir()
    path.write_bytes(b"not a database" * 100)
    store = Store(url)
    with pytest.raises(RegistryError) as failure:
        await store.open()
    await store.close()
    assert failure.value.reason is Reason.STORE_UNAVAILABLE
    assert path.read_bytes() == b"not a database" * 100


async def test_a_folder_that_cannot_be_made_is_unavailable(tmp_path: Path) -> None:
    """The cause is for the operator's log; the message, which goes to callers, names no path."""
    (tmp_path / "file").touch()
    store = Store(f"sqlite:///{tmp_path}/file/registry.db")
    with pytest.raises(RegistryError) as failure, structlog.testing.capture_logs() as logs:
        await store.open()
    await store.close()
    assert failure.value.reason is Reason.STORE_UNAVAILABLE
    assert str(tmp_path) not in failure.value.message
    assert str(tmp_path) in logs[0]["error"]


async def test_a_read_only_database_can_be_read(url: str, store: Store) -> None:
    """Opening what is up to date writes nothing; writing says that it cannot be done now, and may be later."""
    kept = await store.insert(LLAMA)
    assert kept is not None
    reader = Store(f"sqlite:///file:{path_of(url)}?mode=ro&uri=true")
    await reader.open()
    assert await reader.load() == (kept.revision, [kept])
    for write in (reader.insert(plain("other")), reader.update(kept, kept), reader.delete("llama")):
        with pytest.raises(RegistryError) as failure:
            await write
        assert failure.value.reason is Reason.STORE_UNAVAILABLE
        assert failure.value.retry_after == 1.0
    await reader.close()


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE models SET annotations = x'00' WHERE id = 'llama'",
        "UPDATE models SET type = 7 WHERE id = 'llama'",
        "UPDATE models SET create_time = 'yesterday' WHERE id = 'llama'",
        "UPDATE models SET max_context_tokens = 'many' WHERE id = 'llama'",
        "UPDATE models SET provider_id = x'00' WHERE id = 'llama'",
        "UPDATE models SET provider_id = CAST(x'ff' AS TEXT) WHERE id = 'llama'",
        "UPDATE names SET name = x'00' WHERE name = 'fast'",
        "UPDATE names SET name = CAST(x'ff' AS TEXT) WHERE name = 'fast'",
        "UPDATE names SET model_id = 'nobody' WHERE name = 'llama'",
        "DELETE FROM models WHERE id = 'llama'",
    ],
)
async def test_damage_that_only_sqlite_can_hold(url: str, store: Store, damage: str) -> None:
    """A column may hold anything, and another program, such as sqlite3, may take a model away and leave its names."""
    assert await store.insert(LLAMA)
    good = await store.insert(plain("good"))
    assert good is not None
    execute(url, damage)
    assert await store.load() == (good.revision, [good])
    assert await store.insert(LLAMA) is None
    change = await store.delete("llama")
    assert change is not None
    assert (change.model_id, change.model) in [("llama", None), ("nobody", None)]
    if change.model_id == "nobody":  # whose name it had become; the rest has none
        assert await store.delete("small")
    assert await store.insert(LLAMA)
    assert list(whole(url)) == []


@pytest.mark.parametrize("replaced", [False, True])
async def test_a_file_that_is_removed_or_replaced_under_way(url: str, store: Store, replaced: bool) -> None:
    """What is written to it would be gone with the process: writes fail, the log says why, and putting it back mends it."""
    kept = await store.insert(LLAMA)
    assert kept is not None
    path = path_of(url)
    aside = path.with_name("aside.db")
    path.rename(aside)
    if replaced:
        path.write_bytes(b"another file")
    with structlog.testing.capture_logs() as logs:
        for write in (store.insert(plain("other")), store.delete("llama")):
            with pytest.raises(RegistryError) as failure:
                await write
            assert failure.value.reason is Reason.STORE_UNAVAILABLE
        changes = store.changes_elsewhere()
        looking = asyncio.ensure_future(anext(changes))
        await until(lambda: any(line["event"] == "the database's changes cannot be seen" for line in logs))
    assert all("removed or replaced while it was in use" in line["error"] for line in logs)
    aside.rename(path)
    await looking
    await changes.aclose()
    assert await store.insert(plain("other")) is not None
    assert [model.id for model in (await store.load())[1]] == ["llama", "other"]


async def test_a_writer_that_does_not_let_go_makes_it_unavailable(database_url: str) -> None:
    """Waiting for another process has an end, reading needs no waiting, and the log holds nobody's notes."""
    store = Store(database_url, busy_seconds=1.0)
    await store.open()
    kept = await store.insert(LLAMA)
    with closing(engine_of(database_url).connect()) as other:
        other.exec_driver_sql("UPDATE registry_revision SET revision = revision")
        with pytest.raises(RegistryError) as failure, structlog.testing.capture_logs() as logs:
            await store.insert(replace(LLAMA, id="other", aliases=(), annotations={"note": "private"}))
        assert (await store.load())[1] == [kept]
    assert failure.value.reason is Reason.STORE_UNAVAILABLE
    assert "lock" in logs[0]["error"]
    assert "private" not in str(logs)
    assert await store.insert(plain("other"))
    assert list(whole(database_url)) == []
    await store.close()


@pytest.mark.postgres
@pytest.mark.parametrize("kill", [False, True], ids=["stopped", "killed"])
async def test_a_server_that_is_down(postgres: PostgresServer, kill: bool) -> None:
    """Every call says so at once, and the same store works again as soon as the server is back."""
    url = postgres.create_database()
    store = Store(url)
    await store.open()
    kept = await store.insert(LLAMA)
    assert kept is not None
    with postgres.down(kill=kill):
        # Twice: with the connections from before, and with new ones.
        await unusable(store, postgres.password, str(postgres.port))
        await unusable(store, postgres.password, str(postgres.port))
    assert await store.load() == (kept.revision, [kept])
    assert await store.delete("llama", kept.revision)
    assert list(whole(url)) == []
    await store.close()


@pytest.mark.postgres
async def test_a_server_that_stands_still(postgres: PostgresServer) -> None:
    """Connections are there and nobody answers: every call has an end, and the store works again afterwards."""
    url = postgres.create_database()
    store = Store(url, busy_seconds=1.0)
    await store.open()
    kept = await store.insert(LLAMA)
    assert kept is not None
    with postgres.frozen():
        async with asyncio.timeout(60):
            await unusable(store, postgres.password, str(postgres.port))
    assert await store.load() == (kept.revision, [kept])
    assert await store.delete("llama", kept.revision)
    assert list(whole(url)) == []
    await store.close()


@pytest.mark.postgres
async def test_what_accepts_connections_and_says_nothing() -> None:
    """A start against it fails, rather than waiting for ever."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = Store(f"postgresql://me:secret@127.0.0.1:{silent.getsockname()[1]}/db", busy_seconds=0.2)
        with pytest.raises(RegistryError) as failure:
            async with asyncio.timeout(60):
                await store.open()
        await store.close()
    assert failure.value.reason is Reason.STORE_UNAVAILABLE
    assert "secret" not in str(failure.value)


@pytest.mark.postgres
async def test_the_operators_own_options_are_kept(postgres: PostgresServer) -> None:
    """A URL may say in which schema the tables are, and how long to try to connect."""
    url = postgres.create_database()
    execute(url, "CREATE SCHEMA registry")
    store = Store(f"{url}?options=-csearch_path%3Dregistry&connect_timeout=7")
    await store.open()
    assert await store.insert(LLAMA)
    await store.close()
    assert execute(url, "SELECT id FROM registry.models") == [("llama",)]


@pytest.mark.postgres
async def test_a_database_that_may_only_be_read(postgres: PostgresServer) -> None:
    """As a standby is, or one whose disk is full: reading goes on, writing is refused, and works when it may."""
    url = postgres.create_database()
    name = url.rpartition("/")[2]
    store = Store(url)
    await store.open()
    kept = await store.insert(LLAMA)
    assert kept is not None
    await store.close()
    execute(url, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    store = Store(url)
    await store.open()
    assert await store.load() == (kept.revision, [kept])
    for write in (store.insert(plain("other")), store.update(kept, kept), store.delete("llama")):
        with pytest.raises(RegistryError) as failure:
            await write
        assert failure.value.reason is Reason.STORE_UNAVAILABLE
    await store.close()


@pytest.mark.postgres
async def test_a_gateway_that_hangs_in_a_write_does_not_keep_the_others_out(postgres: PostgresServer) -> None:
    """PostgreSQL ends its transaction, of which nothing stays."""
    url = postgres.create_database()
    begun, go = threading.Event(), threading.Event()

    async def hang() -> None:
        store = Store(url, busy_seconds=1.0)
        await store.open()
        # Nothing that is public stands still in the midst of a write.
        async with store._database.writing() as connection:
            await store._next_revision(connection)
            begun.set()
            go.wait()  # and its event loop with it
        await store.close()

    hanging = asyncio.create_task(asyncio.to_thread(asyncio.run, hang()))
    await asyncio.to_thread(begun.wait)
    store = Store(url, busy_seconds=30)
    await store.open()
    kept = await store.insert(LLAMA)
    go.set()
    with pytest.raises((SQLAlchemyError, TimeoutError)):
        await hanging
    assert kept is not None
    assert await store.load() == (2, [kept])
    assert list(whole(url)) == []
    await store.close()


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
async def test_a_new_file_is_this_users_alone(tmp_path: Path, mask: int) -> None:
    """Whatever the umask, and so are the files beside it, from the first moment on."""
    before = os.umask(mask)
    try:
        store = Store(f"sqlite:///{tmp_path}/new/registry.db")
        with structlog.testing.capture_logs() as logs:
            await store.open()
        await store.insert(LLAMA)
        modes = {file.name: oct(file.stat().st_mode & 0o777) for file in (tmp_path / "new").iterdir()}
        await store.close()
    finally:
        os.umask(before)
    assert modes == dict.fromkeys(("registry.db", "registry.db-wal", "registry.db-shm"), "0o600")
    assert not [entry for entry in logs if entry["log_level"] == "warning"]


async def test_a_file_that_others_may_use_is_warned_of(tmp_path: Path) -> None:
    """With its path and the remedy; it is used all the same."""
    path = tmp_path / "registry.db"
    path.touch()
    path.chmod(0o644)
    store = Store(f"sqlite:///{path}")
    with structlog.testing.capture_logs() as logs:
        await store.open()
    await store.close()
    (warning,) = [entry for entry in logs if entry["log_level"] == "warning"]
    assert (warning["event"], warning["path"]) == (
        "other users of this machine can access the database: chmod 600",
        str(path),
    )


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("invalid dsn: host=h password=geheim port=1", "invalid dsn: host=h password=*** port=1"),
        ("host=h password='ge\\'heim x' sslpassword = geheim", "host=h password=*** sslpassword = ***"),
        ("cannot parse postgresql://u:geheim@h/d", "cannot parse postgresql://u:***@h/d"),
        ("password authentication failed for user", "password authentication failed for user"),
        ("", "no answer in time"),
        ("first\nsecond", "first"),
    ],
)
def test_what_a_driver_quotes(words: str, shown: str) -> None:
    """Secrets of a connection string or a URL are masked, wherever its error goes."""
    assert cause_text(ValueError(words)) == shown


@pytest.mark.parametrize("cancels", [1, 2])
async def test_a_connection_that_nobody_waits_for_is_closed(cancels: int) -> None:
    """However often the task that opened it is canceled; the driver would keep it open."""
    opened, closed = asyncio.Event(), asyncio.Event()

    class Connection:
        def close(self) -> None:
            closed.set()

    async def connect() -> Connection:
        await opened.wait()
        return Connection()

    waiting = asyncio.create_task(sqlite._connected(cast("Any", connect())))
    for _ in range(cancels):
        await asyncio.sleep(0)
        waiting.cancel()
    await asyncio.sleep(0)
    opened.set()
    async with asyncio.timeout(10):
        await asyncio.wait([waiting])
        await closed.wait()
    assert waiting.cancelled()
