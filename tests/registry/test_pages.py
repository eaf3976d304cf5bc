from __future__ import annotations

import base64

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltawire_server.errors import Reason
from deltawire_server.registry.model import ModelType
from deltawire_server.registry.registry import Filter, ModelRegistry
from deltawire_server.registry.store import Store
from deltawire_server.upstream.providers import Providers
from tests.registry.helpers import failure_of, ids
from tests.support.fake_provider import FakeProvider


async def test_pages(registry: ModelRegistry, alpha: FakeProvider) -> None:
    """Ascending ids, each model once, and no token on the last page."""
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
async def test_page_sizes(registry: ModelRegistry, alpha: FakeProvider, size: int, expected: int) -> None:
    """0 is 100; values above 1000 are 1000."""
    alpha.served = [str(number) for number in range(1100)]
    models, token, _ = await registry.list(size)
    assert len(models) == expected
    assert token


async def test_a_page_of_large_models_is_shorter(registry: ModelRegistry, alpha: FakeProvider) -> None:
    """Clients in other languages receive 4 MiB by default: no page is larger, and none is empty."""
    notes = {f"{number:0128}": "é" * 448 for number in range(64)}
    alpha.served = [f"model-{number}" for number in range(40)]
    for number in range(40):
        await registry.register(f"model-{number}", "alpha", annotations=notes)
    pages, token = list[int](), ""
    while not pages or token:
        models, token, _ = await registry.list(page_token=token)
        pages.append(len(models))
    assert pages == [16, 16, 10]


async def test_a_full_last_page_has_no_token(registry: ModelRegistry) -> None:
    """So no caller requests an empty page."""
    models, token, _ = await registry.list(4)
    assert (len(models), token) == (4, "")


@pytest.mark.parametrize(
    "token",
    ["!", "a", "é", "a b=", base64.urlsafe_b64encode(b"\xff").decode()],
)
async def test_an_invalid_page_token(registry: ModelRegistry, token: str) -> None:
    """It is refused, together with an invalid size."""
    failure = await failure_of(registry.list(-1, token))
    assert [violation.field for violation in failure.violations] == ["page_size", "page_token"]
    assert failure.reason is Reason.INVALID_REQUEST
    failure = await failure_of(registry.list(0, token))
    assert [violation.field for violation in failure.violations] == ["page_token"]


async def test_a_token_belongs_to_its_filter(registry: ModelRegistry, alpha: FakeProvider) -> None:
    """A page with another filter would begin at an id that the caller never received. The token does not show the id."""
    alpha.served = [f"model-{number}" for number in range(3)]
    _, token, _ = await registry.list(1, wanted=Filter(provider_id="alpha"))
    assert b"alpha" not in token.encode()
    for other in (None, Filter(provider_id="beta"), Filter(provider_id="alpha", type=ModelType.LLM)):
        failure = await failure_of(registry.list(1, token, wanted=other))
        assert [violation.field for violation in failure.violations] == ["page_token"]
    models, _, _ = await registry.list(1, token, wanted=Filter(provider_id="alpha"))
    assert ids(models) == ["alpha/model-1"]


async def test_a_negative_size(registry: ModelRegistry, alpha: FakeProvider) -> None:
    """It is refused before any provider is listed."""
    failure = await failure_of(registry.list(-1))
    assert [violation.field for violation in failure.violations] == ["page_size"]
    assert alpha.tokens == []


# Each example opens a database, so there are few, and no deadline.
@settings(max_examples=30, deadline=None)
@given(
    start=st.sets(st.integers(0, 30)),
    changes=st.lists(st.sets(st.integers(0, 30)), max_size=20),
    size=st.integers(1, 7),
)
async def test_a_model_that_exists_throughout_is_listed_once(
    start: set[int], changes: list[set[int]], size: int
) -> None:
    """While others are added and removed between pages; the order is kept."""
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
