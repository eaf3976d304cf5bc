"""The smallest gateway: what forwarding an answer as typed messages costs in Python, without anything else.

It sends the request over the gateway's own transport, reads the answer with the gateway's own reader, and writes each event as a
message. There is no validation, access, admission, timeout, queue, registry, replica, record or log. What a gateway of this kind
costs above this is what all of these cost together.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import TYPE_CHECKING

import httpx
import msgspec
import uvloop

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import chat_completion_pb2_grpc
from deltawire_server.completions.info import CompletionInfo, Timings
from deltawire_server.rpc.convert import ResponseWriter
from deltawire_server.sansio.events import Completed
from deltawire_server.sansio.reader import CompletionReader, Limits
from deltawire_server.upstream.body import AnswerBody
from deltawire_server.upstream.request import Sampling
from deltawire_server.upstream.transport.client import Transport
from tests.bench.bare import serve

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from deltawire_server.errors import DeltawireError
    from deltawire_server.sansio.events import Event

USAGE = {"include_usage": True, "continuous_usage_stats": True}


class _Completion:
    """What the messages have of a completion."""

    def __init__(self, model: str) -> None:
        self.head = CompletionInfo("cmpl-0", model, "", "vllm", 0.0, Sampling())
        self.failure: DeltawireError | None = None
        self.timings = Timings(0.0)


class Servicer(chat_completion_pb2_grpc.ChatCompletionServicer):
    """Forwards streams.

    Args:
        upstream: The URL of the upstream.
    """

    def __init__(self, upstream: str) -> None:
        self._transport = Transport(max_connections=10_000)
        client = httpx.AsyncClient(transport=self._transport)
        request = client.build_request("POST", f"{upstream}/v1/chat/completions")
        del request.headers["content-length"]
        self._prepared = self._transport.prepare(request)

    async def StreamChatCompletion(  # noqa: N802 (the RPC's name)
        self, request: chat_pb.StreamChatCompletionRequest, _context: object
    ) -> AsyncIterator[chat_pb.StreamChatCompletionResponse]:
        """One answer."""
        chat = request.chat
        messages = [{"role": "user", "content": message.user.text} for message in chat.messages]
        body = {"model": chat.model, "messages": messages, "stream": True, "stream_options": USAGE}
        content = msgspec.json.encode(body)
        headers = (("content-type", "application/json"), ("content-length", str(len(content))))
        exchange = await self._transport.send(self._prepared, headers, _once(content), {})
        reader = CompletionReader(
            choice_count=1,
            offered_tools={},
            stop=(),
            stop_token_ids=(),
            incremental=False,
            argument_checks={},
            whole=False,
            limits=Limits(),
        )
        events: list[Event] = []
        news = asyncio.Event()

        def receive(data: bytes) -> None:
            events.extend(reader.receive(data))
            news.set()

        answer = AnswerBody(b"", exchange)
        answer.follow(receive, lambda _: news.set())
        responses = ResponseWriter(_Completion(chat.model), 1 << 20)
        sequence = 0
        while True:
            if not events:
                news.clear()
                await news.wait()
            taken, events[:] = tuple(events), []
            for event in taken:
                yield responses.message(sequence, event)
                sequence += 1
            if taken and isinstance(taken[-1], Completed):
                break
        answer.close()
        exchange.close()


async def _once(content: bytes) -> AsyncIterator[bytes]:
    yield content


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream", required=True)
    arguments = parser.parse_args()
    uvloop.run(serve(Servicer(arguments.upstream), arguments.port))  # type: ignore[abstract]


if __name__ == "__main__":
    _main()
