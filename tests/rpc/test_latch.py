"""The end of a call: decided once, OK only for a reason, and nothing is written after it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

import grpc
import pytest
from grpc import aio

from deltawire_server.errors import GatewayError, Reason
from deltawire_server.rpc.interceptors import CallInterceptor, CallRecord, call_record
from deltawire_server.rpc.latch import Latch
from deltawire_server.rpc.writer import StreamWriter
from deltawire_server.upstream.base import CallContext
from tests.support.gateway import Lines, taken_apart

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Handler = Callable[[bytes, aio.ServicerContext[bytes, bytes]], Awaitable[Any]]


def test_success_is_recorded() -> None:
    """Without it, the end is an internal error."""
    latch = Latch()
    with pytest.raises(GatewayError) as caught:
        latch.check_succeeded()
    assert caught.value.reason is Reason.INTERNAL
    latch.succeed()
    latch.check_succeeded()


def test_an_end_is_decided_once() -> None:
    """What succeeded does not fail any more, what failed cannot succeed, and nothing is written after either."""
    whole, broken = Latch(), Latch()
    whole.succeed()
    whole.fail()
    assert whole.succeeded
    broken.fail()
    assert not broken.succeeded
    for latch in (whole, broken):
        with pytest.raises(RuntimeError):
            latch.check_open()
        with pytest.raises(RuntimeError):
            latch.succeed()


async def call(handler: Handler, *, streaming: bool) -> tuple[list[bytes], grpc.StatusCode, str]:
    """Call a handler behind the interceptor: its messages, the status and the reason."""
    make: Any = grpc.unary_stream_rpc_method_handler if streaming else grpc.unary_unary_rpc_method_handler
    server = aio.server(interceptors=[CallInterceptor()])
    handlers = {"Call": make(cast("Any", handler))}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("deltawire.v1.Test", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    messages: list[bytes] = []
    try:
        async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            if streaming:
                stream: Any = cast("Any", channel.unary_stream("/deltawire.v1.Test/Call"))(b"")
                async for message in stream:
                    messages.append(message)  # noqa: PERF401 (those before a failure count)
            else:
                unary: Any = channel.unary_unary("/deltawire.v1.Test/Call")
                messages.append(await unary(b""))
    except aio.AioRpcError as error:
        failure = taken_apart(error)
        return messages, failure.code, failure.reason
    finally:
        await server.stop(None)
    return messages, grpc.StatusCode.OK, ""


async def test_a_handler_that_records_nothing(lines: Lines) -> None:
    """Its call does not end OK, unary or streaming, whether or not messages were written."""

    async def nothing(_: bytes, __: aio.ServicerContext[bytes, bytes]) -> None:
        return

    async def a_message(_: bytes, context: aio.ServicerContext[bytes, bytes]) -> None:
        await context.write(b"1")

    assert await call(nothing, streaming=False) == ([], grpc.StatusCode.INTERNAL, "INTERNAL")
    assert await call(nothing, streaming=True) == ([], grpc.StatusCode.INTERNAL, "INTERNAL")
    assert await call(a_message, streaming=True) == ([b"1"], grpc.StatusCode.INTERNAL, "INTERNAL")
    entries = [entry for entry in lines.entries if entry["event"] == "call"]
    assert [entry["code"] for entry in entries] == ["INTERNAL"] * 3
    assert "without a success or a failure" in lines.getvalue()


async def test_a_response_is_a_success() -> None:
    """Of a unary call."""

    async def answer(_: bytes, __: aio.ServicerContext[bytes, bytes]) -> bytes:
        return b"whole"

    assert await call(answer, streaming=False) == ([b"whole"], grpc.StatusCode.OK, "")


def slow(_: float) -> GatewayError:
    """The failure of a caller that does not read."""
    return GatewayError(Reason.SLOW_CALLER, "slow")


async def test_what_fails_after_the_last_message_is_for_the_log(lines: Lines) -> None:
    """The caller has the whole answer, and the call ends OK; the defect is logged."""

    async def answer(_: bytes, context: aio.ServicerContext[bytes, bytes]) -> None:
        async with StreamWriter(context, call_record(context), 5.0, slow) as writer:
            await writer.write(cast("Any", b"last"), last=True)
        raise ZeroDivisionError

    assert await call(answer, streaming=True) == ([b"last"], grpc.StatusCode.OK, "")
    assert "ZeroDivisionError" in lines.getvalue()


async def test_nothing_is_written_after_the_end(lines: Lines) -> None:
    """A message after the last one is a defect: it does not reach the caller."""

    async def answer(_: bytes, context: aio.ServicerContext[bytes, bytes]) -> None:
        async with StreamWriter(context, call_record(context), 5.0, slow) as writer:
            await writer.write(cast("Any", b"last"), last=True)
            await writer.write(cast("Any", b"late"))

    assert await call(answer, streaming=True) == ([b"last"], grpc.StatusCode.OK, "")
    assert "a message was written after the end of its call" in lines.getvalue()


class Context:
    """A call whose caller takes each message after so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.messages: list[object] = []

    async def send_initial_metadata(self, _: object) -> None:
        """Nothing to see."""

    async def write(self, message: object) -> None:
        """Take it, after a while."""
        await asyncio.sleep(self.seconds)
        self.messages.append(message)


async def test_each_message_has_its_own_time() -> None:
    """A caller that takes a message now and then is not slow, however long that goes on; one that takes none is."""
    context: Any = Context(0.01)
    writer = StreamWriter(context, CallRecord(CallContext("r")), 0.2, slow)

    async def write() -> None:
        async with writer:
            for number in range(40):  # twice the time of one message
                await writer.write(cast("Any", number))
            assert context.messages == [*range(40)]
            context.seconds = 3600
            await writer.write(cast("Any", 40))

    with pytest.raises(GatewayError) as caught:
        await write()
    assert caught.value.reason is Reason.SLOW_CALLER
    with pytest.raises(RuntimeError):
        await writer.write(cast("Any", 41))


async def test_a_message_that_waits_can_be_hastened() -> None:
    """When the process is about to stop."""
    context: Any = Context(3600)
    writer = StreamWriter(context, CallRecord(CallContext("r")), 3600, slow)

    async def write() -> None:
        async with writer:
            await writer.write(cast("Any", 1))

    writing = asyncio.create_task(write())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    writer.hasten(0.01)
    with pytest.raises(GatewayError):
        await writing


async def test_the_time_between_messages_is_not_the_callers() -> None:
    """A stream may be silent for longer than one message may take."""
    context: Any = Context(0)
    async with StreamWriter(context, CallRecord(CallContext("r")), 0.02, slow) as writer:
        for number in range(3):
            await writer.write(cast("Any", number))
            await asyncio.sleep(0.05)
    assert context.messages == [0, 1, 2]
