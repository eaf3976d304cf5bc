"""Lists every provider periodically, each at its own interval and in its own task.

So a provider that is unreachable or slow does not delay others.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltawire_server.errors import DeltawireError
from deltawire_server.telemetry import get_logger

if TYPE_CHECKING:
    from deltawire_server.registry.listing_cache import ListingCache
    from deltawire_server.upstream.base import Provider
    from deltawire_server.upstream.providers import Providers

_log = get_logger(__name__)

RETRY_SECONDS = 2.0
"""Interval for a provider that does not answer, unless its own interval is shorter."""

STALE_SECONDS = 1.0
"""Minimum interval between listings because of failed calls, so that a hundred failed calls cause one listing."""


@dataclass(frozen=True, slots=True)
class _Turn:
    provider: Provider
    task: asyncio.Task[None]
    stale: asyncio.Event


class Refresher:
    """Refreshes the listings.

    Args:
        providers: The configured providers.
        served: Requests and records the listings.
        retry_seconds: See `RETRY_SECONDS`.
        stale_seconds: See `STALE_SECONDS`.
    """

    def __init__(
        self,
        providers: Providers,
        served: ListingCache,
        *,
        retry_seconds: float = RETRY_SECONDS,
        stale_seconds: float = STALE_SECONDS,
    ) -> None:
        self._providers = providers
        self._served = served
        self._retry_seconds = retry_seconds
        self._stale_seconds = stale_seconds
        self._turns: dict[str, _Turn] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """List all providers, now and periodically. Call it again when providers were added, removed or replaced."""
        providers = {provider.id: provider for provider in self._providers.all()}
        for provider_id, turn in tuple(self._turns.items()):
            if providers.get(provider_id) is not turn.provider:
                # Also if a new provider has its id: the old one may hang, and the new one must not wait for it.
                del self._turns[provider_id]
                turn.task.cancel()
        for provider_id, provider in providers.items():
            if provider_id not in self._turns:
                stale = asyncio.Event()
                task = asyncio.create_task(self._refresh(provider, stale), name=f"refresh {provider_id}")
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                self._turns[provider_id] = _Turn(provider, task, stale)

    async def stop(self) -> None:
        """Stop all listings."""
        self._turns.clear()
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def mark_stale(self, provider_id: str) -> None:
        """List a provider now, at most once per second, because a call suggests that its listing is out of date."""
        turn = self._turns.get(provider_id)
        if turn is not None:
            turn.stale.set()

    async def _refresh(self, provider: Provider, stale: asyncio.Event) -> None:
        clock = asyncio.get_running_loop().time
        next_stale = clock()  # the earliest time of the next listing because of failed calls
        while True:
            pause = provider.refresh_interval
            stale.clear()
            try:
                await self._served.listing(provider.id, fresh=True)
            except DeltawireError:
                pause = min(pause, self._retry_seconds)  # `ListingCache` logs the error once
            except Exception:  # noqa: BLE001 (a defect must not end the task)
                _log.exception("a provider cannot be refreshed", provider=provider.id)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await stale.wait()
                    await asyncio.sleep(next_stale - clock())
                    next_stale = clock() + self._stale_seconds
