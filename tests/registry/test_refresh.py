"""Refreshing: who is listed when, and that nobody's trouble is another's; look-ups while it goes on."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING

from deltawire_server.errors import ProviderError, Reason
from deltawire_server.registry.listing_cache import ListingCache
from deltawire_server.registry.model import ModelState
from deltawire_server.registry.refresh import Refresher
from deltawire_server.registry.registry import ModelRegistry
from deltawire_server.registry.store import Store
from deltawire_server.upstream.providers import Providers
from tests.support.fake_provider import FakeProvider
from tests.support.gateway import WAIT, Lines, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from deltawire_server.registry.model import Model
    from deltawire_server.upstream.base import ServedModel


class Counted(FakeProvider):
    """A provider whose listings can be waited for, and that can be odd.

    Attributes:
        defect: What listing it raises though no provider may.
    """

    def __init__(self, provider_id: str, *served: str, interval: float = 3600.0) -> None:
        super().__init__(provider_id, served)
        self.refresh_interval = interval
        self.defect: Exception | None = None

    @property
    def listings(self) -> int:
        """How often it was listed."""
        return len(self.tokens)

    async def listed(self, count: int) -> None:
        """Wait until it has been listed so often."""
        await until(lambda: self.listings >= count)

    async def list_models(self, token: str | None = None) -> tuple[ServedModel, ...]:
        """What it serves, or its defect."""
        models = await super().list_models(token)
        if self.defect is not None:
            raise self.defect
        return models


class Kit:
    """A refresher over providers; it hardly waits, unless told to."""

    def __init__(self, *fakes: Counted, retry: float = 0.0, suspect: float = 0.0) -> None:
        self.providers = Providers(fakes)
        self.served = ListingCache(self.providers)
        self.refresher = Refresher(self.providers, self.served, retry_seconds=retry, stale_seconds=suspect)

    def replace(self, *fakes: Counted) -> None:
        """Have these providers from now on, as `ModelRegistry.providers_changed` does."""
        before = {provider.id: provider for provider in self.providers.all()}
        self.providers.replace(fakes)
        self.served.forget(before.keys() - {fake.id for fake in fakes if before.get(fake.id) is fake})
        self.refresher.start()

    def names(self, provider_id: str) -> list[str]:
        """What a provider listed last."""
        return [*self.served.listed(provider_id)]


@asynccontextmanager
async def refreshing(*fakes: Counted, retry: float = 0.0, suspect: float = 0.0) -> AsyncIterator[Kit]:
    """Refresh these, until the end of the block; afterwards nothing is left running."""
    tasks = asyncio.all_tasks()
    kit = Kit(*fakes, retry=retry, suspect=suspect)
    kit.refresher.start()
    try:
        yield kit
    finally:
        async with asyncio.timeout(WAIT):
            await kit.refresher.stop()
            await kit.providers.close()
    assert asyncio.all_tasks() <= tasks


async def test_all_are_listed_at_the_start() -> None:
    """Each by one request, without anybody's token; then not before its interval is over."""
    alpha, beta = Counted("alpha", "a"), Counted("beta", "b")
    async with refreshing(alpha, beta) as kit:
        await until(lambda: kit.names("alpha") == ["a"] and kit.names("beta") == ["b"])
        for _ in range(20):
            await asyncio.sleep(0)
        assert alpha.tokens == beta.tokens == [None]


async def test_each_at_its_own_interval() -> None:
    """One that is listed again and again does not hasten another; what it lists anew is found."""
    alpha, beta = Counted("alpha", "a", interval=0.001), Counted("beta", "b")
    async with refreshing(alpha, beta) as kit:
        await alpha.listed(3)
        alpha.served.append("new")
        await until(lambda: kit.names("alpha") == ["a", "new"])
        assert beta.listings == 1


async def test_one_that_hangs_holds_up_nobody() -> None:
    """Nor is it asked again while it has not answered; when it does, it goes on in its own turn."""
    alpha, beta = Counted("alpha", "a", interval=0.001), Counted("beta", "b", interval=0.001)
    alpha.gate = asyncio.Event()
    async with refreshing(alpha, beta) as kit:
        await alpha.listed(1)
        await beta.listed(5)
        kit.refresher.mark_stale("alpha")
        await beta.listed(10)
        assert (alpha.listings, kit.names("beta")) == (1, ["b"])
        alpha.gate.set()
        await alpha.listed(3)
        assert kit.names("alpha") == ["a"]


async def test_one_that_fails_is_asked_again_soon(lines: Lines) -> None:
    """Long before its interval is over, and told in the log once; when it is back, its interval counts again."""
    alpha, beta = Counted("alpha", "a"), Counted("beta", "b")
    alpha.go_down()
    async with refreshing(alpha, beta) as kit:
        await alpha.listed(5)
        assert beta.listings == 1
        assert kit.served.state("alpha", "a") is ModelState.UNAVAILABLE
        alpha.failure = None
        await until(lambda: kit.names("alpha") == ["a"])
        listings = alpha.listings
        for _ in range(20):
            await asyncio.sleep(0)
        assert alpha.listings == listings
        assert kit.served.state("alpha", "a") is ModelState.SERVING
    assert [entry["event"] for entry in lines.entries] == ["provider not listed", "provider answers again"]


