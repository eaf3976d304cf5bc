from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from deltawire_server.errors import CallerError
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
    """Also when both readings of the name ask the same one."""
    await failure_of(registry.get("alpha/unknown"))
    assert (len(alpha.tokens), len(beta.tokens)) == (1, 1)


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


async def test_a_defect_is_not_taken_for_an_absence(registry: ModelRegistry, alpha: FakeProvider) -> None:
    """Whatever is no failure of a call goes up as it is."""
    alpha.gate = asyncio.Event()
    alpha.gate.wait = None  # type: ignore[method-assign, assignment]
    with pytest.raises(TypeError):
        await registry.get("llama")
