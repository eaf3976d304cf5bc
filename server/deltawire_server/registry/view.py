"""Computes the models that callers see, registered and discovered, with their states, and publishes each change to the feed.

Each change of a registration or a listing names the ids that it may affect. These models are computed again, and published if they
differ. If a provider with very many models fails, all of them change: they are updated in steps, and other tasks run in between.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

from deltawire_server.pacing import give_way
from deltawire_server.registry.model import MAX_CONTEXT_TOKENS, Model, ModelSource, ModelState, scoped_id
from deltawire_server.registry.scopes import may_have, registered
from deltawire_server.registry.store import ChangeKind

if TYPE_CHECKING:
    from collections.abc import Iterable

    from deltawire_server.registry.feed import Feed
    from deltawire_server.registry.listing_cache import ListingCache
    from deltawire_server.registry.registered_index import RegisteredIndex
    from deltawire_server.upstream.base import ServedModel


LOOKS_AT_ONCE = 250
"""Models that are computed or read before other tasks run: a few milliseconds of work."""


class View:
    """The models that all callers see; a caller's own token may show others.

    Args:
        known: The registered models.
        served: The listings of the providers.
        feed: Keeps the models and publishes every change.
    """

    def __init__(self, known: RegisteredIndex, served: ListingCache, feed: Feed) -> None:
        self._known = known
        self._served = served
        self._feed = feed
        self._due: dict[str, None] = {}
        self._task: asyncio.Task[None] | None = None

    async def settled(self) -> None:
        """Wait until the feed has all reported changes."""
        while self._task is not None:
            await asyncio.wait([self._task])

    async def stop(self) -> None:
        """Cancel the remaining updates."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def registered(self, *models: Model | None) -> None:
        """Update the models that a change of a registration affects.

        Args:
            models: The registration before and after the change; `None` if there is none.
        """
        ids: dict[str, None] = {}
        for model in models:
            if model is not None:
                # Also the id of the discovered model, which a registration hides.
                ids.update(dict.fromkeys((*model.names, scoped_id(*model.target))))
        self._update(ids)

    def listed(self, provider_id: str) -> None:
        """Update the models of a provider whose listing or health has changed: `LOOKS_AT_ONCE` now, the rest in a task."""
        seen = [model.id for model in self._feed.models() if model.provider_id == provider_id]
        served = (scoped_id(provider_id, each) for each in self._served.listed(provider_id))
        self._due.update(dict.fromkeys((*seen, *served)))
        if self._task is None:
            self._update_some()
        if self._due and self._task is None:
            self._task = asyncio.create_task(self._update_all(), name="update many models")
            self._task.add_done_callback(self._updated_all)

    def as_seen(self, model: Model) -> Model:
        """A registered model with its current state, without later changes to the registration."""
        state = self._served.state(*model.target)
        seen = self._feed.get(model.id)
        if seen is not None and seen.revision == model.revision and seen.state is state:
            return seen
        return replace(model, state=state)

    async def _update_all(self) -> None:
        while self._due:
            await give_way()
            self._update_some()

    def _updated_all(self, _: asyncio.Task[None]) -> None:
        self._task = None

    def _update_some(self) -> None:
        some = list(itertools.islice(self._due, LOOKS_AT_ONCE))
        for model_id in some:
            del self._due[model_id]
        self._update(some)

    def _update(self, ids: Iterable[str]) -> None:
        for model_id in ids:
            before, now = self._feed.get(model_id), self._now(model_id)
            if now is None and before is not None:
                self._feed.publish(ChangeKind.REMOVED, before)
            elif now is not None and now != before:
                self._feed.publish(ChangeKind.ADDED if before is None else ChangeKind.MODIFIED, now)

    def _now(self, model_id: str) -> Model | None:
        model = self._known.models.get(model_id)
        if model is None or not may_have(model_id, model, self._served.provider_ids):
            found = self._find_discovered(model_id)
            if found is not None and is_new(found, self._known, self._served.provider_ids):
                return found
        if model is None:
            return None
        return replace(model, state=self._served.state(*model.target))

    def _find_discovered(self, model_id: str) -> Model | None:
        for provider_id in self._served.provider_ids:
            scope = scoped_id(provider_id, "")
            if model_id.startswith(scope):
                served = self._served.listed(provider_id).get(model_id.removeprefix(scope))
                if served is not None:
                    return discovered(provider_id, served, self._served.state(provider_id, served.id))
        return None


def discovered(provider_id: str, served: ServedModel, state: ModelState) -> Model:
    """The model of an entry of a provider's listing. It is built in one step, because there may be very many."""
    return Model(
        scoped_id(provider_id, served.id),
        provider_id,
        served.id,
        source=ModelSource.DISCOVERED,
        max_context_tokens=_context_tokens(served),
        engine_root=served.engine_root,
        base_model=served.base_model,
        state=state,
    )


def with_served(model: Model, served: ServedModel) -> Model:
    """A registered model with the data of its provider's listing."""
    tokens, root, base = _context_tokens(served), served.engine_root, served.base_model
    return replace(model, max_context_tokens=tokens, engine_root=root, base_model=base)


def _context_tokens(served: ServedModel) -> int | None:
    # An invalid number is ignored, so that it does not fail the call.
    tokens = served.max_context_tokens
    return tokens if tokens is not None and 0 <= tokens <= MAX_CONTEXT_TOKENS else None


def is_new(discovered_model: Model, known: RegisteredIndex, provider_ids: Iterable[str]) -> bool:
    """Whether a discovered model is visible: neither the model nor its id is registered."""
    hidden = known.has_target(discovered_model.target)
    return not hidden and registered(discovered_model.id, known, provider_ids) is None
