"""A server that plays cases, over HTTP/2 without a gRPC library: such a library cannot break off after a given event.

One case at a time. `play` begins it, `finish` says what of it the client did not do.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import re
import struct
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import ConnectionTerminated, DataReceived, RequestReceived, StreamEnded, StreamReset, WindowUpdated
from h2.exceptions import ProtocolError

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import model_registry_pb2 as registry_pb
from tests.conformance.case_pb2 import Case, ServerCall, Step
from tests.conformance.cases import ID_OF_REQUEST

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from google.protobuf.message import Message

LINGER: Final = 10.0
"""Seconds in which a client that has reported its result must end the calls that wait for that."""

_REQUESTS: Final[Mapping[str, type[Message]]] = {
    "/deltawire.v1.ChatCompletion/StreamChatCompletion": chat_pb.StreamChatCompletionRequest,
    "/deltawire.v1.ModelRegistry/WatchModels": registry_pb.WatchModelsRequest,
}
_HEALTH: Final = "/grpc.health.v1.Health/Check"
_SERVING: Final = health_pb2.HealthCheckResponse.SERVING
_UNKNOWN_FIELD: Final = b"\xc2\x3e\x02hi"
"""Field 1000 with the bytes "hi", which no message of the API has."""
_INVALID_ARGUMENT: Final = 3


@asynccontextmanager
async def serving() -> AsyncIterator[ScriptedServer]:
    """A scripted server on a free port of the loopback interface."""
    scripted = ScriptedServer()
    server = await asyncio.start_server(scripted.accept, "127.0.0.1", 0)
    scripted.target = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield scripted
    finally:
        server.close()
        await scripted.close()


class ScriptedServer:
    """Plays cases.

    Attributes:
        target: The server's address.
        completion_id: The id in the latest request of a stream.
        break_delay: See `play`.
    """

    def __init__(self) -> None:
        self.target = ""
        self.completion_id = ""
        self.break_delay = 0.0
        self._case = Case()
        self._next = 0
        self._complaints: list[str] = []
        self._connections: dict[_Connection, asyncio.Task[None]] = {}
        self._calls: set[asyncio.Task[None]] = set()

    def play(self, case: Case, break_delay: float = 0.0) -> None:
        """Begin a case.

        Args:
            case: The case.
            break_delay: Seconds between an event and a break after it. Most gRPC libraries drop what they have received, and the
                program has not read, when the connection breaks.
        """
        self._case, self._next, self._complaints = case, 0, []
        self.break_delay = break_delay
        for connection in self._connections:
            connection.had_call = False

    async def finish(self) -> list[str]:
        """End the case. Returns what the client did wrong, beside its result; empty if it did nothing wrong."""
        if self._calls:
            _, waiting = await asyncio.wait(self._calls, timeout=LINGER)
            for call in waiting:
                call.cancel()
                self._complaints.append(f"the client has not ended {call.get_name()}")
        missing = [
            number for number in range(self._next, len(self._case.calls)) if not self._case.calls[number].optional
        ]
        self._complaints += [f"call {number + 1} was not made" for number in missing]
        return self._complaints

    async def close(self) -> None:
        """Close every connection, and end every call."""
        for connection, task in self._connections.items():
            connection.close()
            task.cancel()
        await asyncio.gather(*self._calls, *self._connections.values(), return_exceptions=True)

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a connection."""
        connection = _Connection(self, writer)
        serving = asyncio.create_task(connection.run(reader))
        self._connections[connection] = serving
        serving.add_done_callback(lambda _: self._connections.pop(connection))

    def begin(self, connection: _Connection, stream: int, headers: dict[str, str], body: bytes) -> None:
        """Answer a call."""
        call = asyncio.create_task(self._answer(connection, stream, headers, body), name="a call")
        self._calls.add(call)
        call.add_done_callback(self._ended)
        connection.calls[stream] = call

    def _ended(self, call: asyncio.Task[None]) -> None:
        self._calls.discard(call)
        error = None if call.cancelled() else call.exception()
        # A client that has left is no fault: it may have canceled the call.
        if error is not None and not isinstance(error, ConnectionError | ProtocolError):
            self._complaints.append(f"{call.get_name()} cannot be played: {error!r}")

    async def _answer(self, connection: _Connection, stream: int, headers: dict[str, str], body: bytes) -> None:
        kind = _REQUESTS.get(headers[":path"])
        if headers[":path"] == _HEALTH:
            # A proxy asks it before it lets calls through.
            connection.begin(stream, {})
            await connection.send(stream, _message(health_pb2.HealthCheckResponse(status=_SERVING).SerializeToString()))
            await connection.end(stream, Step.Status())
            return
        if kind is None:
            self._complaints.append(f"no case expects a call of {headers[':path']}")
            await connection.end(stream, Step.Status(code=12, message="the conformance server has no such method"))
            return
        request = kind.FromString(body)
        self.completion_id = _about(request) or self.completion_id
        script = self._next_call(request)
        if script is None:
            self._complaints.append(f"call {self._next + 1} is one too many: {request!s}")
            await connection.end(stream, Step.Status(code=_INVALID_ARGUMENT, message="the case has no further call"))
            return
        number = f"call {self._next}"
        current = asyncio.current_task()
        assert current is not None
        current.set_name(number)
        if wrong := self._differences(script, request, headers, connection):
            self._complaints += [f"{number}: {each}" for each in wrong]
            await connection.end(stream, Step.Status(code=_INVALID_ARGUMENT, message="; ".join(wrong)))
            return
        connection.had_call = True
        await _Player(connection, stream, script, request, self.break_delay).play()

    def _next_call(self, request: Message) -> ServerCall | None:
        """What is scripted for the next call: a client may leave out optional ones, if it asks for something else."""
        while self._next < len(self._case.calls):
            script = self._case.calls[self._next]
            self._next += 1
            if not script.optional or not self._asked_wrongly(script, request):
                return script
        return None

    def _differences(
        self, script: ServerCall, request: Message, headers: dict[str, str], connection: _Connection
    ) -> list[str]:
        """How a call differs from the one that the case expects."""
        wrong = []
        if asked := self._asked_wrongly(script, request):
            wrong.append(asked)
        if script.new_connection and connection.had_call:
            wrong.append("it is on the same connection as a call before")
        for name, pattern in script.headers.items():
            if not re.fullmatch(pattern, headers.get(name, "")):
                wrong.append(f"its header {name} is {headers.get(name)!r}, expected is {pattern!r}")
        return wrong

    def _asked_wrongly(self, script: ServerCall, request: Message) -> str:
        """Whether a request is not the expected one: a sentence, or ""."""
        asks = script.WhichOneof("asks")
        if asks is None:
            return ""
        if asks == "watch":
            revision = getattr(request, "revision", None)
            return "" if revision == script.watch else f"it watches from {revision!r}, expected is {script.watch!r}"
        expected = self._case.call.stream.request
        if asks == "resume":
            expected = chat_pb.StreamChatCompletionRequest(resume=script.resume)
        if not isinstance(request, chat_pb.StreamChatCompletionRequest):
            return f"it is no stream: {request!s}"
        given = chat_pb.StreamChatCompletionRequest()
        given.CopyFrom(request)
        start = getattr(given, given.WhichOneof("start") or "chat")
        if not getattr(expected, expected.WhichOneof("start") or "chat").completion_id:
            start.completion_id = ""
        return "" if given == expected else f"it asks for\n{given!s}\nexpected is\n{expected!s}"


