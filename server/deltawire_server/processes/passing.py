"""Passes calls on to the worker that has their completion, and receives the calls that siblings pass on.

A call that lists completions is sent to all workers, and one with a caller's name and an id that the caller chose to one after the
other, because the place of such an id depends on the caller's credential.

    caller ──▶ public listener ── access, receiving ──▶ Passing ── another worker's id ──▶ that worker's private listener
                                                          └── otherwise ──▶ the service of this process

The private listener is a unix socket in a directory that only this user can enter. It takes the caller's name from metadata
that siblings send; the public listeners ignore this metadata. Answers are passed on as bytes.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc import aio

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import chat_completion_pb2_grpc
from deltawire_server.completions.records import lost
from deltawire_server.errors import Code, DeltawireError, GatewayError, Reason, Violation
from deltawire_server.rpc import completion_list
from deltawire_server.rpc.chat_completion import slow_caller
from deltawire_server.rpc.interceptors import (
    ADMITTED,
    HOST,
    PROVIDER_TOKEN,
    REQUEST_ID,
    STREAM_CHAT,
    call_record,
    passed_on,
)
from deltawire_server.rpc.reception import PENDING_REQUESTS
from deltawire_server.rpc.status import DETAILS_TRAILER
from deltawire_server.rpc.writer import StreamWriter

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from deltawire_server.memory import Ledger
    from deltawire_server.processes.worker_process import WorkerProcess
    from deltawire_server.rpc.interceptors import CallRecord

    _Context = aio.ServicerContext[Any, Any]
    _Handler = grpc.RpcMethodHandler[Any, Any]
    _Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]]

CALLER = "deltawire-caller-bin"
OWNER = "deltawire-owner-bin"
ASSERTION = "deltawire-assertion-bin"
"""The metadata by which a sibling names the caller; binary, because a name in a certificate may be any text."""

RETRY_SECONDS = 1.0
"""When to retry a call whose worker has ended: a new one takes about as long to start."""

CLOSE_SECONDS = 1.0
"""How long the calls of a channel that could not connect have to notice it before the channel is closed."""

METADATA_BYTES = 64 * 1024
"""The largest metadata of a passed-on call: the caller's own metadata, which gRPC limits to 16 KiB, and its name."""

_ID_OF: Mapping[str, Callable[[Any], str]] = {
    "/deltawire.v1.ChatCompletion/CreateChatCompletion": lambda request: request.chat.completion_id,
    STREAM_CHAT: lambda request: (request.resume if request.HasField("resume") else request.chat).completion_id,
    "/deltawire.v1.ChatCompletion/CancelChatCompletion": lambda request: request.completion_id,
    "/deltawire.v1.ChatCompletion/GetChatCompletion": lambda request: request.completion_id,
}
"""The id of the completion that a request is about, by method; empty for a new completion without an id of the caller's."""

LIST = "/deltawire.v1.ChatCompletion/ListChatCompletions"

LIST_SECONDS = 5.0
"""How long a sibling may take to list its completions; otherwise the page is returned without them."""

_UNKNOWN = frozenset({Reason.COMPLETION_NOT_FOUND, Reason.COMPLETION_GONE})

_SIZES = [("grpc.max_metadata_size", METADATA_BYTES), ("grpc.absolute_max_metadata_size", METADATA_BYTES)]


