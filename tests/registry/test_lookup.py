from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING

from deltawire_server.errors import CallerError, Code, ProviderError, Reason
from deltawire_server.registry.model import ModelSource, ModelState, ModelType
from deltawire_server.registry.registry import Filter
from tests.registry.helpers import failure_of, ids
from tests.support.fake_provider import FakeProvider

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from deltawire_server.registry.feed import Step
    from deltawire_server.registry.registry import ModelRegistry
    from tests.registry.conftest import Opener


async def test_id_then_alias_then_scoped_then_served(registry: ModelRegistry, alpha: FakeProvider) -> None:
    """Each name resolves to its model; every name but the id is an alias."""
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


async def test_a_registered_name_comes_before_a_served_one(registry: ModelRegistry) -> None:
    """A registration determines the model of a bare name."""
    await registry.register("mistral", "alpha", "llama")
    assert (await registry.get("mistral")).provider_model_id == "llama"
    assert (await registry.get("beta/mistral")).source is ModelSource.DISCOVERED


async def test_slashes_on_both_sides(open_registry: Opener) -> None:
    """A name is split at each provider's id, and no other provider is asked; a served name may begin with its provider's id."""
    one, two = FakeProvider("a", ["b/c", "d", "a/x"]), FakeProvider("a/b", ["c", "e"])
    three = FakeProvider("z", ["a/y", "z/"])
    async with open_registry(one, two, three) as registry:
        assert (await registry.get("a/d")).target == ("a", "d")
        assert (await registry.get("a/b/e")).target == ("a/b", "e")
        assert (await registry.get("a/x")).target == ("a", "a/x")
        assert (await registry.get("z/")).target == ("z", "z/")
        assert (await registry.get("z/a/y")).target == ("z", "a/y")
        missing = await failure_of(registry.get("a/y"))
        assert missing.reason is Reason.MODEL_NOT_FOUND
        assert "only provider a is asked for names that begin with its id" in missing.message
        assert "called as 'provider/a/y'" in missing.message
        failure = await failure_of(registry.get("a/b/c"))
    assert failure.reason is Reason.MODEL_AMBIGUOUS
    assert failure.metadata["providers"] == "a, a/b"


async def test_registered_models_need_no_provider(registry: ModelRegistry, alpha: FakeProvider) -> None:
    """They are found without listing a provider, also while it does not answer."""
    await registry.register("mine", "alpha", "llama", aliases=["a"])
    asked = len(alpha.tokens)
    alpha.go_down()
    for name in ("mine", "a", "alpha/llama"):
        assert (await registry.get(name)).id == "mine"
    assert len(alpha.tokens) == asked


async def test_a_scoped_name_asks_only_its_provider(
    registry: ModelRegistry, alpha: FakeProvider, beta: FakeProvider
) -> None:
    """With the caller's token; a slow provider does not delay names of another one."""
    await registry.get("alpha/llama", "token")
    assert (alpha.tokens, beta.tokens) == (["token"], [])


async def test_a_reserved_name_in_the_database_hides_no_model(
    open_registry: Opener, alpha: FakeProvider, beta: FakeProvider
) -> None:
    """Registered before its provider was configured, it resolves to the provider's model or none, and can be unregistered."""
    async with open_registry(alpha) as registry:
        await registry.register("beta/adapter", "alpha", "llama")
        await registry.register("mine", "alpha", "org/common", aliases=["beta/other"])
        assert (await registry.get("beta/adapter")).target == ("alpha", "llama")
    async with open_registry(alpha, beta) as registry:
        for name in ("beta/adapter", "beta/other"):
            failure = await failure_of(registry.get(name, "token"))
            assert failure.reason is Reason.MODEL_NOT_FOUND
            assert "only provider beta is asked" in failure.message
            assert beta.tokens[-1] == "token"
        assert "token" not in alpha.tokens
        beta.served = ["adapter", "other"]
        for name in ("beta/adapter", "beta/other"):
            assert (await registry.resolve(name)).model.target == ("beta", name.removeprefix("beta/"))
        models, _, _ = await registry.list()
        assert [(model.id, model.provider_id) for model in models] == [
            ("beta/adapter", "beta"),
            ("beta/other", "beta"),
            ("mine", "alpha"),
        ]
        assert (await registry.get("mine")).provider_id == "alpha"
        await registry.update("mine", {"annotations": {"k": "v"}})
        await registry.unregister("beta/adapter")
        await registry.update("mine", {"aliases": []})
        assert (await registry.get("beta/adapter")).provider_id == "beta"


