"""Lists every provider again and again, each at its own interval and in a task of its own.

So one that is away, slow or odd holds up nobody else, nor its own next turn.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltawire_server.errors import DeltawireError
from deltawire_server.telemetry import get_logger

if TYPE_CHECKING:
    from deltawire_server.registry.served import Served
    from deltawire_server.upstream.providers import Providers

_log = get_logger(__name__)

RETRY_SECONDS = 2.0
"""Between two looks at a provider that does not answer, if its interval is not shorter: it is missed, and asking costs it
nothing."""

SUSPECT_SECONDS = 1.0
"""Between two looks that calls asked for: a hundred failed calls are one reason to look, not a hundred."""


@dataclass(frozen=True, slots=True)
class _Turn:
    task: asyncio.Task[None]
    suspected: asyncio.Event


class Refresher:
    """Keeps the listings fresh.

    Args:
        providers: All there are.
        served: Asks them, and keeps what they say.
    """

    def __init__(self, providers: Providers, served: Served) -> None:
        self._providers = providers
        self._served = served
        self._turns: dict[str, _Turn] = {}

    def start(self) -> None:
        """List them all now and on; call it again when providers have come or gone."""
        for provider_id in self._turns.keys() - set(self._providers.ids):
            self._turns.pop(provider_id).task.cancel()
        for provider_id in self._providers.ids:
            if provider_id not in self._turns:
                suspected = asyncio.Event()
                task = asyncio.create_task(self._refresh(provider_id, suspected), name=f"refresh {provider_id}")
                self._turns[provider_id] = _Turn(task, suspected)

    async def stop(self) -> None:
        """List nobody any more."""
        tasks = [turn.task for turn in self._turns.values()]
        self._turns.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def suspect(self, provider_id: str) -> None:
        """A call found that a provider is not what it was: look at once."""
        turn = self._turns.get(provider_id)
        if turn is not None:
            turn.suspected.set()

    async def _refresh(self, provider_id: str, suspected: asyncio.Event) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            begun = clock()
            pause = self._providers.get(provider_id).refresh_interval
            suspected.clear()
            try:
                await self._served.listing(provider_id, fresh=True)
            except DeltawireError:
                pause = min(pause, RETRY_SECONDS)  # why is in the log, once
            except Exception:  # noqa: BLE001 (a defect must not end the refreshing for good)
                _log.exception("a provider cannot be refreshed", provider=provider_id)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await suspected.wait()
            await asyncio.sleep(begun + SUSPECT_SECONDS - clock())