class Passing(aio.ServerInterceptor):
    """The innermost interceptor of the public listeners, and the private listener.

    Args:
        process: This worker.
        calls: The interceptor of every call, public or passed on.
        memory: The memory of all calls.
        max_receive_bytes: Size of the largest request.
        slow_caller_timeout: Seconds that one message of a stream may wait for its caller.

    Attributes:
        server: The server of the private listener. Add the service to it before `start`.
    """

    def __init__(
        self,
        process: WorkerProcess,
        calls: aio.ServerInterceptor,
        memory: Ledger,
        *,
        max_receive_bytes: int,
        slow_caller_timeout: float,
    ) -> None:
        self._process = process
        self._memory = memory
        self._slow_caller_timeout = slow_caller_timeout
        self._channels: dict[int, aio.Channel] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self.server = aio.server(
            interceptors=[_NamedCaller(), calls],
            options=[
                ("grpc.max_receive_message_length", max_receive_bytes),
                ("grpc.http2.bdp_probe", 0),  # as on the public listeners
                *PENDING_REQUESTS,
                *_SIZES,
            ],
        )

    async def start(self) -> None:
        """Receive calls from siblings; `close` ends it."""
        self.server.add_insecure_port(self._process.socket(self._process.number))
        await self.server.start()

    async def close(self) -> None:
        """Cancel the calls that were passed on in either direction."""
        await self.server.stop(0)
        await asyncio.gather(*self._closing, *(channel.close() for channel in self._channels.values()))

    async def intercept_service(
        self, continuation: _Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> _Handler:
        """Wrap the handler of a method that is about one completion in one that may pass the call on."""
        handler = cast("_Handler", await continuation(handler_call_details))
        method = handler_call_details.method
        if method == LIST:
            return self._listing(handler)
        id_of = _ID_OF.get(method)
        if id_of is None:
            return handler
        streams = handler.response_streaming
        here = cast("Any", handler.unary_stream if streams else handler.unary_unary)
        serialize = cast("Callable[[Any], bytes]", handler.response_serializer)

        # Not a coroutine, which would keep the request in memory until the call ends.
        def routed(request: Any, context: _Context) -> Awaitable[object]:  # noqa: ANN401 (a message)
            completion_id = id_of(request)
            if method not in ADMITTED and request.caller and self._process.named_by(completion_id) is None:
                return self._search(method, here, request, context)
            number = self._process.number_for(call_record(context).owner, completion_id)
            if number == self._process.number:
                return cast("Awaitable[object]", here(request, context))
            new = method in ADMITTED and not (streams and request.HasField("resume"))
            unsent = [request.SerializeToString()]
            return self._pass_on(method, unsent, context, completion_id, number, new=new, streams=streams)

        make = grpc.unary_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler

        def serialized(message: object) -> bytes:
            return message if isinstance(message, bytes) else serialize(message)

        return cast("_Handler", cast("Any", make)(routed, handler.request_deserializer, serialized))

    def _listing(self, handler: _Handler) -> _Handler:
        """The handler of LIST: the pages of all workers as one."""
        here = cast("Any", handler.unary_unary)

        async def listed(
            request: chat_pb.ListChatCompletionsRequest, context: _Context
        ) -> chat_pb.ListChatCompletionsResponse:
            record = call_record(context)
            query = completion_list.query_of(request, record)
            siblings = [number for number in range(self._process.count) if number != self._process.number]
            own, *others = await asyncio.gather(
                here(request, context), *(self._listed_by(number, request, record, context) for number in siblings)
            )
            parts = [own, *(each for each in others if each is not None)]
            unreachable = [number for number, each in zip(siblings, others, strict=True) if each is None]
            return completion_list.joined(query, parts, unreachable)

        return cast(
            "_Handler",
            cast("Any", grpc.unary_unary_rpc_method_handler)(
                listed, handler.request_deserializer, handler.response_serializer
            ),
        )

    async def _listed_by(
        self, number: int, request: chat_pb.ListChatCompletionsRequest, record: CallRecord, context: _Context
    ) -> chat_pb.ListChatCompletionsResponse | None:
        """The page of another worker; `None` if it does not answer."""
        remaining = cast("float | None", context.time_remaining())  # None without a deadline, unlike grpc's types
        timeout = LIST_SECONDS if remaining is None else min(LIST_SECONDS, remaining)
        stub = chat_completion_pb2_grpc.ChatCompletionStub(self._channel(number))
        try:
            return await stub.ListChatCompletions(request, timeout=timeout, metadata=_metadata(record))
        except aio.AioRpcError:
            return None

    async def _search(self, method: str, here: Any, request: Any, context: _Context) -> object:  # noqa: ANN401
        """Look for a completion of a named caller at each worker.

        Raises:
            DeltawireError: PERMISSION_DENIED: it is another caller's, and this one is no operator. COMPLETION_NOT_FOUND: no worker
                has it; COMPLETION_GONE if one has ended.
        """
        completion_list.require_operator(call_record(context), request.caller)
        own = self._process.number
        missing: list[DeltawireError] = []
        for number in [own, *(each for each in range(self._process.count) if each != own)]:
            try:
                if number == own:
                    return await here(request, context)
                unsent = [request.SerializeToString()]
                return await self._pass_on(
                    method, unsent, context, request.completion_id, number, new=False, streams=False
                )
            except DeltawireError as error:
                if error.reason not in _UNKNOWN:
                    raise
                missing.append(error.again())
        raise max(missing, key=lambda error: error.reason is Reason.COMPLETION_GONE)

    async def _pass_on(
        self,
        method: str,
        unsent: list[bytes],
        context: _Context,
        completion_id: str,
        number: int,
        *,
        new: bool,
        streams: bool,
    ) -> bytes | None:
        """Call another worker, and return its response or write its stream.

        Raises:
            DeltawireError: The error of the other worker; COMPLETION_GONE if it has ended.
        """
        record = call_record(context)
        record.values.update(completion_id=completion_id, passed_to=number)
        if record.place is not None:
            record.place.release()  # the other worker has the completion, and so its place
        size = len(unsent[0])
        if new:
            record.count()
            self._memory.admit(size, record.share.key)
        channel = self._channel(number)
        # `pop`, because the call keeps what it is given until its end, which may be much later than the request is sent.
        passing: Any = channel.unary_stream(method, request_serializer=list.pop)
        call: aio.UnaryStreamCall[Any, bytes] = passing(
            unsent, timeout=context.time_remaining(), metadata=_metadata(record)
        )
        response: bytes | None = None
        try:
            with self._memory.hold(caller=record.share.key) as held:
                held.set(size)
                await call.wait_for_connection()  # the request is sent
            async with StreamWriter(context, record, self._slow_caller_timeout, slow_caller) as writer:
                while isinstance(message := await call.read(), bytes):
                    if streams:
                        await writer.write(message)
                    else:
                        response = message
        except aio.AioRpcError as error:
            failure = _error_of(error)
            if failure is None and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise asyncio.CancelledError from None  # the caller's deadline, which passes on its side too
            if failure is None and new and not record.begun:
                failure = lost(completion_id, Code.UNAVAILABLE, RETRY_SECONDS)
            raise failure or lost(completion_id, Code.ABORTED if record.begun else None) from None
        finally:
            call.cancel()
        if streams:
            record.latch.succeed()
        return response

    def _channel(self, number: int) -> aio.Channel:
        """The channel to a worker. One that could not connect is replaced, because gRPC would wait before it tries again."""
        channel = self._channels.get(number)
        if channel is not None and channel.get_state() is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
            del self._channels[number]
            closing = asyncio.create_task(channel.close(CLOSE_SECONDS))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        if number not in self._channels:
            options = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1), *_SIZES]
            self._channels[number] = aio.insecure_channel(self._process.socket(number), options=options)
        return self._channels[number]


