"""What the providers serve, as models: discovered ones, or what a registration keeps of them.

`Providers` fetches a listing once for all who ask and keeps it for five seconds. vLLM answers with its first served
name whatever it was asked by, so models are told apart by their listed names and answers are never matched on.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from deltawire_server.errors import DeltawireError
from deltawire_server.registry.model import MAX_CONTEXT_TOKENS, Model, ModelSource, scoped_id
from deltawire_server.telemetry import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from deltawire_server.upstream.base import ServedModel
    from deltawire_server.upstream.providers import Providers

_log = get_logger(__name__)


class Listings:
    """What one call sees of the providers' listings: each provider is asked at most once.

    Args:
        providers: All there are.
        token: The caller's token for them.

    Attributes:
        provider_ids: All there are, ascending.
        failures: Why a provider that was asked did not say what it serves, by its id.
    """

    def __init__(self, providers: Providers, token: str | None) -> None:
        self.provider_ids = providers.ids
        self.failures: dict[str, DeltawireError] = {}
        self._served: dict[str, tuple[ServedModel, ...]] = {}
        self._providers = providers
        self._token = token

    async def fetch(self, provider_ids: Iterable[str]) -> None:
        """Ask those that were not asked yet, all at once."""
        missing = [each for each in provider_ids if each not in self._served and each not in self.failures]
        results = await asyncio.gather(
            *(self._providers.listing(provider_id, self._token) for provider_id in missing), return_exceptions=True
        )
        for provider_id, result in zip(missing, results, strict=True):
            if isinstance(result, DeltawireError):
                _log.warning("provider not listed", provider=provider_id, error=result.message)
                self.failures[provider_id] = result
            elif isinstance(result, BaseException):
                raise result
            else:
                self._served[provider_id] = result

    def find(self, provider_id: str, served_name: str) -> Model | None:
        """The discovered model of this name; `None` as well if its provider was not asked or did not say."""
        listing = self._served.get(provider_id, ())
        return next((_discovered(provider_id, served) for served in listing if served.id == served_name), None)

    def models(self) -> Iterator[Model]:
        """Everything that is listed, whether registered or not."""
        for provider_id, listing in self._served.items():
            for served in listing:
                yield _discovered(provider_id, served)


def with_served(model: Model, served: ServedModel) -> Model:
    """A model with what its provider says of it."""
    tokens = served.max_context_tokens
    # A number that cannot be is as good as none, and must not fail the call.
    known = tokens is not None and 0 <= tokens <= MAX_CONTEXT_TOKENS
    return replace(model, max_context_tokens=tokens if known else None, root=served.root, parent=served.parent)


def _discovered(provider_id: str, served: ServedModel) -> Model:
    model = Model(scoped_id(provider_id, served.id), provider_id, served.id, source=ModelSource.DISCOVERED)
    return with_served(model, served)
