"""The cache of listings: which provider is listed, what is recorded, and the resulting states."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from deltawire_server.errors import CallerError, ProviderError, Reason
from deltawire_server.registry.listing_cache import ListingCache
from deltawire_server.registry.listings import Listings
from deltawire_server.registry.model import ModelState
from deltawire_server.upstream.base import ServedModel
from deltawire_server.upstream.providers import Providers
from tests.registry.helpers import failure_of
from tests.support.fake_provider import FakeProvider
from tests.support.gateway import until

if TYPE_CHECKING:
    from tests.support.gateway import Lines

SERVING, UNAVAILABLE, UNKNOWN = ModelState.SERVING, ModelState.UNAVAILABLE, ModelState.UNKNOWN
GONE = ProviderError(Reason.UPSTREAM_UNAVAILABLE, "cannot be reached")
SILENT = ProviderError(Reason.UPSTREAM_TIMEOUT, "was silent")
WANTS_TOKEN = ProviderError(Reason.PROVIDER_MISCONFIGURED, "wants a token")
REFUSES_TOKEN = ProviderError(Reason.UPSTREAM_UNAUTHENTICATED, "refuses the token")


class Kit:
    """A cache for alpha and beta, and each reported change."""

    def __init__(self, *, listing_seconds: float = 0.0) -> None:
        self.alpha, self.beta = FakeProvider("alpha", ["a"]), FakeProvider("beta", ["b"])
        self.providers = Providers([self.alpha, self.beta], listing_seconds=listing_seconds)
        self.changes: list[str] = []
        self.served = ListingCache(self.providers, self.changes.append)

    async def ask(self, failure: ProviderError | None = None, *models: str | ServedModel) -> None:
        """List alpha when it serves these models, or fails."""
        self.alpha.failure = failure
        self.alpha.served = list(models)
        (result,) = await asyncio.gather(self.served.listing("alpha", fresh=True), return_exceptions=True)
        assert result is failure or failure is None

    def names(self) -> list[str]:
        """The names in the last listing of alpha."""
        return [*self.served.listed("alpha")]


@pytest.fixture
def kit() -> Kit:
    """No provider was listed yet."""
    return Kit()


async def test_before_the_first_listing(kit: Kit) -> None:
    """There are no models, and states are UNKNOWN."""
    assert kit.names() == []
    assert not kit.served.was_asked("alpha")
    assert "a" not in kit.served.listed("alpha")
    assert kit.served.state("alpha", "a") is UNKNOWN
    assert kit.served.provider_ids == ("alpha", "beta")


async def test_a_listing_is_recorded(kit: Kit) -> None:
    """With all data of each model; a model that is not listed is UNAVAILABLE."""
    lora = ServedModel("lora", "/adapters/lora", "a", 4096)
    await kit.ask(None, "a", lora)
    assert kit.served.listed("alpha") == {"a": ServedModel("a"), "lora": lora}
    assert kit.served.listed("alpha")["lora"] == lora
    assert kit.served.was_asked("alpha")
    states = [kit.served.state("alpha", name) for name in ("a", "lora", "other")]
    assert states == [SERVING, SERVING, UNAVAILABLE]
    assert (kit.served.state("beta", "b"), kit.served.was_asked("beta")) == (UNKNOWN, False)


async def test_a_different_listing_is_reported(kit: Kit) -> None:
    """Not an equal one in any order; but one with other data of a model."""
    steps: list[tuple[tuple[str | ServedModel, ...], int]] = [
        (("a", "b"), 1),
        (("a", "b"), 1),
        (("b", "a"), 1),
        (("b",), 2),
        ((ServedModel("b", max_context_tokens=1),), 3),
        ((), 4),
        ((), 4),
    ]
    for models, told in steps:
        await kit.ask(None, *models)
        assert kit.changes == ["alpha"] * told


async def test_a_first_empty_listing_is_reported(kit: Kit) -> None:
    """Because states change from UNKNOWN to UNAVAILABLE."""
    await kit.ask()
    assert kit.changes == ["alpha"]
    assert kit.served.was_asked("alpha")
    assert kit.served.state("alpha", "a") is UNAVAILABLE


@pytest.mark.parametrize(
    ("failure", "state"), [(GONE, UNAVAILABLE), (SILENT, UNAVAILABLE), (WANTS_TOKEN, UNKNOWN), (REFUSES_TOKEN, UNKNOWN)]
)
async def test_a_failure_keeps_the_last_listing(kit: Kit, failure: ProviderError, state: ModelState) -> None:
    """Its models have another state, and are only removed by the next listing."""
    await kit.ask(None, "a", "b")
    await kit.ask(failure)
    assert kit.names() == ["a", "b"]
    assert {kit.served.state("alpha", name) for name in ("a", "other")} == {state}
    await kit.ask(None, "b")
    assert kit.names() == ["b"]
    assert [kit.served.state("alpha", name) for name in ("a", "b")] == [UNAVAILABLE, SERVING]
    assert kit.changes == ["alpha"] * 3


@pytest.mark.parametrize(("failure", "state"), [(GONE, UNAVAILABLE), (WANTS_TOKEN, UNKNOWN)])
async def test_a_first_failure(kit: Kit, failure: ProviderError, state: ModelState) -> None:
    """The provider was asked, and has no models."""
    await kit.ask(failure)
    assert (kit.names(), kit.served.was_asked("alpha")) == ([], True)
    assert kit.served.state("alpha", "a") is state
    assert kit.changes == ["alpha"]


async def test_a_failure_is_reported_and_logged_once(kit: Kit, lines: Lines) -> None:
    """Another failure is reported again, and so is the next listing."""
    await kit.ask(None, "a")
    for failure in (GONE, GONE, GONE, WANTS_TOKEN, WANTS_TOKEN):
        await kit.ask(failure)
    for _ in range(2):
        await kit.ask(None, "a")
    assert kit.changes == ["alpha"] * 4
    logged = [(entry["event"], entry.get("error")) for entry in lines.entries]
    assert logged == [
        ("provider not listed", "cannot be reached"),
        ("provider not listed", "wants a token"),
        ("provider answers again", None),
    ]
    assert {entry["provider"] for entry in lines.entries} == {"alpha"}


async def test_a_change_is_recorded_before_it_is_reported(kit: Kit) -> None:
    """The listing and the state change together."""
    seen: list[tuple[list[str], ModelState]] = []
    kit.served = ListingCache(kit.providers, lambda _: seen.append((kit.names(), kit.served.state("alpha", "a"))))
    await kit.ask(None, "a")
    await kit.ask(GONE)
    await kit.ask(None, "b")
    assert seen == [(["a"], SERVING), (["a"], UNAVAILABLE), (["b"], UNAVAILABLE)]


async def test_providers_are_independent(kit: Kit) -> None:
    """A provider's models and failures do not affect another one."""
    await kit.served.listing("beta")
    await kit.ask(GONE)
    assert kit.served.listed("beta")["b"] == ServedModel("b")
    assert "b" not in kit.served.listed("alpha")
    assert (kit.served.state("alpha", "b"), kit.served.state("beta", "b")) == (UNAVAILABLE, SERVING)