async def test_a_bare_name_keeps_the_callers_token(
    registry: ModelRegistry, alpha: FakeProvider, beta: FakeProvider
) -> None:
    """No call sends it to a provider that the call does not name, unless the provider accepts callers' tokens."""
    for name in ("llama", "unknown"):
        await asyncio.gather(registry.get(name, "token"), return_exceptions=True)
    await registry.list(token="token")
    await registry.refresh(token="token")
    await failure_of(registry.resolve("", "token"))
    await registry.register("mine", "alpha", "llama", aliases=["a"])
    for name in ("mine", "a", "llama"):
        assert not (await registry.resolve(name, "token")).sends_token
    assert {*alpha.tokens, *beta.tokens} == {None}
    assert (await registry.resolve("alpha/llama", "token")).sends_token
    assert (await registry.resolve("beta/mistral", "token")).sends_token
    assert (alpha.tokens[-1], beta.tokens[-1]) == (None, "token")
    alpha.accepts_caller_tokens = True
    await failure_of(registry.get("unknown-to-all", "token"))
    assert (alpha.tokens[-1], beta.tokens[-1]) == ("token", None)
    assert (await registry.resolve("mine", "token")).sends_token
    assert not (await registry.resolve("mistral", "token")).sends_token


async def test_the_only_provider_receives_the_callers_token(open_registry: Opener, alpha: FakeProvider) -> None:
    """For every name, if the operator configured no token."""
    async with open_registry(alpha) as registry:
        assert (await registry.resolve("llama", "token")).sends_token
        await registry.list(token="token")
        await registry.register("mine", provider_model_id="llama", token="token")
        assert (await registry.resolve("mine", "token")).sends_token
        assert alpha.tokens == ["token"] * 3


async def test_a_token_that_was_not_sent_is_explained(
    registry: ModelRegistry, alpha: FakeProvider, beta: FakeProvider
) -> None:
    """If the provider requires one, the error has the remedy; without a token, it is the provider's error."""
    wants = ProviderError(Reason.PROVIDER_MISCONFIGURED, "HTTP 401", metadata={"provider": "x", "http_status": "401"})
    alpha.failure = beta.failure = wants
    failure = await failure_of(registry.get("llama", "token"))
    assert failure.reason is Reason.UPSTREAM_UNAUTHENTICATED
    assert "x-vllm-api-token was not sent" in failure.message
    assert "name the model as 'alpha/…'" in failure.message
    assert "providers.alpha.accept_caller_tokens" in failure.message
    assert "token" not in failure.metadata.values()
    assert await failure_of(registry.get("llama")) is wants
    assert await failure_of(registry.get("alpha/llama", "token")) is wants
    beta.failure = None
    failure = await failure_of(registry.get("llama", "token"))
    assert failure.reason is Reason.MODEL_NOT_FOUND
    assert "without an answer: alpha, and a token may help" in failure.message
    refreshed = await registry.refresh(token="token")
    assert isinstance(refreshed["alpha"], CallerError)
    assert refreshed["beta"] == 2


async def test_not_found_lists_what_there_is(registry: ModelRegistry, alpha: FakeProvider) -> None:
    """At most twenty ids in order, registered and discovered."""
    await registry.register("mine", "alpha", "llama")
    failure = await failure_of(registry.get("unknown"))
    assert isinstance(failure, CallerError)
    assert failure.metadata == {"model": "unknown"}
    assert failure.message == (
        "model 'unknown' not found; there are: alpha/org/common, beta/mistral, beta/org/common, mine"
    )
    alpha.served = [f"model-{number:02}" for number in range(50)]
    assert "alpha/model-19 and 33 more" in (await failure_of(registry.get("unknown"))).message


async def test_found_at_one_while_another_does_not_answer(registry: ModelRegistry, beta: FakeProvider) -> None:
    """The model is found."""
    beta.go_down()
    assert (await registry.get("org/common")).provider_id == "alpha"


async def test_not_found_names_the_providers_without_an_answer(registry: ModelRegistry, beta: FakeProvider) -> None:
    """If at least one provider answers."""
    beta.go_down()
    failure = await failure_of(registry.get("mistral"))
    assert failure.reason is Reason.MODEL_NOT_FOUND
    assert failure.message.endswith("; without an answer: beta")


async def test_no_provider_answers(registry: ModelRegistry, alpha: FakeProvider, beta: FakeProvider) -> None:
    """The error is UNAVAILABLE instead of NOT_FOUND: a retry may help."""
    alpha.go_down()
    beta.go_down()
    failure = await failure_of(registry.get("llama"))
    assert isinstance(failure, ProviderError)
    assert (failure.reason, failure.code) == (Reason.UPSTREAM_UNAVAILABLE, Code.UNAVAILABLE)
    assert failure.metadata == {"provider": "alpha, beta"}
    assert failure.retry_after == 1.0


async def test_the_provider_of_a_scoped_name_does_not_answer(registry: ModelRegistry, alpha: FakeProvider) -> None:
    """Other providers do not matter."""
    alpha.go_down()
    failure = await failure_of(registry.get("alpha/llama"))
    assert failure.reason is Reason.UPSTREAM_UNAVAILABLE
    assert failure.metadata == {"provider": "alpha"}


