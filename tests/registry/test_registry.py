from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import structlog

from deltawire_server.errors import CallerError, Code, ProviderError, Reason, RegistryError
from deltawire_server.registry import listings, view
from deltawire_server.registry.model import Model, ModelSource, ModelState, ModelType
from deltawire_server.registry.registry import Filter, ModelRegistry, require_type
from deltawire_server.registry.store import ChangeKind, Store
from deltawire_server.registry.view import discovered
from deltawire_server.upstream.providers import Providers
from tests.registry.helpers import all_ids, failure_of, ids, kept
from tests.support.fake_provider import FakeProvider

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from deltawire_server.registry.feed import Step
    from deltawire_server.upstream.base import ServedModel
    from tests.registry.conftest import Opener

GONE = ProviderError(Reason.UPSTREAM_UNAVAILABLE, "cannot be reached")


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


async def test_a_discovered_model_has_to_be_registered_first(registry: ModelRegistry) -> None:
    """The errors of update and unregister have the arguments to register it with, after which both succeed by the same id."""
    for call in (registry.unregister("llama"), registry.update("llama", {"aliases": ["a"]})):
        failure = await failure_of(call)
        assert isinstance(failure, RegistryError)
        assert (failure.reason, failure.code) == (Reason.MODEL_DISCOVERED, Code.FAILED_PRECONDITION)
        assert failure.metadata == {"model": "alpha/llama"}
        assert failure.message == (
            "model 'alpha/llama' is not registered but discovered: it exists as long as provider 'alpha' serves it;"
            " register it first: RegisterModel with model_id 'llama' and this provider_id"
        )
    await registry.register("llama", "alpha")
    await registry.update("alpha/llama", {"aliases": ["a"]})
    await registry.unregister("alpha/llama")


async def test_a_served_name_is_too_loose_to_delete_by(registry: ModelRegistry) -> None:
    """It may lead to another model tomorrow; the failure names the id to use."""
    await registry.register("mine", "alpha", "llama")
    failure = await failure_of(registry.unregister("llama"))
    assert failure.reason is Reason.MODEL_NOT_FOUND
    assert "resolves to model 'mine': use that id" in failure.message
    assert (await registry.get("mine")).id == "mine"


async def test_lists_without_a_provider_that_is_away(registry: ModelRegistry, alpha: FakeProvider) -> None:
    """The rest is listed, what is registered with it too, and the answer names it."""
    await registry.register("mine", "alpha", "llama")
    alpha.go_down()
    models, _, unreachable = await registry.list()
    assert ids(models) == ["alpha/org/common", "beta/mistral", "beta/org/common", "mine"]
    assert unreachable == ("alpha",)
    models, _, unreachable = await registry.list(token="token", wanted=Filter(provider_id="alpha"))
    assert (ids(models), unreachable) == (["mine"], ("alpha",))
    assert alpha.tokens[-1] == "token"


async def test_a_model_of_a_provider_that_is_no_longer_configured(open_registry: Opener, beta: FakeProvider) -> None:
    """It is listed and got as UNAVAILABLE, and calling it says what is missing."""
    async with open_registry() as registry:
        model = await registry.register("mine", "alpha", "llama")
    async with open_registry(beta) as registry:
        assert await registry.get("mine") == replace(model, state=ModelState.UNAVAILABLE)
        assert await all_ids(registry) == ["beta/mistral", "beta/org/common", "mine"]
        failure = await failure_of(registry.resolve("mine"))
        assert failure.reason is Reason.PROVIDER_NOT_FOUND
        assert failure.metadata == {"provider": "alpha"}
        await registry.unregister("mine")


async def test_only_an_llm_chats(registry: ModelRegistry) -> None:
    """By whatever name: the scoped name of what is registered is no way around its type."""
    await registry.register("bge", "alpha", "llama", ModelType.EMBEDDING, ["embedder"], embedding_dimension=1024)
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
        model = await registry.register("mine", "alpha", "llama", ModelType.EMBEDDING, ["a"], {"k": "v"}, 1024)
        await registry.register("gone", "alpha", "llama")
        await registry.unregister("gone")
    async with open_registry() as registry:
        assert await registry.get("a") == kept(model)
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
        assert ["readonly" in line["error"] for line in logs] == [True]  # the same error is not logged again at once
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


