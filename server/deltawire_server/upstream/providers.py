"""The configured providers by id, and what each serves now.

A listing is fetched at most once per provider at a time, however many ask (single flight), and kept for five seconds:
long enough that a burst of calls for an unknown model costs one request, short enough that a new model is found soon.
A failure is not kept. Where the operator configured no token, each caller's own token has a listing of its own: what one
may see, another need not.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from deltawire_server.errors import CallerError, Reason

if TYPE_CHECKING:
    from collections.abc import Iterable

    from deltawire_server.upstream.base import Provider, ServedModel

LISTING_SECONDS = 5.0

_Key = tuple[str, "str | None"]
"""A listing: whose, and by which caller's token."""


class Providers:
    """The configured providers, for the process's life.

    Args:
        providers: Their ids must differ.
        listing_seconds: How long a listing is good for.
    """

    def __init__(self, providers: Iterable[Provider], *, listing_seconds: float = LISTING_SECONDS) -> None:
        self._providers = {provider.id: provider for provider in sorted(providers, key=lambda provider: provider.id)}
        self._listing_seconds = listing_seconds
        self._listings: dict[_Key, tuple[float, tuple[ServedModel, ...]]] = {}
        self._fetches: dict[_Key, asyncio.Task[tuple[ServedModel, ...]]] = {}

    @property
    def ids(self) -> tuple[str, ...]:
        """All ids, ascending."""
        return tuple(self._providers)

    def all(self) -> tuple[Provider, ...]:
        """All providers by ascending id."""
        return tuple(self._providers.values())

    def get(self, provider_id: str) -> Provider:
        """The provider of this id.

        Raises:
            CallerError: There is none; the message lists those there are.
        """
        provider = self._providers.get(provider_id)
        if provider is None:
            known = ", ".join(self._providers) or "none"
            raise CallerError(
                Reason.PROVIDER_NOT_FOUND,
                f"provider {provider_id!r} is not configured; configured: {known}",
                metadata={"provider": provider_id},
            )
        return provider

    async def listing(
        self, provider_id: str, token: str | None = None, *, fresh: bool = False
    ) -> tuple[ServedModel, ...]:
        """What a provider serves, at most five seconds old.

        Args:
            provider_id: Which.
            token: The caller's token, used if the operator configured none.
            fresh: Ask the provider even if a listing is at hand; joins a request that is under way.

        Raises:
            CallerError: No such provider.
            ProviderError: It is away, refuses, or answers nonsense.
        """
        provider = self.get(provider_id)
        key = (provider_id, None if provider.has_token else token)
        at, models = self._listings.get(key, (float("-inf"), ()))
        if not fresh and time.monotonic() - at < self._listing_seconds:
            return models
        fetch = self._fetches.get(key)
        if fetch is None:
            fetch = asyncio.create_task(self._fetch(provider, key), name=f"list {provider_id}")
            self._fetches[key] = fetch
            fetch.add_done_callback(lambda done: self._fetched(key, done))
        # Shielded: that one caller gave up must not fail the others that wait for the same listing.
        return await asyncio.shield(fetch)

    async def close(self) -> None:
        """Close every provider, and wait for it."""
        fetches = tuple(self._fetches.values())
        for fetch in fetches:
            fetch.cancel()
        await asyncio.gather(*fetches, return_exceptions=True)
        for provider in self._providers.values():
            await provider.close()

    async def _fetch(self, provider: Provider, key: _Key) -> tuple[ServedModel, ...]:
        models = await provider.list_models(key[1])
        now = time.monotonic()
        # Callers' tokens come and go; their listings must not stay.
        self._listings = {
            other: kept for other, kept in self._listings.items() if now - kept[0] < self._listing_seconds
        }
        self._listings[key] = (now, models)
        return models

    def _fetched(self, key: _Key, fetch: asyncio.Task[tuple[ServedModel, ...]]) -> None:
        del self._fetches[key]
        if not fetch.cancelled():
            fetch.exception()  # seen, even if everybody who waited for it has left
