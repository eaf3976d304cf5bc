"""The registry of models: the API for other packages.

Registered models are cached in memory, so a look-up never waits for the database and works during its outages. A write goes to the
database first, and to memory when it has succeeded. Models that are not registered are discovered: looked up in the listings of the
providers, which are refreshed periodically.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from bisect import bisect_right
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from deltawire_server.errors import CallerError, DeltawireError, GatewayError, Reason, RegistryError
from deltawire_server.metrics.table import PROVIDER_MODELS, REGISTRY_BEHIND, REGISTRY_MODELS
from deltawire_server.pacing import give_way
from deltawire_server.registry import lookup, pages, rules
from deltawire_server.registry.change_log_reader import ChangeLogReader
from deltawire_server.registry.feed import Feed
from deltawire_server.registry.listing_cache import ListingCache
from deltawire_server.registry.listings import Listings
from deltawire_server.registry.messages import cut, quoted, some
from deltawire_server.registry.model import Model, ModelSource, ModelState, ModelType, all_models, scoped_id
from deltawire_server.registry.refresh import Refresher
from deltawire_server.registry.registered_index import RegisteredIndex
from deltawire_server.registry.scopes import may_have, scopes_of
from deltawire_server.registry.view import LOOKS_AT_ONCE, View, is_new
from deltawire_server.registry.writes import Writes
from deltawire_server.telemetry import get_logger

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence

    from deltawire_server.registry.feed import Step
    from deltawire_server.registry.model import Permits
    from deltawire_server.registry.store import Change, Store
    from deltawire_server.upstream.base import Provider
    from deltawire_server.upstream.providers import Providers

_log = get_logger(__name__)

OPEN_SECONDS = 1.0
"""Interval between attempts to open a database that cannot be reached."""

ATTEMPTS = 100
"""Attempts of a write that conflicts with others, each with the new state of the model. Because the others succeed, conflicts end;
only a defect exhausts the attempts."""


@dataclass(frozen=True, slots=True)
class Resolution:
    """The result of resolving a name.

    Attributes:
        model: The model.
        alias: The requested name, if it is not the model's id; otherwise empty.
        provider: The provider of the model: call it with `model.provider_model_id`.
        sends_token: Whether the provider may have the caller's token; if not, call it by `CallContext.without_token`.
    """

    model: Model
    alias: str
    provider: Provider
    sends_token: bool


@dataclass(frozen=True, slots=True)
class Filter:
    """Which models a list includes; `None` and an empty provider match all."""

    provider_id: str = ""
    type: ModelType | None = None
    state: ModelState | None = None
    source: ModelSource | None = None

    def takes(self, model: Model) -> bool:
        """Whether a model is included."""
        return (
            self.provider_id in ("", model.provider_id)
            and self.type in (None, model.type)
            and self.state in (None, model.state)
            and self.source in (None, model.source)
        )


class ModelRegistry:
    """Which models can be called, and under which names. Call `open` first and `close` last.

    Args:
        store: The database; the registry opens and closes it.
        providers: The providers; the caller closes them.
        feed: Publishes the changes.
    """

    def __init__(self, store: Store, providers: Providers, feed: Feed | None = None) -> None:
        self._store = store
        self._providers = providers
        self._feed = feed or Feed()
        self._known = RegisteredIndex()
        self._measured_providers: set[str] = set()
        self._served = ListingCache(providers, lambda provider_id: self._view.listed(provider_id))
        self._view = View(self._known, self._served, self._feed)
        self._follower = ChangeLogReader(store, self._known, self._view.registered)
        self._writes = Writes(store, self._known, self._follower)
        self._refresher = Refresher(providers, self._served)
        self._opened = False
        self._opening: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Open the store and read all registered models into memory. Call `close` even if this fails.

        If the database cannot be reached now, the registry opens without it: discovered models can be called, and everything that
        needs registered models fails with STORE_UNAVAILABLE until they are read.

        Raises:
            RegistryError: The database cannot be used, and a later attempt would not help.
        """
        try:
            await self._open()
        except RegistryError as error:
            if not self._store.is_away(error):
                raise
            _log.warning("serving without registered models: the registry's database cannot be reached")
            self._follower.behind_since = time.monotonic()
            self._opening = asyncio.create_task(self._open_at_last(), name="open the registry's database")

    async def _open(self) -> None:
        await self._store.open()
        await self._follower.start()
        self._opened = True
        _log.info("registry opened", registered_models=len(self._known.models), revision=self._follower.revision)
        self._warn_of_reserved_names()

    async def _open_at_last(self) -> None:
        while not self._opened:
            await asyncio.sleep(OPEN_SECONDS)
            with contextlib.suppress(RegistryError):  # logged where it happened
                await self._open()

    def _require_opened(self) -> None:
        """Check that the registered models are known.

        Raises:
            RegistryError: STORE_UNAVAILABLE.
        """
        if not self._opened:
            raise RegistryError(
                Reason.STORE_UNAVAILABLE,
                "the registry's database could not be reached since this gateway started, so registered models and aliases are"
                " not known yet; discovered models can be called by provider/model",
                retry_after=OPEN_SECONDS,
            )

    def measure(self) -> None:
        """Set the metrics of the current state."""
        REGISTRY_MODELS.set(len(self._known.models))
        # 0 for those that were removed: the library cannot remove series that several processes have.
        self._measured_providers |= {*filter(self._served.is_shared, self._providers.ids)}
        for provider_id in self._measured_providers:
            PROVIDER_MODELS.labels(provider_id).set(len(self._served.listed(provider_id)))
        behind = self._follower.behind_since
        REGISTRY_BEHIND.set(0.0 if behind is None else time.monotonic() - behind)

    def start_refreshing(self) -> None:
        """List the providers now, and periodically until `close`."""
        self._refresher.start()

    def providers_changed(self, provider_ids: Iterable[str]) -> None:
        """Drop the listings of these providers, which were added, removed or replaced, and list them again."""
        self._served.forget(provider_ids)
        self._warn_of_reserved_names()
        self._refresher.start()

    def _warn_of_reserved_names(self) -> None:
        reserved = [
            name
            for model in self._known.models.values()
            for name in model.names
            if not may_have(name, model, self._providers.ids)
        ]
        if reserved:
            _log.warning("registered names cannot be called: they are reserved for a provider", names=some(reserved))

    def interrupt_watches(self) -> None:
        """End all watches with ACCESS_CHANGED. Their callers are authorized again when they resume."""
        self._feed.interrupt()

    def stop_watches(self) -> None:
        """End all watches with DRAINING on shutdown."""
        self._feed.close()

    async def close(self) -> None:
        """Wait for active writes, then close the store."""
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait([self._opening])
        self._feed.close()
        await self._refresher.stop()
        await self._view.stop()
        await self._writes.finish()
        await self._follower.stop()
        await self._store.close()

    async def register(
        self,
        model_id: str,
        provider_id: str = "",
        provider_model_id: str = "",
        model_type: ModelType | int = ModelType.LLM,
        aliases: Sequence[str] = (),
        annotations: Mapping[str, str] | None = None,
        embedding_dimension: int | None = None,
        token: str | None = None,
        owner: str = "",
        permits: Permits = all_models,
    ) -> Model:
        """Register a served model under an id and aliases.

        If an equal registration exists, this changes nothing, calls no provider, and returns the stored model. So a program that
        registers at startup may do so while the provider is still loading. Recent changes of other processes are included.

        Args:
            model_id: The id. If it equals the provider's name of the model, the id becomes "provider_id/provider_model_id".
            provider_id: The provider; empty if there is only one.
            provider_model_id: The name of the model at the provider; empty for `model_id`.
            model_type: A `ModelType`, or the number of one from a request; 0 is LLM.
            aliases: Further names, at most 32.
            annotations: Free text by key.
            embedding_dimension: Length of the vectors; required for EMBEDDING, and not allowed for other types.
            token: The caller's token for the provider; used if `provider_id` is given, see `Providers.token_for`.
            owner: The caller's name; the owner of the first registration stays.
            permits: Whether a model exists for the caller, by its id: its names and what it is registered for must.

        Raises:
            GatewayError: PERMISSION_DENIED: the caller may not use one of the names, or what it is registered for.
            CallerError: Rules are broken (INVALID_REQUEST lists all of them), or there is no such provider.
            RegistryError: MODEL_ALREADY_EXISTS if a name belongs to another model or the id to a different
                registration: update or unregister that first. MODEL_NOT_SERVED. STORE_UNAVAILABLE.
            ProviderError: The provider cannot be asked whether it serves the model.
        """
        self._require_opened()
        wanted = rules.requested(
            self._providers,
            model_id,
            provider_id,
            provider_model_id,
            model_type,
            aliases,
            annotations or {},
            embedding_dimension,
        )
        self._require_permitted(wanted, permits)
        await self._follower.catch_up()
        stored = self._known.same(rules.as_registered(wanted, self._known))
        if stored is None:
            wanted = await rules.as_served(wanted, self._served, token, named=bool(provider_id))
            self._require_permitted(wanted, permits)
            rules.refuse_reserved_names(wanted, self._providers.ids)
            now = datetime.now(UTC)
            stored = await self._writes.insert(replace(wanted, create_time=now, update_time=now, owner=owner))
        return self._view.as_seen(stored)

    async def update(
        self,
        name: str,
        changes: Mapping[str, object],
        etag: str = "",
        token: str | None = None,
        owner: str | None = None,
        permits: Permits = all_models,
    ) -> Model:
        """Change fields of a registered model. Nothing is written if no value is different.

        Args:
            name: Its id or one of its aliases.
            changes: New values by the names in `rules.UPDATABLE`.
            etag: The expected etag; empty for any.
            token: The caller's token for the provider; used if the changes or the name specify the provider.
            owner: The caller that must have registered the model; `None` for any.
            permits: As for `register`.

        Raises:
            GatewayError: PERMISSION_DENIED: another caller registered it, or as for `register`.
            CallerError: MODEL_NOT_FOUND. Rules are broken (INVALID_REQUEST lists all of them), or there is no such provider.
            RegistryError: ETAG_MISMATCH. MODEL_ALREADY_EXISTS if a name belongs to another model. MODEL_NOT_SERVED.
                MODEL_DISCOVERED. STORE_UNAVAILABLE.
            ProviderError: The provider cannot be asked whether it serves the model.
        """
        self._require_opened()
        await self._follower.catch_up()
        attempts = 0
        while True:
            model = await self._registered(name, etag, token, permits)
            _require_owner(model, owner)
            wanted = rules.changed(model, changes, self._providers)
            self._require_permitted(wanted, permits)
            if wanted == model:
                return self._view.as_seen(model)
            if wanted.target != model.target:
                named = "provider_id" in changes or wanted.provider_id in self._named_by(name)
                wanted = replace(await rules.as_served(wanted, self._served, token, named=named), id=model.id)
                self._require_permitted(wanted, permits)
            rules.refuse_reserved_names(wanted, self._providers.ids, model)
            stored = await self._writes.update(replace(wanted, update_time=datetime.now(UTC)))
            if stored is not None:
                return self._view.as_seen(stored)
            attempts += 1
            if attempts == ATTEMPTS:
                raise _overtaken(model)

    async def unregister(
        self,
        name: str,
        etag: str = "",
        token: str | None = None,
        owner: str | None = None,
        permits: Permits = all_models,
    ) -> Change:
        """Remove a registered model. While its provider serves it, it can still be called by the provider's own name.

        Args:
            name: Its id or one of its aliases.
            etag: The expected etag; empty for any.
            token: The caller's token for the providers.
            owner: The caller that must have registered the model; `None` for any, even if the record cannot be read.
            permits: Whether a model exists for the caller, by its id.

        Returns:
            The change, with the removed model unless its record could not be read.

        Raises:
            GatewayError: PERMISSION_DENIED: another caller registered it.
            CallerError: MODEL_NOT_FOUND.
            RegistryError: ETAG_MISMATCH. MODEL_DISCOVERED if it is served but not registered. STORE_UNAVAILABLE.
            ProviderError: No model of this name is registered, and no provider answers whether it serves one.
        """
        self._require_opened()
        attempts = 0
        while True:
            revision = None
            # Otherwise the model is not looked up first: the database may have a damaged record that is not in memory.
            known = self._known.find(name)
            if etag or owner is not None or not permits(name if known is None else known.id):
                model = await self._registered(name, etag, token, permits)
                _require_owner(model, owner)
                revision = model.revision
            change = await self._writes.delete(name, revision)
            if change is not None:
                return change
            # Raises the reason, unless another write is in progress.
            model = await self._registered(name, etag, token, permits)
            attempts += 1
            if attempts == ATTEMPTS:
                raise _overtaken(model)

    async def _registered(self, name: str, etag: str, token: str | None, permits: Permits) -> Model:
        """The registered model of this id or alias, if it has this etag.

        Raises:
            CallerError, ProviderError: As for `unregister`.
            RegistryError: ETAG_MISMATCH, MODEL_DISCOVERED, STORE_UNAVAILABLE.
        """
        model = self._known.find(name)
        if model is None or etag:
            # Another process may have registered or changed it just now.
            await self._follower.catch_up()
            model = self._known.find(name)
        if model is not None and permits(model.id):
            if etag and etag != model.etag:
                raise _overtaken(model)
            return model
        model = await self.get(name, token, permits)
        if model.source is ModelSource.DISCOVERED:
            raise RegistryError(
                Reason.MODEL_DISCOVERED,
                f"model {model.id!r} is not registered but discovered: it exists as long as provider {model.provider_id!r}"
                f" serves it; register it first: RegisterModel with model_id {quoted(model.provider_model_id)} and this"
                " provider_id",
                metadata={"model": model.id},
            )
        raise CallerError(
            Reason.MODEL_NOT_FOUND,
            f"no registered model has the id or alias {quoted(name)}; it resolves to model {model.id!r}: use that id",
            metadata={"model": cut(name)},
        )

    async def get(self, name: str, token: str | None = None, permits: Permits = all_models) -> Model:
        """The model of this name.

        Args:
            name: Id, alias, "provider/served name", or a served name that just one provider has.
            token: The caller's token for the providers.
            permits: Whether a model exists for the caller, by its id.

        Raises:
            CallerError: MODEL_NOT_FOUND, whose message lists some that there are; MODEL_AMBIGUOUS.
            ProviderError: No provider that could serve it answers: retry.
            RegistryError: STORE_UNAVAILABLE: not found, and the database could not be reached since the start.
        """
        try:
            listings = Listings(self._served, token, self._named_by(name), permits)
            model = await lookup.find(name, self._known, listings)
        except CallerError as error:
            if error.reason is Reason.MODEL_NOT_FOUND:
                self._require_opened()
            raise
        return self._view.as_seen(model) if model.source is ModelSource.REGISTERED else model

    async def resolve(self, name: str, token: str | None = None, permits: Permits = all_models) -> Resolution:
        """The model of this name and its provider.

        Args:
            name: As for `get`; empty for the only chat model.
            token: The caller's token for the providers.
            permits: As for `get`.

        Raises:
            CallerError: As for `get`, and PROVIDER_NOT_FOUND if the model's provider is no longer configured; for an empty name
                INVALID_REQUEST if there are several chat models.
            ProviderError: As for `get`.
        """
        if name:
            model = await self.get(name, token, permits)
        else:
            model = await lookup.only_chat_model(self._known, Listings(self._served, token, permits=permits))
        provider = self._providers.get(model.provider_id)
        sends_token = self._providers.token_for(provider.id, token, named=provider.id in self._named_by(name)) == token
        return Resolution(model, "" if name == model.id else name, provider, sends_token)

    async def list(
        self,
        page_size: int = 0,
        page_token: str = "",
        token: str | None = None,
        wanted: Filter | None = None,
        permits: Permits = all_models,
    ) -> tuple[list[Model], str, tuple[str, ...]]:
        """A page of all models, registered and discovered, by ascending id. It is shorter if models have large annotations.

        A page begins after the last id of the previous page, so a model that exists throughout is listed exactly once.

        Args:
            page_size: 1 to 1000; 0 for 100, more is taken as 1000.
            page_token: From the previous page; empty for the first.
            token: The caller's token for the providers.
            wanted: Which models; the same for all pages.
            permits: Whether a model exists for the caller, by its id.

        Returns:
            The models; the token of the next page, empty on the last page; and the providers that could not be listed, whose
            models are those of the last listing.

        Raises:
            CallerError: A negative page size, or a token that is not from a page of this filter.
            RegistryError: STORE_UNAVAILABLE: the database could not be reached since the start.
        """
        self._require_opened()
        wanted = wanted or Filter()
        page = pages.asked_for(page_size, page_token, repr(wanted))
        listings = Listings(self._served, token, (wanted.provider_id,))
        await listings.fetch(each for each in listings.provider_ids if wanted.provider_id in ("", each))
        await self._view.settled()
        own_providers = listings.own()
        # The caller's own token shows these models, instead of what all callers see of these providers.
        own = {}
        if own_providers:
            own = {scoped_id(*target): target for target in listings.targets() if target[0] in own_providers}
        own_ids = sorted(each for each in own if each > page.after)
        shown: dict[str, Model] = {}
        after, place = page.after, 0
        while len(shown) <= page.size:
            # Some of the ids at a time, as they are then: other calls run in between.
            await give_way()
            some_ids = {*own_ids[place : place + LOOKS_AT_ONCE], *self._feed.ids_after(after, LOOKS_AT_ONCE)}
            if not some_ids:
                break
            for model_id in sorted(some_ids)[:LOOKS_AT_ONCE]:
                after = model_id
                if not permits(model_id):
                    continue
                model = listings.find(*own[model_id]) if model_id in own else None
                if model is None or not is_new(model, self._known, self._providers.ids):
                    model = self._feed.get(model_id)
                    if model is None or (model.provider_id in own_providers and model.source is ModelSource.DISCOVERED):
                        continue
                if wanted.takes(model):
                    shown[model_id] = model
                    if len(shown) > page.size:
                        break
            place = bisect_right(own_ids, after)
        models, next_page_token = pages.page_of(shown, page, _bytes_of)
        return models, next_page_token, tuple(sorted(listings.failures))

    def watch(self, revision: str = "", scope: str = "") -> AsyncGenerator[Step]:
        """All models and then every change, or what came after a revision and then every change; see `Feed.watch`.

        What only a caller's own token shows is not among them.
        """
        self._require_opened()
        return self._feed.watch(revision, scope)

    async def refresh(
        self, provider_id: str = "", token: str | None = None, permits: Permits = all_models
    ) -> dict[str, int | DeltawireError]:
        """List a provider now, or all of them.

        Args:
            provider_id: The provider; empty for all.
            token: The caller's token, used where the operator configured none; see `Providers.token_for`.
            permits: Whether a model exists for the caller, by its id.

        Returns:
            By ascending id, the number of models that each lists, or the error if it could not be listed.

        Raises:
            CallerError: No such provider.
        """
        provider_ids = self._providers.ids
        if provider_id:
            provider_ids = (self._providers.get(provider_id).id,)
        listings = Listings(self._served, token, (provider_id,), permits)
        await listings.fetch(provider_ids, fresh=True)
        return {each: listings.failures.get(each) or listings.count(each) for each in provider_ids}

    def mark_stale(self, provider_id: str) -> None:
        """List a provider now, because a call failed in a way that suggests an out-of-date listing."""
        self._refresher.mark_stale(provider_id)

    def _require_permitted(self, model: Model, permits: Permits) -> None:
        """Check that a caller may register a model under its names, and for its target: the served model, or a registration of it.

        Raises:
            GatewayError: PERMISSION_DENIED.
        """
        denied = next((name for name in model.names if not permits(name)), "")
        served = scoped_id(*model.target)
        if not denied and not permits(served) and not any(map(permits, self._known.ids_of(model.target))):
            denied = served
        if denied:
            raise GatewayError(
                Reason.PERMISSION_DENIED,
                f"this caller may not use the name {quoted(denied)}, because its access line has other models: use a name that"
                " matches them, or ask the gateway's operator to add it",
                metadata={"needs": "models", "model": cut(denied)},
            )

    def _named_by(self, name: str) -> dict[str, str]:
        """The providers that a model's name names."""
        return scopes_of(name, self._providers.ids)


