"""All models as they are now: registered and discovered, each with its state; and the changes to them, one by one.

    database ── follower ──▶ known ──┐
                                     ├──▶ view ──▶ feed ──▶ watchers
    providers ── refresh ──▶ served ─┘

Whatever changes says which ids may look different now; those are looked at again, and what is different is published.
A provider may list very many models, which all change when it goes down: they are looked at a part at a time, and other
tasks run in between.
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
"""Models that are looked at without giving way: some milliseconds of work."""


class View:
    """What a caller without a token of its own sees.

    Args:
        known: What is registered.
        served: What the providers list.
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
        """Look at nothing more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def registered(self, *models: Model | None) -> None:
        """A registration has changed: it was one of these and is the other."""
        ids: dict[str, None] = {}
        for model in models:
            if model is not None:
                # Whatever it is called, and what it leads to: a registered model stands for its target.
                ids.update(dict.fromkeys((*model.names, scoped_id(*model.target))))
        self._look(ids)

    def listed(self, provider_id: str) -> None:
        """What is known of a provider has changed: some models are looked at now, the rest as soon as possible."""
        seen = [model.id for model in self._feed.models() if model.provider_id == provider_id]
        served = (scoped_id(provider_id, each) for each in self._served.listed(provider_id))
        self._due.update(dict.fromkeys((*seen, *served)))
        if self._task is None:
            self._look_at_some()
        if self._due and self._task is None:
            self._task = asyncio.create_task(self._look_at_all(), name="look at many models")
            self._task.add_done_callback(self._looked_at_all)

    def as_seen(self, model: Model) -> Model:
        """A registered model with its current state, without later changes to the registration."""
        state = self._served.state(*model.target)
        seen = self._feed.get(model.id)
        if seen is not None and seen.revision == model.revision and seen.state is state:
            return seen
        return replace(model, state=state)

    async def _look_at_all(self) -> None:
        while self._due:
            await give_way()
            self._look_at_some()

    def _looked_at_all(self, _: asyncio.Task[None]) -> None:
        self._task = None

    def _look_at_some(self) -> None:
        some = list(itertools.islice(self._due, LOOKS_AT_ONCE))
        for model_id in some:
            del self._due[model_id]
        self._look(some)

    def _look(self, ids: Iterable[str]) -> None:
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
    """What a provider lists, as a model. Made in one step: there may be very many of them."""
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
    """A registered model with what its provider says of it."""
    return replace(
        model,
        max_context_tokens=_context_tokens(served),
        engine_root=served.engine_root,
        base_model=served.base_model,
    )


def _context_tokens(served: ServedModel) -> int | None:
    # A number that cannot be is as good as none, and must not fail the call.
    tokens = served.max_context_tokens
    return tokens if tokens is not None and 0 <= tokens <= MAX_CONTEXT_TOKENS else None


def is_new(discovered_model: Model, known: RegisteredIndex, provider_ids: Iterable[str]) -> bool:
    """Whether a discovered model is to be seen: neither it nor its name is registered."""
    if known.has_target(discovered_model.target):
        return False
    return registered(discovered_model.id, known, provider_ids) is None
