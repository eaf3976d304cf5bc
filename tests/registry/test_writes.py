from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from deltawire_server.errors import Reason, RegistryError
from deltawire_server.registry.model import Model
from deltawire_server.registry.store import Change, Store
from tests.registry.databases import execute
from tests.registry.helpers import failure_of
from tests.support.gateway import until

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from deltawire_server.registry.registry import ModelRegistry
    from tests.registry.conftest import Opener


@pytest.fixture
def url(database_url: str) -> str:
    """Of each kind of database."""
    return database_url


async def test_of_a_hundred_registrations_of_an_alias_one_wins(registry: ModelRegistry) -> None:
    """The others learn whose it is."""
    results = await asyncio.gather(
        *(registry.register(f"model-{number}", "alpha", "llama", aliases=["wanted"]) for number in range(100)),
        return_exceptions=True,
    )
    (winner,) = [result for result in results if isinstance(result, Model)]
    losers = [result for result in results if isinstance(result, RegistryError)]
    assert len(losers) == 99
    assert {loser.metadata["model"] for loser in losers} == {winner.id}
    assert await registry.get("wanted") is winner


async def test_a_hundred_identical_registrations_all_win(registry: ModelRegistry) -> None:
    """They get the same model with the same times."""
    models = await asyncio.gather(*(registry.register("mine", "alpha", "llama") for _ in range(100)))
    assert {id(model) for model in models} == {id(models[0])}


@pytest.fixture
def deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process hears of another's changes by itself: each is as far behind as it can ever be."""

    async def silence(_: Store) -> AsyncGenerator[None]:
        await asyncio.Event().wait()
        yield

    monkeypatch.setattr(Store, "changes_elsewhere", silence)


@pytest.mark.usefixtures("deaf")
async def test_two_processes_on_one_database(open_registry: Opener) -> None:
    """What another process has registered since is seen as soon as it matters."""
    async with open_registry() as one, open_registry() as two:
        theirs = await one.register("mine", "alpha", "llama", aliases=["a"])
        assert (await two.register("mine", "alpha", "llama", aliases=["a"])).etag == theirs.etag
        await one.register("other", "alpha", "llama", aliases=["b"])
        failure = await failure_of(two.register("new", "alpha", "llama", aliases=["b"]))
        assert failure.metadata == {"model": "other", "name": "b"}
        assert (await two.get("other")).aliases == ("b",)


@pytest.mark.usefixtures("deaf")
async def test_what_another_process_registered_or_removed(open_registry: Opener) -> None:
    """The database decides: what memory does not know yet can be removed, and what it still knows is not there any more."""
    async with open_registry() as one, open_registry() as two:
        await one.register("mine", "alpha", "llama")
        await two.unregister("mine")
        assert (await one.get("mine")).id == "mine"
        assert (await failure_of(one.unregister("mine"))).reason is Reason.MODEL_NOT_FOUND
        assert (await failure_of(one.get("mine"))).reason is Reason.MODEL_NOT_FOUND


@pytest.mark.usefixtures("deaf")
async def test_two_processes_that_change_a_model(open_registry: Opener) -> None:
    """Neither undoes what the other did, each change is made of the latest state, and an etag holds for one state."""
    async with open_registry() as one, open_registry() as two:
        first = await one.register("mine", "alpha", "llama", aliases=["a"])
        await two.update("a", {"annotations": {"by": "two"}})
        both = await one.update("mine", {"aliases": ["b"]})
        assert (both.aliases, both.annotations) == (("b",), {"by": "two"})
        assert both.revision == first.revision + 2
        failure = await failure_of(two.update("mine", {"annotations": {}}, first.etag))
        assert failure.reason is Reason.ETAG_MISMATCH
        assert failure.metadata == {"model": "mine", "etag": both.etag}
        assert (await failure_of(one.unregister("mine", first.etag))).reason is Reason.ETAG_MISMATCH
        await two.unregister("b", both.etag)
        assert (await failure_of(one.update("mine", {"annotations": {}}))).reason is Reason.MODEL_NOT_FOUND


