"""A vLLM look-alike that only writes: its answers are made once, and each chunk costs one system call.

The server under test should be the busiest process. The shipped fake encodes every chunk, which takes it as long as the gateway
takes to read one; on two cores, the gateway would then read less at a time and seem to keep up.

It also notes when a caller closes the connection of an answer that has not ended; `GET /closed` returns these times.

It has three paces. Flat out, every stream gets its next chunk in turn. In steps, as in an engine, all streams get their next
chunk at the same time. On own clocks, each stream has its own period, which begins when its request arrives.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import itertools
import json
import selectors
import socket
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from deltawire_server.fake_vllm.player import http_chunk
from deltawire_server.fake_vllm.wire import Generation

if TYPE_CHECKING:
    from collections.abc import Iterator

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\n%b\r\n\r\n"
STREAM_HEAD = HEAD % (b"text/event-stream; charset=utf-8", b"transfer-encoding: chunked")


class Client:
    """One connection: what it asked for so far, and what is left to write of its answer."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.received = b""
        self.frames: Iterator[bytes] = iter(())
        self.rest = b""
        self.open = True
        self.answering = False

    def request(self) -> tuple[str, Any] | None:
        """The next whole request's path and body, if it has come."""
        head, found, rest = self.received.partition(b"\r\n\r\n")
        if not found:
            return None
        lines = head.decode("latin-1").lower().split("\r\n")
        length = next((int(line.partition(":")[2]) for line in lines if line.startswith("content-length:")), 0)
        if len(rest) < length:
            return None
        self.received = rest[length:]
        return lines[0].split(" ")[1], json.loads(rest[:length]) if length else None

    def step(self) -> bool:
        """Write the next chunk, or what the socket did not take of the last; return whether there was any."""
        frame = self.rest or next(self.frames, b"")
        self.answering = bool(frame)
        if not frame:
            return False
        try:
            sent = self.sock.send(frame)
        except BlockingIOError:
            sent = 0
        except ConnectionError:
            # `_read` learns of it too, and closes the socket.
            return False
        self.rest = frame[sent:] if sent < len(frame) else b""
        return True


class Upstream:
    """Serves the chat API on one port.

    Args:
        port: On loopback.
        model: The name of its model.
        tokens: Of every answer.
        chunks_per_write: How many chunks go into one write; vLLM writes each alone.
        tool_call: Whether the answer is a call of the first tool offered.
        period: Seconds between two chunks of a stream; 0 for flat out.
        in_steps: Whether all streams get their chunks at the same time.
    """

    def __init__(
        self,
        port: int,
        model: str,
        tokens: int,
        chunks_per_write: int,
        *,
        tool_call: bool,
        period: float = 0.0,
        in_steps: bool = False,
    ) -> None:
        self._period = period
        self._in_steps = in_steps
        self._due: list[
            tuple[float, int, Client]
        ] = []  # a heap: the streams with a pace, by the time of the next chunk
        self._order = itertools.count()
        self._model = model
        self._tokens = tokens
        self._tool_call = tool_call
        self._chunks_per_write = chunks_per_write
        self._frames: dict[str, list[bytes]] = {}
        self._answering: list[Client] = []
        self._closed: list[float] = []
        self._selector = selectors.DefaultSelector()
        self._listener = socket.create_server(("127.0.0.1", port), backlog=4096)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def serve(self) -> None:
        """Until the process is ended."""
        while True:
            for key, _ in self._selector.select(self._pause()):
                key.data()
            self._answering = [client for client in self._answering if client.step()]
            now = time.perf_counter()
            while self._due and self._due[0][0] <= now:
                due, order, client = heapq.heappop(self._due)
                if client.open and client.step():
                    heapq.heappush(self._due, (due + self._period, order, client))

    def _pause(self) -> float | None:
        """Seconds until there is something to write; requests and disconnections are handled meanwhile."""
        if self._answering:
            return 0
        return max(0.0, self._due[0][0] - time.perf_counter()) if self._due else None

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._selector.register(sock, selectors.EVENT_READ, partial(self._read, Client(sock)))

    def _read(self, client: Client) -> None:
        with contextlib.suppress(ConnectionError):
            if data := client.sock.recv(1 << 20):
                client.received += data
                if request := client.request():
                    self._answer(client, *request)
                return
        if client.answering:
            self._closed.append(time.perf_counter())
        self._selector.unregister(client.sock)
        client.sock.close()
        client.open = False
        self._answering = [other for other in self._answering if other is not client]

    def _answer(self, client: Client, path: str, body: Any) -> None:  # noqa: ANN401 (any JSON)
        if path.endswith("/chat/completions"):
            usage = str(body.get("stream_options"))
            if usage not in self._frames:
                self._frames[usage] = self._made(body)
            client.frames = iter(self._frames[usage])
            client.answering = True
            if not self._period:
                self._answering.append(client)
                return
            now = time.perf_counter()
            due = (now // self._period + 1) * self._period if self._in_steps else now
            heapq.heappush(self._due, (due, next(self._order), client))
            return
        listing = {"object": "list", "data": [{"id": self._model, "object": "model"}]}
        reply = json.dumps(self._closed if path == "/closed" else listing).encode()
        client.sock.sendall(HEAD % (b"application/json", b"content-length: %d" % len(reply)) + reply)

    def _made(self, body: Any) -> list[bytes]:  # noqa: ANN401 (any JSON)
        """The writes of an answer. Requests differ only in the usage that they ask for, so it is made once for each kind."""
        generation = Generation(body, 1, self._model, self._tokens, self._tool_call)
        chunks = [http_chunk(event) for step in generation.steps() for event in step]
        at_once = self._chunks_per_write
        writes = [b"".join(chunks[start : start + at_once]) for start in range(0, len(chunks), at_once)]
        return [STREAM_HEAD, *writes, b"0\r\n\r\n"]


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--chunks-per-write", type=int, default=1)
    parser.add_argument("--tool-call", action="store_true")
    parser.add_argument("--tokens-per-second", type=float, help="of each stream; without it, flat out")
    parser.add_argument("--in-steps", action="store_true", help="all streams get their chunks at the same time")
    options = parser.parse_args()
    Upstream(
        options.port,
        options.model,
        options.tokens,
        options.chunks_per_write,
        tool_call=options.tool_call,
        period=1 / options.tokens_per_second if options.tokens_per_second else 0.0,
        in_steps=options.in_steps,
    ).serve()


if __name__ == "__main__":
    _main()
