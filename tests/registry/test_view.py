"""The models that callers see, as computed from registrations and listings, and their changes."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltawire_server.errors import DeltawireError, ProviderError, Reason
from deltawire_server.registry.feed import Feed
from deltawire_server.registry.listing_cache import ListingCache
from deltawire_server.registry.model import MAX_CONTEXT_TOKENS, Model, ModelSource, ModelState, ModelType
from deltawire_server.registry.registered_index import RegisteredIndex
from deltawire_server.registry.store import ChangeKind
from deltawire_server.registry.view import LOOKS_AT_ONCE, View
from deltawire_server.upstream.base import ServedModel
from deltawire_server.upstream.providers import Providers
from tests.support.fake_provider import FakeProvider

if TYPE_CHECKING:
    from collections.abc import Iterable

ADDED, MODIFIED, REMOVED = ChangeKind.ADDED, ChangeKind.MODIFIED, ChangeKind.REMOVED
SERVING, UNAVAILABLE, UNKNOWN = ModelState.SERVING, ModelState.UNAVAILABLE, ModelState.UNKNOWN
GONE = ProviderError(Reason.UPSTREAM_UNAVAILABLE, "cannot be reached")
WANTS_TOKEN = ProviderError(Reason.PROVIDER_MISCONFIGURED, "wants a token")


class _RecordingFeed(Feed):
    def __init__(self, events: list[tuple[ChangeKind, Model]]) -> None:
        super().__init__()
        self._events = events

    def publish(self, kind: ChangeKind, model: Model) -> None:
        self._events.append((kind, model))
        super().publish(kind, model)


class Kit:
    """A view with its inputs, its feed, and all published changes."""

    def __init__(self, *provider_ids: str) -> None:
        self.fakes = {each: FakeProvider(each) for each in provider_ids or ("p", "q")}
        self.providers = Providers(self.fakes.values(), listing_seconds=0.0)
        self.known = RegisteredIndex()
        self.events: list[tuple[ChangeKind, Model]] = []
        self.served = ListingCache(self.providers, lambda provider_id: self.view.listed(provider_id))
        self.feed = _RecordingFeed(self.events)
        self.view = View(self.known, self.served, self.feed)

    @property
    def models(self) -> dict[str, Model]:
        """All models, by id."""
        return {model.id: model for model in self.feed.models()}

    async def serve(self, provider_id: str, *models: str | ServedModel, failure: DeltawireError | None = None) -> None:
        """List a provider that serves these models, or fails."""
        fake = self.fakes[provider_id]
        fake.served, fake.failure = list(models), failure
        await asyncio.gather(self.served.listing(provider_id, fresh=True), return_exceptions=True)

    async def fail(self, provider_id: str, failure: DeltawireError = GONE) -> None:
        """List a provider that fails."""
        await self.serve(provider_id, failure=failure)

    def exchange(self, before: Model | None, now: Model | None) -> None:
        """Register, change or unregister a model, as `ChangeLogReader` does."""
        if before is not None:
            self.known.remove(before)
        if now is not None:
            self.known.add(now)
        self.view.registered(before, now)

    def provide(self, *provider_ids: str) -> None:
        """Replace the providers by new ones with these ids, as a reload does."""
        before = self.providers.ids
        self.fakes = {each: FakeProvider(each) for each in provider_ids}
        self.providers.replace(self.fakes.values())
        self.served.forget({*before, *provider_ids})

    def published(self) -> list[tuple[ChangeKind, str, ModelState]]:
        """What was published since the last time."""
        published = [(kind, model.id, model.state) for kind, model in self.events]
        self.events.clear()
        return published


@pytest.fixture
def kit() -> Kit:
    """No registrations and no listings; providers p and q."""
    return Kit()


def registered(model_id: str, provider_id: str = "p", name: str = "m", *aliases: str, **fields: Any) -> Model:  # noqa: ANN401 (whatever a model has)
    """A registered model."""
    return Model(model_id, provider_id, name, aliases=aliases, revision=1, **fields)


async def test_discovered_models(kit: Kit) -> None:
    """They have the data of the listing, and each change of it is published."""
    lora = ServedModel("lora", "/adapters/lora", "m", 4096)
    await kit.serve("p", "m", lora)
    assert kit.models["p/lora"] == Model(
        "p/lora",
        "p",
        "lora",
        source=ModelSource.DISCOVERED,
        max_context_tokens=4096,
        engine_root="/adapters/lora",
        base_model="m",
        state=SERVING,
    )
    assert kit.published() == [(ADDED, "p/m", SERVING), (ADDED, "p/lora", SERVING)]
    await kit.serve("p", replace(lora, max_context_tokens=8192))
    assert kit.models.keys() == {"p/lora"}
    assert kit.published() == [(REMOVED, "p/m", SERVING), (MODIFIED, "p/lora", SERVING)]


@pytest.mark.parametrize(
    ("tokens", "seen"), [(-1, None), (0, 0), (MAX_CONTEXT_TOKENS, MAX_CONTEXT_TOKENS), (2**31, None)]
)
async def test_an_invalid_context_length_is_omitted(kit: Kit, tokens: int, seen: int | None) -> None:
    """A number outside of the API's range must not end every watch."""
    await kit.serve("p", ServedModel("m", max_context_tokens=tokens))
    assert kit.models["p/m"].max_context_tokens == seen


