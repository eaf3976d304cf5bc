"""Receives requests after authorization and admission, with a limit on their number and time.

gRPC receives the request of a unary method before the handler runs. So every handler of the gateway is registered as one with
streamed requests: gRPC then receives at most the first 64 KiB (the HTTP/2 window of a stream) until `read` is called. On the wire
there is no difference.
"""

from __future__ import annotations

import asyncio
import time
import types
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from deltawire_server import pacing
from deltawire_server.errors import CallerError, Code, GatewayError, Reason
from deltawire_server.upstream.failures import RETRY_SECONDS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Generator

    from grpc import aio

    _Context = aio.ServicerContext[Any, Any]

ARRIVAL_TURNS = 3
ARRIVAL_SECONDS = 0.0003
"""How often and how long to wait for a request that needs no key, which is one of health or reflection.

Clients send a small request together with the call's headers, or microseconds later, so gRPC has it before the handler runs.
A read opens the window for the whole message, whatever its size; in this time, 1 to 2 MiB may arrive from the same machine.
The wait spans several iterations of the event loop, to see requests that arrived while the loop was busy."""


_MAX_PENDING = 1_000_000
"""Calls that wait for a Python handler; more than the connections of any machine carry at once."""

PENDING_REQUESTS = (
    ("grpc.server.max_pending_requests", _MAX_PENDING),
    ("grpc.server.max_pending_requests_hard_limit", _MAX_PENDING),
)
"""Options of a server. By default, grpc itself cancels calls of a burst without a reason. The gateway has its own admission
control."""

QUICK_SECONDS = 0.003
"""A request that takes longer to arrive may be large, so it waits while long work is in progress before gRPC copies it."""

SHARE = 4
"""One caller may use this fraction of the turns, so that a caller that sends slowly does not block others."""

_readings: set[asyncio.Task[object]] = set()
"""References to the running reads: asyncio itself keeps only weak references to tasks."""


class Reception:
    """Receives the requests of admitted calls.

    Args:
        limit: Requests that are received at once; one caller may use a quarter of them. Further calls wait, each with at most
            64 KiB of its request in memory.
        timeout: Seconds that a request may wait for its turn, and seconds that it may then take.
    """

    def __init__(self, limit: int = 64, timeout: float = 60.0) -> None:
        self._limit = limit
        self._turns = asyncio.Semaphore(limit)
        # One for each caller with a request that is being received or waits.
        self._shares: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._timeout = timeout

    async def receive(self, context: _Context, check: Callable[[bytes], Awaitable[None]], caller: str) -> bytes:
        """The bytes of the call's request; parse and validate them next.

        A second message is never received, as with gRPC's own unary handlers, because the window stays closed.

        Args:
            context: The call.
            check: Checks the bytes during the call's turn, so that the number of unchecked requests in memory is limited.
            caller: Identifies the caller.

        Raises:
            CallerError: From `check`; or INVALID_REQUEST with UNIMPLEMENTED, as in gRPC: the call has no request.
            GatewayError: DURATION_LIMIT_EXCEEDED: the request did not arrive in time. TOO_MANY_STREAMS: the request got no turn
                in time, because other requests arrive too slowly.
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
        try:
            async with asyncio.timeout(self._timeout):
                data = _message(await asyncio.shield(_reading(context)))
        except TimeoutError:
            limit = f"{self._timeout:g}"
            raise GatewayError(
                Reason.DURATION_LIMIT_EXCEEDED,
                f"the request did not arrive within {limit} seconds: send it faster, or send a smaller one",
                metadata={"limit_seconds": limit},
            ) from None
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
                f"this gateway receives at most {self._limit} requests at once, a quarter of them from one caller, and this "
                f"one had no turn within {self._timeout:g} seconds: retry later",
                metadata={"limit": str(self._limit)},
                retry_after=RETRY_SECONDS,
            ) from None


async def arrived(context: _Context) -> bytes | None:
    """The bytes of a request that has arrived or arrives immediately.

    Returns:
        The bytes; `None` if it does not arrive. Then end the call, because gRPC receives the request as long as the call lasts.

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
    """Start a read. Never cancel it: gRPC does not free a message that it has received for a canceled reader.

    The read ends with its call at the latest.
    """
    reading = asyncio.create_task(_read_in_turn(context.read()))
    _readings.add(reading)
    reading.add_done_callback(_read)
    return reading


async def _read_in_turn(read: Coroutine[object, None, object]) -> object:
    """Run gRPC's read coroutine, with a pause between the arrival of the request and gRPC's copies of it.

    When the coroutine resumes, gRPC copies the request twice, which blocks the event loop for 1.5 ms per MiB. How large it is can
    be seen only afterwards. So the first large request is copied at once, and others wait for a pause after it; small ones do
    not wait for each other, however busy the event loop is.
    """
    return await _steps(read)  # a task runs only native coroutines, from Python 3.12 on


@types.coroutine
def _steps(read: Coroutine[object, None, object]) -> Generator[object, None, object]:
    began = time.perf_counter()
    try:
        awaited = read.send(None)
        while True:
            try:
                yield awaited
                waits = time.perf_counter() - began > QUICK_SECONDS and pacing.is_busy()
                if waits:
                    yield from pacing.give_way().__await__()
            except BaseException as error:  # noqa: BLE001 (it is for gRPC's coroutine)
                awaited = read.throw(error)
            else:
                resumed = time.perf_counter()
                try:
                    awaited = read.send(None)
                finally:
                    if not waits:  # else the queue measures it
                        pacing.charge(time.perf_counter() - resumed)
    except StopIteration as end:
        return end.value


def _read(reading: asyncio.Task[object]) -> None:
    _readings.discard(reading)
    if not reading.cancelled():
        reading.exception()  # retrieve it so that asyncio does not log it: the call has ended


def _message(read: object) -> bytes:
    if not isinstance(read, bytes):  # the end of the stream
        raise CallerError(
            Reason.INVALID_REQUEST,
            "the call has no request: send exactly one message, not larger than server.max_receive_bytes",
            code=Code.UNIMPLEMENTED,
        )
    return read