def _bytes_of(model: Model) -> int:
    texts = (*model.names, *model.target, model.engine_root, model.base_model, model.owner)
    notes = (*model.annotations, *model.annotations.values())
    return sum(len(text.encode()) for text in (*texts, *notes))


def _require_owner(model: Model, caller: str | None) -> None:
    """Check that a caller may change a registration.

    Args:
        model: The registration.
        caller: Its name; `None` for one that may change them all.

    Raises:
        GatewayError: PERMISSION_DENIED.
    """
    if caller is None or model.owner == caller:
        return
    owner = f"{quoted(model.owner)} registered" if model.owner else "no known caller registered"
    raise GatewayError(
        Reason.PERMISSION_DENIED,
        f"{owner} model {model.id!r}, so {caller} needs the permission operate to change it: let its owner do it, or have"
        " the gateway's operator grant operate",
        metadata={"caller": caller, "needs": "operate", "model": model.id, "owner": model.owner},
    )


def _overtaken(model: Model) -> RegistryError:
    return RegistryError(
        Reason.ETAG_MISMATCH,
        f"model {model.id!r} has another etag, so it was changed since it was read; it is {model.etag!r} now: read it again",
        metadata={"model": model.id, "etag": model.etag},
    )


def require_type(model: Model, wanted: ModelType) -> None:
    """Check that a model has the type that a call requires.

    Raises:
        CallerError: MODEL_WRONG_TYPE.
    """
    if model.type is not wanted:
        raise CallerError(
            Reason.MODEL_WRONG_TYPE,
            f"model {model.id!r} is of type {model.type.name} rather than the expected type {wanted.name};"
            f" ListModels returns each model's type",
            metadata={"model": model.id, "type": model.type.name},
        )
