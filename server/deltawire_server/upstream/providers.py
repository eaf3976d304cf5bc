"""The configured providers by id, and their cached model listings.

At most one request for a listing per provider is in flight; concurrent callers share it. A listing is cached for five seconds:
a burst of calls for an unknown model costs one request, and a new model is found soon. A failure is not cached and removes
the cached listing. If the operator configured no token, each caller's token has its own listing, because access may differ.

`replace` exchanges the providers at run time. Removed providers are retired: `get` no longer returns them, but calls in
progress use them to the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from typing import TYPE_CHECKING

from deltawire_server.errors import CallerError, DeltawireError, ProviderError, Reason
from deltawire_server.metrics.table import ENGINE_INFO, REPLICA_STATE, engine_version
from deltawire_server.telemetry import get_logger
from deltawire_server.upstream.failures import excerpt
from deltawire_server.upstream.replicas import State

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from prometheus_client import Gauge

    from deltawire_server.upstream.base import Health, Provider, ServedModel

_log = get_logger(__name__)

LISTING_SECONDS = 5.0

TOKEN_LISTINGS = 32
"""Limit for cached listings by callers' tokens; the oldest is evicted. Each may take a few MiB, and any text is a token."""

_Key = tuple["Provider", "str | None"]
"""The key of a listing: the provider and the caller's token. Not the id, which a later provider may have."""


class Providers:
    """The configured providers.

    Args:
        providers: The providers; their ids must differ.
        listing_seconds: How long a listing is cached.
    """

    def __init__(self, providers: Iterable[Provider], *, listing_seconds: float = LISTING_SECONDS) -> None:
        self._providers = _by_id(providers)
        self._holds: Counter[Provider] = Counter()
        self._retired: set[Provider] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._listing_seconds = listing_seconds
        self._listings: dict[_Key, tuple[float, tuple[ServedModel, ...]]] = {}
        self._fetches: dict[_Key, asyncio.Task[tuple[ServedModel, ...]]] = {}
        self._measured: dict[tuple[Gauge, tuple[str, ...]], int] = {}

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
            CallerError: PROVIDER_NOT_FOUND; the message lists the configured ids.
        """
        provider = self._providers.get(provider_id)
        if provider is None:
            configured = ", ".join(self._providers) or "none"
            raise CallerError(
                Reason.PROVIDER_NOT_FOUND,
                f"provider {excerpt(provider_id)!r} is not configured; configured: {configured}",
                metadata={"provider": provider_id},
            )
        return provider

    def token_for(self, provider_id: str, token: str | None, *, named: bool) -> str | None:
        """The caller's token if it may be sent to a provider, else `None`.

        It may if the call names the provider, if the operator set `accept_caller_tokens` for it, or if it is the only
        configured provider. A bare model name may resolve to any provider that lists it, so without this rule a server that
        the caller did not choose could receive the token.

        Args:
            provider_id: The provider that the token would be sent to.
            token: The token of the call; `None` if it has none.
            named: Whether the call names this provider, as "provider/model" or in its provider field.
        """
        provider = self._providers.get(provider_id)
        if provider is None or not (named or provider.accepts_caller_tokens or len(self._providers) == 1):
            return None
        return token

    def measure(self) -> None:
        """Set the metrics of the current state of every replica."""
        values: dict[tuple[Gauge, tuple[str, ...]], int] = {}
        for provider in self.all():
            for replica in provider.replicas:
                labels = (provider.id, replica.base_url)
                for state in State:
                    values[REPLICA_STATE, (*labels, state.name.lower())] = int(state is replica.state)
                engine = replica.engine
                if engine.version:
                    values[
                        ENGINE_INFO, (*labels, engine.kind.name.lower(), engine_version(excerpt(engine.version)))
                    ] = 1
        # 0 for those that are not there any more: the library cannot remove series that several processes have.
        values = dict.fromkeys(self._measured, 0) | values
        for (gauge, series), value in values.items():
            if self._measured.get((gauge, series)) != value:
                gauge.labels(*series).set(value)
        self._measured = values

    @contextlib.contextmanager
    def held(self, provider: Provider) -> Iterator[None]:
        """Keep a provider open while the context is entered, even if it is retired meanwhile.

        Use it for the whole of a call. Enter it without an `await` after `get`; otherwise the provider may be closed.
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
        """Replace the providers, atomically.

        A provider that is in both sets is unchanged. The others of the old set are retired: their calls in progress continue,
        their listings are dropped, and each is closed once no call holds it.

        Args:
            providers: The new providers; their ids must differ, and none may have been retired before.
        """
        before, self._providers = self._providers, _by_id(providers)
        retired = {provider for provider in before.values() if self._providers.get(provider.id) is not provider}
        self._listings = {key: kept for key, kept in self._listings.items() if key[0] not in retired}
        self._retired |= retired
        for provider in retired:
            if provider not in self._holds:
                self._close_soon(provider)

    async def check_health(self, provider_id: str) -> Health:
        """Check the health of a provider. An unhealthy provider is a result, not an exception.

        Raises:
            CallerError: PROVIDER_NOT_FOUND.
        """
        provider = self.get(provider_id)
        with self.held(provider):
            return await provider.check_health()

    async def listing(
        self, provider_id: str, token: str | None = None, *, fresh: bool = False
    ) -> tuple[ServedModel, ...]:
        """The models that a provider serves, at most five seconds old.

        Args:
            provider_id: The provider's id.
            token: The caller's token, used if the operator configured none.
            fresh: Do not use the cached listing; a request in progress is shared all the same.

        Raises:
            CallerError: PROVIDER_NOT_FOUND.
            ProviderError: It cannot be reached, answers with an error, or sends a malformed response.
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
        # Shielded: a cancelled caller must not cancel the request that other callers wait for.
        return await asyncio.shield(fetch)

    async def close(self) -> None:
        """Close all providers, including retired ones, without waiting for calls in progress."""
        fetches = tuple(self._fetches.values())
        for fetch in fetches:
            fetch.cancel()
        await asyncio.gather(*fetches, return_exceptions=True)
        retired, self._retired = self._retired, set()  # so that the end of a call does not close one again
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
            # An unexpected exception must not affect the listings of other providers.
            _log.exception("a provider's listing failed in an unexpected way", provider=provider.id)
            message = f"provider {provider.id!r} cannot be listed: {type(error).__name__}: {excerpt(str(error))}"
            raise ProviderError(Reason.UPSTREAM_MALFORMED, message, metadata={"provider": provider.id}) from error
        if self._providers.get(provider.id) is not provider:
            return models  # it was retired meanwhile, so do not cache
        now = time.monotonic()
        # Remove expired listings, because callers' tokens change.
        self._listings = {
            other: kept
            for other, kept in self._listings.items()
            if other != key and now - kept[0] < self._listing_seconds  # added below, as the newest
        }
        self._listings[key] = (now, models)
        own = [other for other in self._listings if other[1] is not None]
        for oldest in own[: max(0, len(own) - TOKEN_LISTINGS)]:
            del self._listings[oldest]
        return models

    def _fetched(self, key: _Key, fetch: asyncio.Task[tuple[ServedModel, ...]]) -> None:
        del self._fetches[key]
        if not fetch.cancelled():
            fetch.exception()  # retrieve it so that asyncio does not log it if no caller waits any more


def _by_id(providers: Iterable[Provider]) -> dict[str, Provider]:
    return {provider.id: provider for provider in sorted(providers, key=lambda provider: provider.id)}
