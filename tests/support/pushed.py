"""Bodies of answers for providers in memory."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from deltawire_server.upstream.base import Body

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Callable

    from deltawire_server.sansio.events import Fault


class PushedBody(Body):
    """Pushes what an iterable gives, in a task of its own.

    Args:
        pieces: The body.
    """

    def __init__(self, pieces: AsyncIterable[bytes]) -> None:
        self._pieces = pieces
        self._may_go_on = asyncio.Event()
        self._may_go_on.set()

    def follow(self, receive: Callable[[bytes], None], end: Callable[[Fault | None], None]) -> None:
        self._task = asyncio.create_task(self._push(receive, end))

    def pause(self) -> None:
        self._may_go_on.clear()

    def resume(self) -> None:
        self._may_go_on.set()

    async def _push(self, receive: Callable[[bytes], None], end: Callable[[Fault | None], None]) -> None:
        async for piece in self._pieces:
            await self._may_go_on.wait()
            receive(piece)
        await self._may_go_on.wait()
        end(None)
