"""The configured providers: by id, and what each serves."""

from __future__ import annotations

import asyncio

import pytest

from deltawire_server.errors import CallerError, ProviderError, Reason
from deltawire_server.upstream.base import Health, HealthStatus, ServedModel
from deltawire_server.upstream.providers import TOKEN_LISTINGS, Providers
from tests.support.fake_provider import FakeProvider
from tests.support.gateway import until

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
    with pytest.raises(CallerError, match="configured: none") as caught:
        Providers([]).get("c" * 1_000_000)
    assert len(caught.value.message) < 2000


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
    """The next caller asks again."""
    providers = Providers([provider])
    provider.go_down()
    with pytest.raises(ProviderError):
        await providers.listing("p")
    provider.failure = None
    assert await providers.listing("p") == M


async def test_a_failure_ends_the_listing_that_was(provider: FakeProvider) -> None:
    """Else a provider that is known to be away would seem to be back for as long as its listing is kept."""
    providers = Providers([provider])
    await providers.listing("p")
    provider.go_down()
    for fresh in (True, False):
        with pytest.raises(ProviderError):
            await providers.listing("p", fresh=fresh)


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


async def test_listings_by_callers_tokens_are_bounded(provider: FakeProvider) -> None:
    """Any text is a token: however many there are, the last ones are kept, and the listing that all see stays."""
    providers = Providers([provider], listing_seconds=3600.0)
    await providers.listing("p")
    for number in range(3 * TOKEN_LISTINGS):
        await providers.listing("p", str(number))
    assert len(providers._listings) == TOKEN_LISTINGS + 1
    asked = len(provider.tokens)
    for token in (None, *map(str, range(2 * TOKEN_LISTINGS, 3 * TOKEN_LISTINGS))):
        await providers.listing("p", token)
    assert len(provider.tokens) == asked
    await providers.listing("p", "0")
    assert len(provider.tokens) == asked + 1


@pytest.mark.parametrize(
    ("ids", "named", "accepts", "sent"),
    [
        (["p"], False, False, True),
        (["p", "q"], False, False, False),
        (["p", "q"], True, False, True),
        (["p", "q"], False, True, True),
        (["q"], True, True, False),
    ],
    ids=["the only one", "one of two", "named", "marked", "not configured"],
)
def test_who_may_have_a_callers_token(ids: list[str], *, named: bool, accepts: bool, sent: bool) -> None:
    """A provider that the call names, that the operator marked, or that every call means."""
    fakes = [FakeProvider(each) for each in ids]
    for fake in fakes:
        fake.accepts_caller_tokens = accepts
    assert Providers(fakes).token_for("p", "token", named=named) == ("token" if sent else None)
    assert Providers(fakes).token_for("p", None, named=named) is None


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


async def closed(provider: FakeProvider) -> None:
    """Wait until a provider is closed."""
    await until(lambda: provider.closed)


async def test_replacing() -> None:
    """The next look-up returns the new ones; an earlier result keeps the old ones, complete."""
    a, b, c = FakeProvider("a"), FakeProvider("b"), FakeProvider("c")
    providers = Providers([a, b])
    before = (providers.ids, providers.all())
    with providers.held(a):
        providers.replace([c, b])
        assert before == (("a", "b"), (a, b))
        assert (providers.ids, providers.all()) == (("b", "c"), (b, c))
        with pytest.raises(CallerError, match="configured: b, c"):
            providers.get("a")


async def test_who_has_to_go_is_closed_and_who_stays_is_not() -> None:
    """Gone, or with another in its place: closed. The same object: as it was."""
    gone, changed, same = FakeProvider("a"), FakeProvider("b"), FakeProvider("c")
    providers = Providers([gone, changed, same])
    replacement = FakeProvider("b")
    providers.replace([replacement, same])
    await closed(gone)
    await closed(changed)
    assert providers.get("b") is replacement
    await providers.close()
    assert replacement.closed
    assert same.closed


async def test_a_provider_that_is_held_is_closed_when_the_last_lets_go() -> None:
    """Calls under way go on, and a provider that stays is not closed by their end."""
    old, same = FakeProvider("a"), FakeProvider("b")
    providers = Providers([old, same])
    with providers.held(old), providers.held(same):
        with providers.held(old):
            providers.replace([same])
        await asyncio.sleep(0)
        assert not old.closed
    await closed(old)
    assert not same.closed


async def test_a_listing_under_way_is_a_call_too(provider: FakeProvider) -> None:
    """It ends well for those who wait; it is not kept, and who asks now asks the new provider."""
    providers = Providers([provider])
    provider.gate = asyncio.Event()
    waiting = asyncio.create_task(providers.listing("p"))
    await provider.asked.wait()
    new = FakeProvider("p", ["new"])
    providers.replace([new])
    assert await providers.listing("p") == (ServedModel("new"),)
    assert not provider.closed
    provider.gate.set()
    assert await waiting == M
    assert await providers.listing("p") == (ServedModel("new"),)
    await closed(provider)
    assert len(new.tokens) == 1


async def test_what_a_replaced_provider_listed_is_forgotten(provider: FakeProvider) -> None:
    """What the same object listed is not."""
    other = FakeProvider("q", ["m"])
    providers = Providers([provider, other])
    await providers.listing("p")
    await providers.listing("q")
    new = FakeProvider("p", ["new"])
    providers.replace([new, other])
    assert await providers.listing("p") == (ServedModel("new"),)
    assert await providers.listing("q") == M
    assert len(other.tokens) == 1


async def test_a_health_check_under_way_is_a_call_too(provider: FakeProvider) -> None:
    """Its provider stays open until it has said how it is; an unknown one cannot be asked."""
    gate = asyncio.Event()
    asked = asyncio.Event()

    async def check_health() -> Health:
        asked.set()
        await gate.wait()
        assert not provider.closed
        return Health(HealthStatus.OK)

    provider.check_health = check_health  # type: ignore[method-assign]
    providers = Providers([provider])
    checking = asyncio.create_task(providers.check_health("p"))
    await asked.wait()
    providers.replace([])
    gate.set()
    assert (await checking).status is HealthStatus.OK
    await closed(provider)
    with pytest.raises(CallerError):
        await providers.check_health("p")


async def test_closing_does_not_wait_for_those_who_hold() -> None:
    """It ends the retired ones too, and waits for those being closed; what lets go afterwards has nothing left to do."""
    counts = [0, 0]

    class Counted(FakeProvider):
        async def close(self) -> None:
            counts[0] += 1
            await asyncio.sleep(0)
            counts[1] += 1

    old, older = Counted("a"), Counted("b")
    providers = Providers([old, older])
    with providers.held(old):
        providers.replace([])
        await providers.close()
        assert counts == [2, 2]
    await asyncio.sleep(0)
    assert counts == [2, 2]