async def test_one_that_fails_is_not_asked_more_often_than_others() -> None:
    """Where its interval is shorter than the pause after a failure, the interval counts."""
    alpha = Counted("alpha", interval=0.001)
    alpha.go_down()
    async with refreshing(alpha, retry=3600.0):
        await alpha.listed(3)


async def test_a_defect_is_survived(lines: Lines) -> None:
    """It is logged with its trace; what was known stays, the next turn comes, and the others are listed as before."""
    alpha, beta = Counted("alpha", "a", interval=0.001), Counted("beta", "b", interval=0.001)
    async with refreshing(alpha, beta) as kit:
        await until(lambda: kit.names("alpha") == ["a"])
        alpha.defect = TypeError("odd")
        entry = await lines.find("a provider's listing failed in an unexpected way", provider="alpha")
        assert "TypeError: odd" in str(entry)
        entry = await lines.find("provider not listed", provider="alpha")
        assert entry["error"] == "provider 'alpha' cannot be listed: TypeError: odd"
        assert kit.names("alpha") == ["a"]
        listings = beta.listings
        await beta.listed(listings + 3)
        alpha.defect, alpha.served = None, ["b"]
        await until(lambda: kit.names("alpha") == ["b"])


async def test_a_suspect_is_listed_at_once() -> None:
    """Long before its interval is over; nobody else is."""
    alpha, beta = Counted("alpha", "a"), Counted("beta", "b")
    async with refreshing(alpha, beta) as kit:
        await until(lambda: kit.names("alpha") == ["a"] and kit.names("beta") == ["b"])
        alpha.served = ["new"]
        kit.refresher.mark_stale("alpha")
        await until(lambda: kit.names("alpha") == ["new"])
        assert (alpha.listings, beta.listings) == (2, 1)


async def test_a_hundred_suspicions_are_one_look() -> None:
    """Those that come until it begins; and one that comes while it is under way is another look, since it is newer."""
    alpha = Counted("alpha", "a")
    async with refreshing(alpha) as kit:
        await until(lambda: kit.names("alpha") == ["a"])
        alpha.gate = asyncio.Event()
        for _ in range(100):
            kit.refresher.mark_stale("alpha")
        await alpha.listed(2)
        for _ in range(100):
            kit.refresher.mark_stale("alpha")
        alpha.served = ["new"]
        alpha.gate.set()
        await until(lambda: kit.names("alpha") == ["new"])
        await alpha.listed(3)
        for _ in range(20):
            await asyncio.sleep(0)
        assert alpha.listings == 3


async def test_suspicions_do_not_add_up_to_a_flood() -> None:
    """Between two looks that were asked for there is a pause, however often somebody finds a reason."""
    alpha = Counted("alpha", "a")
    async with refreshing(alpha, suspect=3600.0) as kit:
        await until(lambda: kit.names("alpha") == ["a"])
        kit.refresher.mark_stale("alpha")
        await alpha.listed(2)
        for _ in range(100):
            kit.refresher.mark_stale("alpha")
            await asyncio.sleep(0)
        assert alpha.listings == 2


async def test_one_that_has_to_wait_for_its_look_keeps_its_turn() -> None:
    """The pause between two looks that were asked for does not put off those that are due."""
    alpha = Counted("alpha", interval=0.001)
    async with refreshing(alpha, suspect=3600.0) as kit:
        await alpha.listed(1)
        for count in range(2, 6):
            kit.refresher.mark_stale("alpha")
            await alpha.listed(count)


async def test_nobody_is_suspected_in_vain() -> None:
    """A provider that is gone meanwhile, or before anything was started."""
    kit = Kit(Counted("alpha"))
    kit.refresher.mark_stale("alpha")
    async with refreshing(Counted("alpha")) as kit:
        kit.refresher.mark_stale("gone")


async def test_starting_again_changes_nothing_for_those_who_stay() -> None:
    """They are not listed anew; one that came is, and one that went is not any more."""
    alpha, beta, gamma = Counted("alpha"), Counted("beta", interval=0.001), Counted("gamma")
    async with refreshing(alpha, beta) as kit:
        await alpha.listed(1)
        await beta.listed(1)
        kit.replace(alpha, gamma)
        await gamma.listed(1)
        listings = beta.listings
        kit.refresher.start()
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert (alpha.listings, beta.listings, gamma.listings) == (1, listings, 1)


async def test_a_replaced_provider_does_not_hold_up_its_successor() -> None:
    """The new one is listed at once, though the old one hangs; and what the old one says at last is not the new one's."""
    old, new = Counted("alpha", "old"), Counted("alpha", "new")
    old.gate = asyncio.Event()
    async with refreshing(old) as kit:
        await old.listed(1)
        kit.replace(new)
        await until(lambda: kit.names("alpha") == ["new"])
        old.gate.set()
        await until(lambda: old.closed)
        assert (kit.names("alpha"), old.listings, new.listings) == (["new"], 1, 1)


