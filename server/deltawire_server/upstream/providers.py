"""The configured providers by id, and what each serves now.

A listing is fetched at most once per provider at a time, however many ask (single flight), and kept for five seconds:
long enough that a burst of calls for an unknown model costs one request, short enough that a new model is found soon.
A failure is not kept.
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


class Providers:
    """The configured providers, for the process's life.

    Args:
        providers: Their ids must differ.
        listing_seconds: How long a listing is good for.
    """

    def __init__(self, providers: Iterable[Provider], *, listing_seconds: float = LISTING_SECONDS) -> None:
        self._providers = {provider.id: provider for provider in sorted(providers, key=lambda provider: provider.id)}
        self._listing_seconds = listing_seconds
        self._listings: dict[str, tuple[float, tuple[ServedModel, ...]]] = {}
        self._fetches: dict[tuple[str, str | None], asyncio.Task[tuple[ServedModel, ...]]] = {}

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
        at, models = self._listings.get(provider_id, (float("-inf"), ()))
        if not fresh and time.monotonic() - at < self._listing_seconds:
            return models
        key = (provider_id, token)
        fetch = self._fetches.get(key)
        if fetch is None:
            fetch = asyncio.create_task(self._fetch(provider, token), name=f"list {provider_id}")
            self._fetches[key] = fetch
            fetch.add_done_callback(lambda _: self._fetches.pop(key, None))
        # Shielded: that one caller gave up must not fail the others that wait for the same listing.
        return await asyncio.shield(fetch)

    async def close(self) -> None:
        """Close every provider, and wait for it."""
        for fetch in tuple(self._fetches.values()):
            fetch.cancel()
        for provider in self._providers.values():
            await provider.close()

    async def _fetch(self, provider: Provider, token: str | None) -> tuple[ServedModel, ...]:
        models = await provider.list_models(token)
        self._listings[provider.id] = (time.monotonic(), models)
        return models
