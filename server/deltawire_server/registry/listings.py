"""The listings of the providers as one call sees them: the last ones if they suffice, otherwise new ones.

vLLM always answers with its first served name, so models are distinguished by their listed names, never by answers.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from deltawire_server.errors import DeltawireError
from deltawire_server.registry.model import ModelState
from deltawire_server.registry.view import discovered

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from deltawire_server.registry.listing_cache import ListingCache
    from deltawire_server.registry.model import Model
    from deltawire_server.upstream.base import ServedModel


class Listings:
    """The listings that one call looks at: each provider is asked at most once.

    Args:
        served: Asks them, and knows what they said last.
        token: The caller's token for them.
        named: The providers that the call names: they may have the token; see `Providers.token_for`.

    Attributes:
        provider_ids: All there are, ascending.
        failures: Why a provider that was asked did not say what it serves, by its id.
    """

    def __init__(self, served: ListingCache, token: str | None, named: Iterable[str] = ()) -> None:
        self.provider_ids = served.provider_ids
        self.failures: dict[str, DeltawireError] = {}
        self._served = served
        self._token = token
        self._named = frozenset(named)
        self._listings: dict[str, Mapping[str, ServedModel]] = {}
        self._asked: set[str] = set()

    async def recall(self, provider_ids: Iterable[str]) -> None:
        """Load the last listings of these providers, even of those that do not answer; request only missing ones."""
        provider_ids = tuple(provider_ids)
        await self.fetch(each for each in provider_ids if not self._recalled(each))

    async def fetch(self, provider_ids: Iterable[str]) -> None:
        """Load listings that are at most five seconds old; for providers that do not answer, the last ones."""
        missing = [each for each in provider_ids if each not in self._asked]
        self._asked.update(missing)
        results = await asyncio.gather(
            *(self._served.listing(each, self._token, named=each in self._named) for each in missing),
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
        """The discovered model of this name; `None` as well if its provider was not asked or did not say."""
        served = self._listings.get(provider_id, {}).get(served_name)
        if served is None:
            return None
        # A caller with a token of its own has just seen it.
        state = self._served.state(provider_id, served.id) if self.shared(provider_id) else ModelState.SERVING
        return discovered(provider_id, served, state)

    def targets(self) -> Iterator[tuple[str, str]]:
        """Provider and served name of everything that is listed, whether registered or not."""
        for provider_id, listing in self._listings.items():
            for served_name in listing:
                yield provider_id, served_name

    def shared(self, provider_id: str) -> bool:
        """Whether all callers see this listing of the provider, and not only this one by its own token."""
        return self._served.shared(provider_id, self._token, named=provider_id in self._named)

    def own(self) -> frozenset[str]:
        """The providers of which this caller sees a listing of its own."""
        return frozenset(each for each in self.provider_ids if not self.shared(each))

    def _recalled(self, provider_id: str) -> bool:
        if not self.shared(provider_id) or not self._served.was_asked(provider_id):
            return False
        self._listings[provider_id] = self._served.listed(provider_id)
        return True
