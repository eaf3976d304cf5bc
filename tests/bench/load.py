"""The callers: so many at once, each reading its answers to their ends."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

import httpx
from grpc import aio

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import chat_completion_pb2_grpc, message_pb2, tool_pb2
from deltawire_server.upstream.transport.client import Transport
from tests.bench.results import PROGRAMS
from tests.bench.servers import MODEL, UPSTREAM, Server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

CHANNELS = 4
"""Connections that the streams share, as a few backends would."""

STREAM_SECONDS = 300.0
"""A limit for every stream, so that a run that hangs ends."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One answer: seconds to its first event and to its end."""

    first: float
    total: float


class Load(Protocol):
    """Callers of one server, which keep their connections."""

    async def run(self, streams: int, tokens: int, *, calls: int = 1, tools: bool = False) -> list[Timing]:
        """Run streams at once, each of them several calls in sequence, and check that each answer has its tokens."""

    def hold(self) -> contextlib.AbstractAsyncContextManager[None]:
        """One stream that is open from its first event to the exit, which cancels it."""

    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *_: object) -> None: ...


def load_of(server: Server, *, channels: int = CHANNELS, model: str = MODEL) -> Load:
    """The callers for a server: over HTTP for the peers that speak only that; as for `GrpcLoad`."""
    return HttpLoad(server) if server.name in (UPSTREAM, *PROGRAMS) else GrpcLoad(server, channels, model)


def chat_request(*, tools: bool = False, model: str = MODEL) -> chat_pb.StreamChatCompletionRequest:
    """The request of every stream."""
    chat = chat_pb.ChatRequest(
        model=model,
        messages=[message_pb2.ChatMessage(user=message_pb2.UserMessage(text="Go on."))],
    )
    if tools:
        schema = json.dumps({"type": "object", "properties": {"text": {"type": "string"}}})
        for name in ("write_file", "get_weather"):
            chat.tools.append(tool_pb2.Tool(name=name, description="A tool.", input_schema=schema))
    return chat_pb.StreamChatCompletionRequest(chat=chat)


class GrpcLoad:
    """Callers over gRPC that keep their connections.

    Args:
        server: The gateway, or what stands in for it.
        channels: Their connections.
        model: What they ask for.
    """

    def __init__(self, server: Server, channels: int = CHANNELS, model: str = MODEL) -> None:
        self._server = server
        self._model = model
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channels = [aio.insecure_channel(f"127.0.0.1:{server.port}", options) for _ in range(channels)]
        self._turns = itertools.cycle(map(chat_completion_pb2_grpc.ChatCompletionStub, self._channels))

    async def __aenter__(self) -> Self:
        await asyncio.gather(*(channel.channel_ready() for channel in self._channels))
        return self

    async def __aexit__(self, *_: object) -> None:
        for channel in self._channels:
            await channel.close()

    @contextlib.asynccontextmanager
    async def hold(self) -> AsyncIterator[None]:
        """See `Load`."""
        call = next(self._turns).StreamChatCompletion(chat_request(model=self._model), timeout=STREAM_SECONDS)
        await call.read()
        yield
        call.cancel()

    async def run(self, streams: int, tokens: int, *, calls: int = 1, tools: bool = False) -> list[Timing]:
        """See `Load`."""
        request = chat_request(tools=tools, model=self._model)

        async def stream(_: int) -> list[Timing]:
            method = next(self._turns).StreamChatCompletion
            timings = []
            for _ in range(calls):
                begin = time.perf_counter()
                first = None
                last = chat_pb.StreamChatCompletionResponse()
                async for event in method(request, timeout=STREAM_SECONDS):
                    first = first or time.perf_counter() - begin
                    last = event
                if first is None or last.completed.usage.completion_tokens < tokens:
                    raise RuntimeError(f"{self._server.name} ended a stream without its {tokens} tokens: {last}")
                timings.append(Timing(first, time.perf_counter() - begin))
            return timings

        return [timing for each in await asyncio.gather(*map(stream, range(streams))) for timing in each]


class HttpLoad:
    """Callers over HTTP that keep their connections, and read without parsing.

    Args:
        server: A server of the chat API.
        running_usage: Whether every chunk has the usage so far, which gateways ask for and few callers do.
    """

    def __init__(self, server: Server, *, running_usage: bool = True) -> None:
        self._server = server
        self._body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": "Go on."}],
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": running_usage},
        }
        self._url = f"http://127.0.0.1:{server.port}/v1/chat/completions"
        transport = Transport(tls=False, max_connections=10_000)
        self._client = httpx.AsyncClient(transport=transport, timeout=httpx.Timeout(STREAM_SECONDS), trust_env=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    @contextlib.asynccontextmanager
    async def hold(self) -> AsyncIterator[None]:
        """See `Load`."""
        async with self._client.stream("POST", self._url, json=self._body) as response:
            response.raise_for_status()
            await anext(response.aiter_raw())
            yield

    async def closed(self) -> list[float]:
        """For the upstream: when callers closed connections before their answers ended, by `time.perf_counter`."""
        response = await self._client.get(f"http://127.0.0.1:{self._server.port}/closed")
        times: list[float] = response.json()
        return times

    async def run(self, streams: int, tokens: int, *, calls: int = 1, tools: bool = False) -> list[Timing]:
        """See `Load`. No tools are sent: the answer is the same, and these callers do not assemble calls."""
        del tools

        async def stream(_: int) -> list[Timing]:
            timings = []
            for _ in range(calls):
                begin = time.perf_counter()
                first = None
                events = 0
                async with self._client.stream("POST", self._url, json=self._body) as response:
                    response.raise_for_status()
                    async for data in response.aiter_raw():
                        first = first or time.perf_counter() - begin
                        events += data.count(b"data: ")
                if first is None or events < tokens:
                    raise RuntimeError(f"{self._server.name} ended a stream after {events} events of {tokens}")
                timings.append(Timing(first, time.perf_counter() - begin))
            return timings

        return [timing for each in await asyncio.gather(*map(stream, range(streams))) for timing in each]
