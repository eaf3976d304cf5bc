"""The listings of the providers as one call sees them: the last ones if they suffice, otherwise new ones.

vLLM always answers with its first served name, so models are distinguished by their listed names, never by answers.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from deltawire_server.errors import DeltawireError
from deltawire_server.registry.model import ModelState, all_models, scoped_id
from deltawire_server.registry.view import discovered

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from deltawire_server.registry.listing_cache import ListingCache
    from deltawire_server.registry.model import Model, Permits
    from deltawire_server.upstream.base import ServedModel


class Listings:
    """The listings that one call reads. Each provider is requested at most once.

    Args:
        served: Requests the listings, and has the last ones.
        token: The caller's token for the providers.
        named: The providers that the call names, which may have the token; see `Providers.token_for`.
        permits: Whether a model exists for the caller, by its id; by default all do.

    Attributes:
        permits: As above.
        provider_ids: All provider ids, ascending.
        failures: The errors of the providers that could not be listed, by id.
    """

    def __init__(
        self,
        served: ListingCache,
        token: str | None,
        named: Iterable[str] = (),
        permits: Permits = all_models,
    ) -> None:
        self.permits = permits
        self.provider_ids = served.provider_ids
        self.failures: dict[str, DeltawireError] = {}
        self._served = served
        self._token = token
        self._named = frozenset(named)
        self._listings: dict[str, Mapping[str, ServedModel]] = {}
        self._asked: set[str] = set()

    async def recall(self, provider_ids: Iterable[str]) -> None:
        """Load the last listings of these providers, even of those that do not answer; request only missing ones."""
        await self.fetch([each for each in provider_ids if not self._recalled(each)])

    async def fetch(self, provider_ids: Iterable[str], *, fresh: bool = False) -> None:
        """Load listings that are at most five seconds old, or new ones; for providers that do not answer, the last ones."""
        missing = [each for each in provider_ids if each not in self._asked]
        if not missing:
            return
        self._asked.update(missing)
        results = await asyncio.gather(
            *(self._served.listing(each, self._token, fresh=fresh, named=each in self._named) for each in missing),
            return_exceptions=True,
        )
        for provider_id, result in zip(missing, results, strict=True):
            if isinstance(result, DeltawireError):
                self.failures[provider_id] = result
                self._recalled(provider_id)
            elif isinstance(result, BaseException):
                raise result
            else:
                self._listings[provider_id] = result

    def find(self, provider_id: str, served_name: str) -> Model | None:
        """The discovered model of this name; `None` if it is not listed, or the listing is not loaded."""
        served = self._listings.get(provider_id, {}).get(served_name)
        if served is None or not self.permits(scoped_id(provider_id, served_name)):
            return None
        # A listing for the caller's own token was requested by this call.
        state = self._served.state(provider_id, served.id) if self.shared(provider_id) else ModelState.SERVING
        return discovered(provider_id, served, state)

    def targets(self) -> Iterator[tuple[str, str]]:
        """The provider and the served name of each listed model, whether it is registered or not."""
        for provider_id, listing in self._listings.items():
            for served_name in listing:
                if self.permits(scoped_id(provider_id, served_name)):
                    yield provider_id, served_name

    def count(self, provider_id: str) -> int:
        """The number of listed models of a provider."""
        return sum(self.permits(scoped_id(provider_id, each)) for each in self._listings.get(provider_id, ()))

    def shared(self, provider_id: str) -> bool:
        """Whether all callers see the same listing of the provider; otherwise it is that of the caller's own token."""
        return self._served.shared(provider_id, self._token, named=provider_id in self._named)

    def own(self) -> frozenset[str]:
        """The providers whose listings are those of the caller's own token."""
        return frozenset(each for each in self.provider_ids if not self.shared(each))

    def _recalled(self, provider_id: str) -> bool:
        if not self.shared(provider_id) or not self._served.was_asked(provider_id):
            return False
        self._listings[provider_id] = self._served.listed(provider_id)
        return True
