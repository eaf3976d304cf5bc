from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine, inspect

from deltawire_server.errors import Reason, RegistryError
from deltawire_server.registry.model import Model, ModelType
from deltawire_server.registry.schema import LATEST, SCHEMA_STEPS, STEPS, TABLES, migrate
from deltawire_server.registry.store import Store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

NOW = datetime(2026, 3, 4, 5, 6, 7, 123456, tzinfo=UTC)
LLAMA = Model(
    "llama",
    "vllm",
    "org/llama",
    ModelType.LLM,
    ("small", "fast"),
    {"owner": "we", "note": "grüße\x00"},
    max_context_tokens=4096,
    root="/models/llama",
    parent="base",
    create_time=NOW,
    update_time=NOW.replace(year=2027),
)


@pytest.fixture
async def store(url: str) -> AsyncIterator[Store]:
    """Open, and not waiting long for others."""
    store = Store(url, busy_seconds=0.2)
    await store.open()
    yield store
    await store.close()


def path_of(url: str) -> Path:
    """The database file."""
    return Path(url.removeprefix("sqlite:///"))


def execute(url: str, *statements: str) -> None:
    """Another program at the database file."""
    with closing(sqlite3.connect(path_of(url))) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


def plain(model_id: str, *aliases: str) -> Model:
    """A model about which little is known."""
    return Model(model_id, "vllm", model_id, aliases=aliases, create_time=NOW, update_time=NOW)


@pytest.mark.parametrize("scheme", ["sqlite", "sqlite+aiosqlite"])
async def test_creates_the_folder_and_the_file(tmp_path: Path, scheme: str) -> None:
    """A first start needs no preparation; both spellings of the URL are taken."""
    store = Store(f"{scheme}:///{tmp_path}/a/b/registry.db")
    await store.open()
    await store.close()
    assert (tmp_path / "a/b/registry.db").is_file()


async def test_keeps_every_field_over_a_restart(url: str, store: Store) -> None:
    """What is read after a restart equals what was written, the order of aliases and microseconds included."""
    bare = plain("bare")
    assert await store.insert(LLAMA)
    assert await store.insert(bare)
    await store.close()
    again = Store(url)
    await again.open()
    assert await again.list() == [bare, LLAMA]
    await again.close()


async def test_lives_in_memory_if_asked() -> None:
    """A URL without a file makes no file, and works for the process's life."""
    store = Store("sqlite://")
    await store.open()
    assert await store.insert(LLAMA)
    assert await store.list() == [LLAMA]
    assert await store.delete("fast") == "llama"
    assert await store.list() == []
    await store.close()


@pytest.mark.parametrize("name", ["llama", "small", "fast"])
async def test_delete_takes_any_name_and_frees_all_of_them(store: Store, name: str) -> None:
    """A model goes as a whole: its names can be used again at once."""
    await store.insert(LLAMA)
    assert await store.delete(name) == "llama"
    assert await store.delete(name) is None
    assert await store.list() == []
    assert await store.insert(plain("fast", "llama", "small"))


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(plain("llama"), id="an id that is an id"),
        pytest.param(plain("small"), id="an id that is an alias"),
        pytest.param(plain("other", "llama"), id="an alias that is an id"),
        pytest.param(plain("other", "free", "fast"), id="an alias that is an alias"),
    ],
)
async def test_a_name_has_one_owner(store: Store, model: Model) -> None:
    """Ids and aliases share one space, and a refused insert leaves nothing behind."""
    await store.insert(LLAMA)
    assert not await store.insert(model)
    assert await store.list() == [LLAMA]
    assert await store.insert(plain("free"))


async def test_of_many_processes_that_want_an_alias_one_gets_it(url: str, store: Store) -> None:
    """The database itself decides: each of these has its own connections, as separate processes have."""
    # They wait for each other, on a slow machine for long: that is not what is looked at.
    stores = [Store(url, busy_seconds=60) for _ in range(8)]
    for other in stores:
        await other.open()
    models = [plain(f"model-{number:02}", "wanted") for number in range(40)]
    kept = await asyncio.gather(*(stores[number % 8].insert(model) for number, model in enumerate(models)))
    for other in stores:
        await other.close()
    assert kept.count(True) == 1
    assert await store.list() == [models[kept.index(True)]]