async def test_an_update_changes_what_it_names(registry: ModelRegistry) -> None:
    """And nothing else; the etag is another one, the names that are given up are free."""
    before = await registry.register("mine", "alpha", "llama", aliases=["a", "b"], annotations={"k": "v"})
    after = await registry.update("a", {"aliases": ["b", "c"]}, before.etag)
    assert after == replace(
        before, aliases=("b", "c"), update_time=after.update_time, revision=after.revision, state=after.state
    )
    assert after.update_time is not None
    assert before.update_time is not None
    assert after.update_time >= before.update_time
    assert after.revision > before.revision
    assert await registry.get("c") == after
    assert (await registry.register("a", "alpha", "llama")).id == "a"


async def test_an_update_to_what_it_is_writes_nothing(registry: ModelRegistry) -> None:
    """So doing it again is as good as doing it once."""
    model = await registry.register("mine", "alpha", "llama", aliases=["a"], annotations={"k": "v"})
    assert await registry.update("mine", {"aliases": ("a",), "annotations": {"k": "v"}}) == model


async def test_an_update_of_what_a_model_leads_to(registry: ModelRegistry, beta: FakeProvider) -> None:
    """Its new provider must serve it; the id stays, whatever it is called there."""
    await registry.register("mistral", "alpha", "llama")
    failure = await failure_of(registry.update("mistral", {"provider_model_id": "gone"}))
    assert failure.reason is Reason.MODEL_NOT_SERVED
    moved = await registry.update("mistral", {"provider_id": "beta", "provider_model_id": "mistral"})
    assert (moved.id, moved.target) == ("mistral", ("beta", "mistral"))
    assert (await registry.resolve("mistral")).provider is beta


async def test_an_update_does_not_lead_a_scoped_name_elsewhere(registry: ModelRegistry, alpha: FakeProvider) -> None:
    """A scoped name leads to what the provider serves under it or to nothing, whether it is served now or not."""
    await registry.register("llama", "alpha")
    elsewhere = {"provider_id": "beta", "provider_model_id": "mistral"}
    for served in (["llama"], ["org/common"]):
        alpha.served = [*served]
        failure = await failure_of(registry.update("alpha/llama", elsewhere))
        assert [violation.field for violation in failure.violations] == ["model.provider_id"]
        assert "'alpha/llama' is reserved" in failure.message


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"provider_model_id": "", "type": 9}, ["model.provider_model_id", "model.type"]),
        ({"type": ModelType.EMBEDDING}, ["model.embedding_dimension"]),
        ({"embedding_dimension": 5}, ["model.embedding_dimension"]),
        ({"type": ModelType.EMBEDDING, "embedding_dimension": 0}, ["model.embedding_dimension"]),
        (
            {"aliases": ["mine", "two words"], "annotations": {"": "v"}},
            ["model.aliases[0]", "model.aliases[1]", "model.annotations"],
        ),
    ],
)
async def test_an_update_keeps_the_rules(
    registry: ModelRegistry, changes: dict[str, object], fields: list[str]
) -> None:
    """All that are broken are told, and nothing is changed."""
    model = await registry.register("mine", "alpha", "llama")
    failure = await failure_of(registry.update("mine", changes))
    assert failure.reason is Reason.INVALID_REQUEST
    assert [violation.field for violation in failure.violations] == fields
    assert await registry.get("mine") == model


async def test_an_update_to_a_name_of_another_model(registry: ModelRegistry) -> None:
    """The name is taken, by whichever caller registered it; nothing changes."""
    model = await registry.register("mine", "alpha", "llama")
    await registry.register("other", "alpha", "llama", aliases=["wanted"])
    failure = await failure_of(registry.update("mine", {"aliases": ["free", "wanted"]}))
    assert failure.reason is Reason.MODEL_ALREADY_EXISTS
    assert failure.metadata == {"model": "other", "name": "wanted"}
    assert await registry.get("mine") == model
    assert (await failure_of(registry.get("free"))).reason is Reason.MODEL_NOT_FOUND


async def test_what_is_not_registered_cannot_be_updated(registry: ModelRegistry) -> None:
    """An unknown name is reported as such."""
    assert (await failure_of(registry.update("unknown", {"aliases": ["a"]}))).reason is Reason.MODEL_NOT_FOUND


