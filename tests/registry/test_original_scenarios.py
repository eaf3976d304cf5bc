"""What the registry that this one grew out of was tested for: kept, or fixed where it was not right.

In the order of its tests: of its known models, of its routing tables, of its store.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from deltawire_server.errors import Code, Reason
from deltawire_server.registry.catalog import names_of
from deltawire_server.registry.model import ModelSource, ModelType
from tests.registry.helpers import all_ids, failure_of, kept
from tests.support.fake_provider import FakeProvider

if TYPE_CHECKING:
    from tests.registry.conftest import Opener

# Known models.

REPOSITORY, DESCRIPTOR = "meta-llama/Llama-3.1-8B-Instruct", "Llama3.1-8B-Instruct"
REPOSITORY_2 = "meta-llama/Llama-3.3-70B-Instruct"


async def test_looking_up_an_unknown_name(open_registry: Opener) -> None:
    """Kept: neither the known models nor the registry make anything of it; of a registry it is a failure by name."""
    assert names_of("unknown-model") == ()
    async with open_registry(FakeProvider("test_provider", [REPOSITORY])) as registry:
        assert (await failure_of(registry.get("unknown-model"))).reason is Reason.MODEL_NOT_FOUND


async def test_registering_what_the_provider_does_not_know(open_registry: Opener) -> None:
    """Kept: it is refused, and nothing is registered."""
    async with open_registry(FakeProvider("test_provider", [REPOSITORY])) as registry:
        failure = await failure_of(registry.register("model", provider_model_id="unknown-provider-id"))
        assert failure.reason is Reason.MODEL_NOT_SERVED
        assert (await failure_of(registry.get("model"))).reason is Reason.MODEL_NOT_FOUND


async def test_a_new_alias_of_a_known_model(open_registry: Opener) -> None:
    """Kept: it leads to what the provider serves."""
    async with open_registry(FakeProvider("test_provider", [REPOSITORY])) as registry:
        await registry.register("new-model", provider_model_id=REPOSITORY)
        assert (await registry.resolve("new-model")).model.provider_model_id == REPOSITORY


async def test_a_known_alias_instead_of_the_providers_name(open_registry: Opener) -> None:
    """Fixed: it leads to the provider's name. The original found that name, asked for the alias, and was refused."""
    async with open_registry(FakeProvider("test_provider", [REPOSITORY])) as registry:
        model = await registry.register("new-model", provider_model_id=DESCRIPTOR)
        assert (model.id, model.provider_model_id) == ("new-model", REPOSITORY)
        assert (await registry.resolve("new-model")).model.provider_model_id == REPOSITORY


async def test_an_identical_registration(open_registry: Opener) -> None:
    """Kept: it succeeds and changes nothing, also by an alias of the provider's name."""
    async with open_registry(FakeProvider("test_provider", [REPOSITORY])) as registry:
        model = await registry.register("known-model", provider_model_id=REPOSITORY)
        assert await registry.register("known-model", provider_model_id=REPOSITORY) is model
        assert await registry.register("known-model", provider_model_id=DESCRIPTOR) is model


async def test_a_registered_name_for_another_model(open_registry: Opener) -> None:
    """Fixed: it is refused and the first stays. The original's helper refused, and its adapter passed over that."""
    async with open_registry(FakeProvider("test_provider", [REPOSITORY, REPOSITORY_2])) as registry:
        await registry.register("known-model", provider_model_id=REPOSITORY)
        failure = await failure_of(registry.register("known-model", provider_model_id=REPOSITORY_2))
        assert (failure.reason, failure.code) == (Reason.MODEL_ALREADY_EXISTS, Code.ALREADY_EXISTS)
        assert "already registered with different provider_model_id" in failure.message
        assert (await registry.get("known-model")).provider_model_id == REPOSITORY


async def test_a_providers_own_name(open_registry: Opener) -> None:
    """Kept: it leads to itself with nothing registered."""
    async with open_registry(FakeProvider("test_provider", [REPOSITORY])) as registry:
        assert (await registry.get(REPOSITORY)).provider_model_id == REPOSITORY


async def test_a_model_that_is_known_by_being_served(open_registry: Opener) -> None:
    """Kept: what no list of known models holds can be registered and found."""
    provider = FakeProvider("test_provider", [REPOSITORY])
    async with open_registry(provider) as registry:
        provider.served.append("dynamic-model")
        await registry.register("dynamic-model")
        assert (await registry.get("dynamic-model")).provider_model_id == "dynamic-model"


async def test_a_model_that_is_neither_known_nor_served(open_registry: Opener) -> None:
    """Fixed: the failure lists what is served. The original listed what it knew, with "..." for what it could not."""
    async with open_registry(FakeProvider("test_provider", ["served-1", "served-2"])) as registry:
        failure = await failure_of(registry.register("unknown-model"))
    assert failure.reason is Reason.MODEL_NOT_SERVED
    assert failure.message.endswith("it serves: served-1, served-2")


