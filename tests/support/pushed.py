"""Bodies of answers for providers in memory."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from deltawire_server.upstream.base import Body

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterable, Callable

    from deltawire_server.sansio.events import Fault


class PushedBody(Body):
    """Pushes what an iterable gives, in a task of its own.

    Args:
        pieces: The body.
    """

    def __init__(self, pieces: AsyncIterable[bytes]) -> None:
        self._pieces = pieces
        self._task: asyncio.Task[None] | None = None
        self._may_go_on = asyncio.Event()
        self._may_go_on.set()

    def follow(self, receive: Callable[[bytes], None], end: Callable[[Fault | None], None]) -> None:
        self._task = asyncio.create_task(self._push(receive, end))

    def pause(self) -> None:
        self._may_go_on.clear()

    def resume(self) -> None:
        self._may_go_on.set()

    def close(self) -> None:
        """Push nothing from now on."""
        if self._task is not None:
            self._task.cancel()

    async def _push(self, receive: Callable[[bytes], None], end: Callable[[Fault | None], None]) -> None:
        async for piece in self._pieces:
            await asyncio.sleep(0)
            await self._may_go_on.wait()
            receive(piece)
        await self._may_go_on.wait()
        end(None)


class BrokenBodyError(Exception):
    """A body ended with a fault."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


async def pulled(body: Body) -> AsyncGenerator[bytes]:
    """The pieces of a body; raises `BrokenBodyError` at its end if that is a fault."""
    pieces: asyncio.Queue[bytes | BrokenBodyError | None] = asyncio.Queue()
    body.follow(pieces.put_nowait, lambda fault: pieces.put_nowait(None if fault is None else BrokenBodyError(fault)))
    while (piece := await pieces.get()) is not None:
        if isinstance(piece, BrokenBodyError):
            raise piece
        yield piece
