"""The callers: so many streams at once, each read to its end."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Self

import httpx
from grpc import aio

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import chat_completion_pb2_grpc, message_pb2, tool_pb2
from deltawire_server.upstream.transport.client import Transport
from tests.bench.servers import MODEL, Server

CHANNELS = 4
"""Connections that the streams share, as a few backends would."""

STREAM_SECONDS = 300.0
"""A bound on every stream, so that a run that hangs ends."""


def chat_request(*, tools: bool = False) -> chat_pb.StreamChatCompletionRequest:
    """What every stream asks."""
    chat = chat_pb.ChatRequest(
        model=MODEL,
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
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channels = [aio.insecure_channel(f"127.0.0.1:{server.port}", options) for _ in range(CHANNELS)]
        self._stubs = [chat_completion_pb2_grpc.ChatCompletionStub(channel) for channel in self._channels]

    async def __aenter__(self) -> Self:
        await asyncio.gather(*(channel.channel_ready() for channel in self._channels))
        return self

    async def __aexit__(self, *_: object) -> None:
        for channel in self._channels:
            await channel.close()

    async def run(self, streams: int, tokens: int, *, tools: bool = False) -> list[float]:
        """Run streams at once and check that each had its tokens.

        Returns:
            Seconds to each stream's first event.
        """
        request = chat_request(tools=tools)

        async def stream(number: int) -> float:
            begin = time.perf_counter()
            first = None
            last = chat_pb.StreamChatCompletionResponse()
            async for event in self._stubs[number % CHANNELS].StreamChatCompletion(request, timeout=STREAM_SECONDS):
                first = first or time.perf_counter() - begin
                last = event
            if first is None or last.completed.usage.completion_tokens < tokens:
                raise RuntimeError(f"{self._server.name} ended a stream without its {tokens} tokens: {last}")
            return first

        return await asyncio.gather(*map(stream, range(streams)))


class HttpLoad:
    """Callers over HTTP that keep their connections, and read without parsing.

    Args:
        server: What speaks the chat API.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._url = f"http://127.0.0.1:{server.port}/v1/chat/completions"
        transport = Transport(tls=False, max_connections=10_000)
        self._client = httpx.AsyncClient(transport=transport, timeout=httpx.Timeout(STREAM_SECONDS), trust_env=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def run(self, streams: int, tokens: int) -> list[float]:
        """Run streams at once and check that each had its chunks.

        Returns:
            Seconds to the first bytes of each stream's body.
        """
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": "Go on."}],
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }

        async def stream(_: int) -> float:
            begin = time.perf_counter()
            first = None
            events = 0
            async with self._client.stream("POST", self._url, json=body) as response:
                response.raise_for_status()
                async for data in response.aiter_raw():
                    first = first or time.perf_counter() - begin
                    events += data.count(b"data: ")
            if first is None or events < tokens:
                raise RuntimeError(f"{self._server.name} ended a stream after {events} events of {tokens}")
            return first

        return await asyncio.gather(*map(stream, range(streams)))