async def test_an_alias_of_a_model_that_is_known_by_being_served(open_registry: Opener) -> None:
    """Kept: alias and own name both lead to it."""
    async with open_registry(FakeProvider("test_provider", ["dynamic-model"])) as registry:
        model = await registry.register("my-alias", provider_model_id="dynamic-model")
        assert await registry.get("my-alias") is model
        assert await registry.get("dynamic-model") is model


async def test_an_alias_after_unregistering(open_registry: Opener) -> None:
    """Fixed: it is free for another model. The original never forgot an alias, and its tests of that were switched off."""
    async with open_registry(FakeProvider("test_provider", [REPOSITORY, REPOSITORY_2])) as registry:
        await registry.register("my-alias", provider_model_id=REPOSITORY)
        await registry.unregister("my-alias")
        assert (await failure_of(registry.get("my-alias"))).reason is Reason.MODEL_NOT_FOUND
        await registry.register("my-alias", provider_model_id=REPOSITORY_2)
        assert (await registry.get("my-alias")).provider_model_id == REPOSITORY_2


# Routing tables.


async def test_two_registrations_are_listed_got_and_gone_after_unregistering(open_registry: Opener) -> None:
    """Kept: registered under their own names, models have scoped ids. What is missing is a failure rather than None."""
    provider = FakeProvider("test_provider", ["test-model", "test-model-2"])
    async with open_registry(provider) as registry:
        await registry.register("test-model")
        await registry.register("test-model-2")
        assert await all_ids(registry) == ["test_provider/test-model", "test_provider/test-model-2"]
        assert (await registry.get("test_provider/test-model")).provider_model_id == "test-model"
        missing = await failure_of(registry.get("missing"))
        assert (missing.reason, missing.code) == (Reason.MODEL_NOT_FOUND, Code.NOT_FOUND)
        await registry.unregister("test_provider/test-model")
        await registry.unregister("test_provider/test-model-2")
        provider.served = []
        assert await all_ids(registry) == []


async def test_alias(open_registry: Opener) -> None:
    """Kept: an id that is not the provider's own name becomes the id as it is."""
    async with open_registry(FakeProvider("test_provider", ["actual-provider-model"])) as registry:
        model = await registry.register("my-alias", provider_model_id="actual-provider-model")
        assert (model.id, model.provider_id, model.provider_model_id) == (
            "my-alias",
            "test_provider",
            "actual-provider-model",
        )
        assert await registry.get("my-alias") == model


async def test_two_providers_same_model(open_registry: Opener) -> None:
    """Kept: both can be registered; the bare name is ambiguous, and the failure names both and how to call them."""
    one, two = FakeProvider("provider1", ["common-model"]), FakeProvider("provider2", ["common-model"])
    async with open_registry(one, two) as registry:
        for provider_id in ("provider1", "provider2"):
            await registry.register("common-model", provider_id)
            assert (await registry.get(f"{provider_id}/common-model")).provider_id == provider_id
        failure = await failure_of(registry.get("common-model"))
    assert (failure.reason, failure.code) == (Reason.MODEL_AMBIGUOUS, Code.FAILED_PRECONDITION)
    assert failure.metadata == {"model": "common-model", "providers": "provider1, provider2"}
    assert "call it as 'provider1/common-model' or 'provider2/common-model'" in failure.message


async def test_fallback(open_registry: Opener) -> None:
    """Kept: the scoped and the bare name both lead to the scoped entry."""
    async with open_registry(FakeProvider("test_provider", ["test-model"])) as registry:
        model = await registry.register("test-model")
        assert await registry.get("test_provider/test-model") == await registry.get("test-model") == model
        assert "not found" in (await failure_of(registry.get("unknown"))).message


async def test_a_scoped_entry_and_an_alias_of_one_provider_are_not_ambiguous(open_registry: Opener) -> None:
    """Fixed: the original failed here with "multiple providers: a, a"."""
    async with open_registry(FakeProvider("a", ["m"])) as registry:
        await registry.register("alias", provider_model_id="m")
        await registry.register("m")
        assert (await registry.get("m")).id == "a/m"


async def test_source(open_registry: Opener) -> None:
    """Kept: each model says how it came to be known. What is listed is an LLM: a vLLM does not say what else it may be."""
    async with open_registry(FakeProvider("test_provider", ["mine", "listed"])) as registry:
        assert (await registry.register("mine")).source is ModelSource.REGISTERED
        assert (await registry.get("test_provider/mine")).source is ModelSource.REGISTERED
        listed = await registry.get("test_provider/listed")
        assert (listed.source, listed.type) == (ModelSource.DISCOVERED, ModelType.LLM)


async def test_a_listing_keeps_the_alias_and_adds_only_what_is_different(open_registry: Opener) -> None:
    """Kept: what is registered is not listed a second time as discovered."""
    provider = FakeProvider("test_provider", ["provider-model-1", "different-model"])
    async with open_registry(provider) as registry:
        await registry.register("my-custom-alias", provider_model_id="provider-model-1")
        assert await all_ids(registry) == ["my-custom-alias", "test_provider/different-model"]