async def test_no_change_is_published_without_a_difference(kit: Kit) -> None:
    """For listings in any order, and for a registration that is registered again."""
    mine = registered("mine")
    kit.exchange(None, mine)
    await kit.serve("p", "m", "n")
    await kit.serve("q", "m")
    kit.published()
    for models in (("m", "n"), ("n", "m"), ("m", "n")):
        await kit.serve("p", *models)
        await kit.serve("q", "m")
        kit.exchange(mine, mine)
    assert kit.published() == []


async def test_a_registered_model_hides_the_discovered_one(kit: Kit) -> None:
    """The discovered model is removed with the first registration, and added after the last one is removed."""
    await kit.serve("p", "m")
    kit.published()
    first, second = registered("first"), registered("second")
    kit.exchange(None, first)
    assert kit.published() == [(ADDED, "first", SERVING), (REMOVED, "p/m", SERVING)]
    kit.exchange(None, second)
    assert kit.published() == [(ADDED, "second", SERVING)]
    kit.exchange(first, None)
    assert kit.published() == [(REMOVED, "first", SERVING)]
    kit.exchange(second, None)
    assert kit.published() == [(REMOVED, "second", SERVING), (ADDED, "p/m", SERVING)]


async def test_registering_under_the_discovered_id_is_a_modification(kit: Kit) -> None:
    """The id exists before and after, so it is neither added nor removed; also when it is unregistered."""
    await kit.serve("p", "m")
    kit.published()
    mine = registered("p/m", type=ModelType.EMBEDDING, embedding_dimension=3)
    kit.exchange(None, mine)
    assert kit.models["p/m"] == replace(mine, state=SERVING)
    assert kit.published() == [(MODIFIED, "p/m", SERVING)]
    kit.exchange(mine, None)
    assert kit.models["p/m"].source is ModelSource.DISCOVERED
    assert kit.published() == [(MODIFIED, "p/m", SERVING)]


async def test_a_registration_with_a_reserved_name_hides_no_model(kit: Kit) -> None:
    """The model that the provider serves under the name is listed, instead of the registration."""
    await kit.serve("p", "m", "n")
    kit.published()
    mine = registered("mine", "p", "m", "p/n", "q/m")
    kit.exchange(None, mine)
    assert kit.published() == [(ADDED, "mine", SERVING), (REMOVED, "p/m", SERVING)]
    await kit.serve("q", "m")
    assert kit.published() == [(ADDED, "q/m", SERVING)]
    elsewhere = registered("q/n", "p", "n")
    kit.exchange(None, elsewhere)
    assert kit.published() == [(ADDED, "q/n", SERVING), (REMOVED, "p/n", SERVING)]
    await kit.serve("q", "m", "n")
    assert kit.models["q/n"].target == ("q", "n")
    assert kit.published() == [(MODIFIED, "q/n", SERVING)]
    await kit.serve("q", "m")
    assert kit.models["q/n"] == replace(elsewhere, state=SERVING)


async def test_very_many_models_are_updated_in_steps(kit: Kit) -> None:
    """Other tasks run between the steps; after `settled`, the feed has all changes, and `as_seen` always has the current state."""
    names = [f"m{number:05}" for number in range(10 * LOOKS_AT_ONCE)]
    mine = registered("mine", "p", names[-1])
    kit.exchange(None, mine)
    kit.published()
    await kit.serve("p", *names)
    turns = 0
    while len(kit.models) < len(names):
        before = len(kit.events)
        await asyncio.sleep(0)
        turns += 1
        assert len(kit.events) - before <= LOOKS_AT_ONCE
    assert turns >= 5
    await kit.view.settled()
    kit.published()
    await kit.fail("p")
    assert 0 < len(kit.events) < len(names)
    assert kit.view.as_seen(mine).state is UNAVAILABLE
    await kit.view.settled()
    assert {model.state for model in kit.models.values()} == {UNAVAILABLE}
    assert len(kit.published()) == len(names)
    await kit.serve("p", *names)
    await kit.view.stop()
    await kit.view.settled()


