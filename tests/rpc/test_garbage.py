"""What a call held is freed at its end, not when the garbage collector finds it, which may be much later."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire_server.completions.completion import Completion
from deltawire_server.fake_vllm import Chunks, FakeVllm, Script
from deltawire_server.memory import Hold
from deltawire_server.sansio.reader import CompletionReader
from deltawire_server.upstream.request import ChatRequest
from tests.support.gateway import Lines, Running, ask, failure_of, read, tool

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import StartGateway

CHUNKS = Chunks()
FREED = (Completion, CompletionReader, ChatRequest, Hold)
"""What can be large. gRPC itself leaves each failed call's context to the garbage collector."""

CHECKED = chat_pb.ToolCallPolicy(validate_schema=True)
CALLS: dict[str, tuple[Script, dict[str, Any]]] = {
    "a whole answer": (Script.generated(), {}),
    "a refusal by the provider": (Script.error(400, "no"), {}),
    "a provider that is not there": (Script.generated(after=0, end="reset"), {}),
    "an answer that breaks": (Script.chunks([CHUNKS.role(), CHUNKS.text("a")], end="cut"), {}),
    "an answer that is too large": (Script.chunks([CHUNKS.role(), *[CHUNKS.text("a" * 1000)] * 100]), {}),
    "a schema that is invalid": (
        Script.generated(),
        {"tools": [tool(), tool("b", input_schema='{"type": "nope"}')], "tool_call_policy": CHECKED},
    ),
    "a field that is invalid": (Script.generated(), {"choice_count": -1}),
    "a silent provider": (Script.chunks([CHUNKS.role(), asyncio.Event()]), {}),
}


@pytest.fixture
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def alive() -> Counter[str]:
    """How many there are of what is to be freed."""
    return Counter(type(each).__name__ for each in gc.get_objects() if type(each) in FREED)


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize(("script", "fields"), CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("streamed", [True, False], ids=["stream", "unary"])
async def test_a_call_leaves_nothing(
    start_gateway: StartGateway,
    vllm: FakeVllm,
    lines: Lines,
    script: Script,
    fields: dict[str, Any],
    *,
    streamed: bool,
) -> None:
    """Its request, its completion and its checks are freed when it ends, whether it succeeds or fails."""
    limits = {"max_answer_bytes": 64 * 1024}
    async with start_gateway(stream=limits, provider={"silence_timeout": 0.2}) as gateway:
        before = alive()
        vllm.play(script)
        chat = ask(**fields)
        if streamed:
            await read(gateway.stream(chat))
        elif script is CALLS["a whole answer"][0]:
            await gateway.create(chat)
        else:
            await failure_of(gateway.create(chat))
        await lines.find("call")
        await _settled(before)


@pytest.mark.usefixtures("_no_collector")
async def test_a_canceled_stream_leaves_nothing(served: Running, vllm: FakeVllm, lines: Lines) -> None:
    """Its request and completion are freed when the caller cancels it."""
    before = alive()
    vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("a"), asyncio.Event()]))
    call = served.stream()
    await anext(aiter(call))
    call.cancel()
    await lines.find("call")
    await _settled(before)


async def _settled(before: Counter[str]) -> None:
    for _ in range(200):
        if alive() <= before:
            return
        await asyncio.sleep(0.01)
    assert alive() - before == Counter()
