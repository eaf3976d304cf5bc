from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from deltawire_server.errors import CallerError, Code, Reason, RegistryError
from deltawire_server.registry.messages import MAX_NAME_LENGTH
from deltawire_server.registry.model import Model, ModelSource, ModelState, ModelType
from deltawire_server.registry.registry import ModelRegistry
from deltawire_server.registry.rules import MAX_ANNOTATION_BYTES
from deltawire_server.registry.store import Store
from deltawire_server.upstream.base import ServedModel
from deltawire_server.upstream.providers import Providers
from tests.registry.helpers import all_ids, failure_of
from tests.support.fake_provider import FakeProvider

if TYPE_CHECKING:
    from tests.registry.conftest import Opener


async def test_keeps_what_the_provider_says(open_registry: Opener) -> None:
    """The provider's limits and origins are part of the model, its times are set."""
    served = ServedModel("lora", engine_root="/adapters/lora", base_model="base", max_context_tokens=4096)
    async with open_registry(FakeProvider("vllm", ["base", served])) as registry:
        model = await registry.register("mine", "vllm", "lora", ModelType.EMBEDDING, ["a", "b"], {"k": "v"}, 1024)
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
        1024,
        model.revision,
        ModelState.SERVING,
    )
    assert model.etag == f"r{model.revision}"


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
    registry: ModelRegistry, model_id: str, provider_model_id: str, expected: str
) -> None:
    """An id different from the provider's name is an alias and stays; the provider's own name is scoped."""
    assert (await registry.register(model_id, "alpha", provider_model_id)).id == expected


REPOSITORY, DESCRIPTOR = "meta-llama/Llama-3.1-8B-Instruct", "Llama3.1-8B-Instruct"


@pytest.mark.parametrize(
    ("served", "model_id", "provider_model_id", "expected_id"),
    [
        pytest.param(ServedModel(REPOSITORY), DESCRIPTOR, "", DESCRIPTOR, id="descriptor of a served repository"),
        pytest.param(ServedModel(REPOSITORY), "mine", DESCRIPTOR, "mine", id="alias of a descriptor"),
        pytest.param(
            ServedModel(REPOSITORY), REPOSITORY, DESCRIPTOR, f"vllm/{REPOSITORY}", id="the provider's own name"
        ),
        pytest.param(
            ServedModel(REPOSITORY), f"vllm/{DESCRIPTOR}", DESCRIPTOR, f"vllm/{DESCRIPTOR}", id="the scoped descriptor"
        ),
        pytest.param(ServedModel(DESCRIPTOR), REPOSITORY, "", REPOSITORY, id="repository of a served descriptor"),
        pytest.param(ServedModel("small", REPOSITORY), DESCRIPTOR, "", DESCRIPTOR, id="descriptor of what was loaded"),
        pytest.param(ServedModel("small", "org/big"), "small", "org/big", "vllm/small", id="what was loaded, unknown"),
        pytest.param(ServedModel(DESCRIPTOR), DESCRIPTOR, "", f"vllm/{DESCRIPTOR}", id="a descriptor that is served"),
    ],
)
async def test_a_model_is_registered_as_what_its_provider_serves(
    open_registry: Opener, served: ServedModel, model_id: str, provider_model_id: str, expected_id: str
) -> None:
    """Any name of the model finds it, the provider's own is kept, and the rule for ids holds for that one.

    The same again is the same, also when the provider is down and cannot say what it calls it.
    """
    provider = FakeProvider("vllm", ["other", served])
    async with open_registry(provider) as registry:
        model = await registry.register(model_id, provider_model_id=provider_model_id, aliases=["a"])
        assert (model.id, model.provider_model_id, model.engine_root) == (expected_id, served.id, served.engine_root)
        assert await registry.get(f"vllm/{served.id}") is model
        provider.go_down()
        assert await registry.register(model_id, provider_model_id=provider_model_id, aliases=["a"]) is model
        failure = await failure_of(registry.register(model_id, provider_model_id=provider_model_id, aliases=["b"]))
        assert failure.reason is Reason.MODEL_ALREADY_EXISTS
        assert "with different aliases" in failure.message


async def test_the_same_by_another_name(open_registry: Opener) -> None:
    """An id is registered for the model, whichever of its names was used; for another provider's it is not."""
    one, two = FakeProvider("one", [REPOSITORY]), FakeProvider("two", [REPOSITORY])
    async with open_registry(one, two) as registry:
        model = await registry.register("mine", "one", DESCRIPTOR)
        assert await registry.register("mine", "one", REPOSITORY) is model
        failure = await failure_of(registry.register("mine", "two", DESCRIPTOR))
        assert failure.reason is Reason.MODEL_ALREADY_EXISTS
        assert "different provider_id" in failure.message


