from __future__ import annotations

import asyncio
import base64
import sqlite3
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from deltawire_server.errors import CallerError, Code, DeltawireError, ProviderError, Reason, RegistryError
from deltawire_server.registry.model import Model, ModelSource, ModelType
from deltawire_server.registry.registry import ModelRegistry, require_type
from deltawire_server.registry.store import Store
from deltawire_server.upstream.base import ServedModel
from deltawire_server.upstream.providers import Providers
from tests.support.fake_provider import FakeProvider

if TYPE_CHECKING:
    from collections.abc import Awaitable, Mapping, Sequence
    from pathlib import Path

    from tests.registry.conftest import Opener


async def failure_of(call: Awaitable[object]) -> DeltawireError:
    """What a call that must fail fails with."""
    with pytest.raises(DeltawireError) as failure:
        await call
    return failure.value


def ids(models: Sequence[Model]) -> list[str]:
    """In their order."""
    return [model.id for model in models]


async def all_ids(registry: ModelRegistry) -> list[str]:
    """Of the first page, which is large enough."""
    models, _, _ = await registry.list()
    return ids(models)


def on_disk(url: str, statement: str) -> None:
    """Another program at the database file."""
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
        connection.execute(statement)
        connection.commit()


class TestTheOriginalsScenarios:
    """What the registry that this one grew out of held, where it still holds, or why it does not."""

    async def test_two_registrations_are_listed_got_and_gone_after_unregistering(self, open_registry: Opener) -> None:
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

    async def test_alias(self, open_registry: Opener) -> None:
        """An id that is not the provider's own name becomes the id as it is."""
        async with open_registry(FakeProvider("test_provider", ["actual-provider-model"])) as registry:
            model = await registry.register("my-alias", provider_model_id="actual-provider-model")
            assert (model.id, model.provider_id, model.provider_model_id) == (
                "my-alias",
                "test_provider",
                "actual-provider-model",
            )
            assert await registry.get("my-alias") == model

    async def test_two_providers_same_model(self, open_registry: Opener) -> None:
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

    async def test_fallback(self, open_registry: Opener) -> None:
        """The scoped and the bare name both lead to the scoped entry."""
        async with open_registry(FakeProvider("test_provider", ["test-model"])) as registry:
            model = await registry.register("test-model")
            assert await registry.get("test_provider/test-model") == await registry.get("test-model") == model
            assert "not found" in (await failure_of(registry.get("unknown"))).message

    async def test_a_scoped_entry_and_an_alias_of_one_provider_are_not_ambiguous(self, open_registry: Opener) -> None:
        """The original failed here with "multiple providers: a, a"."""
        async with open_registry(FakeProvider("a", ["m"])) as registry:
            await registry.register("alias", provider_model_id="m")
            await registry.register("m")
            assert (await registry.get("m")).id == "a/m"

    async def test_source(self, open_registry: Opener) -> None:
        """Each model says how it came to be known."""
        async with open_registry(FakeProvider("test_provider", ["mine", "listed"])) as registry:
            assert (await registry.register("mine")).source is ModelSource.REGISTERED
            assert (await registry.get("test_provider/mine")).source is ModelSource.REGISTERED
            assert (await registry.get("test_provider/listed")).source is ModelSource.DISCOVERED

    async def test_a_listing_keeps_the_alias_and_adds_only_what_is_different(self, open_registry: Opener) -> None:
        """What is registered is not listed a second time as discovered."""
        provider = FakeProvider("test_provider", ["provider-model-1", "different-model"])
        async with open_registry(provider) as registry:
            await registry.register("my-custom-alias", provider_model_id="provider-model-1")
            assert await all_ids(registry) == ["my-custom-alias", "test_provider/different-model"]

    async def test_a_new_listing_keeps_the_registered_drops_the_old_and_adds_the_new(
        self, open_registry: Opener
    ) -> None:
        """Discovered models are there for as long as they are listed; registered ones stay."""
        provider = FakeProvider("test_provider", ["user-model", "provider-model-old"])
        async with open_registry(provider) as registry:
            await registry.register("user", provider_model_id="user-model")
            assert await all_ids(registry) == ["test_provider/provider-model-old", "user"]
            provider.served = ["provider-model-new"]
            assert await all_ids(registry) == ["test_provider/provider-model-new", "user"]
            assert (await failure_of(registry.get("provider-model-old"))).reason is Reason.MODEL_NOT_FOUND