async def test_a_rejected_token_is_reported(registry: ModelRegistry, alpha: FakeProvider, beta: FakeProvider) -> None:
    """It is the provider's error, because a retry does not help; if another provider does not answer, it may."""
    alpha.failure = CallerError(Reason.UPSTREAM_UNAUTHENTICATED, "token refused", metadata={"provider": "alpha"})
    beta.failure = alpha.failure
    assert await failure_of(registry.get("llama")) is alpha.failure
    assert await failure_of(registry.get("alpha/llama")) is alpha.failure
    beta.go_down()
    assert (await failure_of(registry.get("llama"))).reason is Reason.UPSTREAM_UNAVAILABLE


async def test_a_listed_model_is_found_without_a_request(
    registry: ModelRegistry, alpha: FakeProvider, beta: FakeProvider
) -> None:
    """An unknown name causes a new listing."""
    await registry.refresh()
    for name in ("llama", "alpha/llama", "beta/mistral"):
        assert (await registry.get(name)).state is ModelState.SERVING
    assert (len(alpha.tokens), len(beta.tokens)) == (1, 1)
    alpha.served.append("new")
    assert (await registry.get("new")).id == "alpha/new"


async def test_a_listed_model_stays_while_its_provider_does_not_answer(
    registry: ModelRegistry, alpha: FakeProvider
) -> None:
    """It is found, and its state is UNAVAILABLE."""
    await registry.refresh()
    alpha.go_down()
    await registry.refresh()
    assert (await registry.get("llama")).state is ModelState.UNAVAILABLE
    models, _, unreachable = await registry.list()
    states = {model.id: model.state for model in models}
    assert states["alpha/llama"] is ModelState.UNAVAILABLE
    assert states["beta/mistral"] is ModelState.SERVING
    assert unreachable == ("alpha",)


async def test_a_caller_with_its_own_token_sees_its_own_listing(registry: ModelRegistry, alpha: FakeProvider) -> None:
    """It does not see the shared listing, and other callers do not see its listing."""
    alpha.served = ["secret"]
    assert (await registry.get("alpha/secret", "token")).state is ModelState.SERVING
    models, _, _ = await registry.list(token="token", wanted=Filter(provider_id="alpha"))
    assert ids(models) == ["alpha/secret"]
    alpha.served = []
    assert (await failure_of(registry.get("secret"))).reason is Reason.MODEL_NOT_FOUND
    seen = [step.model async for step in _snapshot(registry)]
    assert sorted(model.id for model in seen if model) == ["beta/mistral", "beta/org/common"]


async def _snapshot(registry: ModelRegistry) -> AsyncIterator[Step]:
    """The snapshot of a watch."""
    async with aclosing(registry.watch()) as steps:
        async for step in steps:
            if step.kind is None:
                return
            yield step


async def test_without_a_name_the_only_chat_model_is_used(open_registry: Opener) -> None:
    """A model and its registrations count as one, by the first registered id; models of other types do not count."""
    provider = FakeProvider("vllm", ["llama", "bge"])
    async with open_registry(provider) as registry:
        await registry.register("vectors", "vllm", "bge", ModelType.EMBEDDING, embedding_dimension=8)
        assert (await registry.resolve("")).model.id == "vllm/llama"
        await registry.register("z", "vllm", "llama")
        await registry.register("chat", "vllm", "llama")
        resolution = await registry.resolve("")
        assert (resolution.model.id, resolution.alias, resolution.provider) == ("chat", "", provider)


async def test_without_a_name_several_chat_models_are_ambiguous(open_registry: Opener) -> None:
    """The error lists them; if there is none, it is NOT_FOUND, or UNAVAILABLE if no provider answers."""
    one, two = FakeProvider("a", ["m"]), FakeProvider("b", ["m"])
    async with open_registry(one, two) as registry:
        failure = await failure_of(registry.resolve(""))
        assert [violation.field for violation in failure.violations] == ["chat.model"]
        assert "there are: a/m, b/m" in failure.message
    one, two = FakeProvider("a", []), FakeProvider("b", [])
    async with open_registry(one, two) as registry:
        failure = await failure_of(registry.resolve(""))
        assert (failure.reason, failure.message) == (Reason.MODEL_NOT_FOUND, "a chat model not found; there are: none")
        # A model that has appeared since the last listing is found.
        one.served = ["m"]
        await registry.refresh()
        assert (await registry.resolve("")).model.id == "a/m"
        one.served = []
        await registry.refresh()
        for provider in (one, two):
            provider.go_down()
        failure = await failure_of(registry.resolve(""))
        assert failure.code is Code.UNAVAILABLE