class _Player:
    """Plays the script of one call."""

    def __init__(
        self, connection: _Connection, stream: int, script: ServerCall, request: Message, break_delay: float
    ) -> None:
        self._connection = connection
        self._stream = stream
        self._script = script
        self._id = _about(request)
        self._break_delay = break_delay

    async def play(self) -> None:
        for step in self._script.steps:
            for repetition in range(max(1, step.times)):
                if not await self._take(step, repetition):
                    return
        await self._connection.end(self._stream, Step.Status(), self._script.response_headers)

    async def _take(self, step: Step, repetition: int) -> bool:
        """Take a step. False if it has ended the call."""
        kind = step.WhichOneof("step")
        if kind == "event":
            event = chat_pb.StreamChatCompletionResponse()
            event.CopyFrom(step.event)
            event.sequence += repetition
            if event.started.completion_id == ID_OF_REQUEST:
                event.started.completion_id = self._id
            await self._send(event.SerializeToString())
        elif kind == "unknown":
            event = chat_pb.StreamChatCompletionResponse(sequence=step.unknown.sequence + repetition)
            await self._send(event.SerializeToString() + _UNKNOWN_FIELD)
        elif kind == "change":
            await self._send(step.change.SerializeToString())
        elif kind == "pause":
            await asyncio.sleep(step.pause.ToTimedelta().total_seconds())
        elif kind == "status":
            await self._connection.end(self._stream, step.status, self._script.response_headers)
            return False
        elif kind == "wait_for_cancel":
            # The client's reset of the stream, or the end of its connection, cancels this task.
            await asyncio.Event().wait()
        else:
            await self._break(getattr(step, "break"))
            return False
        return True

    async def _send(self, data: bytes) -> None:
        self._connection.begin(self._stream, self._script.response_headers)
        await self._connection.send(self._stream, _message(data))

    async def _break(self, how: Step.Break.ValueType) -> None:
        await asyncio.sleep(self._break_delay)
        if how == Step.BREAK_PROXY:
            await self._connection.page(self._stream)
        elif how == Step.BREAK_STREAM:
            self._connection.begin(self._stream, self._script.response_headers)
            self._connection.reset(self._stream)
        else:
            if how == Step.BREAK_MESSAGE:
                self._connection.begin(self._stream, self._script.response_headers)
                await self._connection.send(self._stream, b"\0" + struct.pack(">I", 100) + b"half")
            self._connection.close()


