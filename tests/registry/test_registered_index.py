from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from deltawire_server.errors import Code, Reason, RegistryError
from deltawire_server.registry.model import ModelType
from tests.registry.helpers import failure_of

if TYPE_CHECKING:
    from deltawire_server.registry.registry import ModelRegistry
    from tests.support.fake_provider import FakeProvider


async def test_the_same_again_changes_nothing(registry: ModelRegistry, alpha: FakeProvider) -> None:
    """Times are kept, the order of aliases means nothing, and the provider may be down."""
    model = await registry.register("mine", "alpha", "llama", aliases=["a", "b"], annotations={"k": "v"})
    alpha.go_down()
    again = await registry.register("mine", "alpha", "llama", aliases=["b", "a"], annotations={"k": "v"})
    assert again is model


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"provider_id": "beta", "provider_model_id": "mistral"}, "provider_id and provider_model_id"),
        ({"provider_model_id": "org/common"}, "provider_model_id"),
        ({"model_type": ModelType.RERANK}, "type"),
        ({"aliases": ["a"]}, "aliases"),
        ({"aliases": ["a", "b", "c"]}, "aliases"),
        ({"annotations": {}}, "annotations"),
    ],
)
async def test_an_id_is_never_registered_differently(
    registry: ModelRegistry, change: dict[str, object], field: str
) -> None:
    """Neither a silent overwrite nor a silently lost change; the failure says what differs and what to do."""
    arguments: dict[str, object] = {
        "model_id": "mine",
        "provider_id": "alpha",
        "provider_model_id": "llama",
        "aliases": ["a", "b"],
        "annotations": {"k": "v"},
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
    registry: ModelRegistry, model_id: str, aliases: list[str], name: str
) -> None:
    """An id or alias is unique over the registry; the failure names the owner."""
    await registry.register("mine", "alpha", "llama", aliases=["a", "b"])
    failure = await failure_of(registry.register(model_id, "alpha", "llama", aliases=aliases))
    assert failure.reason is Reason.MODEL_ALREADY_EXISTS
    assert failure.metadata == {"model": "mine", "name": name}
    assert "belongs to model 'mine'" in failure.message


async def test_one_of_several_for_the_same_target(registry: ModelRegistry) -> None:
    """The others stay, and the target leads to them."""
    await registry.register("one", "alpha", "llama")
    await registry.register("two", "alpha", "llama")
    assert (await registry.get("llama")).id == "one"
    await registry.unregister("one")
    assert (await registry.get("alpha/llama")).id == "two"
