"""One call with one answer, and how it fails."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

import grpc
from grpc import aio

from deltawire._errors import CallCancelledError
from deltawire._failure import Failure

if TYPE_CHECKING:
    from deltawire._channel import Outgoing

Q = TypeVar("Q")
R = TypeVar("R")


async def invoke(method: aio.UnaryUnaryMultiCallable[Q, R], request: Q, outgoing: Outgoing) -> R:
    """Make a call with one answer.

    Raises:
        CallError: It failed.
    """
    call = method(request, **outgoing.arguments)
    try:
        response = await call
    except aio.AioRpcError as error:
        raise outgoing.error(error) from error
    except asyncio.CancelledError:
        if task_is_cancelled():
            raise
        failure = Failure(grpc.StatusCode.CANCELLED, "the client was closed", request_id=outgoing.info.request_id)
        raise CallCancelledError(failure) from None
    outgoing.began(await call.initial_metadata())
    outgoing.ended(await call.trailing_metadata())
    return response


def task_is_cancelled() -> bool:
    """Whether it is this task that is being cancelled, and not only its call: gRPC raises the same for both."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0