async def test_a_failed_provider_is_listed_again() -> None:
    """Although its last listing is recent; the states do not change until it answers."""
    kit = Kit(listing_seconds=3600.0)
    await kit.ask(None, "a")
    await kit.ask(GONE)
    assert await failure_of(kit.served.listing("alpha")) is GONE
    assert kit.served.state("alpha", "a") is UNAVAILABLE
    assert kit.changes == ["alpha"] * 2


async def test_a_listing_by_a_callers_own_token_is_not_recorded(kit: Kit) -> None:
    """Only this caller receives it, or its error."""
    await kit.ask(WANTS_TOKEN)
    kit.alpha.failure, kit.alpha.served = None, ["secret"]
    assert not kit.served.shared("alpha", "mine", named=True)
    assert await kit.served.listing("alpha", "mine", named=True) == {"secret": ServedModel("secret")}
    assert (kit.names(), kit.served.state("alpha", "secret")) == ([], UNKNOWN)
    await kit.ask(None, "a")
    kit.alpha.failure = REFUSES_TOKEN
    assert await failure_of(kit.served.listing("alpha", "mine", fresh=True, named=True)) is REFUSES_TOKEN
    assert (kit.names(), kit.served.state("alpha", "a")) == (["a"], SERVING)
    assert kit.alpha.tokens == [None, "mine", None, "mine"]