async def test_a_successor_has_its_own_interval() -> None:
    """The pause of the old one ends with it, and the new one's counts."""
    old, new = Counted("alpha", "old"), Counted("alpha", "new", interval=0.001)
    async with refreshing(old) as kit:
        await until(lambda: kit.names("alpha") == ["old"])
        kit.replace(new)
        await new.listed(3)


async def test_stopping_while_all_hang() -> None:
    """Waits for nobody, and leaves nothing running; what `refreshing` asserts."""
    fakes = [Counted(name) for name in ("alpha", "beta", "gamma")]
    for fake in fakes:
        fake.gate = asyncio.Event()
    async with refreshing(*fakes) as kit:
        for fake in fakes:
            await fake.listed(1)
        kit.replace(Counted("alpha"))


async def test_stopping_what_was_never_started() -> None:
    """Is nothing to wait for; and stopping twice is stopping."""
    kit = Kit(Counted("alpha"))
    await kit.refresher.stop()
    await kit.refresher.stop()


@asynccontextmanager
async def opened(*fakes: Counted) -> AsyncIterator[tuple[ModelRegistry, Providers]]:
    """A registry that refreshes these."""
    providers = Providers(fakes, listing_seconds=0.0)
    registry = ModelRegistry(Store("sqlite://"), providers)
    await registry.open()
    try:
        registry.start_refreshing()
        yield registry, providers
    finally:
        await registry.close()
        await providers.close()


async def test_look_ups_find_what_is_there_while_everything_is_refreshed() -> None:
    """What is served before and after a listing is found at every moment, registered or not, and never asked for.

    So are the names beside it: a listing takes the place of the one before as a whole.
    """
    alpha = Counted("alpha", "stays", "first")
    async with opened(alpha) as (registry, _):
        await registry.register("mine", provider_model_id="stays")
        await alpha.listed(1)
        states = set()
        for turn in range(100):
            alpha.served = ["stays", ("first", "second")[turn % 2]]
            refresh = asyncio.create_task(registry.refresh())
            while not refresh.done():
                listings = alpha.listings
                for name in ("mine", "alpha/stays", "stays"):
                    model = await registry.get(name)
                    assert model.id == "mine"
                    states.add(model.state)
                assert alpha.listings == listings
                found = {each.id for each in await listed(registry)}
                assert found in ({"mine", "alpha/first"}, {"mine", "alpha/second"})
                await asyncio.sleep(0)
            assert await refresh == {"alpha": 2}
    assert states == {ModelState.SERVING}


async def test_registered_models_are_never_lost() -> None:
    """Whatever a provider lists, or fails with, or whether it is configured at all: they are found, in a state of its own."""
    alpha = Counted("alpha", "m")
    async with opened(alpha) as (registry, providers):
        mine = await registry.register("mine", provider_model_id="m", aliases=["other"])
        assert mine.state is ModelState.SERVING
        failures = [ProviderError(reason, "x") for reason in (Reason.UPSTREAM_MALFORMED, Reason.PROVIDER_MISCONFIGURED)]
        states = [ModelState.UNAVAILABLE, ModelState.UNKNOWN]
        for failure, state in zip(failures, states, strict=True):
            alpha.failure = failure
            assert await registry.refresh() == {"alpha": failure}
            for name in ("mine", "other", "alpha/m", "m"):
                found = await registry.get(name)
                assert (found.id, found.state) == ("mine", state)
        alpha.failure, alpha.served = None, []
        assert await registry.refresh() == {"alpha": 0}
        assert (await registry.get("other")).state is ModelState.UNAVAILABLE
        providers.replace([])
        registry.providers_changed(["alpha"])
        assert [(model.id, model.state) for model in await listed(registry)] == [("mine", ModelState.UNAVAILABLE)]
        providers.replace([Counted("alpha", "m")])
        registry.providers_changed(["alpha"])
        async with asyncio.timeout(WAIT), aclosing(registry.watch()) as steps:
            async for step in steps:
                if step.model is not None and step.model.id == "mine" and step.model.state is ModelState.SERVING:
                    break


async def test_a_provider_that_is_away_does_not_slow_look_ups() -> None:
    """What it served last is found without asking it: the call to it fails by itself if it is still away."""
    alpha = Counted("alpha", "m")
    async with opened(alpha) as (registry, _):
        await registry.refresh()
        alpha.go_down()
        await registry.refresh()
        listings = alpha.listings
        for name in ("m", "alpha/m"):
            model = await registry.get(name)
            assert (model.id, model.state) == ("alpha/m", ModelState.UNAVAILABLE)
        assert alpha.listings == listings


async def listed(registry: ModelRegistry) -> list[Model]:
    """All models."""
    models, _, _ = await registry.list()
    return models
