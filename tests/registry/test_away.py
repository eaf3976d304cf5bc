"""A gateway that starts while its database cannot be reached."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import psycopg
import pytest
import structlog
from google.protobuf.field_mask_pb2 import FieldMask
from sqlalchemy.exc import OperationalError

import deltawire_server.registry.store as store_module
from deltawire.v1 import model_registry_pb2 as pb
from deltawire_server.app import Gateway
from deltawire_server.errors import Reason, RegistryError
from deltawire_server.registry.change_log_reader import ChangeLogReader
from deltawire_server.registry.postgres import PostgresDatabase
from deltawire_server.registry.registered_index import RegisteredIndex
from deltawire_server.registry.store import Store, database_of
from deltawire_server.settings import RegistrySettings
from tests.metrics.scrape import Page, until_scraped
from tests.support.gateway import WAIT, ask, failure_of, read_well, running, settings_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from deltawire_server.fake_vllm import FakeVllm
    from deltawire_server.settings import Settings
    from tests.support.gateway import Lines
    from tests.support.postgres import PostgresServer


def settings_with(base_url: str, folder: Path, url: str) -> Settings:
    """Settings with a database."""
    settings = settings_of(base_url, folder, metrics={"listen": "127.0.0.1:0"})
    return settings.model_copy(update={"registry": RegistrySettings(database_url=url)})


async def registered(settings: Settings) -> None:
    """Register a model with an alias."""
    async with running(settings) as gateway:
        await gateway.models.RegisterModel(
            pb.RegisterModelRequest(
                model_id="mine",
                provider_model_id="fake",
                provider_id="vllm",
                aliases=["also"],
                type=pb.MODEL_TYPE_LLM,
            )
        )


def is_behind(page: Page) -> bool:
    """Whether a scrape says that the registry is without its database."""
    return page.value("deltawire_registry_behind_seconds") > 0


@pytest.mark.postgres
async def test_it_chats_without_its_database_and_joins_when_it_is_back(
    vllm: FakeVllm, tmp_path: Path, lines: Lines, postgres: PostgresServer
) -> None:
    """Discovered models can be called at once. What needs the database says so, and works as soon as it is there."""
    settings = settings_with(vllm.base_url, tmp_path, postgres.create_database())
    await registered(settings)
    update = pb.UpdateModelRequest(model=pb.Model(id="mine"), update_mask=FieldMask(paths=["aliases"]))
    async with contextlib.AsyncExitStack() as stack:
        with postgres.down():
            gateway = await stack.enter_async_context(running(settings))
            await lines.find("serving without registered models: the registry's database cannot be reached")
            await read_well(gateway.stream(ask(model="fake")))
            for call in (
                gateway.create(ask(model="also")),
                gateway.models.ListModels(pb.ListModelsRequest()),
                gateway.models.GetModel(pb.GetModelRequest(model_id="mine")),
                gateway.models.RegisterModel(pb.RegisterModelRequest(model_id="x", provider_model_id="fake")),
                gateway.models.UpdateModel(update),
                gateway.models.UnregisterModel(pb.UnregisterModelRequest(model_id="mine")),
                anext(aiter(gateway.models.WatchModels(pb.WatchModelsRequest()))),
            ):
                failure = await failure_of(call)
                assert (failure.reason, failure.code.name) == ("STORE_UNAVAILABLE", "UNAVAILABLE")
                assert "could not be reached since this gateway started" in failure.message
            await until_scraped(gateway.gateway.metrics_address, is_behind)
        await until_scraped(gateway.gateway.metrics_address, lambda page: not is_behind(page))
        assert (await gateway.create(ask(model="also"))).started.model == "mine"
        listed = await gateway.models.ListModels(pb.ListModelsRequest())
        assert listed.models[0].id == "mine"
        with postgres.down():
            # Also without a write meanwhile.
            await until_scraped(gateway.gateway.metrics_address, is_behind)
        await until_scraped(gateway.gateway.metrics_address, lambda page: not is_behind(page))


@pytest.mark.postgres
async def test_a_database_that_refuses_the_gateway_is_an_error(
    vllm: FakeVllm, tmp_path: Path, postgres: PostgresServer
) -> None:
    """A wrong password will still be wrong later."""
    url = postgres.create_database().replace(postgres.password, "wrong")
    with pytest.raises(RegistryError):
        async with Gateway(settings_with(vllm.base_url, tmp_path, url)):
            pass


@pytest.mark.postgres
async def test_it_stops_while_its_database_is_away(vllm: FakeVllm, tmp_path: Path, postgres: PostgresServer) -> None:
    """Without waiting for it."""
    url = postgres.create_database()
    with postgres.down():
        async with asyncio.timeout(WAIT), running(settings_with(vllm.base_url, tmp_path, url)):
            pass


@pytest.mark.parametrize(
    ("cause", "away"),
    [
        (psycopg.OperationalError("connection refused"), True),
        (psycopg.OperationalError("FATAL:  the database system is starting up"), True),
        (psycopg.OperationalError("FATAL:  sorry, too many clients already"), True),
        (psycopg.OperationalError('FATAL:  database "deltawire" does not exist'), False),
        (psycopg.OperationalError('invalid port number: "99999"'), False),
        (psycopg.OperationalError('invalid sslmode value: "foo"'), False),
        (TimeoutError(), True),
        (ValueError(), False),
    ],
    ids=["refused", "starting", "full", "name", "port", "sslmode", "timeout", "bug"],
)
async def test_what_means_away(cause: Exception, away: bool) -> None:
    """No connection or no answer, and the answers of a server that starts or stops."""
    database = database_of("postgresql://user@localhost/name")
    assert isinstance(database, PostgresDatabase)
    assert database.is_away(cause) is away
    assert database.is_away(OperationalError("SELECT", {}, cause)) is away
    await database.close()


async def test_an_outage_of_a_file_is_seen_without_a_write(tmp_path: Path) -> None:
    """The gateway says that it does not follow its database, and that it does again."""
    path = tmp_path / "registry.db"
    known = RegisteredIndex()
    store = Store(f"sqlite:///{path}")
    await store.open()
    reader = ChangeLogReader(store, known)
    await reader.start()
    try:
        async with asyncio.timeout(WAIT):
            path.rename(tmp_path / "elsewhere.db")
            while reader.behind_since is None:  # noqa: ASYNC110 (nothing announces it)
                await asyncio.sleep(0.01)
            (tmp_path / "elsewhere.db").rename(path)
            while reader.behind_since is not None:  # noqa: ASYNC110 (nothing announces it)
                await asyncio.sleep(0.01)
    finally:
        await reader.stop()
        await store.close()


async def test_the_same_error_is_logged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway that waits for its database tries each second; other errors, and the same one later, are logged."""
    (tmp_path / "file").write_text("")
    store = Store(f"sqlite:///{tmp_path}/file/registry.db")
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            with pytest.raises(RegistryError):
                await store.open()
        assert len(logs) == 1
        monkeypatch.setattr(store_module, "REPEAT_SECONDS", -1.0)
        with pytest.raises(RegistryError):
            await store.open()
        assert len(logs) == 2
    await store.close()


@pytest.fixture
async def file(tmp_path: Path) -> AsyncIterator[Store]:
    """A store in something that is no folder."""
    (tmp_path / "file").write_text("")
    store = Store(f"sqlite:///{tmp_path}/file/registry.db")
    yield store
    await store.close()


async def test_a_file_is_never_away(file: Store) -> None:
    """A path that is wrong will still be wrong later."""
    with pytest.raises(RegistryError) as caught:
        await file.open()
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    assert not file.is_away(caught.value)