class _Connection:
    """One HTTP/2 connection.

    Attributes:
        had_call: Whether it had a call of the current case.
        calls: The running calls by stream.
    """

    def __init__(self, server: ScriptedServer, writer: asyncio.StreamWriter) -> None:
        self.had_call = False
        self.calls: dict[int, asyncio.Task[None]] = {}
        self._server = server
        self._writer = writer
        self._h2 = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
        self._requests: dict[int, tuple[dict[str, str], bytearray]] = {}
        self._begun: set[int] = set()
        self._window = asyncio.Condition()

    async def run(self, reader: asyncio.StreamReader) -> None:
        """Serve until the client, or a script, closes the connection."""
        self._h2.initiate_connection()
        self._flush()
        with contextlib.closing(self), contextlib.suppress(ConnectionError, ProtocolError):
            while data := await reader.read(65_536):
                for event in self._h2.receive_data(data):
                    if isinstance(event, RequestReceived):
                        headers = {str(name): str(value) for name, value in event.headers or ()}
                        self._requests[event.stream_id] = (headers, bytearray())
                    elif isinstance(event, DataReceived):
                        self._requests[event.stream_id][1].extend(event.data or b"")
                        self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                    elif isinstance(event, StreamEnded):
                        headers, body = self._requests.pop(event.stream_id)
                        self._server.begin(self, event.stream_id, headers, bytes(body[5:]))
                    elif isinstance(event, StreamReset):
                        self._forget(event.stream_id)
                    elif isinstance(event, WindowUpdated):
                        async with self._window:
                            self._window.notify_all()
                    elif isinstance(event, ConnectionTerminated):
                        return
                self._flush()

    def close(self) -> None:
        """Close the connection after what was written, and end its calls."""
        self._writer.close()
        current = asyncio.current_task() if self.calls else None
        for stream, call in tuple(self.calls.items()):
            if call is not current:
                self._forget(stream)

    def begin(self, stream: int, headers: Mapping[str, str]) -> None:
        """Send the headers of an answer, once."""
        if stream not in self._begun:
            self._begun.add(stream)
            self._h2.send_headers(stream, [(":status", "200"), ("content-type", "application/grpc"), *headers.items()])
            self._flush()

    async def send(self, stream: int, data: bytes) -> None:
        """Send bytes, as fast as the client takes them."""
        while data:
            room = min(self._h2.local_flow_control_window(stream), self._h2.max_outbound_frame_size)
            if room <= 0:
                async with self._window:
                    await self._window.wait()
                continue
            self._h2.send_data(stream, data[:room])
            self._flush()
            data = data[room:]
            await self._writer.drain()

    async def end(self, stream: int, status: Step.Status, headers: Mapping[str, str] | None = None) -> None:
        """End a call. Headers that were not sent yet are sent only with status OK, as a gateway does."""
        if not status.code:
            self.begin(stream, headers or {})
        trailers = _trailers(status)
        if stream not in self._begun:
            trailers = [(":status", "200"), ("content-type", "application/grpc"), *trailers]
        self._h2.send_headers(stream, trailers, end_stream=True)
        self._flush()
        await self._writer.drain()

    async def page(self, stream: int) -> None:
        """Answer as a proxy that cannot reach the server."""
        self._h2.send_headers(stream, [(":status", "503"), ("content-type", "text/html")])
        self._h2.send_data(stream, b"<h1>503</h1>", end_stream=True)
        self._flush()
        await self._writer.drain()

    def reset(self, stream: int) -> None:
        """Reset a stream."""
        self._h2.reset_stream(stream, ErrorCodes.INTERNAL_ERROR)
        self._flush()

    def _forget(self, stream: int) -> None:
        call = self.calls.pop(stream, None)
        if call is not None:
            call.cancel()

    def _flush(self) -> None:
        self._writer.write(self._h2.data_to_send())