async def test_the_same_beside_another_providers_alias(open_registry: Opener) -> None:
    """What one provider calls a model says nothing of what another does, though an alias has the name asked for."""
    one, two = FakeProvider("one", [ServedModel("small", REPOSITORY)]), FakeProvider("two", [REPOSITORY])
    async with open_registry(one, two) as registry:
        model = await registry.register(REPOSITORY, "two", DESCRIPTOR)
        await registry.register("mine", "one", "small", aliases=[REPOSITORY])
        assert await registry.register(REPOSITORY, "two", DESCRIPTOR) is model


async def test_what_is_served_now_decides_for_a_new_id(open_registry: Opener) -> None:
    """That another id is registered for the model does not tell what a provider that was started anew calls it."""
    provider = FakeProvider("vllm", [REPOSITORY])
    async with open_registry(provider) as registry:
        await registry.register(f"vllm/{DESCRIPTOR}", provider_model_id=DESCRIPTOR)
        provider.served = [ServedModel("small", REPOSITORY)]
        assert (await registry.register(DESCRIPTOR)).provider_model_id == "small"


async def test_an_alias_that_the_id_becomes(open_registry: Opener) -> None:
    """Only its provider's listing tells what the id will be; an alias that repeats it is refused all the same."""
    async with open_registry(FakeProvider("vllm", [REPOSITORY])) as registry:
        failure = await failure_of(registry.register(DESCRIPTOR, aliases=["fine", DESCRIPTOR]))
        assert isinstance(failure, CallerError)
        assert [violation.field for violation in failure.violations] == ["aliases[1]"]
        assert await all_ids(registry) == [f"vllm/{REPOSITORY}"]


async def test_an_adapter_is_not_taken_for_its_base(open_registry: Opener) -> None:
    """What says that it was loaded from the model, but is another one, is not served under the model's names."""
    adapter = ServedModel("adapter", engine_root=REPOSITORY, base_model="base")
    async with open_registry(FakeProvider("vllm", [adapter])) as registry:
        assert (await failure_of(registry.register(DESCRIPTOR))).reason is Reason.MODEL_NOT_SERVED
        assert (await registry.register("mine", provider_model_id="adapter")).base_model == "base"


@pytest.mark.parametrize("number", [0, 1, 2, 3])
async def test_types_by_number(registry: ModelRegistry, number: int) -> None:
    """A number as it came over the wire; none is LLM."""
    dimension = 1024 if number == ModelType.EMBEDDING.value else None
    model = await registry.register("llama", "alpha", model_type=number, embedding_dimension=dimension)
    assert model.type.value == (number or 1)


async def test_every_broken_rule_is_listed(registry: ModelRegistry) -> None:
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
        "annotations",
        "annotations",
        "annotations['v']",
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
        pytest.param({"model_id": "ll\u0430ma"}, "model_id", id="a Cyrillic a"),
        pytest.param({"model_id": "\u217c\u217cama"}, "model_id", id="Roman numerals"),
        pytest.param({"model_id": "cafe\u0301"}, "model_id", id="a decomposed letter"),
        pytest.param({"model_id": "caf\u00e9"}, "model_id", id="a composed letter"),
        pytest.param({"model_id": "llama\uff0f8b"}, "model_id", id="a full-width slash"),
        ({"model_id": "llama", "aliases": ["mistra\u13a7"]}, "aliases[0]"),
        ({"model_id": "llama", "annotations": {f"{n}": "x" * 4096 for n in range(16)}}, "annotations"),
        ({"model_id": "llama", "annotations": {f"{n}": "\u20ac" * 1400 for n in range(16)}}, "annotations"),
        ({"model_id": "llama", "aliases": ["alpha/llama"]}, "aliases[0]"),
        ({"model_id": "llama", "aliases": [f"alias-{number}" for number in range(33)]}, "aliases"),
        ({"model_id": "llama", "annotations": {str(number): "" for number in range(65)}}, "annotations"),
        ({"model_id": "llama", "model_type": -1}, "type"),
    ],
)
async def test_a_broken_rule(registry: ModelRegistry, arguments: dict[str, object], field: str) -> None:
    """Each rule by itself, at its limit; nobody was asked about what cannot be registered."""
    failure = await failure_of(registry.register(provider_id="alpha", **arguments))  # type: ignore[arg-type]
    assert [violation.field for violation in failure.violations] == [field]