async def test_with_the_operators_token_all_callers_share_a_listing(kit: Kit) -> None:
    """Any caller's request is recorded for all."""
    kit.alpha.has_token = True
    assert kit.served.shared("alpha", "mine")
    await kit.served.listing("alpha", "mine")
    assert kit.names() == ["a"]
    assert kit.changes == ["alpha"]
    assert kit.alpha.tokens == [None]


async def test_without_a_token_all_callers_share_a_listing(kit: Kit) -> None:
    """Also if the operator configured no token."""
    assert kit.served.shared("alpha", None)


async def test_an_unknown_provider(kit: Kit) -> None:
    """The call fails with PROVIDER_NOT_FOUND; its registered models are UNAVAILABLE."""
    failure = await failure_of(kit.served.listing("gamma"))
    assert (type(failure), failure.reason) == (CallerError, Reason.PROVIDER_NOT_FOUND)
    assert kit.served.state("gamma", "g") is UNAVAILABLE
    assert kit.served.listed("gamma") == {}


async def test_a_provider_that_is_removed_during_its_listing(kit: Kit) -> None:
    """The caller receives its listing and those of the others, with or without a token."""
    kit.alpha.gate = asyncio.Event()
    callers = [Listings(kit.served, token, ["alpha"]) for token in (None, "mine")]
    asking = [asyncio.create_task(caller.fetch(caller.provider_ids)) for caller in callers]
    await until(lambda: len(kit.alpha.tokens) == len(callers))
    kit.providers.replace([kit.beta])
    kit.served.forget(["alpha"])
    kit.alpha.gate.set()
    await asyncio.gather(*asking)
    for caller in callers:
        assert {*caller.targets()} == {("alpha", "a"), ("beta", "b")}
    assert not kit.served.shared("alpha", "mine")
    gone = Listings(kit.served, "mine", ["alpha"])
    await gone.fetch(["alpha", "beta"])
    assert {*gone.targets()} == {("beta", "b")}
    assert gone.failures["alpha"].reason is Reason.PROVIDER_NOT_FOUND


async def test_forget(kit: Kit) -> None:
    """The listing and the failure are removed, and this is reported; other providers are not affected."""
    await kit.ask(None, "a")
    await kit.ask(GONE)
    await kit.served.listing("beta")
    kit.changes.clear()
    kit.served.forget(["alpha"])
    assert kit.changes == ["alpha"]
    assert (kit.names(), kit.served.was_asked("alpha")) == ([], False)
    assert (kit.served.state("alpha", "a"), kit.served.state("beta", "b")) == (UNKNOWN, SERVING)
    kit.providers.replace([kit.beta])
    kit.served.forget(["alpha"])
    assert kit.served.state("alpha", "a") is UNAVAILABLE


@pytest.mark.parametrize("failure", [None, GONE])
async def test_a_late_answer_of_a_replaced_provider(kit: Kit, failure: ProviderError | None) -> None:
    """Its callers receive it, and it is not recorded for the new provider of the same id."""
    kit.alpha.failure, kit.alpha.gate = failure, asyncio.Event()
    asking = asyncio.create_task(kit.served.listing("alpha"))
    await kit.alpha.asked.wait()
    new = FakeProvider("alpha", ["new"])
    kit.providers.replace([new, kit.beta])
    kit.served.forget(["alpha"])
    kit.changes.clear()
    kit.alpha.gate.set()
    (answer,) = await asyncio.gather(asking, return_exceptions=True)
    assert answer == (failure or {"a": ServedModel("a")})
    assert (kit.names(), kit.served.was_asked("alpha"), kit.changes) == ([], False, [])
    await kit.served.listing("alpha")
    assert (kit.names(), kit.changes) == (["new"], ["alpha"])


async def test_an_unexpected_exception_is_a_failure(kit: Kit) -> None:
    """The last listing is kept."""
    await kit.ask(None, "a")
    kit.alpha.gate = asyncio.Event()
    kit.alpha.gate.wait = None  # type: ignore[method-assign, assignment]
    with pytest.raises(ProviderError, match="cannot be listed: TypeError"):
        await kit.served.listing("alpha", fresh=True)
    assert (kit.names(), kit.served.state("alpha", "a")) == (["a"], ModelState.UNAVAILABLE)


async def test_concurrent_requests_are_one_change(kit: Kit) -> None:
    """They share a request, and its result is reported once."""
    await asyncio.gather(*(kit.served.listing("alpha", fresh=True) for _ in range(50)))
    assert (len(kit.alpha.tokens), kit.changes) == (1, ["alpha"])
