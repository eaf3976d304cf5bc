"""A registry is one of several on its database: what it says of a write is true of the database, and not of its memory."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from deltawire_server.errors import Reason, RegistryError
from deltawire_server.registry.store import Store
from tests.registry.databases import execute
from tests.registry.helpers import failure_of

if TYPE_CHECKING:
    from deltawire_server.registry.registry import ModelRegistry
    from tests.registry.conftest import Opener


async def test_the_same_again_is_registered_if_another_process_has_removed_it(url: str, open_registry: Opener) -> None:
    """An answer that all is well would be false: nothing would be registered."""
    async with open_registry() as one, open_registry() as two:
        first = await one.register("mine", "alpha", "llama")
        await two.unregister("mine")
        again = await one.register("mine", "alpha", "llama")
        assert again.revision > first.revision
    store = Store(url)
    await store.open()
    assert [model.id for model in (await store.load())[1]] == ["mine"]
    await store.close()


async def test_what_another_process_has_removed_is_in_nobodys_way(open_registry: Opener) -> None:
    """Its name can be given away as soon as the other process has said that it is free."""
    async with open_registry() as one, open_registry() as two:
        await one.register("mine", "alpha", "llama", aliases=["a"])
        await two.unregister("mine")
        assert (await one.register("mine", "beta", "mistral")).provider_id == "beta"
        assert (await one.register("other", "alpha", "llama", aliases=["a"])).aliases == ("a",)


async def test_an_update_back_to_what_memory_still_has_is_written(open_registry: Opener) -> None:
    """Another process has changed it in between, so that something is to be done."""
    async with open_registry() as one, open_registry() as two:
        await one.register("mine", "alpha", "llama", aliases=["a"])
        between = await two.update("mine", {"aliases": ("b",)})
        after = await one.update("mine", {"aliases": ("a",)})
        assert (after.aliases, after.revision > between.revision) == (("a",), True)
        assert (await two.update("mine", {"aliases": ("a",)})).revision == after.revision


async def test_updates_of_one_model_at_once_all_succeed(open_registry: Opener) -> None:
    """An update without an etag does not fail because of other updates, however many succeed before it."""
    # SQLite's lock is not fair, so that on a busy machine a write may wait longer than tests usually allow.
    async with open_registry(busy_seconds=10.0) as one, open_registry(busy_seconds=10.0) as two:
        await one.register("mine", "alpha", "llama")
        writes = [
            registry.update("mine", {"annotations": {"number": str(number)}})
            for number in range(20)
            for registry in (one, two)
        ]
        written = await asyncio.gather(*writes)
        assert len({model.revision for model in written}) >= 20


async def test_the_answer_to_a_write_is_what_it_wrote(registry: ModelRegistry) -> None:
    """Not what somebody has made of it since: with that etag, the caller would undo a change that it has not seen."""
    written = await registry.register("mine", "alpha", "llama", aliases=["a"])
    changed = await registry.update("mine", {"aliases": ("b",)})
    assert registry._view.as_seen(replace(written)) == written
    assert registry._view.as_seen(changed) == changed


async def test_an_update_of_a_model_that_is_gone_blames_no_name(registry: ModelRegistry) -> None:
    """Its own id may be another's by now; whose it is has to be found out anew."""
    before = await registry.register("mine", "alpha", "llama")
    await registry.unregister("mine")
    await registry.register("other", "alpha", "llama", aliases=["mine"])
    assert await registry._writes.update(replace(before, annotations={"k": "v"})) is None


async def test_an_alias_of_a_record_that_cannot_be_read(url: str, open_registry: Opener) -> None:
    """Taken, as for a registration: to try again would not help."""
    async with open_registry() as registry:
        await registry.register("damaged", "alpha", "llama", aliases=["a"])
        await registry.register("mine", "alpha", "llama")
    execute(url, "UPDATE models SET annotations = '{' WHERE id = 'damaged'")
    async with open_registry() as registry:
        failure = await failure_of(registry.update("mine", {"aliases": ("a",)}))
        assert isinstance(failure, RegistryError)
        assert failure.reason is Reason.MODEL_ALREADY_EXISTS
        assert "cannot be read" in failure.message
