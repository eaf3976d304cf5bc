"""Writes the messages of all streaming calls: completions, retained streams and watches. Each message has its own timeout."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from deltawire_server.rpc.interceptors import REQUEST_ID

if TYPE_CHECKING:
    from collections.abc import Callable

    from google.protobuf.message import Message
    from grpc import aio

    from deltawire_server.errors import GatewayError
    from deltawire_server.rpc.interceptors import CallRecord


class StreamWriter:
    """Writes the messages of one streaming call.

    Initial metadata is sent with the first message and not earlier: until then, clients and proxies can retry the call.

    Args:
        context: The call.
        record: The record of the call.
        timeout: Seconds that one message may wait for the caller.
        slow: Returns the error for a caller that does not receive a message in that time.
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
        self._clock: asyncio.Timeout | None = None

    async def write(self, message: Message | bytes, *, last: bool = False) -> None:
        """Write a message.

        Args:
            message: The next one.
            last: Whether it ends the stream without an error; then the call has succeeded.

        Raises:
            GatewayError: The error of `slow`: the caller did not receive the message in time. Nothing can be written after that.
        """
        self._record.latch.check_open()
        if not self._begun:
            self._begun = self._record.begun = True
            await self._context.send_initial_metadata(((REQUEST_ID, self._record.call.request_id),))
        try:
            async with asyncio.timeout(self._timeout) as self._clock:
                await self._context.write(message)
        except TimeoutError:
            self._record.latch.fail()
            raise self._slow(self._timeout) from None
        finally:
            self._clock = None
        if last:
            self._record.latch.succeed()

    def hasten(self, seconds: float) -> None:
        """Reduce the timeout of all messages, including the one that is being written, because the process shuts down."""
        self._timeout = min(self._timeout, seconds)
        if self._clock is not None and not self._clock.expired():
            end_by = asyncio.get_running_loop().time() + self._timeout
            self._clock.reschedule(min(end_by, self._clock.when() or end_by))