async def test_a_new_listing_keeps_the_registered_drops_the_old_and_adds_the_new(open_registry: Opener) -> None:
    """Kept: discovered models are there for as long as they are listed; registered ones stay."""
    provider = FakeProvider("test_provider", ["user-model", "provider-model-old"])
    async with open_registry(provider) as registry:
        await registry.register("user", provider_model_id="user-model")
        assert await all_ids(registry) == ["test_provider/provider-model-old", "user"]
        provider.served = ["provider-model-new"]
        assert await all_ids(registry) == ["test_provider/provider-model-new", "user"]
        assert (await failure_of(registry.get("provider-model-old"))).reason is Reason.MODEL_NOT_FOUND


# Store.


async def test_an_empty_registry(open_registry: Opener) -> None:
    """Kept: nothing is listed, and what is missing is missing."""
    async with open_registry(FakeProvider("test_provider")) as registry:
        assert await all_ids(registry) == []
        assert (await failure_of(registry.get("missing"))).reason is Reason.MODEL_NOT_FOUND


async def test_two_types(open_registry: Opener) -> None:
    """Kept: each is got as what it was registered for, from memory and from disk; an embedding with its dimension."""
    provider = FakeProvider("test_provider", ["test-llm", "test-embedding"])
    async with open_registry(provider) as registry:
        llm = await registry.register("test-llm", model_type=ModelType.LLM)
        embedding = await registry.register("test-embedding", model_type=ModelType.EMBEDDING, embedding_dimension=512)
        assert (llm.type, embedding.type) == (ModelType.LLM, ModelType.EMBEDDING)
        assert [await registry.get(model.id) for model in (llm, embedding)] == [llm, embedding]
    async with open_registry(provider) as registry:
        assert [await registry.get(model.id) for model in (llm, embedding)] == [kept(llm), kept(embedding)]


async def test_memory_holds_what_was_on_disk(open_registry: Opener) -> None:
    """Kept: what was written before the registry was opened is found, without asking anybody."""
    provider = FakeProvider("test_provider", ["test-model"])
    async with open_registry(provider) as registry:
        model = await registry.register("mine", provider_model_id="test-model", annotations={"k": "v"})
    async with open_registry(provider) as registry:
        provider.go_down()
        assert await registry.get("mine") == kept(model)


async def test_a_write_is_in_memory_and_on_disk(open_registry: Opener) -> None:
    """Kept: it is found here at once, and by another store on the same database."""
    provider = FakeProvider("test_provider", ["test-model"])
    async with open_registry(provider) as registry:
        model = await registry.register("mine", provider_model_id="test-model")
        assert await registry.get("mine") is model
        async with open_registry(provider) as another:
            assert await another.get("mine") == kept(model)


async def test_the_same_id_and_provider_twice(open_registry: Opener) -> None:
    """Fixed: the original is kept and the caller is told. There it was kept too, and the caller got the other back."""
    provider = FakeProvider("test_provider", ["test-model"])
    async with open_registry(provider) as registry:
        first = await registry.register("mine", provider_model_id="test-model", annotations={"k": "original"})
        failure = await failure_of(
            registry.register("mine", provider_model_id="test-model", annotations={"k": "other"})
        )
        assert failure.reason is Reason.MODEL_ALREADY_EXISTS
        assert await registry.get("mine") is first
    async with open_registry(provider) as registry:
        assert await registry.get("mine") == kept(first)


async def test_the_same_id_of_another_provider(open_registry: Opener) -> None:
    """Fixed: the first owner keeps it. The original gave it to the second without a word."""
    one, two = FakeProvider("provider1", ["common-model"]), FakeProvider("provider2", ["common-model"])
    async with open_registry(one, two) as registry:
        first = await registry.register("mine", "provider1", "common-model")
        failure = await failure_of(registry.register("mine", "provider2", "common-model"))
        assert failure.reason is Reason.MODEL_ALREADY_EXISTS
        assert await registry.get("mine") is first


async def test_three_are_listed(open_registry: Opener) -> None:
    """Kept: all that was registered, from memory and from disk."""
    provider = FakeProvider("test_provider", ["test-model"])
    expected = ["model-0", "model-1", "model-2"]
    async with open_registry(provider) as registry:
        for model_id in reversed(expected):
            await registry.register(model_id, provider_model_id="test-model")
        assert await all_ids(registry) == expected
    async with open_registry(provider) as registry:
        assert await all_ids(registry) == expected


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param("annotations = '{not valid JSON'", id="corrupt JSON"),
        pytest.param("annotations = '', type = ''", id="missing fields"),
    ],
)
async def test_a_damaged_record(url: str, open_registry: Opener, damage: str) -> None:
    """Kept: it is left out of the list and not found; the others are not harmed."""
    provider = FakeProvider("test_provider", ["test-model"])
    async with open_registry(provider) as registry:
        await registry.register("damaged", provider_model_id="test-model")
        good = await registry.register("good", provider_model_id="test-model")
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
        connection.execute(f"UPDATE models SET {damage} WHERE id = 'damaged'")  # noqa: S608 (from the list above)
        connection.commit()
    async with open_registry(provider) as registry:
        assert await all_ids(registry) == ["good"]
        assert await registry.get("good") == good
        assert (await failure_of(registry.get("damaged"))).reason is Reason.MODEL_NOT_FOUND