async def test_the_limits_themselves_are_allowed(registry: ModelRegistry) -> None:
    """The greatest that the rules name is within them."""
    aliases = [f"{number:02}{'~' * 254}" for number in range(32)]
    annotations = {f"{number:02}{'k' * 126}": "é" * 448 for number in range(64)}
    assert sum(len(text.encode()) for text in (*annotations, *annotations.values())) == MAX_ANNOTATION_BYTES
    await registry.register("long", "alpha", "llama", annotations={"k": "v" * 4096})
    model = await registry.register("x" * 256, "alpha", "llama", aliases=aliases, annotations=annotations)
    assert await registry.get(aliases[-1]) == model


async def test_the_only_provider_needs_no_name(open_registry: Opener, alpha: FakeProvider) -> None:
    """With one provider there is no doubt."""
    async with open_registry(alpha) as registry:
        assert (await registry.register("llama")).provider_id == "alpha"


async def test_without_any_provider(url: str) -> None:
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


async def test_an_unknown_provider(registry: ModelRegistry) -> None:
    """A provider is the operator's to configure."""
    failure = await failure_of(registry.register("llama", "gamma"))
    assert failure.reason is Reason.PROVIDER_NOT_FOUND


async def test_a_model_that_is_not_served(registry: ModelRegistry, alpha: FakeProvider) -> None:
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


async def test_asks_the_provider_itself_with_the_callers_token(url: str, alpha: FakeProvider) -> None:
    """A listing at hand is not enough: what was loaded a second ago can be registered."""
    registry = ModelRegistry(Store(url), Providers([alpha]))
    await registry.open()
    await registry.list()
    alpha.served.append("new")
    assert (await registry.register("new", token="mine")).id == "alpha/new"
    await registry.close()
    assert alpha.tokens == [None, "mine"]


async def test_a_provider_that_is_down(registry: ModelRegistry, alpha: FakeProvider) -> None:
    """The provider's own failure tells; nothing is registered."""
    alpha.go_down()
    assert await failure_of(registry.register("llama", "alpha")) is alpha.failure
    alpha.failure = None
    assert (await registry.get("llama")).source is ModelSource.DISCOVERED


async def test_a_name_that_is_too_long_is_read_no_further(registry: ModelRegistry) -> None:
    """What comes after the most that it may have is not looked at."""
    with pytest.raises(CallerError) as caught:
        await registry.register("x" * MAX_NAME_LENGTH + "\n" * 1000, "alpha", "llama")
    (violation,) = caught.value.violations
    assert violation.description == "has 1256 characters; at most 256 are allowed"


@pytest.mark.parametrize("name", ["beta/mistral", "beta/free", "beta/", "alpha/other", "alpha/alpha/llama"])
async def test_names_of_a_provider_are_reserved(registry: ModelRegistry, beta: FakeProvider, name: str) -> None:
    """Served now or not, for an id and for an alias, of another provider and of the same: it is refused, and beta is not asked."""
    failure = await failure_of(registry.register(name, "alpha", "llama", aliases=["fine"]))
    assert (failure.reason, [violation.field for violation in failure.violations]) == (
        Reason.INVALID_REQUEST,
        ["model_id"],
    )
    assert f"is reserved for what provider {name.partition('/')[0]} serves under that name" in failure.message
    failure = await failure_of(registry.register("mine", "alpha", "llama", aliases=["fine", name]))
    assert [violation.field for violation in failure.violations] == ["aliases[1]"]
    await registry.register("mine", "alpha", "llama")
    failure = await failure_of(registry.update("mine", {"aliases": [name]}))
    assert [violation.field for violation in failure.violations] == ["model.aliases[0]"]
    assert beta.tokens == []


async def test_old_names_and_notes_do_not_prevent_changes(registry: ModelRegistry, url: str) -> None:
    """What an earlier release registered under other rules stays, is called by its names, and can be changed."""
    notes = {str(number): "x" * 4096 for number in range(64)}
    store = Store(url)
    await store.open()
    now = datetime.now(UTC)
    old = Model("größe", "alpha", "llama", aliases=("küçük",), annotations=notes, create_time=now, update_time=now)
    await store.insert(old)
    await store.close()
    assert (await registry.update("größe", {"aliases": ["küçük", "small"]})).annotations == notes
    assert (await registry.get("küçük")).aliases == ("küçük", "small")
    assert (await registry.update("small", {"type": ModelType.RERANK})).type is ModelType.RERANK