async def test_many_may_open_a_new_database_at_once(url: str) -> None:
    """Each step is taken once, by whoever comes first."""
    stores = [Store(url, busy_seconds=60) for _ in range(5)]
    await asyncio.gather(*(store.open() for store in stores))
    for store in stores:
        assert await store.list() == []
        await store.close()
    with closing(sqlite3.connect(path_of(url))) as connection:
        assert connection.execute("SELECT version FROM schema_steps").fetchall() == [(1,)]


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE models SET metadata = '{' WHERE id = 'llama'",
        "UPDATE models SET metadata = '[]' WHERE id = 'llama'",
        "UPDATE models SET metadata = '{\"a\": 1}' WHERE id = 'llama'",
        "UPDATE models SET metadata = x'00' WHERE id = 'llama'",
        "UPDATE models SET type = 'ORACLE' WHERE id = 'llama'",
        "UPDATE models SET type = 7 WHERE id = 'llama'",
        "UPDATE models SET create_time = 'yesterday' WHERE id = 'llama'",
        "UPDATE models SET update_time = 9000000000000000000 WHERE id = 'llama'",
        "UPDATE models SET max_context_tokens = 'many' WHERE id = 'llama'",
        "UPDATE models SET max_context_tokens = 4294967296 WHERE id = 'llama'",
        "UPDATE models SET provider_id = x'00' WHERE id = 'llama'",
        "UPDATE names SET name = x'00' WHERE name = 'fast'",
    ],
)
async def test_a_damaged_record_is_logged_and_left_out(url: str, store: Store, damage: str) -> None:
    """One bad record never costs the others, and can still be deleted."""
    good = plain("good")
    await store.insert(LLAMA)
    await store.insert(good)
    execute(url, damage)
    with structlog.testing.capture_logs() as logs:
        assert await store.list() == [good]
    assert [(line["event"], line["model"]) for line in logs] == [("damaged record left out", "llama")]
    assert await store.delete("llama") == "llama"
    assert await store.insert(LLAMA)


async def test_a_database_of_a_newer_release_is_refused(url: str, store: Store) -> None:
    """A step that this release does not know may mean anything: nothing is touched."""
    await store.close()
    execute(url, "UPDATE schema_steps SET version = version + 1")
    newer = Store(url)
    with pytest.raises(RegistryError, match="use a newer one") as failure:
        await newer.open()
    await newer.close()
    assert failure.value.reason is Reason.STORE_UNAVAILABLE


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
    await store.insert(LLAMA)
    reader = Store(f"sqlite:///file:{path_of(url)}?mode=ro&uri=true")
    await reader.open()
    assert await reader.list() == [LLAMA]
    for write in (reader.insert(plain("other")), reader.delete("llama")):
        with pytest.raises(RegistryError) as failure:
            await write
        assert failure.value.reason is Reason.STORE_UNAVAILABLE
        assert failure.value.retry_after == 1.0
    await reader.close()


async def test_a_writer_that_does_not_let_go_makes_it_unavailable(url: str, store: Store) -> None:
    """Waiting for another process has an end, reading needs no waiting, and the log holds nobody's notes."""
    await store.insert(LLAMA)
    with closing(sqlite3.connect(path_of(url), isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(RegistryError) as failure, structlog.testing.capture_logs() as logs:
            await store.insert(replace(LLAMA, id="other", aliases=(), metadata={"note": "private"}))
        assert await store.list() == [LLAMA]
        other.execute("ROLLBACK")
    assert failure.value.reason is Reason.STORE_UNAVAILABLE
    assert "locked" in logs[0]["error"]
    assert "private" not in str(logs)
    assert await store.insert(plain("other"))


async def test_only_registered_models_are_stored(store: Store) -> None:
    """A model without times is a discovered one, and storing it a defect of ours."""
    with pytest.raises(ValueError, match="has no times"):
        await store.insert(Model("vllm/llama", "vllm", "llama"))


@pytest.mark.parametrize("url", ["postgresql://me:secret@db/models", "registry.db", ""])
def test_other_urls_are_refused_without_being_repeated(url: str) -> None:
    """A mistake in the settings is found at once; a URL may hold a password, so no message does."""
    with pytest.raises(ValueError, match=r"SQLite|URL") as failure:
        Store(url)
    assert "secret" not in str(failure.value)


def test_the_steps_lead_to_the_tables() -> None:
    """The statements of the steps and the tables that queries are built from are the same schema, told twice."""
    engine = create_engine("sqlite://")
    with engine.begin() as connection:
        migrate(connection)
        found = inspect(connection)
        assert set(found.get_table_names()) == set(TABLES.tables)
        for table in TABLES.sorted_tables:
            key = found.get_pk_constraint(table.name)["constrained_columns"]
            columns = {
                column["name"]: (str(column["type"]), column["nullable"], column["name"] in key)
                for column in found.get_columns(table.name)
            }
            assert columns == {
                column.name: (str(column.type), bool(column.nullable), column.primary_key) for column in table.columns
            }
        assert connection.execute(SCHEMA_STEPS.select()).one().version == LATEST
    engine.dispose()
    assert list(STEPS) == list(range(1, LATEST + 1))


# Each example opens a database, so there are few, and no deadline.
@settings(max_examples=20, deadline=None)
@given(st.dictionaries(st.text(), st.text()), st.lists(st.text(min_size=1), unique=True, max_size=5))
async def test_any_text_survives(metadata: dict[str, str], names: list[str]) -> None:
    """Notes and names come back as they went in, whatever letters they hold."""
    model = replace(LLAMA, id="id", aliases=tuple(name for name in names if name != "id"), metadata=metadata)
    store = Store("sqlite://")
    await store.open()
    try:
        assert await store.insert(model)
        assert await store.list() == [model]
    finally:
        await store.close()