async def test_a_hidden_model_is_not_published(kit: Kit) -> None:
    """Only the state of the registered model changes."""
    kit.exchange(None, registered("mine"))
    assert kit.published() == [(ADDED, "mine", UNKNOWN)]
    await kit.serve("p", "m")
    assert kit.published() == [(MODIFIED, "mine", SERVING)]
    await kit.serve("p")
    assert kit.published() == [(MODIFIED, "mine", UNAVAILABLE)]


async def test_a_changed_target(kit: Kit) -> None:
    """The old target is visible again, the new one is hidden, and the state is that of the new one."""
    await kit.serve("p", "m")
    await kit.serve("q", "n")
    await kit.fail("q")
    before, after = registered("mine"), registered("mine", "q", "n")
    kit.exchange(None, before)
    kit.published()
    kit.exchange(before, after)
    assert kit.published() == [(MODIFIED, "mine", UNAVAILABLE), (ADDED, "p/m", SERVING), (REMOVED, "q/n", UNAVAILABLE)]


async def test_a_provider_that_fails(kit: Kit) -> None:
    """Its models change their state once, and those of other providers do not."""
    kit.exchange(None, registered("mine"))
    await kit.serve("p", "m", "n")
    await kit.serve("q", "m")
    kit.published()
    for _ in range(3):
        await kit.fail("p")
    assert sorted(kit.published(), key=str) == [(MODIFIED, "mine", UNAVAILABLE), (MODIFIED, "p/n", UNAVAILABLE)]
    assert kit.models["q/m"].state is SERVING
    await kit.fail("p", WANTS_TOKEN)
    assert sorted(kit.published(), key=str) == [(MODIFIED, "mine", UNKNOWN), (MODIFIED, "p/n", UNKNOWN)]
    await kit.serve("p", "n")
    assert sorted(kit.published(), key=str) == [(MODIFIED, "mine", UNAVAILABLE), (MODIFIED, "p/n", SERVING)]


async def test_a_provider_that_fails_repeatedly(kit: Kit) -> None:
    """Each change of the state is published once."""
    await kit.serve("p", "m")
    kit.published()
    for _ in range(20):
        await kit.fail("p")
        await kit.serve("p", "m")
    assert kit.published() == [(MODIFIED, "p/m", UNAVAILABLE), (MODIFIED, "p/m", SERVING)] * 20


async def test_a_removed_provider(kit: Kit) -> None:
    """Its discovered models are removed; registered ones stay UNAVAILABLE."""
    kit.exchange(None, registered("mine"))
    await kit.serve("p", "m", "n")
    kit.published()
    kit.provide("q")
    assert sorted(kit.published(), key=str) == [(MODIFIED, "mine", UNAVAILABLE), (REMOVED, "p/n", SERVING)]
    kit.provide("p", "q")
    assert kit.published() == [(MODIFIED, "mine", UNKNOWN)]
    await kit.serve("p", "m", "n")
    assert kit.published() == [(MODIFIED, "mine", SERVING), (ADDED, "p/n", SERVING)]


async def test_a_replaced_provider(kit: Kit) -> None:
    """The listing of the old provider is dropped; states are UNKNOWN until the new one is listed."""
    kit.exchange(None, registered("mine"))
    await kit.serve("p", "m", "n")
    kit.published()
    kit.provide("p", "q")
    assert sorted(kit.published(), key=str) == [(MODIFIED, "mine", UNKNOWN), (REMOVED, "p/n", SERVING)]


async def test_ids_and_names_with_slashes() -> None:
    """A model belongs to the provider that lists it, also if its id can be split in several ways."""
    kit = Kit("org", "org/lab")
    await kit.serve("org", "lab/m", "n")
    await kit.serve("org/lab", "m")
    assert {model.id: model.target for model in kit.models.values()} == {
        "org/lab/m": ("org", "lab/m"),
        "org/n": ("org", "n"),
    }
    kit.published()
    await kit.serve("org", "n")
    assert kit.models["org/lab/m"].target == ("org/lab", "m")
    assert kit.published() == [(MODIFIED, "org/lab/m", SERVING)]


async def test_as_seen(kit: Kit) -> None:
    """A registered model with its current state, without later changes of the registration."""
    mine = registered("mine")
    kit.exchange(None, mine)
    await kit.serve("p", "m")
    assert kit.view.as_seen(mine) is kit.models["mine"]
    assert kit.view.as_seen(mine) == replace(mine, state=SERVING)
    changed = replace(mine, annotations={"k": "v"}, revision=mine.revision + 1)
    assert kit.view.as_seen(changed) == replace(changed, state=SERVING)
    kit.exchange(mine, None)
    assert kit.view.as_seen(mine) == replace(mine, state=SERVING)


