"""How the registry's tables come to be, in either database."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import inspect

from deltawire_server.errors import Reason, RegistryError
from deltawire_server.registry.store import Change, ChangeKind, Store
from deltawire_server.registry.tables import LATEST, STEPS, TABLES
from tests.registry.databases import LLAMA, engine_of, execute, plain, whole

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def url(database_url: str, tmp_path: Path) -> str:
    """Of each kind of database; for a file there is a folder."""
    (tmp_path / "state").mkdir()
    return database_url


async def open_and_close(url: str) -> None:
    """A start of this release."""
    store = Store(url, busy_seconds=60)
    try:
        await store.open()
    finally:
        await store.close()


def make_version_1(url: str) -> None:
    """The database of the release before, with a model in it."""
    execute(
        url,
        *STEPS[1],
        "INSERT INTO schema_steps VALUES (1, 1767225600000000)",
        "INSERT INTO models VALUES ('llama', 'vllm', 'org/llama', 'LLM', '{\"owner\": \"we\"}', 4096,"
        " '/models/llama', 'base', 1772600767123456, 1804136767123456)",
        "INSERT INTO models VALUES ('vectors', 'vllm', 'v', 'EMBEDDING', '{}', NULL, '', '', 1772600767123456,"
        " 1772600767123456)",
        "INSERT INTO names VALUES ('llama', 'llama', 0)",
        "INSERT INTO names VALUES ('small', 'llama', 1)",
        "INSERT INTO names VALUES ('fast', 'llama', 2)",
        "INSERT INTO names VALUES ('vectors', 'vectors', 0)",
    )


async def test_the_steps_lead_to_the_tables(url: str) -> None:
    """The statements of the steps and the tables that queries are built from are the same schema, told twice."""
    await open_and_close(url)
    with engine_of(url).connect() as connection:
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
    assert execute(url, "SELECT version FROM schema_steps ORDER BY version") == [(version,) for version in STEPS]
    assert list(STEPS) == list(range(1, LATEST + 1))


async def test_a_database_of_the_release_before_is_brought_up_to_date(url: str) -> None:
    """Its models stay as they were, and can be changed, removed and followed like new ones."""
    make_version_1(url)
    store = Store(url)
    await store.open()
    try:
        revision, (llama, vectors) = await store.load()
        assert llama == replace(LLAMA, annotations={"owner": "we"}, revision=1)
        assert (vectors.id, vectors.embedding_dimension, vectors.revision) == ("vectors", None, 1)
        assert revision == 1
        assert await store.changes_after(1) == []
        changed = await store.update(llama, replace(llama, aliases=("small",)))
        assert changed is not None
        removed = await store.delete("vectors", 1)
        added = await store.insert(plain("fast"))
        assert added is not None
        assert await store.changes_after(1) == [
            Change(2, ChangeKind.MODIFIED, "llama", changed),
            removed,
            Change(4, ChangeKind.ADDED, "fast", added),
        ]
        assert list(whole(url)) == []
    finally:
        await store.close()


async def test_what_is_up_to_date_is_not_written_to(url: str) -> None:
    """A start takes no lock that a writer elsewhere could hold."""
    await open_and_close(url)
    times = execute(url, "SELECT applied_time FROM schema_steps")
    with engine_of(url).connect() as other:
        # The lock of a writer that does not come to its end.
        other.exec_driver_sql("UPDATE registry_revision SET revision = revision")
        await open_and_close(url)
    assert execute(url, "SELECT applied_time FROM schema_steps") == times


@pytest.mark.parametrize("old", [False, True], ids=["new", "of the release before"])
async def test_many_may_open_a_database_at_once(url: str, old: bool) -> None:
    """Each step runs once, in the first process; the others find it done."""
    if old:
        make_version_1(url)
    await asyncio.gather(*(open_and_close(url) for _ in range(8)))
    assert execute(url, "SELECT version FROM schema_steps ORDER BY version") == [(version,) for version in STEPS]
    assert execute(url, "SELECT count(*) FROM models") == [(2 if old else 0,)]
    assert list(whole(url)) == []


async def test_a_step_that_fails_leaves_nothing_of_any_step(url: str) -> None:
    """All steps that are missing are taken or none, and the next start takes them."""
    make_version_1(url)
    execute(url, "CREATE TABLE changes (of_another_program INTEGER)")
    with pytest.raises(RegistryError) as failure:
        await open_and_close(url)
    assert failure.value.reason is Reason.STORE_UNAVAILABLE
    assert execute(url, "SELECT version FROM schema_steps") == [(1,)]
    execute(url, "DROP TABLE changes")
    await open_and_close(url)
    assert list(whole(url)) == []


async def test_a_database_of_a_newer_release_is_refused(url: str) -> None:
    """A step that this release does not know may mean anything: nothing is touched."""
    await open_and_close(url)
    execute(url, f"INSERT INTO schema_steps VALUES ({LATEST + 1}, 0)")  # noqa: S608 (a number of ours)
    with pytest.raises(RegistryError, match="use a newer one") as failure:
        await open_and_close(url)
    assert failure.value.reason is Reason.STORE_UNAVAILABLE