class TestRegister:
    async def test_keeps_what_the_provider_says(self, open_registry: Opener) -> None:
        """The provider's limits and origins are part of the model, its times are set."""
        served = ServedModel("lora", root="/adapters/lora", parent="base", max_context_tokens=4096)
        async with open_registry(FakeProvider("vllm", ["base", served])) as registry:
            model = await registry.register("mine", "vllm", "lora", ModelType.EMBEDDING, ["a", "b"], {"k": "v"})
        assert model.create_time is not None
        assert model == Model(
            "mine",
            "vllm",
            "lora",
            ModelType.EMBEDDING,
            ("a", "b"),
            {"k": "v"},
            ModelSource.REGISTERED,
            4096,
            "/adapters/lora",
            "base",
            model.create_time,
            model.create_time,
        )

    @pytest.mark.parametrize(
        ("model_id", "provider_model_id", "expected"),
        [
            ("llama", "", "alpha/llama"),
            ("llama", "llama", "alpha/llama"),
            ("mine", "llama", "mine"),
            ("org/common", "", "alpha/org/common"),
            ("alpha/llama", "llama", "alpha/llama"),
        ],
    )
    async def test_the_identifier_rule(
        self, registry: ModelRegistry, model_id: str, provider_model_id: str, expected: str
    ) -> None:
        """An id different from the provider's name is an alias and stays; the provider's own name is scoped."""
        assert (await registry.register(model_id, "alpha", provider_model_id)).id == expected

    @pytest.mark.parametrize("number", [0, 1, 2, 3])
    async def test_types_by_number(self, registry: ModelRegistry, number: int) -> None:
        """A number as it came over the wire; none is LLM."""
        model = await registry.register("llama", "alpha", model_type=number)
        assert model.type.value == (number or 1)

    async def test_every_broken_rule_is_listed(self, registry: ModelRegistry) -> None:
        """One answer tells all there is to mend."""
        failure = await failure_of(
            registry.register(
                "two words",
                "",
                "llama",
                9,
                ["", "fine", "fine", "two words", "x" * 257, "tab\t"],
                {"": "", "k" * 129: "", "v": "x" * 4097},
            )
        )
        assert isinstance(failure, CallerError)
        assert (failure.reason, failure.code) == (Reason.INVALID_REQUEST, Code.INVALID_ARGUMENT)
        assert [violation.field for violation in failure.violations] == [
            "model_id",
            "metadata",
            "metadata",
            "metadata['v']",
            "provider_id",
            "type",
            "aliases[0]",
            "aliases[2]",
            "aliases[3]",
            "aliases[3]",
            "aliases[4]",
            "aliases[5]",
        ]
        assert "alpha, beta" in failure.message

    @pytest.mark.parametrize(
        ("arguments", "field"),
        [
            ({"model_id": ""}, "model_id"),
            ({"model_id": "x" * 257}, "model_id"),
            ({"model_id": "nul\x00"}, "model_id"),
            ({"model_id": "hidden\u202e"}, "model_id"),
            ({"model_id": "no\u00a0break"}, "model_id"),
            ({"model_id": "llama", "aliases": ["alpha/llama"]}, "aliases[0]"),
            ({"model_id": "llama", "aliases": [f"alias-{number}" for number in range(33)]}, "aliases"),
            ({"model_id": "llama", "metadata": {str(number): "" for number in range(65)}}, "metadata"),
            ({"model_id": "llama", "model_type": -1}, "type"),
        ],
    )
    async def test_a_broken_rule(self, registry: ModelRegistry, arguments: dict[str, object], field: str) -> None:
        """Each rule by itself, at its limit; nobody was asked about what cannot be registered."""
        failure = await failure_of(registry.register(provider_id="alpha", **arguments))  # type: ignore[arg-type]
        assert [violation.field for violation in failure.violations] == [field]

    async def test_the_limits_themselves_are_allowed(self, registry: ModelRegistry) -> None:
        """The greatest that the rules name is within them."""
        aliases = [f"{number:02}{'é' * 254}" for number in range(32)]
        metadata = {f"{number:02}{'k' * 126}": "v" * 4096 for number in range(64)}
        model = await registry.register("x" * 256, "alpha", "llama", aliases=aliases, metadata=metadata)
        assert await registry.get(aliases[-1]) == model

    async def test_the_only_provider_needs_no_name(self, open_registry: Opener, alpha: FakeProvider) -> None:
        """With one provider there is no doubt."""
        async with open_registry(alpha) as registry:
            assert (await registry.register("llama")).provider_id == "alpha"

    async def test_without_any_provider(self, url: str) -> None:
        """The failure says that there is none, and nothing can be found."""
        registry = ModelRegistry(Store(url), Providers([]))
        await registry.open()
        failure = await failure_of(registry.register("llama"))
        missing = await failure_of(registry.get("llama"))
        await registry.close()
        assert [violation.field for violation in failure.violations] == ["provider_id"]
        assert "there are: none" in failure.message
        assert missing.reason is Reason.MODEL_NOT_FOUND
        assert "there are: none" in missing.message

    async def test_an_unknown_provider(self, registry: ModelRegistry) -> None:
        """A provider is the operator's to configure."""
        failure = await failure_of(registry.register("llama", "gamma"))
        assert failure.reason is Reason.PROVIDER_NOT_FOUND

    async def test_a_model_that_is_not_served(self, registry: ModelRegistry, alpha: FakeProvider) -> None:
        """The failure lists what is, at most twenty names."""
        failure = await failure_of(registry.register("mine", "alpha", "mistral"))
        assert isinstance(failure, RegistryError)
        assert (failure.reason, failure.code) == (Reason.MODEL_NOT_SERVED, Code.FAILED_PRECONDITION)
        assert failure.metadata == {"model": "mistral", "provider": "alpha"}
        assert "it serves: llama, org/common" in failure.message
        alpha.served = [f"model-{number:02}" for number in range(50)]
        failure = await failure_of(registry.register("mine", "alpha", "mistral"))
        assert "model-19 and 30 more" in failure.message
        assert "model-20" not in failure.message
        alpha.served = []
        assert "it serves: nothing" in (await failure_of(registry.register("mine", "alpha", "mistral"))).message

    async def test_asks_the_provider_itself_with_the_callers_token(self, url: str, alpha: FakeProvider) -> None:
        """A listing at hand is not enough: what was loaded a second ago can be registered."""
        registry = ModelRegistry(Store(url), Providers([alpha]))
        await registry.open()
        await registry.list()
        alpha.served.append("new")
        assert (await registry.register("new", token="mine")).id == "alpha/new"
        await registry.close()
        assert alpha.tokens == [None, "mine"]

    async def test_a_provider_that_is_down(self, registry: ModelRegistry, alpha: FakeProvider) -> None:
        """The provider's own failure tells; nothing is registered."""
        alpha.go_down()
        assert await failure_of(registry.register("llama", "alpha")) is alpha.failure
        alpha.failure = None
        assert (await registry.get("llama")).source is ModelSource.DISCOVERED

    async def test_the_same_again_changes_nothing(self, registry: ModelRegistry, alpha: FakeProvider) -> None:
        """Times are kept, the order of aliases means nothing, and the provider may be down."""
        model = await registry.register("mine", "alpha", "llama", aliases=["a", "b"], metadata={"k": "v"})
        alpha.go_down()
        again = await registry.register("mine", "alpha", "llama", aliases=["b", "a"], metadata={"k": "v"})
        assert again is model

    @pytest.mark.parametrize(
        ("change", "field"),
        [
            ({"provider_id": "beta", "provider_model_id": "mistral"}, "provider_id and provider_model_id"),
            ({"provider_model_id": "org/common"}, "provider_model_id"),
            ({"model_type": ModelType.RERANK}, "type"),
            ({"aliases": ["a"]}, "aliases"),
            ({"aliases": ["a", "b", "c"]}, "aliases"),
            ({"metadata": {}}, "metadata"),
        ],
    )
    async def test_an_id_is_never_registered_differently(
        self, registry: ModelRegistry, change: dict[str, object], field: str
    ) -> None:
        """Neither a silent overwrite nor a silently lost change; the failure says what differs and what to do."""
        arguments: dict[str, object] = {
            "model_id": "mine",
            "provider_id": "alpha",
            "provider_model_id": "llama",
            "aliases": ["a", "b"],
            "metadata": {"k": "v"},
        }
        model = await registry.register(**arguments)  # type: ignore[arg-type]
        failure = await failure_of(registry.register(**{**arguments, **change}))  # type: ignore[arg-type]
        assert isinstance(failure, RegistryError)
        assert (failure.reason, failure.code) == (Reason.MODEL_ALREADY_EXISTS, Code.ALREADY_EXISTS)
        assert failure.metadata == {"model": "mine", "name": "mine"}
        assert f"different {field};" in failure.message
        assert "unregister that one first" in failure.message
        assert await registry.get("mine") is model

    @pytest.mark.parametrize(
        ("model_id", "aliases", "name"),
        [("a", [], "a"), ("new", ["mine"], "mine"), ("new", ["free", "b"], "b")],
    )
    async def test_a_name_of_another_model_is_taken(
        self, registry: ModelRegistry, model_id: str, aliases: list[str], name: str
    ) -> None:
        """An id or alias is unique over the registry; the failure names the owner."""
        await registry.register("mine", "alpha", "llama", aliases=["a", "b"])
        failure = await failure_of(registry.register(model_id, "alpha", "llama", aliases=aliases))
        assert failure.reason is Reason.MODEL_ALREADY_EXISTS
        assert failure.metadata == {"model": "mine", "name": name}
        assert "belongs to model 'mine'" in failure.message

    async def test_a_scoped_name_stays_with_what_is_served_under_it(
        self, registry: ModelRegistry, beta: FakeProvider
    ) -> None:
        """Nobody leads the callers of beta/mistral to another model; a name that beta does not serve is free."""
        failure = await failure_of(registry.register("beta/mistral", "alpha", "llama"))
        assert failure.reason is Reason.MODEL_ALREADY_EXISTS
        assert failure.metadata == {"model": "beta/mistral", "name": "beta/mistral"}
        assert (await registry.register("beta/free", "alpha", "llama")).id == "beta/free"
        beta.go_down()
        assert await failure_of(registry.register("beta/other", "alpha", "llama")) is beta.failure

    async def test_of_a_hundred_registrations_of_an_alias_one_wins(self, registry: ModelRegistry) -> None:
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

    async def test_a_hundred_identical_registrations_all_win(self, registry: ModelRegistry) -> None:
        """They get the same model with the same times."""
        models = await asyncio.gather(*(registry.register("mine", "alpha", "llama") for _ in range(100)))
        assert {id(model) for model in models} == {id(models[0])}

    async def test_two_processes_on_one_database(self, open_registry: Opener) -> None:
        """What another process has registered since is seen as soon as it matters."""
        async with open_registry() as one, open_registry() as two:
            theirs = await one.register("mine", "alpha", "llama", aliases=["a"])
            assert await two.register("mine", "alpha", "llama", aliases=["a"]) == theirs
            await one.register("other", "alpha", "llama", aliases=["b"])
            failure = await failure_of(two.register("new", "alpha", "llama", aliases=["b"]))
            assert failure.metadata == {"model": "other", "name": "b"}
            assert (await two.get("other")).aliases == ("b",)

    async def test_a_name_of_a_damaged_record_is_taken_until_it_is_unregistered(
        self, url: str, open_registry: Opener
    ) -> None:
        """A damaged record costs no start; its names are not given away, and unregistering mends it."""
        async with open_registry() as registry:
            await registry.register("mine", "alpha", "llama", aliases=["a"])
            good = await registry.register("good", "alpha", "llama")
        on_disk(url, "UPDATE models SET metadata = '{' WHERE id = 'mine'")
        async with open_registry() as registry:
            assert await registry.get("good") == good
            failure = await failure_of(registry.register("mine", "alpha", "llama"))
            assert failure.reason is Reason.MODEL_ALREADY_EXISTS
            assert "cannot be read; unregister that one first" in failure.message
            await registry.unregister("mine")
            assert (await registry.register("a", "alpha", "llama")).id == "a"

    async def test_a_caller_that_gives_up_leaves_memory_and_database_the_same(
        self, open_registry: Opener, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A write that has begun is done as a whole, by the latest before closing."""
        begun, go = asyncio.Event(), asyncio.Event()
        insert = Store.insert

        async def slow_insert(store: Store, model: Model) -> bool:
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
            assert await registry.get("mine") == mine

    async def test_a_failure_that_nobody_waits_for_is_no_noise(
        self, registry: ModelRegistry, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It was the caller's to hear, and the caller has gone."""
        begun, go = asyncio.Event(), asyncio.Event()

        async def failing_delete(_: Store, __: str) -> str | None:
            begun.set()
            await go.wait()
            raise RegistryError(Reason.STORE_UNAVAILABLE, "away")

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


class TestUnregister:
    @pytest.mark.parametrize("name", ["mine", "a"])
    async def test_by_id_or_alias(self, registry: ModelRegistry, name: str) -> None:
        """All its names are free; what is served stays callable by the provider's own name."""
        await registry.register("mine", "alpha", "llama", aliases=["a"])
        await registry.unregister(name)
        for gone in ("mine", "a"):
            assert (await failure_of(registry.get(gone))).reason is Reason.MODEL_NOT_FOUND
        assert (await registry.get("llama")).source is ModelSource.DISCOVERED
        assert (await registry.register("a", "alpha", "llama", aliases=["mine"])).id == "a"

    async def test_one_of_several_for_the_same_target(self, registry: ModelRegistry) -> None:
        """The others stay, and the target leads to them."""
        await registry.register("one", "alpha", "llama")
        await registry.register("two", "alpha", "llama")
        assert (await registry.get("llama")).id == "one"
        await registry.unregister("one")
        assert (await registry.get("alpha/llama")).id == "two"

    async def test_an_unknown_name(self, registry: ModelRegistry) -> None:
        """Not found, as for any other call."""
        failure = await failure_of(registry.unregister("unknown"))
        assert failure.reason is Reason.MODEL_NOT_FOUND

    async def test_a_discovered_model(self, registry: ModelRegistry) -> None:
        """It is there for as long as it is served."""
        failure = await failure_of(registry.unregister("llama"))
        assert isinstance(failure, RegistryError)
        assert (failure.reason, failure.code) == (Reason.MODEL_DISCOVERED, Code.FAILED_PRECONDITION)
        assert failure.metadata == {"model": "alpha/llama"}

    async def test_a_served_name_is_too_loose_to_delete_by(self, registry: ModelRegistry) -> None:
        """It may lead to another model tomorrow; the failure names the id to use."""
        await registry.register("mine", "alpha", "llama")
        failure = await failure_of(registry.unregister("llama"))
        assert failure.reason is Reason.MODEL_NOT_FOUND
        assert "leads to model 'mine': unregister that" in failure.message
        assert (await registry.get("mine")).id == "mine"

    async def test_what_another_process_registered_or_removed(self, open_registry: Opener) -> None:
        """The database decides: either way it is gone here afterwards."""
        async with open_registry() as one, open_registry() as two:
            await one.register("mine", "alpha", "llama")
            await two.unregister("mine")
            await one.unregister("mine")
            assert (await failure_of(one.get("mine"))).reason is Reason.MODEL_NOT_FOUND


class TestLookUp:
    async def test_id_then_alias_then_scoped_then_served(self, registry: ModelRegistry, alpha: FakeProvider) -> None:
        """Every way leads to its model; only the id itself is no alias."""
        alpha.served = ["llama", "plain"]
        mine = await registry.register("mine", "alpha", "llama", aliases=["a"])
        for name, model_id in [
            ("mine", "mine"),
            ("a", "mine"),
            ("alpha/llama", "mine"),
            ("llama", "mine"),
            ("alpha/plain", "alpha/plain"),
            ("plain", "alpha/plain"),
            ("beta/org/common", "beta/org/common"),
            ("org/common", "beta/org/common"),
        ]:
            resolution = await registry.resolve(name)
            assert resolution.model.id == model_id
            assert resolution.alias == ("" if name == model_id else name)
            assert resolution.provider.id == resolution.model.provider_id
        assert (await registry.resolve("mine")).provider is alpha
        assert await registry.get("a") is mine

    async def test_a_registered_name_comes_before_a_served_one(self, registry: ModelRegistry) -> None:
        """Whoever registers decides what a bare name means."""
        await registry.register("mistral", "alpha", "llama")
        assert (await registry.get("mistral")).provider_model_id == "llama"
        assert (await registry.get("beta/mistral")).source is ModelSource.DISCOVERED

    async def test_a_discovered_model_says_what_the_provider_says(self, open_registry: Opener) -> None:
        """All that is known of it, and no more."""
        served = ServedModel("lora", root="/adapters/lora", parent="base", max_context_tokens=4096)
        async with open_registry(FakeProvider("vllm", [served])) as registry:
            assert await registry.get("lora") == Model(
                "vllm/lora",
                "vllm",
                "lora",
                source=ModelSource.DISCOVERED,
                max_context_tokens=4096,
                root="/adapters/lora",
                parent="base",
            )

    @pytest.mark.parametrize(("tokens", "kept"), [(-1, None), (0, 0), (2**32 - 1, 2**32 - 1), (2**32, None)])
    async def test_a_context_that_cannot_be_is_left_out(
        self, open_registry: Opener, tokens: int, kept: int | None
    ) -> None:
        """A provider's nonsense is no reason to fail a call."""
        async with open_registry(FakeProvider("vllm", [ServedModel("m", max_context_tokens=tokens)])) as registry:
            assert (await registry.get("m")).max_context_tokens == kept
            assert (await registry.register("m")).max_context_tokens == kept

    async def test_slashes_on_both_sides(self, open_registry: Opener) -> None:
        """A name is split at each provider's id; a served name that looks scoped is found by itself."""
        one, two = FakeProvider("a", ["b/c", "d"]), FakeProvider("a/b", ["c", "e"])
        three = FakeProvider("z", ["a/x", "a/"])
        async with open_registry(one, two, three) as registry:
            assert (await registry.get("a/d")).target == ("a", "d")
            assert (await registry.get("a/b/e")).target == ("a/b", "e")
            assert (await registry.get("a/x")).target == ("z", "a/x")
            assert (await registry.get("a/")).target == ("z", "a/")
            failure = await failure_of(registry.get("a/b/c"))
        assert failure.reason is Reason.MODEL_AMBIGUOUS
        assert failure.metadata["providers"] == "a, a/b"

    async def test_registered_models_need_no_provider(self, registry: ModelRegistry, alpha: FakeProvider) -> None:
        """Look-ups of what is registered ask nobody, so they are quick and go on when the provider does not answer."""
        await registry.register("mine", "alpha", "llama", aliases=["a"])
        asked = len(alpha.tokens)
        alpha.go_down()
        for name in ("mine", "a", "alpha/llama"):
            assert (await registry.get(name)).id == "mine"
        assert len(alpha.tokens) == asked

    async def test_a_scoped_name_asks_only_its_provider(
        self, registry: ModelRegistry, alpha: FakeProvider, beta: FakeProvider
    ) -> None:
        """The other may be slow; the caller's token goes along."""
        await registry.get("alpha/llama", "token")
        assert (alpha.tokens, beta.tokens) == (["token"], [])

    async def test_a_miss_asks_each_provider_once(
        self, registry: ModelRegistry, alpha: FakeProvider, beta: FakeProvider
    ) -> None:
        """Also when both readings of the name ask the same one."""
        await failure_of(registry.get("alpha/unknown"))
        assert (len(alpha.tokens), len(beta.tokens)) == (1, 1)

    async def test_a_hundred_misses_at_once_ask_once(self, url: str, alpha: FakeProvider) -> None:
        """And the listing is kept for those who come next."""
        alpha.gate = asyncio.Event()
        registry = ModelRegistry(Store(url), Providers([alpha]))
        await registry.open()
        calls = [asyncio.create_task(registry.get("unknown")) for _ in range(100)]
        await alpha.asked.wait()
        alpha.gate.set()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(result) for result in results} == {CallerError}
        await failure_of(registry.get("unknown"))
        assert len(alpha.tokens) == 1
        await registry.close()

    async def test_not_found_lists_what_there_is(self, registry: ModelRegistry, alpha: FakeProvider) -> None:
        """Ids, by name, at most twenty of them, registered and discovered."""
        await registry.register("mine", "alpha", "llama")
        failure = await failure_of(registry.get("unknown"))
        assert isinstance(failure, CallerError)
        assert failure.metadata == {"model": "unknown"}
        assert failure.message == (
            "model 'unknown' not found; there are: alpha/org/common, beta/mistral, beta/org/common, mine"
        )
        alpha.served = [f"model-{number:02}" for number in range(50)]
        assert "alpha/model-19 and 33 more" in (await failure_of(registry.get("unknown"))).message

    async def test_messages_stay_short(self, registry: ModelRegistry, alpha: FakeProvider) -> None:
        """They travel in the trailers, which have a limit."""
        alpha.served = [f"{number}{'x' * 1000}" for number in range(50)]
        failure = await failure_of(registry.get("y" * 100_000))
        assert len(failure.message) <= 1024
        assert len(failure.metadata["model"]) <= 257

    async def test_found_at_one_while_another_is_away(self, registry: ModelRegistry, beta: FakeProvider) -> None:
        """What is found is good enough."""
        beta.go_down()
        assert (await registry.get("org/common")).provider_id == "alpha"

    async def test_not_found_names_who_could_not_be_asked(self, registry: ModelRegistry, beta: FakeProvider) -> None:
        """At least one answered: not found, but the caller learns who did not."""
        beta.go_down()
        failure = await failure_of(registry.get("mistral"))
        assert failure.reason is Reason.MODEL_NOT_FOUND
        assert failure.message.endswith("; without an answer: beta")

    async def test_nobody_can_be_asked(self, registry: ModelRegistry, alpha: FakeProvider, beta: FakeProvider) -> None:
        """Not NOT_FOUND, since nobody knows: try again."""
        alpha.go_down()
        beta.go_down()
        failure = await failure_of(registry.get("llama"))
        assert isinstance(failure, ProviderError)
        assert (failure.reason, failure.code) == (Reason.UPSTREAM_UNAVAILABLE, Code.UNAVAILABLE)
        assert failure.metadata == {"provider": "alpha, beta"}
        assert failure.retry_after == 1.0

    async def test_the_provider_that_a_name_names_cannot_be_asked(
        self, registry: ModelRegistry, alpha: FakeProvider
    ) -> None:
        """What others say does not matter for a scoped name."""
        alpha.go_down()
        failure = await failure_of(registry.get("alpha/llama"))
        assert failure.reason is Reason.UPSTREAM_UNAVAILABLE
        assert failure.metadata == {"provider": "alpha"}

    async def test_a_refused_token_is_told_as_such(
        self, registry: ModelRegistry, alpha: FakeProvider, beta: FakeProvider
    ) -> None:
        """Waiting would not help, so the failure is the provider's own; one merely away may yet have the model."""
        alpha.failure = CallerError(Reason.UPSTREAM_UNAUTHENTICATED, "token refused", metadata={"provider": "alpha"})
        beta.failure = alpha.failure
        assert await failure_of(registry.get("llama")) is alpha.failure
        assert await failure_of(registry.get("alpha/llama")) is alpha.failure
        beta.go_down()
        assert (await failure_of(registry.get("llama"))).reason is Reason.UPSTREAM_UNAVAILABLE

    async def test_a_defect_is_not_taken_for_an_absence(self, registry: ModelRegistry, alpha: FakeProvider) -> None:
        """Whatever is no failure of a call goes up as it is."""
        alpha.gate = asyncio.Event()
        alpha.gate.wait = None  # type: ignore[method-assign, assignment]
        with pytest.raises(TypeError):
            await registry.get("llama")

    async def test_a_model_of_a_provider_that_is_no_longer_configured(
        self, open_registry: Opener, beta: FakeProvider
    ) -> None:
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

    async def test_only_an_llm_chats(self, registry: ModelRegistry) -> None:
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

    def test_require_type(self) -> None:
        """The right type passes, any other does not."""
        model = Model("r", "vllm", "r", ModelType.RERANK)
        require_type(model, ModelType.RERANK)
        with pytest.raises(CallerError, match="RERANK rather than the expected type EMBEDDING"):
            require_type(model, ModelType.EMBEDDING)


