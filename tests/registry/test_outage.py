"""A registry whose database is away, full or may only be read: what is known can be called, and all is well afterwards."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import pytest
from sqlalchemy import Pool, event

from deltawire_server.errors import Reason
from tests.registry.databases import execute, whole
from tests.registry.helpers import all_ids, failure_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from sqlalchemy.engine.interfaces import DBAPIConnection

    from deltawire_server.registry.registry import ModelRegistry
    from tests.support.postgres import PostgresServer

NOTES = {str(number): "x" * 4096 for number in range(15)}
"""As many as there may be: more than fits into what is free in a file by chance."""


class Outage(Protocol):
    """The database cannot be written to until this is left."""

    def __call__(self) -> AbstractContextManager[None]: ...


@contextmanager
def told(trouble: str, well: str) -> Iterator[Outage]:
    """Every connection to SQLite is told these from now on, whenever it is used: the one during an outage, else the other."""
    statement = well

    def tell(connection: DBAPIConnection, *_: object) -> None:
        cursor = connection.cursor()
        cursor.execute(statement)
        cursor.close()

    @contextmanager
    def outage() -> Iterator[None]:
        nonlocal statement
        statement = trouble
        try:
            yield
        finally:
            statement = well

    event.listen(Pool, "checkout", tell)
    try:
        yield outage
    finally:
        event.remove(Pool, "checkout", tell)


@pytest.fixture(
    params=[
        "full",
        "read-only",
        *(pytest.param(each, marks=pytest.mark.postgres) for each in ("standby", "stopped", "killed")),
    ]
)
def outage(request: pytest.FixtureRequest, url: str) -> Iterator[Outage]:
    """Of each kind."""
    if request.param == "full":
        with told("PRAGMA max_page_count = 1", "PRAGMA max_page_count = 1073741823") as outage:
            yield outage
    elif request.param == "read-only":
        with told("PRAGMA query_only = ON", "PRAGMA query_only = OFF") as outage:
            yield outage
    else:
        postgres: PostgresServer = request.getfixturevalue("postgres")
        if request.param == "standby":
            yield lambda: standby(url)
        else:
            yield lambda: postgres.down(kill=request.param == "killed")


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    """Of the kind of database that the outage is of."""
    if request.node.callspec.params["outage"] in ("full", "read-only"):
        return str(request.getfixturevalue("sqlite_url"))
    return str(request.getfixturevalue("postgres").create_database())


@contextmanager
def standby(url: str) -> Iterator[None]:
    """Connections are cut, and new ones may only read."""
    name = url.rpartition("/")[2]
    cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    execute(url, f"ALTER DATABASE {name} SET default_transaction_read_only = on", cut)
    try:
        yield
    finally:
        execute(url, "SET TRANSACTION READ WRITE", f"ALTER DATABASE {name} RESET default_transaction_read_only", cut)


async def test_what_is_known_goes_on_and_nothing_is_half_done(
    url: str, registry: ModelRegistry, outage: Outage
) -> None:
    """Reads come from memory, writes say that they cannot be done now, and the same registry works again afterwards."""
    mine = await registry.register("mine", "alpha", "llama", aliases=["a"])
    with outage():
        writes = [
            registry.register("new", "alpha", "llama", annotations=NOTES),
            registry.update("mine", {"aliases": ["b"], "annotations": NOTES}),
            registry.update("a", {"annotations": NOTES}, mine.etag),
        ]
        for write in writes:
            failure = await failure_of(write)
            assert failure.reason is Reason.STORE_UNAVAILABLE
            assert failure.retry_after == 1.0
            assert failure.message == (
                "the registry's database is unavailable; models that are already registered can still be called"
            )
        assert await registry.get("a") == mine
        assert (await registry.resolve("mine")).model == mine
        assert await all_ids(registry) == ["alpha/org/common", "beta/mistral", "beta/org/common", "mine"]
    assert execute(url, "SELECT revision FROM registry_revision") == [(mine.revision,)]
    assert list(whole(url)) == []
    changed = await registry.update("mine", {"aliases": ["b"], "annotations": NOTES}, mine.etag)
    new = await registry.register("new", "alpha", "llama", annotations=NOTES, aliases=["a"])
    await registry.unregister("b")
    assert (changed.revision, new.revision) == (mine.revision + 1, mine.revision + 2)
    assert await registry.get("a") == new
    assert execute(url, "SELECT id, revision FROM models") == [("new", new.revision)]
    assert list(whole(url)) == []