@pytest.mark.usefixtures("deaf")
async def test_an_alias_that_another_process_has_given_away(open_registry: Opener) -> None:
    """Whose it is is found out, and the model stays as it was."""
    async with open_registry() as one, open_registry() as two:
        mine = await one.register("mine", "alpha", "llama")
        await two.register("other", "alpha", "llama", aliases=["wanted"])
        failure = await failure_of(one.update("mine", {"aliases": ["wanted"]}))
        assert failure.reason is Reason.MODEL_ALREADY_EXISTS
        assert failure.metadata == {"model": "other", "name": "wanted"}
        assert (await one.get("mine")).etag == mine.etag


async def test_what_another_process_does_is_known_without_asking(open_registry: Opener) -> None:
    """It is looked up under its new names, and not under those that it has lost."""
    async with open_registry() as one, open_registry() as two:
        await one.register("mine", "alpha", "llama", aliases=["a"])
        await until(lambda: two._known.find("a") is not None)
        await one.update("mine", {"aliases": ["b"]})
        await until(lambda: two._known.find("b") is not None)
        assert (await failure_of(two.get("a"))).reason is Reason.MODEL_NOT_FOUND
        await one.unregister("mine")
        await until(lambda: two._known.find("mine") is None)


async def test_a_name_of_a_damaged_record_is_taken_until_it_is_unregistered(url: str, open_registry: Opener) -> None:
    """A damaged record costs no start; its names are not given away, and unregistering mends it."""
    async with open_registry() as registry:
        await registry.register("mine", "alpha", "llama", aliases=["a"])
        good = await registry.register("good", "alpha", "llama")
    execute(url, "UPDATE models SET annotations = '{' WHERE id = 'mine'")
    async with open_registry() as registry:
        assert (await registry.get("good")).etag == good.etag
        failure = await failure_of(registry.register("mine", "alpha", "llama"))
        assert failure.reason is Reason.MODEL_ALREADY_EXISTS
        assert "belongs to a record that cannot be read" in failure.message
        assert "unregister that one first" in failure.message
        await registry.unregister("mine")
        assert (await registry.register("a", "alpha", "llama")).id == "a"


async def test_a_caller_that_gives_up_leaves_memory_and_database_the_same(
    open_registry: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that has begun is done as a whole, by the latest before closing."""
    begun, go = asyncio.Event(), asyncio.Event()
    insert = Store.insert

    async def slow_insert(store: Store, model: Model) -> Model | None:
        kept = await insert(store, model)
        begun.set()
        await go.wait()
        return kept

    monkeypatch.setattr(Store, "insert", slow_insert)
    async with open_registry() as registry:
        call = asyncio.create_task(registry.register("mine", "alpha", "llama"))
        await begun.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        waiting = asyncio.create_task(registry.register("other", "alpha", "llama"))
        closing_down = asyncio.create_task(registry.close())
        await asyncio.sleep(0)
        waiting.cancel()
        go.set()
        await closing_down
        with pytest.raises(asyncio.CancelledError):
            await waiting
        mine = await registry.get("mine")
    async with open_registry() as registry:
        assert replace(await registry.get("mine"), state=mine.state) == mine


@pytest.mark.parametrize(
    "failure", [RegistryError(Reason.STORE_UNAVAILABLE, "away"), asyncio.CancelledError()], ids=["failed", "cancelled"]
)
async def test_a_failure_that_nobody_waits_for_is_no_noise(
    registry: ModelRegistry, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    """It was the caller's to hear, and the caller has gone; nor is it one that the event loop ends."""
    begun, go = asyncio.Event(), asyncio.Event()

    async def failing_delete(*_: object) -> Change | None:
        begun.set()
        await go.wait()
        raise failure

    monkeypatch.setattr(Store, "delete", failing_delete)
    noise: list[Mapping[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: noise.append(context))
    call = asyncio.create_task(registry.unregister("mine"))
    await begun.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    go.set()
    await registry.close()
    assert noise == []
