"""What the registry that this one grew out of held, where it still holds, or why it does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltawire_server.errors import Code, Reason
from deltawire_server.registry.model import ModelSource
from tests.registry.helpers import all_ids, failure_of
from tests.support.fake_provider import FakeProvider

if TYPE_CHECKING:
    from tests.registry.conftest import Opener


async def test_two_registrations_are_listed_got_and_gone_after_unregistering(open_registry: Opener) -> None:
    """Registered under their own names, models have scoped ids."""
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
    """An id that is not the provider's own name becomes the id as it is."""
    async with open_registry(FakeProvider("test_provider", ["actual-provider-model"])) as registry:
        model = await registry.register("my-alias", provider_model_id="actual-provider-model")
        assert (model.id, model.provider_id, model.provider_model_id) == (
            "my-alias",
            "test_provider",
            "actual-provider-model",
        )
        assert await registry.get("my-alias") == model


async def test_two_providers_same_model(open_registry: Opener) -> None:
    """Both can be registered; the bare name is ambiguous, and the failure names both and how to call them."""
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
    """The scoped and the bare name both lead to the scoped entry."""
    async with open_registry(FakeProvider("test_provider", ["test-model"])) as registry:
        model = await registry.register("test-model")
        assert await registry.get("test_provider/test-model") == await registry.get("test-model") == model
        assert "not found" in (await failure_of(registry.get("unknown"))).message


async def test_a_scoped_entry_and_an_alias_of_one_provider_are_not_ambiguous(open_registry: Opener) -> None:
    """The original failed here with "multiple providers: a, a"."""
    async with open_registry(FakeProvider("a", ["m"])) as registry:
        await registry.register("alias", provider_model_id="m")
        await registry.register("m")
        assert (await registry.get("m")).id == "a/m"


async def test_source(open_registry: Opener) -> None:
    """Each model says how it came to be known."""
    async with open_registry(FakeProvider("test_provider", ["mine", "listed"])) as registry:
        assert (await registry.register("mine")).source is ModelSource.REGISTERED
        assert (await registry.get("test_provider/mine")).source is ModelSource.REGISTERED
        assert (await registry.get("test_provider/listed")).source is ModelSource.DISCOVERED


async def test_a_listing_keeps_the_alias_and_adds_only_what_is_different(open_registry: Opener) -> None:
    """What is registered is not listed a second time as discovered."""
    provider = FakeProvider("test_provider", ["provider-model-1", "different-model"])
    async with open_registry(provider) as registry:
        await registry.register("my-custom-alias", provider_model_id="provider-model-1")
        assert await all_ids(registry) == ["my-custom-alias", "test_provider/different-model"]


async def test_a_new_listing_keeps_the_registered_drops_the_old_and_adds_the_new(open_registry: Opener) -> None:
    """Discovered models are there for as long as they are listed; registered ones stay."""
    provider = FakeProvider("test_provider", ["user-model", "provider-model-old"])
    async with open_registry(provider) as registry:
        await registry.register("user", provider_model_id="user-model")
        assert await all_ids(registry) == ["test_provider/provider-model-old", "user"]
        provider.served = ["provider-model-new"]
        assert await all_ids(registry) == ["test_provider/provider-model-new", "user"]
        assert (await failure_of(registry.get("provider-model-old"))).reason is Reason.MODEL_NOT_FOUND