class TestList:
    async def test_pages(self, registry: ModelRegistry, alpha: FakeProvider) -> None:
        """Ascending ids, every model once, the last page without a token."""
        alpha.served = [f"model-{number}" for number in (3, 1, 2)]
        await registry.register("mine", "alpha", "model-2")
        pages, token = [], ""
        while True:
            models, token, unreachable = await registry.list(2, token)
            assert unreachable == ()
            pages.append(ids(models))
            if not token:
                break
        assert pages == [["alpha/model-1", "alpha/model-3"], ["beta/mistral", "beta/org/common"], ["mine"]]

    @pytest.mark.parametrize(("size", "expected"), [(0, 100), (1, 1), (1000, 1000), (1001, 1000), (2**31 - 1, 1000)])
    async def test_page_sizes(self, registry: ModelRegistry, alpha: FakeProvider, size: int, expected: int) -> None:
        """None is a hundred, too many are a thousand."""
        alpha.served = [str(number) for number in range(1100)]
        models, token, _ = await registry.list(size)
        assert len(models) == expected
        assert token

    async def test_a_page_of_many_notes_is_shorter(self, registry: ModelRegistry, alpha: FakeProvider) -> None:
        """Other languages' clients receive 4 MiB by default: no page may be beyond that, and none is empty."""
        notes = {f"{number:0128}": "é" * 4096 for number in range(64)}
        alpha.served = [f"model-{number}" for number in range(5)]
        for number in range(5):
            await registry.register(f"model-{number}", "alpha", metadata=notes)
        pages, token = list[int](), ""
        while not pages or token:
            models, token, _ = await registry.list(page_token=token)
            pages.append(len(models))
        assert pages == [2, 2, 3]

    async def test_a_full_last_page_has_no_token(self, registry: ModelRegistry) -> None:
        """Nobody asks for a page that would be empty."""
        models, token, _ = await registry.list(4)
        assert (len(models), token) == (4, "")

    @pytest.mark.parametrize(
        "token",
        ["!", "a", "é", "a b=", base64.urlsafe_b64encode(b"\xff").decode()],
    )
    async def test_a_token_that_is_none_of_ours(self, registry: ModelRegistry, token: str) -> None:
        """It is refused rather than taken for the beginning, together with a bad size."""
        failure = await failure_of(registry.list(-1, token))
        assert [violation.field for violation in failure.violations] == ["page_size", "page_token"]
        assert failure.reason is Reason.INVALID_REQUEST
        failure = await failure_of(registry.list(0, token))
        assert [violation.field for violation in failure.violations] == ["page_token"]

    async def test_a_negative_size(self, registry: ModelRegistry, alpha: FakeProvider) -> None:
        """It is refused, and nobody was asked for anything."""
        failure = await failure_of(registry.list(-1))
        assert [violation.field for violation in failure.violations] == ["page_size"]
        assert alpha.tokens == []

    async def test_a_provider_that_is_away(self, registry: ModelRegistry, alpha: FakeProvider) -> None:
        """The rest is listed, what is registered with it too, and the answer names it."""
        await registry.register("mine", "alpha", "llama")
        alpha.go_down()
        models, _, unreachable = await registry.list(token="token")
        assert ids(models) == ["beta/mistral", "beta/org/common", "mine"]
        assert unreachable == ("alpha",)
        assert alpha.tokens[-1] == "token"

    async def test_an_id_is_listed_once(self, registry: ModelRegistry, alpha: FakeProvider) -> None:
        """A registered name comes before what is served under it later, here as in look-ups."""
        mine = await registry.register("alpha/later", "alpha", "llama")
        alpha.served.append("later")
        models, _, _ = await registry.list()
        assert ids(models) == ["alpha/later", "alpha/org/common", "beta/mistral", "beta/org/common"]
        assert models[0] is mine

    # Each example opens a database, so there are few, and no deadline.
    @settings(max_examples=30, deadline=None)
    @given(
        start=st.sets(st.integers(0, 30)),
        changes=st.lists(st.sets(st.integers(0, 30)), max_size=20),
        size=st.integers(1, 7),
    )
    async def test_what_stays_is_seen_just_once(self, start: set[int], changes: list[set[int]], size: int) -> None:
        """Models come and go between pages: those that stay are neither missed nor repeated, and the order holds."""
        provider = FakeProvider("vllm")
        registry = ModelRegistry(Store("sqlite://"), Providers([provider], listing_seconds=0.0))
        await registry.open()
        try:
            stays, seen, token, versions = set(start), list[str](), "", iter(changes)
            served = start
            while True:
                provider.served = [f"{number:02}" for number in served]
                models, token, _ = await registry.list(size, token)
                seen += ids(models)
                if not token:
                    break
                served = next(versions, served)
                stays &= served
        finally:
            await registry.close()
        assert seen == sorted(set(seen))
        assert {f"vllm/{number:02}" for number in stays} <= set(seen)


