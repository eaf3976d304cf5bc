"""The last listing of each provider, and whether the provider still answers.

Every listing that is the same for all callers is recorded here, whether a look-up, a refresh or a registration requested it. If a
provider stops answering, its last listing is kept, and its models are UNAVAILABLE. Listings that depend on a caller's own token are
not recorded, because other callers must not see them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltawire_server.errors import DeltawireError, Reason
from deltawire_server.registry.model import ModelState
from deltawire_server.telemetry import get_logger
from deltawire_server.upstream.failures import token_not_sent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from deltawire_server.upstream.base import Provider, ServedModel
    from deltawire_server.upstream.providers import Providers

_log = get_logger(__name__)

_REFUSED = frozenset({"401", "403"})
"""The HTTP statuses of a provider that refuses a token, or requires one."""

_NEEDS_TOKEN = frozenset({Reason.PROVIDER_MISCONFIGURED, Reason.UPSTREAM_UNAUTHENTICATED})


class ListingCache:
    """The last listing of each provider.

    Args:
        providers: All there are.
        on_change: Called with a provider's id when its record has changed, synchronously, before any other task runs.
    """

    def __init__(self, providers: Providers, on_change: Callable[[str], None] = lambda _: None) -> None:
        self._providers = providers
        self._on_change = on_change
        self._models: dict[str, Mapping[str, ServedModel]] = {}
        self._failures: dict[str, DeltawireError] = {}

    @property
    def provider_ids(self) -> tuple[str, ...]:
        """All there are, ascending."""
        return self._providers.ids

    def shared(self, provider_id: str, token: str | None, *, named: bool = False) -> bool:
        """Whether a caller sees the same listing as all others; not of a provider that was removed.

        Args:
            provider_id: Whose listing.
            token: The caller's token.
            named: Whether the call names the provider, so that it may have the token.
        """
        if token is None:
            return True
        if provider_id in self._providers.ids and self._providers.token_for(provider_id, token, named=named) is None:
            return True
        return any(provider.id == provider_id and provider.has_token for provider in self._providers.all())

    async def listing(
        self, provider_id: str, token: str | None = None, *, fresh: bool = False, named: bool = False
    ) -> Mapping[str, ServedModel]:
        """Request a provider's listing, by served name, and record it; see `Providers.listing`.

        Args:
            provider_id: Which.
            token: The caller's token, used if the operator configured none and the provider may have it.
            fresh: Ask it even if it was asked just now.
            named: Whether the call names the provider; see `Providers.token_for`.

        Raises:
            CallerError: No such provider; UPSTREAM_UNAUTHENTICATED if it requires a token and the caller's was not sent.
            ProviderError: It is unreachable, refuses the request, or its answer is malformed.
        """
        shared = self.shared(provider_id, token, named=named)
        asked = self._providers.get(provider_id)
        try:
            listing = await self._providers.listing(provider_id, None if shared else token, fresh=fresh)
        except DeltawireError as error:
            if not shared:
                raise
            if self._is_current(asked):
                self._fail(provider_id, error)
            withheld = token is not None and self._providers.token_for(provider_id, token, named=named) is None
            if withheld and error.metadata.get("http_status") in _REFUSED:
                raise token_not_sent(provider_id, error.metadata) from error
            raise
        models = {served.id: served for served in listing}
        return self._record(provider_id, models) if shared and self._is_current(asked) else models

    def listed(self, provider_id: str) -> Mapping[str, ServedModel]:
        """The last listing of a provider, by served name; empty if there is none. The next listing replaces it."""
        return self._models.get(provider_id, {})

    def was_asked(self, provider_id: str) -> bool:
        """Whether the provider was asked before, so that `listed` is not merely unknown."""
        return provider_id in self._models or provider_id in self._failures

    def is_shared(self, provider_id: str) -> bool:
        """Whether callers without a token of their own see a listing, or would if the provider answered."""
        failure = self._failures.get(provider_id)
        return failure is None or failure.reason not in _NEEDS_TOKEN

    def state(self, provider_id: str, served_name: str) -> ModelState:
        """Whether this can be called now."""
        if provider_id not in self._providers.ids:
            return ModelState.UNAVAILABLE
        failure = self._failures.get(provider_id)
        if failure is not None and failure.reason not in _NEEDS_TOKEN:
            return ModelState.UNAVAILABLE
        if failure is not None or provider_id not in self._models:
            return ModelState.UNKNOWN
        return ModelState.SERVING if served_name in self._models[provider_id] else ModelState.UNAVAILABLE

    def forget(self, provider_ids: Iterable[str]) -> None:
        """Remove the records of these providers, which were removed or replaced."""
        for provider_id in provider_ids:
            self._models.pop(provider_id, None)
            self._failures.pop(provider_id, None)
            self._on_change(provider_id)

    def _is_current(self, provider: Provider) -> bool:
        """Whether a provider is still the one of its id, or there is another one now, of whom its answer says nothing."""
        return any(provider is each for each in self._providers.all())

    def _record(self, provider_id: str, models: Mapping[str, ServedModel]) -> Mapping[str, ServedModel]:
        """Record a listing; return the recorded one, which is the previous one if it is equal."""
        failed = self._failures.pop(provider_id, None)
        if failed is not None:
            _log.info("provider answers again", provider=provider_id)
        if failed is not None or models != self._models.get(provider_id):
            self._models[provider_id] = models
            self._on_change(provider_id)
        return self._models[provider_id]

    def _fail(self, provider_id: str, error: DeltawireError) -> None:
        before = self._failures.get(provider_id)
        self._failures[provider_id] = error
        if before is None or before.reason is not error.reason:
            # Once, and not with every refresh for as long as it is away.
            _log.warning("provider not listed", provider=provider_id, error=error.message)
            self._on_change(provider_id)
