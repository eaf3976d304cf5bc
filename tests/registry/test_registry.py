from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import structlog

from deltawire_server.errors import CallerError, Code, Reason, RegistryError
from deltawire_server.registry.model import Model, ModelSource, ModelType
from deltawire_server.registry.registry import ModelRegistry, require_type
from deltawire_server.registry.store import Store
from deltawire_server.upstream.providers import Providers
from tests.registry.helpers import all_ids, failure_of, ids

if TYPE_CHECKING:
    from pathlib import Path

    from tests.registry.conftest import Opener
    from tests.support.fake_provider import FakeProvider


@pytest.mark.parametrize("name", ["mine", "a"])
async def test_unregisters_by_id_or_alias(registry: ModelRegistry, name: str) -> None:
    """All its names are free; what is served stays callable by the provider's own name."""
    await registry.register("mine", "alpha", "llama", aliases=["a"])
    await registry.unregister(name)
    for gone in ("mine", "a"):
        assert (await failure_of(registry.get(gone))).reason is Reason.MODEL_NOT_FOUND
    assert (await registry.get("llama")).source is ModelSource.DISCOVERED
    assert (await registry.register("a", "alpha", "llama", aliases=["mine"])).id == "a"


async def test_unregistering_an_unknown_name(registry: ModelRegistry) -> None:
    """Not found, as for any other call."""
    failure = await failure_of(registry.unregister("unknown"))
    assert failure.reason is Reason.MODEL_NOT_FOUND


async def test_unregistering_a_discovered_model(registry: ModelRegistry) -> None:
    """It is there for as long as it is served."""
    failure = await failure_of(registry.unregister("llama"))
    assert isinstance(failure, RegistryError)
    assert (failure.reason, failure.code) == (Reason.MODEL_DISCOVERED, Code.FAILED_PRECONDITION)
    assert failure.metadata == {"model": "alpha/llama"}


async def test_a_served_name_is_too_loose_to_delete_by(registry: ModelRegistry) -> None:
    """It may lead to another model tomorrow; the failure names the id to use."""
    await registry.register("mine", "alpha", "llama")
    failure = await failure_of(registry.unregister("llama"))
    assert failure.reason is Reason.MODEL_NOT_FOUND
    assert "leads to model 'mine': unregister that" in failure.message
    assert (await registry.get("mine")).id == "mine"


async def test_lists_without_a_provider_that_is_away(registry: ModelRegistry, alpha: FakeProvider) -> None:
    """The rest is listed, what is registered with it too, and the answer names it."""
    await registry.register("mine", "alpha", "llama")
    alpha.go_down()
    models, _, unreachable = await registry.list(token="token")
    assert ids(models) == ["beta/mistral", "beta/org/common", "mine"]
    assert unreachable == ("alpha",)
    assert alpha.tokens[-1] == "token"


async def test_a_model_of_a_provider_that_is_no_longer_configured(open_registry: Opener, beta: FakeProvider) -> None:
    """It is listed and got, and calling it says what is missing."""
    async with open_registry() as registry:
        model = await registry.register("mine", "alpha", "llama")
    async with open_registry(beta) as registry:
        assert await registry.get("mine") == model
        assert await all_ids(registry) == ["beta/mistral", "beta/org/common", "mine"]
        failure = await failure_of(registry.resolve("mine"))
        assert failure.reason is Reason.PROVIDER_NOT_FOUND
        assert failure.metadata == {"provider": "alpha"}
        await registry.unregister("mine")


async def test_only_an_llm_chats(registry: ModelRegistry) -> None:
    """By whatever name: the scoped name of what is registered is no way around its type."""
    await registry.register("bge", "alpha", "llama", ModelType.EMBEDDING, ["embedder"])
    require_type(await registry.get("mistral"), ModelType.LLM)
    for name in ("bge", "embedder", "alpha/llama", "llama"):
        with pytest.raises(CallerError) as raised:
            require_type(await registry.get(name), ModelType.LLM)
        failure = raised.value
        assert (failure.reason, failure.code) == (Reason.MODEL_WRONG_TYPE, Code.FAILED_PRECONDITION)
        assert failure.metadata == {"model": "bge", "type": "EMBEDDING"}
        assert "model 'bge' is of type EMBEDDING rather than the expected type LLM" in failure.message


def test_require_type() -> None:
    """The right type passes, any other does not."""
    model = Model("r", "vllm", "r", ModelType.RERANK)
    require_type(model, ModelType.RERANK)
    with pytest.raises(CallerError, match="RERANK rather than the expected type EMBEDDING"):
        require_type(model, ModelType.EMBEDDING)


async def test_registrations_survive_a_restart(open_registry: Opener) -> None:
    """Every field and every name."""
    async with open_registry() as registry:
        model = await registry.register("mine", "alpha", "llama", ModelType.RERANK, ["a"], {"k": "v"})
        await registry.register("gone", "alpha", "llama")
        await registry.unregister("gone")
    async with open_registry() as registry:
        assert await registry.get("a") == model
        assert (await failure_of(registry.get("gone"))).reason is Reason.MODEL_NOT_FOUND


async def test_reads_go_on_without_the_database(url: str, open_registry: Opener) -> None:
    """A database gone read-only costs writes and nothing else, and what a write could not do has not happened."""
    async with open_registry() as registry:
        model = await registry.register("mine", "alpha", "llama", aliases=["a"])
    path = url.removeprefix("sqlite:///")
    async with open_registry(url=f"sqlite:///file:{path}?mode=ro&uri=true") as registry:
        with structlog.testing.capture_logs() as logs:
            for write in (registry.register("new", "alpha", "llama"), registry.unregister("mine")):
                failure = await failure_of(write)
                assert isinstance(failure, RegistryError)
                assert (failure.reason, failure.code) == (Reason.STORE_UNAVAILABLE, Code.UNAVAILABLE)
        assert ["readonly" in line["error"] for line in logs] == [True, True]
        assert await registry.register("mine", "alpha", "llama", aliases=["a"]) == model
        assert (await registry.resolve("a")).model == model
        assert (await failure_of(registry.get("new"))).reason is Reason.MODEL_NOT_FOUND
        assert await all_ids(registry) == ["alpha/org/common", "beta/mistral", "beta/org/common", "mine"]


async def test_a_database_that_cannot_be_opened(tmp_path: Path, alpha: FakeProvider) -> None:
    """Opening fails as a whole, and closing afterwards is fine."""
    registry = ModelRegistry(Store(f"sqlite:///{tmp_path}"), Providers([alpha]))
    failure = await failure_of(registry.open())
    await registry.close()
    assert failure.reason is Reason.STORE_UNAVAILABLE