class TestDatabase:
    async def test_registrations_survive_a_restart(self, open_registry: Opener) -> None:
        """Every field and every name."""
        async with open_registry() as registry:
            model = await registry.register("mine", "alpha", "llama", ModelType.RERANK, ["a"], {"k": "v"})
            await registry.register("gone", "alpha", "llama")
            await registry.unregister("gone")
        async with open_registry() as registry:
            assert await registry.get("a") == model
            assert (await failure_of(registry.get("gone"))).reason is Reason.MODEL_NOT_FOUND

    async def test_reads_go_on_without_the_database(self, url: str, open_registry: Opener) -> None:
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

    async def test_a_database_that_cannot_be_opened(self, tmp_path: Path, alpha: FakeProvider) -> None:
        """Opening fails as a whole, and closing afterwards is fine."""
        registry = ModelRegistry(Store(f"sqlite:///{tmp_path}"), Providers([alpha]))
        failure = await failure_of(registry.open())
        await registry.close()
        assert failure.reason is Reason.STORE_UNAVAILABLE


def test_a_model_is_a_value() -> None:
    """Two of the same fields are equal, and names begin with the id."""
    model = Model("id", "vllm", "m", aliases=("a", "b"))
    assert model == replace(model)
    assert model.names == ("id", "a", "b")
