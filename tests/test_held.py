"""What a gateway holds of a call, counted as what Python has allocated: one copy of its request until that is sent."""

from __future__ import annotations

import asyncio
import tracemalloc
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc import aio

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import error_reason_pb2, message_pb2
from deltawire_server.memory import MIB
from tests.faults import script
from tests.faults.upstream import Gate, Plan, Send, Stall, Upstream
from tests.support.gateway import (
    WAIT,
    ask,
    failure_of,
    read,
    read_badly,
    read_well,
    running,
    settings_of,
    taken_apart,
    until,
)

if TYPE_CHECKING:
    from pathlib import Path

IMAGE_BYTES = 8 * MIB
PARTS = [message_pb2.ContentPart(image=message_pb2.Image(data=b"\x89PNG\r\n\x1a\n" + bytes(IMAGE_BYTES)))]
REQUEST_ID = "held"


@pytest.fixture(autouse=True)
def contract_is_kept() -> None:
    """Not checked here: the recorder keeps each request until its call ends."""


def _event(chunk: script.Chunk) -> bytes:
    return script.framed(script.event(chunk))


BEGIN = _event(script.ROLE) + _event(script.text("a"))
END = _event(script.FINISH) + script.framed(script.event(script.DONE)) + script.END


def _request(kind: str) -> tuple[str, bytes]:
    """A method and the bytes of its request, made before anything is counted."""
    message = message_pb2.ChatMessage(user=message_pb2.UserMessage(content=PARTS))
    chat = ask(model="fake", messages=[message], completion_id="mine" if "id" in kind else "")
    if "create" in kind:
        return "CreateChatCompletion", chat_pb.CreateChatCompletionRequest(chat=chat).SerializeToString()
    request = chat_pb.StreamChatCompletionRequest(chat=chat)
    if kind == "retained":
        request.options.retention.FromSeconds(10)
    return "StreamChatCompletion", request.SerializeToString()


@pytest.mark.parametrize("kind", ["stream", "stream with an id", "retained", "create", "create with an id"])
async def test_one_copy_of_a_request_is_held_until_the_first_event(kind: str, tmp_path: Path) -> None:
    """While the provider is silent it may have to be sent to another replica; from its first event on nothing is held."""
    method, data = _request(kind)
    plan = Plan([Send(script.HEAD), Gate(), Send(BEGIN), Stall()])
    async with (
        Upstream() as upstream,
        running(settings_of(upstream.base_url, tmp_path)) as gateway,
        asyncio.timeout(WAIT),
    ):
        # Everything is used once before: what is loaded by the first call is not the call's.
        upstream.plans["first"] = Plan([Send(script.HEAD + BEGIN + END)])
        await read(gateway.stream(ask(model="fake"), metadata=(("x-request-id", "first"),)))
        upstream.plans[REQUEST_ID] = plan
        tracemalloc.start()
        try:
            start: aio.UnaryStreamMultiCallable[bytes, bytes] = gateway.channel.unary_stream(
                f"/deltawire.v1.ChatCompletion/{method}"
            )
            call = start(data, metadata=(("x-request-id", REQUEST_ID),))
            await plan.at_gate.wait()
            waiting = await _settled()
            plan.gate.set()
            streaming = await _settled()
            call.cancel()
        finally:
            tracemalloc.stop()
    assert IMAGE_BYTES <= waiting < 9 * MIB
    assert streaming < 1 * MIB


async def _settled() -> int:
    """The allocated bytes once they no longer change."""
    await asyncio.sleep(0.5)
    return tracemalloc.get_traced_memory()[0]


async def test_a_response_is_at_most_4_mib(tmp_path: Path) -> None:
    """With its envelope; a larger answer says to stream it, before the gateway has held much of it."""
    for count, reason in [(3 * 1024, ""), (16 * 1024, "ANSWER_TOO_LARGE")]:
        plan = Plan(
            [
                Send(script.HEAD + _event(script.ROLE)),
                Send(_event(script.text("x" * 1024)) * count, 1 << 16),
                Send(_event(script.FINISH) + script.framed(script.event(script.DONE)) + script.END),
            ]
        )
        async with Upstream() as upstream, running(settings_of(upstream.base_url, tmp_path)) as gateway:
            upstream.plans[REQUEST_ID] = plan
            call = gateway.chat.CreateChatCompletion(
                chat_pb.CreateChatCompletionRequest(chat=ask(model="fake")), metadata=(("x-request-id", REQUEST_ID),)
            )
            if not reason:
                response = await call
                assert len(response.completed.choices[0].message.text) == count * 1024
                continue
            failure = await failure_of(call)
            assert (failure.reason, failure.code) == (reason, grpc.StatusCode.RESOURCE_EXHAUSTED)
            assert "stream it" in failure.message
            assert plan.peer_closed


async def test_calls_are_refused_and_ended_for_want_of_memory(tmp_path: Path) -> None:
    """A request that would take too much is refused before it is validated, and may be retried; the account is empty then.

    Only that of a caller that uses more than its part: another one's calls are answered meanwhile.
    """
    async with Upstream() as upstream:
        settings = settings_of(upstream.base_url, tmp_path, server={"max_memory_bytes": 64 * MIB})
        async with running(settings) as gateway:
            ledger = gateway.gateway._worker.memory
            other = ledger.hold(caller="ipv4:127.0.0.1")
            other.set(55 * MIB)
            start: aio.UnaryStreamMultiCallable[bytes, bytes] = gateway.channel.unary_stream(
                "/deltawire.v1.ChatCompletion/StreamChatCompletion"
            )
            with pytest.raises(aio.AioRpcError) as caught:
                await start(_request("stream")[1]).read()
            refused = taken_apart(caught.value)
            assert (refused.reason, refused.code) == ("MEMORY_LIMIT_EXCEEDED", grpc.StatusCode.RESOURCE_EXHAUSTED)
            assert refused.retry_seconds
            other.close()
            other = ledger.hold(caller="another")
            other.set(60 * MIB)
            upstream.plans["modest"] = Plan([Send(script.HEAD + BEGIN + END)])
            await read_well(gateway.stream(ask(model="fake"), metadata=(("x-request-id", "modest"),)))
            other.close()
            await until(lambda: ledger.held == 0)
            plan = Plan([Send(script.HEAD + BEGIN), Gate()])
            upstream.plans[REQUEST_ID] = plan
            reading = asyncio.create_task(
                read_badly(gateway.stream(ask(model="fake"), metadata=(("x-request-id", REQUEST_ID),)))
            )
            await plan.at_gate.wait()
            await until(lambda: bool(ledger._holds))
            await asyncio.sleep(0.1)
            other = ledger.hold()
            other.set(65 * MIB)
            events, ended = await reading
            assert ended.reason == "MEMORY_LIMIT_EXCEEDED"
            assert ended.retry_seconds
            assert events[-1].completed.error.reason == error_reason_pb2.ERROR_REASON_MEMORY_LIMIT_EXCEEDED
            other.close()
            await until(lambda: ledger.held == 0)
