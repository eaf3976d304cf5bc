"""A grpc.aio server that yields ready-made text deltas: what streaming typed messages costs before anything is done."""

from __future__ import annotations

import argparse
import asyncio
from typing import TYPE_CHECKING

import uvloop
from grpc import aio

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import chat_completion_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Servicer(chat_completion_pb2_grpc.ChatCompletionServicer):
    """Answers every stream with the same messages.

    Args:
        tokens: Messages of a stream.
        per_second: Messages per second and stream; `None` for flat out.
    """

    def __init__(self, tokens: int, per_second: float | None) -> None:
        self._tokens = tokens
        self._pause = None if per_second is None else 1 / per_second
        self._message = chat_pb.StreamChatCompletionResponse(choice_index=0)
        self._message.text_delta.text = " sea"

    async def CreateChatCompletion(  # noqa: N802 (the RPC's name)
        self, _request: chat_pb.CreateChatCompletionRequest, _context: object
    ) -> chat_pb.CreateChatCompletionResponse:
        """Not measured."""
        raise NotImplementedError

    async def StreamChatCompletion(  # noqa: N802 (the RPC's name)
        self, _request: chat_pb.StreamChatCompletionRequest, _context: object
    ) -> AsyncIterator[chat_pb.StreamChatCompletionResponse]:
        """The same message, over and over, then the end."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        for _ in range(self._tokens):
            if self._pause is not None:
                due += self._pause
                await asyncio.sleep(max(0.0, due - loop.time()))
            yield self._message
        end = chat_pb.StreamChatCompletionResponse()
        end.completed.usage.completion_tokens = self._tokens
        yield end


async def _serve(port: int, tokens: int, per_second: float | None) -> None:
    server = aio.server()
    chat_completion_pb2_grpc.add_ChatCompletionServicer_to_server(Servicer(tokens, per_second), server)  # type: ignore[abstract]
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--tokens-per-second", type=float)
    arguments = parser.parse_args()
    uvloop.run(_serve(arguments.port, arguments.tokens, arguments.tokens_per_second))


if __name__ == "__main__":
    _main()