class _NamedCaller(aio.ServerInterceptor):
    """Sets `passed_on`, from the metadata of a call that a sibling passes on."""

    async def intercept_service(
        self, continuation: _Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> _Handler:
        given = dict(cast("Any", handler_call_details.invocation_metadata))
        caller, owner, assertion = (given[name].decode() for name in (CALLER, OWNER, ASSERTION))
        passed_on.set((caller, owner, assertion))
        return cast("_Handler", await continuation(handler_call_details))


def _metadata(record: CallRecord) -> list[tuple[str, str | bytes]]:
    """The metadata of a passed-on call: what is forwarded to the provider, and the caller."""
    call = record.call
    forwarded = {
        REQUEST_ID: call.request_id,
        PROVIDER_TOKEN: call.token,
        "traceparent": call.traceparent,
        "tracestate": call.tracestate,
        HOST: record.share.key,
    }
    named = {CALLER: record.caller, OWNER: record.owner, ASSERTION: record.assertion}
    return [
        *((name, value) for name, value in forwarded.items() if value),
        *((name, value.encode()) for name, value in named.items()),
    ]


def _error_of(error: aio.AioRpcError) -> DeltawireError | None:
    """The error of which `rpc.status` made a status; `None` if gRPC itself made the status."""
    packed = dict(error.trailing_metadata() or ()).get(DETAILS_TRAILER)
    if not isinstance(packed, bytes):
        return None
    status = status_pb2.Status.FromString(packed)
    info, request, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    retries = False
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(request)
        retries |= detail.Unpack(retry)
    return GatewayError(
        Reason[info.reason],
        status.message,
        code=Code(status.code),
        metadata=info.metadata,
        violations=[Violation(each.field, each.description) for each in request.field_violations],
        retry_after=retry.retry_delay.ToNanoseconds() / 1e9 if retries else None,
    )
