"""A grpc.aio server that yields ready-made text deltas: what streaming typed messages costs before anything is done."""

from __future__ import annotations

import argparse
import asyncio
from typing import TYPE_CHECKING, Any

import grpc
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
        in_steps: Whether all streams send their messages at the same time, as an engine does.
        refuses: Whether it refuses every call instead.
    """

    def __init__(self, tokens: int, per_second: float | None, *, in_steps: bool, refuses: bool = False) -> None:
        self._tokens = tokens
        self._pause = None if per_second is None else 1 / per_second
        self._in_steps = in_steps
        self._refuses = refuses
        self._step: asyncio.Future[None] | None = None
        self._message = chat_pb.StreamChatCompletionResponse(choice_index=0)
        self._message.text_delta.text = " sea"

    async def StreamChatCompletion(  # noqa: N802 (the RPC's name)
        self, _request: chat_pb.StreamChatCompletionRequest, context: aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[chat_pb.StreamChatCompletionResponse]:
        """The same message, over and over, then the end."""
        if self._refuses:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        loop = asyncio.get_running_loop()
        due = loop.time()
        for _ in range(self._tokens):
            if self._pause is not None and self._in_steps:
                await self._next_step(self._pause)
            elif self._pause is not None:
                due += self._pause
                await asyncio.sleep(max(0.0, due - loop.time()))
            yield self._message
        end = chat_pb.StreamChatCompletionResponse()
        end.completed.usage.completion_tokens = self._tokens
        yield end

    async def _next_step(self, period: float) -> None:
        """Wait for the next step, whose time is a multiple of the period; all streams share one timer."""
        if self._step is None:
            loop = asyncio.get_running_loop()
            self._step = loop.create_future()
            loop.call_at((loop.time() // period + 1) * period, self._begin_step)
        await asyncio.shield(self._step)

    def _begin_step(self) -> None:
        step, self._step = self._step, None
        if step is not None:
            step.set_result(None)


async def serve(servicer: chat_completion_pb2_grpc.ChatCompletionServicer, port: int) -> None:
    """Serve until the process is ended."""
    # By default gRPC refuses some of 2,000 calls that begin at the same instant.
    server = aio.server(options=[("grpc.server.max_pending_requests", 4000)])
    chat_completion_pb2_grpc.add_ChatCompletionServicer_to_server(servicer, server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--tokens-per-second", type=float)
    parser.add_argument("--in-steps", action="store_true")
    parser.add_argument("--refuse", action="store_true")
    arguments = parser.parse_args()
    pace = (arguments.tokens, arguments.tokens_per_second)
    servicer = Servicer(*pace, in_steps=arguments.in_steps, refuses=arguments.refuse)  # type: ignore[abstract]
    uvloop.run(serve(servicer, arguments.port))


if __name__ == "__main__":
    _main()
