from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from deltawire_server.errors import CallerError, ProviderError, Reason
from deltawire_server.registry.model import Model, ModelSource, ModelState
from deltawire_server.registry.registry import ModelRegistry
from deltawire_server.registry.store import Store
from deltawire_server.upstream.base import ServedModel
from deltawire_server.upstream.providers import Providers
from tests.registry.helpers import failure_of
from tests.support.fake_provider import FakeProvider

if TYPE_CHECKING:
    from tests.registry.conftest import Opener


async def test_a_discovered_model_says_what_the_provider_says(open_registry: Opener) -> None:
    """All that is known of it, and no more."""
    served = ServedModel("lora", engine_root="/adapters/lora", base_model="base", max_context_tokens=4096)
    async with open_registry(FakeProvider("vllm", [served])) as registry:
        assert await registry.get("lora") == Model(
            "vllm/lora",
            "vllm",
            "lora",
            source=ModelSource.DISCOVERED,
            max_context_tokens=4096,
            engine_root="/adapters/lora",
            base_model="base",
            state=ModelState.SERVING,
        )


@pytest.mark.parametrize(("tokens", "kept"), [(-1, None), (0, 0), (2**31 - 1, 2**31 - 1), (2**31, None)])
async def test_a_context_that_cannot_be_is_left_out(open_registry: Opener, tokens: int, kept: int | None) -> None:
    """A provider's nonsense is no reason to fail a call."""
    async with open_registry(FakeProvider("vllm", [ServedModel("m", max_context_tokens=tokens)])) as registry:
        assert (await registry.get("m")).max_context_tokens == kept
        assert (await registry.register("m")).max_context_tokens == kept


async def test_a_miss_asks_each_provider_once(registry: ModelRegistry, alpha: FakeProvider, beta: FakeProvider) -> None:
    """Also when both readings of the name ask the same one; one that the name does not name is not asked."""
    await failure_of(registry.get("alpha/unknown"))
    assert (len(alpha.tokens), len(beta.tokens)) == (1, 0)
    await failure_of(registry.get("unknown"))
    assert (len(alpha.tokens), len(beta.tokens)) == (2, 1)


async def test_a_hundred_misses_at_once_ask_once(url: str, alpha: FakeProvider) -> None:
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


DEFECTS = (
    ValueError("odd"),
    RecursionError("too deep"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    UnicodeError("label too long"),
    KeyError("data"),
    AttributeError("x"),
    ExceptionGroup("several", [OSError()]),
)


@pytest.mark.parametrize("defect", DEFECTS, ids=repr)
async def test_one_provider_that_fails_in_any_way(
    registry: ModelRegistry, alpha: FakeProvider, beta: FakeProvider, defect: Exception
) -> None:
    """Lists, refreshes and bare names of the others work as before; the one is reported with its reason."""
    healthy = (await registry.get("beta/mistral")).id
    alpha.failure = defect  # type: ignore[assignment]
    models, _, unreachable = await registry.list()
    assert healthy in [model.id for model in models]
    assert [*unreachable] in ([], ["alpha"])
    refreshed = await registry.refresh("", None)
    assert refreshed["beta"] == len(beta.served)
    failure = refreshed["alpha"]
    assert isinstance(failure, ProviderError)
    assert (failure.reason, failure.metadata) == (Reason.UPSTREAM_MALFORMED, {"provider": "alpha"})
    assert f"provider 'alpha' cannot be listed: {type(defect).__name__}" in failure.message
    assert (await registry.get("mistral")).id == healthy
    assert (await registry.register("mine", "beta", "mistral")).id == "mine"
    absent = await failure_of(registry.get("nowhere"))
    assert (absent.reason, "without an answer: alpha" in absent.message) == (Reason.MODEL_NOT_FOUND, True)
    assert (await failure_of(registry.get("alpha/nowhere"))).reason is Reason.UPSTREAM_MALFORMED
