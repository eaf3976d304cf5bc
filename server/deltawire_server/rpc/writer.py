"""Writes the messages of all streaming calls: completions, retained streams and watches. Each message has its own timeout."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Self

from deltawire_server.clock import Clock
from deltawire_server.rpc.interceptors import REQUEST_ID

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from google.protobuf.message import Message
    from grpc import aio

    from deltawire_server.errors import GatewayError
    from deltawire_server.rpc.interceptors import CallRecord


class StreamWriter:
    """Writes the messages of one streaming call, which is the body of its `async with`.

    Initial metadata is sent with the first message and not earlier: until then, clients and proxies can retry the call. One timer
    serves all messages of a stream, because a timeout of its own for each costs a tenth of the message.

    Args:
        context: The call.
        record: The record of the call.
        timeout: Seconds that one message may wait for the caller.
        slow: Returns the error for a caller that does not receive a message in that time.

    Raises:
        GatewayError: The error of `slow`, at the end of the `async with`: the caller did not receive a message in time.
    """

    def __init__(
        self,
        context: aio.ServicerContext[Any, Any],
        record: CallRecord,
        timeout: float,
        slow: Callable[[float], GatewayError],
    ) -> None:
        self._context = context
        self._record = record
        self._timeout = timeout
        self._slow = slow
        self._begun = False
        self._writing = False
        self._call = asyncio.timeout(None)
        self._clock: Clock  # from `__aenter__` on, so that nothing is written without it

    async def __aenter__(self) -> Self:
        self._clock = Clock(self._time_out)
        await self._call.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clock.stop()
        try:
            await self._call.__aexit__(kind, error, trace)
        except TimeoutError:
            raise self._slow(self._timeout) from None

    async def write(self, message: Message | bytes, *, last: bool = False) -> None:
        """Write a message. If the caller does not receive it in time, the call is canceled.

        Args:
            message: The next one.
            last: Whether it ends the stream without an error; then the call has succeeded.
        """
        self._record.latch.check_open()
        if not self._begun:
            self._begun = self._record.begun = True
            record = self._record
            await self._context.send_initial_metadata(((REQUEST_ID, record.call.request_id), *record.load.metadata))
        self._writing = True
        self._clock.allow(self._timeout)
        await self._context.write(message)
        self._writing = False
        self._clock.pause()
        if last:
            self._record.latch.succeed()

    def hasten(self, seconds: float) -> None:
        """Reduce the timeout of all messages, including the one that is being written, because the process shuts down."""
        self._timeout = min(self._timeout, seconds)
        if self._writing:
            self._clock.hasten(self._timeout)

    def _time_out(self) -> None:
        self._record.latch.fail()
        self._call.reschedule(asyncio.get_running_loop().time())
