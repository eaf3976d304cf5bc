"""Clients that are killed, and connections that break, anywhere in a stream: no character is lost, and none comes twice."""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING

import pytest
from google.protobuf.duration_pb2 import Duration
from grpc import aio

from deltawire import AsyncClient, CompletionNotFoundError, StreamChatCompletionResponse, chat_request
from deltawire._completion import elsewhere
from deltawire.v1.chat_completion_pb2 import ChatRequest, StreamChatCompletionRequest, StreamOptions
from deltawire.v1.chat_completion_pb2_grpc import ChatCompletionStub
from deltawire_server.fake_vllm import Script
from deltawire_server.sansio.events import Completed
from tests.support import recordings
from tests.support.cutting import CuttingProxy
from tests.support.gateway import tool
from tests.support.recordings import TRANSCRIPTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deltawire import AsyncChatStream
    from deltawire_server.fake_vllm import FakeVllm
    from tests.support.gateway import Running

POINTS = 200


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next call is made at once."""
    monkeypatch.setattr(elsewhere, "MAX_PAUSE", 0.0)


def answers() -> list[str]:
    """Recordings of answers that say something and end well."""
    found = []
    for name in recordings.names():
        last = recordings.load(name).read(incremental=False)[-1]
        if isinstance(last, Completed) and last.fault is None:
            found.append(name)
    return found


async def whole(served: Running, completion_id: str) -> list[StreamChatCompletionResponse]:
    """The stream from the beginning, over a connection that holds."""
    async with AsyncClient(served.address) as client, client.chat.resume(completion_id) as stream:
        return [event async for event in stream]


def held(name: str, events: Sequence[StreamChatCompletionResponse]) -> None:
    """Hold what was read, in however many calls, to the recorded answer: every character once, in order."""
    assert [event.sequence for event in events] == list(range(len(events)))
    expected = recordings.load(name).read(incremental=True)[-1]
    assert isinstance(expected, Completed)
    for choice in expected.choices:
        mine = [event for event in events if event.choice_index == choice.index]
        assert "".join(event.text_delta.text for event in mine) == choice.text
        assert "".join(event.reasoning_delta.text for event in mine) == choice.reasoning
        verdicts = [
            event.tool_call_delta for event in mine if event.tool_call_delta.WhichOneof("outcome") == "tool_call"
        ]
        assert [verdict.tool_call.arguments for verdict in verdicts] == [call.arguments for call in choice.tool_calls]
        for verdict in verdicts:
            pieces = [
                event.tool_call_delta.arguments_fragment
                for event in mine
                if event.tool_call_delta.index == verdict.index
            ]
            assert ("".join(pieces) or "{}") == verdict.tool_call.arguments


class Answers:
    """Recorded answers, asked for through a proxy; each is as many bytes on the wire as it was the first time."""

    def __init__(self, served: Running, vllm: FakeVllm) -> None:
        self._served = served
        self._vllm = vllm
        self._sizes: dict[str, int] = {}
        self._asked = 0

    async def size(self, name: str) -> int:
        """Bytes of an answer on a connection of its own."""
        if name not in self._sizes:
            async with CuttingProxy(self._served.address, lambda: None) as proxy:
                async with AsyncClient(proxy.address) as client, self.stream(client, name) as stream:
                    held(name, [event async for event in stream])
                self._sizes[name] = proxy.passed
        return self._sizes[name]

    def asked(self, name: str) -> ChatRequest:
        """Have it played next; the request for it, with another id each time."""
        self._vllm.play(Script.recording(TRANSCRIPTS / f"{name}.sse"))
        self._asked += 1
        asked = recordings.load(name).asked
        return chat_request(
            "hi",
            model="fake",
            choice_count=asked["choice_count"],
            tools=[tool(called, input_schema=schema) for called, schema in asked["offered_tools"].items()],
            incremental_tool_calls=True,
            completion_id=f"asked-{self._asked}",
        )

    def stream(self, client: AsyncClient, name: str) -> AsyncChatStream:
        """Ask for it."""
        return client.chat.stream(self.asked(name), retention=60)


@pytest.fixture
def recorded(served: Running, vllm: FakeVllm) -> Answers:
    """The answers."""
    return Answers(served, vllm)


async def read_until_cut(proxy: CuttingProxy, chat: ChatRequest) -> list[StreamChatCompletionResponse]:
    """What a client has read when it dies: one that tries nothing again."""
    events: list[StreamChatCompletionResponse] = []
    options = StreamOptions(retention=Duration(seconds=60))
    async with aio.insecure_channel(proxy.address, (("grpc.enable_retries", 0),)) as channel:
        call = ChatCompletionStub(channel).StreamChatCompletion(StreamChatCompletionRequest(chat=chat, options=options))
        with contextlib.suppress(aio.AioRpcError):
            async for event in call:
                events.append(event)  # noqa: PERF401 (kept when it breaks)
    return events


async def rest_of(
    served: Running, request: ChatRequest, events: Sequence[StreamChatCompletionResponse]
) -> list[StreamChatCompletionResponse]:
    """What another client reads, which knows what the dead one had read, and what it had asked."""
    async with AsyncClient(served.address) as client:
        try:
            async with client.chat.resume(request.completion_id, events[-1].sequence if events else None) as stream:
                return [event async for event in stream]
        except CompletionNotFoundError:
            assert not events  # it died before its request had arrived
            async with client.chat.stream(request, retention=60) as stream:
                return [event async for event in stream]


async def test_a_client_killed_anywhere(served: Running, recorded: Answers) -> None:
    """Another one reads on after the last event that the dead one had, at two hundred random places in recorded answers."""
    chance = random.Random(4)  # noqa: S311 (the same places in every run)
    names = answers()
    killed = 0
    while killed < POINTS:
        name = chance.choice(names)
        size = await recorded.size(name)
        request = recorded.asked(name)
        async with CuttingProxy(served.address, lambda size=size: chance.randrange(1, size)) as proxy:  # type: ignore[misc]
            events = await read_until_cut(proxy, request)
        if not proxy.cuts:
            continue  # it was all there before
        killed += 1
        events += await rest_of(served, request, events)
        held(name, events)
        assert events == await whole(served, request.completion_id)


async def test_a_connection_that_breaks_again_and_again(served: Running, recorded: Answers) -> None:
    """The stream goes on by itself each time; who reads it notices nothing but the time it takes."""
    chance = random.Random(5)  # noqa: S311 (the same places in every run)
    resumed = 0
    for name in answers():
        size = await recorded.size(name)
        # Enough for what a connection says before the first message, and for some of the answer.
        async with (
            CuttingProxy(served.address, lambda size=size: chance.randrange(400, 400 + size)) as proxy,  # type: ignore[misc]
            AsyncClient(proxy.address) as client,
            recorded.stream(client, name) as stream,
        ):
            events = [event async for event in stream]
            answer = await stream.final()
        held(name, events)
        assert answer.completed == events[-1].completed
        resumed += stream.resumed
    assert resumed > len(answers()) // 4