async def test_an_etag_holds_between_processes(open_registry: Opener) -> None:
    """What another process has changed counts, also what this one has not heard of; a new etag is good at once."""
    async with open_registry() as one, open_registry() as two:
        first = await one.register("mine", "alpha", "llama")
        second = await two.update("mine", {"annotations": {"by": "two"}}, first.etag)
        for stale in (one.update("mine", {"annotations": {}}, first.etag), one.unregister("mine", first.etag)):
            failure = await failure_of(stale)
            assert (failure.reason, failure.code) == (Reason.ETAG_MISMATCH, Code.ABORTED)
            assert failure.metadata == {"model": "mine", "etag": second.etag}
        third = await one.update("mine", {"annotations": {"by": "one"}}, second.etag)
        await two.unregister("mine", third.etag)
        assert (await failure_of(one.update("mine", {}, third.etag))).reason is Reason.MODEL_NOT_FOUND


async def test_updates_without_etags_lose_nothing(open_registry: Opener) -> None:
    """Each is done on what the others have made of the model, also between processes: changes of different fields add up."""
    async with open_registry() as one, open_registry() as two:
        await one.register("mine", "alpha", "llama")
        await asyncio.gather(
            one.update("mine", {"aliases": ["a"]}),
            two.update("mine", {"annotations": {"k": "v"}}),
            one.update("mine", {"type": ModelType.RERANK}),
        )
        await two.update("mine", {"aliases": ["a", "b"]})
        model = await two.get("b")
    assert (model.aliases, model.annotations, model.type) == (("a", "b"), {"k": "v"}, ModelType.RERANK)


@pytest.mark.parametrize("count", [5000, 20_000])
async def test_a_large_provider_that_goes_down_cuts_no_watcher(
    open_registry: Opener, beta: FakeProvider, count: int
) -> None:
    """Nor when it is back: a watcher that reads, and one that begins to read afterwards, know all models as they are."""
    large = FakeProvider("large", [f"organization/model-{number:05}" for number in range(count)])

    async def follow(steps: AsyncGenerator[Step], known: dict[str, Model], state: ModelState) -> None:
        ready = {model_id for model_id, model in known.items() if model.provider_id == "large" and model.state is state}
        async for step in steps:
            if step.model is not None:
                assert step.kind is ChangeKind.ADDED or step.model.id in known
                known[step.model.id] = step.model
                if step.model.provider_id == "large":
                    (ready.add if step.model.state is state else ready.discard)(step.model.id)
            if len(ready) == count and len(known) == count + 2:
                return

    async with (
        open_registry(large, beta) as registry,
        aclosing(registry.watch()) as reading,
        aclosing(registry.watch()) as late,
    ):
        await anext(reading)
        await anext(late)
        seen: dict[str, Model] = {}
        seen_late: dict[str, Model] = {}
        await registry.refresh()
        await follow(reading, seen, ModelState.SERVING)
        for failure, state in ((GONE, ModelState.UNAVAILABLE), (None, ModelState.SERVING)):
            large.failure = failure
            async with asyncio.TaskGroup() as group:
                group.create_task(follow(reading, seen, state))
                await registry.refresh()
        await follow(late, seen_late, ModelState.SERVING)
        assert seen == seen_late


async def test_calls_build_no_more_models_than_they_show(
    open_registry: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look-up builds one model, a miss and a list none, a page of a caller's own listing one more than it has.

    A walk through a whole listing lets other tasks run.
    """
    large = FakeProvider("large", [f"model-{number:04}" for number in range(3000)])
    built = 0

    def counted(provider_id: str, served: ServedModel, state: ModelState) -> Model:
        nonlocal built
        built += 1
        return discovered(provider_id, served, state)

    async with open_registry(large, FakeProvider("other")) as registry:
        await registry.list()
        monkeypatch.setattr(listings, "discovered", counted)
        monkeypatch.setattr(view, "discovered", counted)
        for call, expected in (
            (registry.get("model-0007"), 1),
            (registry.get("large/model-0007"), 1),
            (registry.get("large/model-0007", "token"), 1),
            (registry.get("none"), 0),
            (registry.resolve(""), 0),
            (registry.register("mine", "large", "none"), 0),
            (registry.list(), 0),
        ):
            built = 0
            await asyncio.gather(call, return_exceptions=True)
            assert built == expected
        turns = 0

        async def count_turns() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count_turns())
        built = 0
        models, _, _ = await registry.list(token="token", wanted=Filter(provider_id="large"))
        assert (len(models), built) == (100, 101)
        turns = 0
        models, _, _ = await registry.list(token="token", wanted=Filter(provider_id="large", type=ModelType.RERANK))
        counting.cancel()
        assert models == []
        assert turns >= 3000 / view.LOOKS_AT_ONCE
