"""The configured providers by id, and what each serves now.

A listing is fetched at most once per provider at a time, however many ask (single flight), and kept for five seconds:
long enough that a burst of calls for an unknown model costs one request, short enough that a new model is found soon.
A failure is not kept, and what was kept before it is dropped: the provider is not what it was. Where the operator
configured no token, each caller's own token has a listing of its own: what one may see, another need not.

While the process runs, other providers may take the place of these. Those that have to go are retired: nobody finds them
any more, but whoever holds one has it until the end of the call.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from typing import TYPE_CHECKING

from deltawire_server.errors import CallerError, DeltawireError, ProviderError, Reason
from deltawire_server.telemetry import get_logger
from deltawire_server.upstream.failures import excerpt

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from deltawire_server.upstream.base import Health, Provider, ServedModel

_log = get_logger(__name__)

LISTING_SECONDS = 5.0

TOKEN_LISTINGS = 32
"""Listings by callers' own tokens that are kept at once; the oldest makes room. Each may be a few MiB, and any text is a token."""

_Key = tuple["Provider", "str | None"]
"""A listing: whose, and by which caller's token. Not by the id, which another provider may have the next moment."""


class Providers:
    """The configured providers.

    Args:
        providers: Their ids must differ.
        listing_seconds: How long a listing is good for.
    """

    def __init__(self, providers: Iterable[Provider], *, listing_seconds: float = LISTING_SECONDS) -> None:
        self._providers = _by_id(providers)
        self._holds: Counter[Provider] = Counter()
        self._retired: set[Provider] = set()
        self._closing: set[asyncio.Task[None]] = set()
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
                f"provider {excerpt(provider_id)!r} is not configured; configured: {known}",
                metadata={"provider": provider_id},
            )
        return provider

    def token_for(self, provider_id: str, token: str | None, *, named: bool) -> str | None:
        """The caller's token if a provider may have it, else `None`.

        It may if the call names the provider, if the operator set `accept_caller_tokens` for it, or if it is the only one
        configured, so that every call means it. A bare model name may lead to any provider that lists such a name: a token
        sent there would be known to a server that the caller did not choose.

        Args:
            provider_id: Which provider the token would be sent to.
            token: As it came with the call; `None` if none came.
            named: Whether the call names this provider, by "provider/model" or in a field of its own.
        """
        provider = self._providers.get(provider_id)
        if provider is None or not (named or provider.accepts_caller_tokens or len(self._providers) == 1):
            return None
        return token

    @contextlib.contextmanager
    def held(self, provider: Provider) -> Iterator[None]:
        """Keep a provider open while entered, even if it is retired meanwhile: for a call, from finding it to its end.

        Enter without awaiting anything after `get`, or it may be gone by then.
        """
        self._holds[provider] += 1
        try:
            yield
        finally:
            self._holds[provider] -= 1
            if not self._holds[provider]:
                del self._holds[provider]
                if provider in self._retired:
                    self._close_soon(provider)

    def replace(self, providers: Iterable[Provider]) -> None:
        """Serve by these from now on, all at once: whoever looks sees all of the old ones or all of the new ones.

        A provider that is in both stays as it is. The others of the old ones are retired: what is under way at them goes
        on, what they listed is forgotten, and once nobody holds one it is closed.

        Args:
            providers: Their ids must differ. None that was retired before.
        """
        before, self._providers = self._providers, _by_id(providers)
        retired = {provider for provider in before.values() if self._providers.get(provider.id) is not provider}
        self._listings = {key: kept for key, kept in self._listings.items() if key[0] not in retired}
        self._retired |= retired
        for provider in retired:
            if provider not in self._holds:
                self._close_soon(provider)

    async def check_health(self, provider_id: str) -> Health:
        """How a provider is; one that is down is an answer.

        Raises:
            CallerError: No such provider.
        """
        provider = self.get(provider_id)
        with self.held(provider):
            return await provider.check_health()

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
        key = (provider, None if provider.has_token else token)
        at, models = self._listings.get(key, (float("-inf"), ()))
        if not fresh and time.monotonic() - at < self._listing_seconds:
            return models
        fetch = self._fetches.get(key)
        if fetch is None:
            fetch = asyncio.create_task(self._fetch(key), name=f"list {provider_id}")
            self._fetches[key] = fetch
            fetch.add_done_callback(lambda done: self._fetched(key, done))
        # Shielded: that one caller gave up must not fail the others that wait for the same listing.
        return await asyncio.shield(fetch)

    async def close(self) -> None:
        """Close every provider at once, retired ones too, and wait for it."""
        fetches = tuple(self._fetches.values())
        for fetch in fetches:
            fetch.cancel()
        await asyncio.gather(*fetches, return_exceptions=True)
        retired, self._retired = self._retired, set()  # whoever lets go of one now has nothing left to close
        for provider in (*self._providers.values(), *retired):
            await provider.close()
        await asyncio.gather(*self._closing)

    def _close_soon(self, provider: Provider) -> None:
        self._retired.discard(provider)
        task = asyncio.create_task(provider.close(), name=f"close {provider.id}")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _fetch(self, key: _Key) -> tuple[ServedModel, ...]:
        provider, token = key
        try:
            with self.held(provider):
                models = await provider.list_models(token)
        except BaseException as error:
            self._listings.pop(key, None)
            if isinstance(error, DeltawireError) or not isinstance(error, Exception):
                raise
            # Whatever it is, it must not take the listings of other providers with it.
            _log.exception("a provider's listing failed in an unexpected way", provider=provider.id)
            message = f"provider {provider.id!r} cannot be listed: {type(error).__name__}: {excerpt(str(error))}"
            raise ProviderError(Reason.UPSTREAM_MALFORMED, message, metadata={"provider": provider.id}) from error
        if self._providers.get(provider.id) is not provider:
            return models  # for those who asked before it was retired
        now = time.monotonic()
        # Callers' tokens come and go; their listings must not stay.
        self._listings = {
            other: kept
            for other, kept in self._listings.items()
            if other != key and now - kept[0] < self._listing_seconds  # added again below, as the newest
        }
        self._listings[key] = (now, models)
        own = [other for other in self._listings if other[1] is not None]
        for oldest in own[: max(0, len(own) - TOKEN_LISTINGS)]:
            del self._listings[oldest]
        return models

    def _fetched(self, key: _Key, fetch: asyncio.Task[tuple[ServedModel, ...]]) -> None:
        del self._fetches[key]
        if not fetch.cancelled():
            fetch.exception()  # seen, even if everybody who waited for it has left


def _by_id(providers: Iterable[Provider]) -> dict[str, Provider]:
    return {provider.id: provider for provider in sorted(providers, key=lambda provider: provider.id)}
