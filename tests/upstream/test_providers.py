"""The configured providers: by id, and what each serves."""

from __future__ import annotations

import asyncio

import pytest

from deltawire_server.errors import CallerError, ProviderError, Reason
from deltawire_server.upstream.base import ServedModel
from deltawire_server.upstream.providers import Providers
from tests.support.fake_provider import FakeProvider

M = (ServedModel("m"),)


@pytest.fixture
def provider() -> FakeProvider:
    """Serves m."""
    return FakeProvider("p", ["m"])


def test_by_id() -> None:
    """In ascending order, whatever the settings'; an unknown one is named beside those there are."""
    a, b = FakeProvider("a"), FakeProvider("b")
    providers = Providers([b, a])
    assert (providers.ids, providers.all()) == (("a", "b"), (a, b))
    assert providers.get("b") is b
    with pytest.raises(CallerError, match="'c' is not configured; configured: a, b") as caught:
        providers.get("c")
    assert (caught.value.reason, caught.value.metadata) == (Reason.PROVIDER_NOT_FOUND, {"provider": "c"})
    with pytest.raises(CallerError, match="configured: none"):
        Providers([]).get("c")


async def test_a_listing_is_kept(provider: FakeProvider) -> None:
    """A second look costs no request, unless a fresh one is asked for."""
    providers = Providers([provider])
    for _ in range(3):
        assert await providers.listing("p") == M
    assert len(provider.tokens) == 1
    provider.served.append("new")
    assert await providers.listing("p") == M
    assert await providers.listing("p", fresh=True) == (*M, ServedModel("new"))
    assert len(provider.tokens) == 2


async def test_an_old_listing_is_fetched_again(provider: FakeProvider) -> None:
    """As soon as it is too old, which here is at once."""
    providers = Providers([provider], listing_seconds=0.0)
    await providers.listing("p")
    await providers.listing("p")
    assert len(provider.tokens) == 2


async def test_a_failure_is_not_kept(provider: FakeProvider) -> None:
    """Whoever comes next asks again."""
    providers = Providers([provider])
    provider.go_down()
    with pytest.raises(ProviderError):
        await providers.listing("p")
    provider.failure = None
    assert await providers.listing("p") == M


async def test_all_who_wait_share_one_request(provider: FakeProvider) -> None:
    """However many ask meanwhile; and who gives up does not fail the others."""
    providers = Providers([provider])
    provider.gate = asyncio.Event()
    tasks = [asyncio.create_task(providers.listing("p", "t")) for _ in range(5)]
    await provider.asked.wait()
    tasks[0].cancel()
    await asyncio.wait([tasks[0]])
    provider.gate.set()
    assert await asyncio.gather(*tasks[1:]) == [M] * 4
    assert tasks[0].cancelled()
    assert provider.tokens == ["t"]


async def test_other_tokens_ask_for_themselves(provider: FakeProvider) -> None:
    """One caller's wrong token must not fail another's listing."""
    providers = Providers([provider])
    provider.gate = asyncio.Event()
    tasks = [asyncio.create_task(providers.listing("p", token)) for token in ("a", "b", None)]
    await provider.asked.wait()
    provider.gate.set()
    await asyncio.gather(*tasks)
    assert sorted(map(str, provider.tokens)) == ["None", "a", "b"]


async def test_what_one_token_may_see_another_need_not(provider: FakeProvider) -> None:
    """Without a token of the operator's, a listing is kept for the caller whose token fetched it."""
    providers = Providers([provider])
    assert [await providers.listing("p", token) for token in ("a", "b", "a")] == [M] * 3
    assert provider.tokens == ["a", "b"]


async def test_the_operators_token_makes_one_listing_for_all(provider: FakeProvider) -> None:
    """Then callers' tokens change nothing, and cost no request."""
    provider.has_token = True
    providers = Providers([provider])
    assert [await providers.listing("p", token) for token in ("a", "b", None)] == [M] * 3
    assert provider.tokens == [None]


async def test_closing(provider: FakeProvider) -> None:
    """Every provider is closed, and a listing under way is given up."""
    providers = Providers([provider])
    provider.gate = asyncio.Event()
    task = asyncio.create_task(providers.listing("p"))
    await provider.asked.wait()
    await providers.close()
    assert provider.closed
    with pytest.raises(asyncio.CancelledError):
        await task