def _message(data: bytes) -> bytes:
    """A message as gRPC frames it."""
    return b"\0" + struct.pack(">I", len(data)) + data


def _about(request: Message) -> str:
    """The id of the completion that a request is about; "" if it has none."""
    if not isinstance(request, chat_pb.StreamChatCompletionRequest):
        return ""
    return request.resume.completion_id if request.HasField("resume") else request.chat.completion_id


def _trailers(status: Step.Status) -> list[tuple[str, str]]:
    """The trailers that end a call, as a gateway sends them."""
    trailers = [("grpc-status", str(status.code)), ("grpc-message", quote(status.message, safe=" /:;,.()"))]
    if not status.reason:
        return trailers[: 1 if not status.code else 2]
    milliseconds = str(status.retry_delay.ToMilliseconds()) if status.HasField("retry_delay") else "-1"
    trailers += [
        ("deltawire-reason", status.reason),
        ("x-request-id", "request-1"),
        ("grpc-retry-pushback-ms", milliseconds),
    ]
    if status.without_details:
        return trailers
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=status.reason, domain="deltawire.dev", metadata={"request_id": "request-1"})
    ]
    if status.fields:
        violations = [error_details_pb2.BadRequest.FieldViolation(field=field) for field in status.fields]
        details.append(error_details_pb2.BadRequest(field_violations=violations))
    if status.HasField("retry_delay"):
        details.append(error_details_pb2.RetryInfo(retry_delay=status.retry_delay))
    packed = status_pb2.Status(code=status.code, message=status.message)
    for detail in details:
        any_detail = any_pb2.Any()
        any_detail.Pack(detail)
        packed.details.append(any_detail)
    return [*trailers, ("grpc-status-details-bin", base64.b64encode(packed.SerializeToString()).decode().rstrip("="))]
