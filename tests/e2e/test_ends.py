"""Calls that the caller ends in any way: the engine must stop generating.

Each asks for an answer that would go on for a minute or more, waits until it has begun, and then looks at the engine.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import TYPE_CHECKING

import grpc
import pytest

from deltawire import AsyncClient, CallCancelledError, DeadlineExceededError, Sampling, chat_request
from deltawire.v1.chat_completion_pb2 import StreamChatCompletionRequest
from deltawire.v1.chat_completion_pb2_grpc import ChatCompletionStub
from tests.e2e.support import CALL_SECONDS, MODEL, SEA, eventually

if TYPE_CHECKING:
    from typing import Any

    from tests.e2e.support import Engine
    from tests.support.gateway_process import GatewayProcess

pytestmark = pytest.mark.e2e

ENDLESS = chat_request(SEA, model=MODEL, sampling=Sampling(max_tokens=3500, ignore_eos=True))


async def log_line(gateway: GatewayProcess, request_id: str) -> dict[str, Any]:
    """The log line of a call, which is written when the call has ended in the gateway."""
    found: list[dict[str, Any]] = []

    def there() -> bool:
        found.extend(each for each in gateway.records() if each.get("request_id") == request_id)
        return bool(found)

    await eventually(there, f"the gateway does not log the end of {request_id}")
    return found[0]


async def test_a_cancelled_stream_stops_the_engine(
    client: AsyncClient, engine: Engine, gateway: GatewayProcess
) -> None:
    """Leaving the block of the stream stops the engine; the usage is in the log."""
    async with client.chat.stream(ENDLESS) as stream:
        async for event in stream:
            if event.sequence == 5:
                break
        assert engine.running() == 1
    with pytest.raises(CallCancelledError) as caught:
        await stream.final()
    assert caught.value.answer is not None
    assert caught.value.answer.text
    await engine.becomes_idle()
    line = await log_line(gateway, stream.request_id)
    assert line["code"] == "CANCELLED"
    assert line["completion_tokens"] >= 5


async def test_a_cancelled_unary_call_stops_the_engine(client: AsyncClient, engine: Engine) -> None:
    """Cancelling the waiting task stops the engine."""
    task = asyncio.create_task(client.chat.create(ENDLESS))
    await eventually(lambda: engine.running() == 1, "it does not begin")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await engine.becomes_idle()


async def test_a_deadline_ends_the_stream_and_stops_the_engine(
    client: AsyncClient, engine: Engine, gateway: GatewayProcess
) -> None:
    """The deadline stops the engine, and the error has the partial answer."""
    with pytest.raises(DeadlineExceededError) as caught:
        async with client.chat.stream(ENDLESS, timeout=3.0) as stream:
            await stream.final()
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert caught.value.answer is not None
    assert caught.value.answer.text
    await engine.becomes_idle()
    line = await log_line(gateway, caught.value.request_id)
    # The caller's own clock may be the first to strike; then its cancel is what arrives.
    assert line["code"] in ("DEADLINE_EXCEEDED", "CANCELLED")
    assert line["completion_tokens"] > 0


async def test_a_closed_channel_stops_the_engine(gateway: GatewayProcess, engine: Engine) -> None:
    """Closing the channel during a stream stops the engine."""
    client = AsyncClient(gateway.address, timeout=CALL_SECONDS)
    stream = client.chat.stream(ENDLESS)
    await anext(stream)
    assert engine.running() == 1
    await client.close()
    await engine.becomes_idle()


async def test_a_killed_client_stops_the_engine(gateway: GatewayProcess, engine: Engine) -> None:
    """Killing the client process stops the engine."""
    command = [sys.executable, "-m", "deltawire", "chat", "--json", "--request", "-", "--target", gateway.address]
    request = '{"model": "smollm2", "messages": [{"user": {"text": "Hello"}}], "sampling": %s}'
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write((request % '{"maxTokens": 3500, "ignoreEos": true}').encode())
        process.stdin.close()
        assert b"started" in await process.stdout.readline()
        assert engine.running() == 1
        os.kill(process.pid, signal.SIGKILL)
        await engine.becomes_idle()
    finally:
        if process.returncode is None:
            await process.communicate()


async def test_a_generated_stub(gateway: GatewayProcess, engine: Engine) -> None:
    """A generated stub receives the same events, and its cancel stops the engine."""
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        call = ChatCompletionStub(channel).StreamChatCompletion(StreamChatCompletionRequest(chat=ENDLESS))
        first = await anext(aiter(call))
        assert first.WhichOneof("event") == "started"
        assert "x-request-id" in {name for name, _ in await call.initial_metadata() or ()}
        call.cancel()
        await engine.becomes_idle()
