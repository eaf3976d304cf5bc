"""The callers: so many streams at once, each read to its end."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
from grpc import aio

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import chat_completion_pb2_grpc, message_pb2, tool_pb2
from tests.bench.servers import MODEL, Server

CHANNELS = 4
"""Connections that the streams share, as a few backends would."""

STREAM_SECONDS = 300.0
"""A bound on every stream, so that a run that hangs ends."""

Stream = Callable[[], Awaitable[float]]
"""Runs one stream; gives the seconds to its first event."""


def chat_request(*, tools: bool = False) -> chat_pb.StreamChatCompletionRequest:
    """What every stream asks."""
    chat = chat_pb.ChatRequest(
        model=MODEL,
        messages=[message_pb2.Message(user=message_pb2.UserMessage(content=[message_pb2.ContentPart(text="Go on.")]))],
    )
    if tools:
        schema = json.dumps({"type": "object", "properties": {"text": {"type": "string"}}})
        for name in ("write_file", "get_weather"):
            chat.tools.append(tool_pb2.Tool(name=name, description="A tool.", input_schema=schema))
    return chat_pb.StreamChatCompletionRequest(chat=chat)


async def grpc_streams(server: Server, streams: int, tokens: int, *, tools: bool = False) -> list[float]:
    """Run streams over gRPC at once and check that each had its tokens.

    Returns:
        Seconds to each stream's first event.
    """
    channels = [
        aio.insecure_channel(f"127.0.0.1:{server.port}", [("grpc.use_local_subchannel_pool", 1)])
        for _ in range(CHANNELS)
    ]
    stubs = [chat_completion_pb2_grpc.ChatCompletionStub(channel) for channel in channels]
    request = chat_request(tools=tools)

    async def stream(number: int) -> float:
        begin = time.perf_counter()
        first = None
        last = chat_pb.StreamChatCompletionResponse()
        async for event in stubs[number % CHANNELS].StreamChatCompletion(request, timeout=STREAM_SECONDS):
            first = first or time.perf_counter() - begin
            last = event
        if first is None or last.completed.usage.completion_tokens < tokens:
            raise RuntimeError(f"{server.name} ended a stream without its {tokens} tokens: {last}")
        return first

    try:
        return await asyncio.gather(*map(stream, range(streams)))
    finally:
        for channel in channels:
            await channel.close()


async def http_streams(server: Server, streams: int, tokens: int) -> list[float]:
    """Run streams over HTTP at once, reading and not parsing; check that each had its chunks.

    Returns:
        Seconds to the first byte of each stream's body.
    """
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Go on."}],
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    timeout = aiohttp.ClientTimeout(total=STREAM_SECONDS)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:

        async def stream(_: int) -> float:
            begin = time.perf_counter()
            first = None
            events = 0
            url = f"http://127.0.0.1:{server.port}/v1/chat/completions"
            async with session.post(url, json=body) as response:
                response.raise_for_status()
                async for data in _body(response):
                    first = first or time.perf_counter() - begin
                    events += data.count(b"data: ")
            if first is None or events < tokens:
                raise RuntimeError(f"{server.name} ended a stream after {events} events of {tokens}")
            return first

        return await asyncio.gather(*map(stream, range(streams)))


async def _body(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    async for data in response.content.iter_any():
        yield data
