"""Receiving requests: only after access and admission, a bounded number at a time, within a bounded time.

gRPC receives the request of a unary method before its handler runs. So every handler of ours is registered as one whose
requests are a stream: gRPC then receives nothing beyond the first 64 KiB (the HTTP/2 window of a stream) until `read` is
called. On the wire the two are the same.
"""

from __future__ import annotations

import asyncio
import time
import types
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from deltawire_server.errors import CallerError, Code, GatewayError, Reason
from deltawire_server.pacing import give_way
from deltawire_server.upstream.failures import RETRY_SECONDS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Generator

    from grpc import aio

    _Context = aio.ServicerContext[Any, Any]

ARRIVAL_TURNS = 3
ARRIVAL_SECONDS = 0.0003
"""So many times so long a request is awaited where no key is needed: for health and reflection.

Clients send a small request together with the call's headers, or microseconds later: gRPC has it before the handler runs.
To read it opens the window to all of its message, whatever the size; in this time one or two MiB arrive from the same machine.
Several turns of the event loop, so that what arrived while the loop was busy is seen."""


QUICK_SECONDS = 0.003
"""A request that takes longer to arrive waits in line before gRPC copies it: it may be a large one."""

SHARE = 4
"""One caller may have one in so many of the turns: the others' requests do not wait for a caller that does not send its own."""

_readings: set[asyncio.Task[object]] = set()
"""Those that have not ended: asyncio itself keeps no task."""


class Reception:
    """Receives requests of callers who may call.

    Args:
        limit: Requests that are received at once, of one caller a quarter of them; further calls wait, with at most 64 KiB of
            theirs in memory.
        timeout: Seconds that one request may wait for its turn, and that it may then take.
    """

    def __init__(self, limit: int = 64, timeout: float = 60.0) -> None:
        self._limit = limit
        self._turns = asyncio.Semaphore(limit)
        # Those of callers with a request that is received or waits.
        self._shares: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._timeout = timeout

    async def receive(self, context: _Context, check: Callable[[bytes], Awaitable[None]], caller: str) -> bytes:
        """The bytes of the call's request; parse and validate them next.

        A second message is never received, as by gRPC's own unary handlers: its sender meets a closed window.

        Args:
            context: The call.
            check: Checks the bytes while the call still has its turn: no more requests are in memory unchecked than have one.
            caller: What distinguishes the caller from others.

        Raises:
            CallerError: What `check` raises; INVALID_REQUEST with UNIMPLEMENTED, which is gRPC's code for it: the call has
                no request.
            GatewayError: DURATION_LIMIT_EXCEEDED: the request did not arrive in time. TOO_MANY_STREAMS: other requests
                arrive too slowly for this one to get a turn in time.
        """
        share = self._shares.get(caller)
        if share is None:
            share = self._shares[caller] = asyncio.Semaphore(max(1, self._limit // SHARE))
        await self._take_turn(share)
        try:
            await self._take_turn(self._turns)
            try:
                return await self._receive(context, check)
            finally:
                self._turns.release()
        finally:
            share.release()

    async def _receive(self, context: _Context, check: Callable[[bytes], Awaitable[None]]) -> bytes:
        reading = _reading(context)
        done, _ = await asyncio.wait([reading], timeout=self._timeout)
        if not done:
            limit = f"{self._timeout:g}"
            raise GatewayError(
                Reason.DURATION_LIMIT_EXCEEDED,
                f"the request did not arrive within {limit} seconds: send it faster, or less of it",
                metadata={"limit_seconds": limit},
            )
        data = _message(reading.result())
        await check(data)
        return data

    async def _take_turn(self, turns: asyncio.Semaphore) -> None:
        if not turns.locked():
            await turns.acquire()  # at once
            return
        try:
            async with asyncio.timeout(self._timeout):
                await turns.acquire()
        except TimeoutError:
            raise GatewayError(
                Reason.TOO_MANY_STREAMS,
                f"this gateway receives {self._limit} requests at once, of one caller a quarter of them, and had no turn for this "
                f"one in {self._timeout:g} seconds",
                metadata={"limit": str(self._limit)},
                retry_after=RETRY_SECONDS,
            ) from None


async def arrived(context: _Context) -> bytes | None:
    """The bytes of a request that is already here or arrives at once.

    Returns:
        `None` if it does not: end the call then, since the request is received for as long as the call lasts.

    Raises:
        CallerError: INVALID_REQUEST with UNIMPLEMENTED: the call has no request.
    """
    reading = _reading(context)
    for _ in range(ARRIVAL_TURNS):
        done, _ = await asyncio.wait([reading], timeout=ARRIVAL_SECONDS)
        if done:
            return _message(reading.result())
    return None


def _reading(context: _Context) -> asyncio.Task[object]:
    """Begin to read. Never cancel it: gRPC would not free a message that it has received for a reader that is canceled.

    It ends with its call at the latest.
    """
    reading = asyncio.create_task(_read_in_turn(context.read()))
    _readings.add(reading)
    reading.add_done_callback(_read)
    return reading


@types.coroutine
def _read_in_turn(read: Coroutine[object, None, object]) -> Generator[object, None, object]:
    """Drive gRPC's read, with a pause between the arrival of the request and gRPC's copies of it.

    gRPC copies the request twice when its coroutine goes on: 1.5 ms per MiB, in which nothing else runs.
    """
    began = time.perf_counter()
    try:
        awaited = read.send(None)
        while True:
            try:
                yield awaited
                if time.perf_counter() - began > QUICK_SECONDS:
                    yield from give_way().__await__()
            except BaseException as error:  # noqa: BLE001 (it is for gRPC's coroutine)
                awaited = read.throw(error)
            else:
                awaited = read.send(None)
    except StopIteration as end:
        return end.value


def _read(reading: asyncio.Task[object]) -> None:
    _readings.discard(reading)
    if not reading.cancelled():
        reading.exception()  # retrieved, so that asyncio does not log it: the call has ended


def _message(read: object) -> bytes:
    if not isinstance(read, bytes):  # the end of the stream
        raise CallerError(
            Reason.INVALID_REQUEST,
            "the call has no request: send exactly one message, not larger than server.max_receive_bytes",
            code=Code.UNIMPLEMENTED,
        )
    return read
