"""What the providers said last: who is asked, what is kept of it, and which state it gives a model."""

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
    """What is served by alpha and beta, and each change of it that was told."""

    def __init__(self, *, listing_seconds: float = 0.0) -> None:
        self.alpha, self.beta = FakeProvider("alpha", ["a"]), FakeProvider("beta", ["b"])
        self.providers = Providers([self.alpha, self.beta], listing_seconds=listing_seconds)
        self.changes: list[str] = []
        self.served = ListingCache(self.providers, self.changes.append)

    async def ask(self, failure: ProviderError | None = None, *models: str | ServedModel) -> None:
        """Have alpha listed when it serves these, or fails."""
        self.alpha.failure = failure
        self.alpha.served = list(models)
        (result,) = await asyncio.gather(self.served.listing("alpha", fresh=True), return_exceptions=True)
        assert result is failure or failure is None

    def names(self) -> list[str]:
        """What alpha listed last."""
        return [*self.served.listed("alpha")]


@pytest.fixture
def kit() -> Kit:
    """Nobody was asked yet."""
    return Kit()


async def test_before_anybody_was_asked(kit: Kit) -> None:
    """Nothing is known, and nothing is said to be gone."""
    assert kit.names() == []
    assert not kit.served.was_asked("alpha")
    assert "a" not in kit.served.listed("alpha")
    assert kit.served.state("alpha", "a") is UNKNOWN
    assert kit.served.provider_ids == ("alpha", "beta")


async def test_a_listing_is_kept_whole(kit: Kit) -> None:
    """With all that the provider says of each model; what it does not list cannot be called."""
    lora = ServedModel("lora", "/adapters/lora", "a", 4096)
    await kit.ask(None, "a", lora)
    assert kit.served.listed("alpha") == {"a": ServedModel("a"), "lora": lora}
    assert kit.served.listed("alpha")["lora"] == lora
    assert kit.served.was_asked("alpha")
    states = [kit.served.state("alpha", name) for name in ("a", "lora", "other")]
    assert states == [SERVING, SERVING, UNAVAILABLE]
    assert (kit.served.state("beta", "b"), kit.served.was_asked("beta")) == (UNKNOWN, False)


async def test_a_listing_is_told_if_it_is_different(kit: Kit) -> None:
    """Not if it is the same again, nor in another order; but also if only what is said of a model is new."""
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


async def test_a_first_listing_of_nothing_is_told(kit: Kit) -> None:
    """What was unknown is known not to be there."""
    await kit.ask()
    assert kit.changes == ["alpha"]
    assert kit.served.was_asked("alpha")
    assert kit.served.state("alpha", "a") is UNAVAILABLE


@pytest.mark.parametrize(
    ("failure", "state"), [(GONE, UNAVAILABLE), (SILENT, UNAVAILABLE), (WANTS_TOKEN, UNKNOWN), (REFUSES_TOKEN, UNKNOWN)]
)
async def test_a_failure_leaves_the_last_listing(kit: Kit, failure: ProviderError, state: ModelState) -> None:
    """Its models are still there, in another state; only when the provider answers again may some be gone."""
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
    """It was asked, and lists nothing that is known."""
    await kit.ask(failure)
    assert (kit.names(), kit.served.was_asked("alpha")) == ([], True)
    assert kit.served.state("alpha", "a") is state
    assert kit.changes == ["alpha"]


async def test_a_failure_is_told_and_logged_once(kit: Kit, lines: Lines) -> None:
    """However often it is asked meanwhile; another failure is news, and so is that it answers again."""
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


async def test_what_is_told_is_there_already(kit: Kit) -> None:
    """Whoever hears of a change sees all of it: the listing and the state change as one."""
    seen: list[tuple[list[str], ModelState]] = []
    kit.served = ListingCache(kit.providers, lambda _: seen.append((kit.names(), kit.served.state("alpha", "a"))))
    await kit.ask(None, "a")
    await kit.ask(GONE)
    await kit.ask(None, "b")
    assert seen == [(["a"], SERVING), (["a"], UNAVAILABLE), (["b"], UNAVAILABLE)]


async def test_one_provider_says_nothing_of_another(kit: Kit) -> None:
    """Neither its models nor its failures."""
    await kit.served.listing("beta")
    await kit.ask(GONE)
    assert kit.served.listed("beta")["b"] == ServedModel("b")
    assert "b" not in kit.served.listed("alpha")
    assert (kit.served.state("alpha", "b"), kit.served.state("beta", "b")) == (UNAVAILABLE, SERVING)


async def test_a_kept_listing_does_not_say_that_a_provider_is_back() -> None:
    """Where it was found away since, it is asked again, and its models stay in the state that they have."""
    kit = Kit(listing_seconds=3600.0)
    await kit.ask(None, "a")
    await kit.ask(GONE)
    assert await failure_of(kit.served.listing("alpha")) is GONE
    assert kit.served.state("alpha", "a") is UNAVAILABLE
    assert kit.changes == ["alpha"] * 2


async def test_a_callers_own_token_tells_nobody_else(kit: Kit) -> None:
    """What it shows is given to that caller; what is known to all stays as it was, also if it is refused."""
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


async def test_where_the_operator_has_a_token_all_see_the_same(kit: Kit) -> None:
    """Whoever asks, with whatever of its own, asks for all."""
    kit.alpha.has_token = True
    assert kit.served.shared("alpha", "mine")
    await kit.served.listing("alpha", "mine")
    assert kit.names() == ["a"]
    assert kit.changes == ["alpha"]
    assert kit.alpha.tokens == [None]


async def test_without_a_token_all_see_the_same(kit: Kit) -> None:
    """As far as the operator has none either."""
    assert kit.served.shared("alpha", None)


async def test_an_unknown_provider(kit: Kit) -> None:
    """Is the asker's mistake; what is registered at one cannot be called."""
    failure = await failure_of(kit.served.listing("gamma"))
    assert (type(failure), failure.reason) == (CallerError, Reason.PROVIDER_NOT_FOUND)
    assert kit.served.state("gamma", "g") is UNAVAILABLE
    assert kit.served.listed("gamma") == {}


async def test_a_provider_that_goes_while_its_listing_is_awaited(kit: Kit) -> None:
    """With a caller's token or without: whoever asked for it among others still hears of the others, and of this one too."""
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


async def test_forgetting(kit: Kit) -> None:
    """Nothing is left of a listing or a failure, and it is told; the others are not touched."""
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
    """Goes to those who asked it, and says nothing of the provider that has its id now."""
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


async def test_a_defect_is_no_listing(kit: Kit) -> None:
    """It is the provider's failure; what was known stays."""
    await kit.ask(None, "a")
    kit.alpha.gate = asyncio.Event()
    kit.alpha.gate.wait = None  # type: ignore[method-assign, assignment]
    with pytest.raises(ProviderError, match="cannot be listed: TypeError"):
        await kit.served.listing("alpha", fresh=True)
    assert (kit.names(), kit.served.state("alpha", "a")) == (["a"], ModelState.UNAVAILABLE)


async def test_many_who_ask_at_once_are_one_change(kit: Kit) -> None:
    """They share a request, and what it says is told once."""
    await asyncio.gather(*(kit.served.listing("alpha", fresh=True) for _ in range(50)))
    assert (len(kit.alpha.tokens), kit.changes) == (1, ["alpha"])
