"""What the providers serve, as one call sees it: what they said last where that is enough, else what they say now.

vLLM answers with its first served name whatever it was asked by, so models are told apart by their listed names and
answers are never matched on.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from deltawire_server.errors import DeltawireError
from deltawire_server.registry.model import ModelState
from deltawire_server.registry.view import discovered

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from deltawire_server.registry.model import Model
    from deltawire_server.registry.served import Served
    from deltawire_server.upstream.base import ServedModel


class Listings:
    """The listings that one call looks at: each provider is asked at most once.

    Args:
        served: Asks them, and knows what they said last.
        token: The caller's token for them.

    Attributes:
        provider_ids: All there are, ascending.
        failures: Why a provider that was asked did not say what it serves, by its id.
    """

    def __init__(self, served: Served, token: str | None) -> None:
        self.provider_ids = served.provider_ids
        self.failures: dict[str, DeltawireError] = {}
        self._served = served
        self._token = token
        self._listings: dict[str, tuple[ServedModel, ...]] = {}
        self._asked: set[str] = set()

    async def recall(self, provider_ids: Iterable[str]) -> None:
        """Have what these said last, also of those that do not answer any more; ask only those that never were."""
        provider_ids = tuple(provider_ids)
        await self.fetch(each for each in provider_ids if not self._recalled(each))

    async def fetch(self, provider_ids: Iterable[str]) -> None:
        """Have what these say now, at most five seconds old; what those that do not answer said last."""
        missing = [each for each in provider_ids if each not in self._asked]
        self._asked.update(missing)
        results = await asyncio.gather(
            *(self._served.listing(provider_id, self._token) for provider_id in missing), return_exceptions=True
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
        return next((model for model in self._models(provider_id) if model.provider_model_id == served_name), None)

    def models(self) -> Iterator[Model]:
        """Everything that is listed, whether registered or not."""
        for provider_id in self._listings:
            yield from self._models(provider_id)

    def _recalled(self, provider_id: str) -> bool:
        if not self._served.shared(provider_id, self._token) or not self._served.was_asked(provider_id):
            return False
        self._listings[provider_id] = self._served.models(provider_id)
        return True

    def _models(self, provider_id: str) -> Iterator[Model]:
        for served in self._listings.get(provider_id, ()):
            model = discovered(provider_id, served)
            state = ModelState.SERVING  # as a caller with a token of its own has just been told
            if self._served.shared(provider_id, self._token):
                state = self._served.state(provider_id, served.id)
            yield replace(model, state=state)
