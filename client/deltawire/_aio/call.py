"""One call with one answer, and how it fails."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, TypeVar

from grpc import aio

from deltawire._failure import ClosedCall, failed_call

if TYPE_CHECKING:
    from deltawire._channel import Outgoing

Q = TypeVar("Q")
R = TypeVar("R")


async def invoke(method: aio.UnaryUnaryMultiCallable[Q, R], request: Q, outgoing: Outgoing) -> R:
    """Make a call with one answer.

    Raises:
        CallError: It failed.
    """
    try:
        return await _answer(method, request, outgoing)
    except (aio.AioRpcError, aio.UsageError) as error:
        raise outgoing.error(failed_call(error)) from error
    except asyncio.CancelledError:
        if task_is_cancelled():
            raise
        raise outgoing.error(ClosedCall()) from None


async def _answer(method: aio.UnaryUnaryMultiCallable[Q, R], request: Q, outgoing: Outgoing) -> R:
    """Make a call. Its frame is not that of the error that is raised for it; see `failed_call`."""
    call = method(request, **outgoing.arguments)
    response = await call
    outgoing.began(await call.initial_metadata())
    outgoing.ended(await call.trailing_metadata())
    return response


def task_is_cancelled() -> bool:
    """Whether it is this task that is being canceled, and not only its call: gRPC raises the same for both."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


async def pause(seconds: float, ended: asyncio.Event) -> None:
    """Wait so long, or until the event is set."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await ended.wait()