def replayed(models: Iterable[Model], events: Iterable[tuple[ChangeKind, Model]]) -> dict[str, Model]:
    """The models of a watcher after a snapshot and changes; each change must make a difference."""
    table = {model.id: model for model in models}
    for kind, model in events:
        if kind is ADDED:
            assert model.id not in table
            table[model.id] = model
        elif kind is MODIFIED:
            assert table[model.id] != model
            table[model.id] = model
        else:
            assert table.pop(model.id) == model
    return table


def expected(
    kit: Kit, listed: dict[str, dict[str, ServedModel]], failed: dict[str, DeltawireError]
) -> dict[str, Model]:
    """The models that callers see, computed from the last listings and errors of all providers."""

    def state(provider_id: str, name: str) -> ModelState:
        failure = failed.get(provider_id)
        if provider_id not in kit.fakes or failure is GONE:
            return UNAVAILABLE
        if failure is WANTS_TOKEN or provider_id not in listed:
            return UNKNOWN
        return SERVING if name in listed[provider_id] else UNAVAILABLE

    mine = kit.known.models.values()
    targets = {f"{model.provider_id}/{model.provider_model_id}" for model in mine}
    # A configured provider's name leads to what it serves; without that provider it is a name like any other.
    names = targets | {
        name for model in mine for name in model.names if name[0] not in kit.fakes or not name.startswith(("p/", "q/"))
    }
    there = {model.id: replace(model, state=state(*model.target)) for model in mine}
    for provider_id, models in listed.items():
        for name, served in models.items():
            model_id = f"{provider_id}/{name}"
            if model_id not in names:
                there[model_id] = Model(
                    model_id,
                    provider_id,
                    name,
                    source=ModelSource.DISCOVERED,
                    engine_root=served.engine_root,
                    state=state(provider_id, name),
                )
    return there


_PROVIDERS = st.sampled_from(["p", "q"])
_NAMES = st.sampled_from(["m", "n", "o"])
_IDS = st.sampled_from(["mine", "yours", "p/m", "p/n", "q/m"])
_STEPS = st.one_of(
    st.tuples(st.just("register"), _IDS, st.sets(_IDS, max_size=2), st.tuples(_PROVIDERS, _NAMES)),
    st.tuples(st.just("unregister"), _IDS),
    st.tuples(st.just("list"), _PROVIDERS, st.dictionaries(_NAMES, st.sampled_from(["", "/root"]))),
    st.tuples(st.just("fail"), _PROVIDERS, st.sampled_from([GONE, WANTS_TOKEN])),
    st.tuples(st.just("provide"), st.sets(_PROVIDERS)),
)


@given(st.lists(_STEPS, max_size=25))
@settings(max_examples=300, deadline=None)
async def test_changes_lead_to_the_current_models(steps: list[tuple[Any, ...]]) -> None:
    """After each action, the models are those computed from everything, and the changes from any snapshot lead to them."""
    kit = Kit()
    listed: dict[str, dict[str, ServedModel]] = {}
    failed: dict[str, DeltawireError] = {}
    snapshots: list[tuple[int, dict[str, Model]]] = [(0, {})]
    for step in steps:
        match step:
            case ("register", model_id, aliases, (provider_id, name)):
                before = kit.known.models.get(model_id)
                model = registered(model_id, provider_id, name, *sorted(aliases - {model_id}))
                owners = (kit.known.find(each) for each in model.names)
                if all(owner is None or owner is before for owner in owners):
                    kit.exchange(before, model)
            case ("unregister", model_id) if model_id in kit.known.models:
                kit.exchange(kit.known.models[model_id], None)
            case ("list", provider_id, roots) if provider_id in kit.fakes:
                listed[provider_id] = {name: ServedModel(name, root) for name, root in roots.items()}
                failed.pop(provider_id, None)
                await kit.serve(provider_id, *listed[provider_id].values())
            case ("fail", provider_id, failure) if provider_id in kit.fakes:
                failed[provider_id] = failure
                await kit.fail(provider_id, failure)
            case ("provide", provider_ids):
                listed.clear()
                failed.clear()
                kit.provide(*sorted(provider_ids))
        assert kit.models == expected(kit, listed, failed)
        snapshots.append((len(kit.events), dict(kit.models)))
    for place, models in snapshots:
        assert replayed(models.values(), kit.events[place:]) == kit.models
