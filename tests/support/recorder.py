"""Records every completion of the gateways in this process and checks it against the contract, whichever client calls."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError, Message
from grpc import aio

from deltawire.v1 import chat_completion_pb2 as chat_pb
from tests.support.contract import ContractError, Ending, check_failure, check_stream, check_whole

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_SERVICE = "/deltawire.v1."
_STREAM = f"{_SERVICE}ChatCompletion/StreamChatCompletion"
_CREATE = f"{_SERVICE}ChatCompletion/CreateChatCompletion"
_KINDS = {True: "stream", False: "unary"}
_Context = aio.ServicerContext[Any, Any]


class Recorder(aio.ServerInterceptor):
    """The outermost interceptor of a gateway.

    Attributes:
        broken: What was wrong, for each call that broke the contract.
        checked: How many calls of each method have ended and were checked.
    """

    def __init__(self) -> None:
        self.broken: list[str] = []
        self.checked: Counter[str] = Counter()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Find the handler and wrap it."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(_SERVICE):
            return cast("grpc.RpcMethodHandler[Any, Any]", handler)
        # The gateway reads the one request of a call itself, so to gRPC its methods have a stream of them.
        kind = f"{_KINDS[handler.request_streaming]}_{_KINDS[handler.response_streaming]}"
        behaviour = cast("Any", getattr(handler, kind))
        make = getattr(grpc, f"{kind}_rpc_method_handler")

        async def recorded(request: object, context: _Context) -> object:
            recording = _Recording(context)
            if not handler.request_streaming:
                recording.request = request
            answer, ended = None, False
            try:
                # A handler that yields is read here, so that gRPC sees one that writes.
                if inspect.isasyncgenfunction(behaviour):
                    async for response in behaviour(request, recording):
                        await recording.write(response)
                else:
                    answer = await behaviour(request, recording)
                ended = True
            finally:
                self._check(method, recording.request, recording, answer, recording.ending(ended=ended))
            return answer

        return cast(
            "grpc.RpcMethodHandler[Any, Any]",
            make(recorded, handler.request_deserializer, handler.response_serializer),
        )

    def _check(self, method: str, request: object, recording: _Recording, answer: object, ending: Ending) -> None:
        self.checked[method.rpartition("/")[2]] += 1
        try:
            if method == _STREAM:
                check_stream(_parsed(chat_pb.StreamChatCompletionRequest, request), recording.responses, ending)
            elif method == _CREATE:
                whole = None if answer is None else _parsed(chat_pb.CreateChatCompletionResponse, answer)
                check_whole(_parsed(chat_pb.CreateChatCompletionRequest, request), whole, ending)
            elif not recording.responses:
                check_failure(ending)
        except ContractError as broken:
            self.broken.append(f"{method}: {broken}")


_Parsed = TypeVar("_Parsed", bound=Message)


def _parsed(kind: type[_Parsed], request: object) -> _Parsed:
    """A message, which may be in bytes: a request that a handler parses, or a response that another worker made.

    An empty one if it is not protobuf.
    """
    if isinstance(request, bytes):
        with contextlib.suppress(DecodeError):
            return kind.FromString(request)
        return kind()
    assert isinstance(request, kind)
    return request


class _Recording:
    """A call's context that keeps what the handler sends and how it ends the call."""

    def __init__(self, context: _Context) -> None:
        self.request: object = b""
        self.responses: list[Any] = []
        self._context = context
        self._initial: tuple[Any, ...] = ()
        self._trailers: tuple[Any, ...] = ()
        self._code = grpc.StatusCode.OK
        self._message = ""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (all that is not recorded)
        return getattr(self._context, name)

    async def read(self) -> object:
        self.request = await self._context.read()
        return self.request

    async def write(self, message: Any) -> None:  # noqa: ANN401
        # A copy, since a writer may use its message again.
        if isinstance(message, bytes):  # passed on by another worker
            copy = chat_pb.StreamChatCompletionResponse.FromString(message)
        else:
            copy = type(message)()
            copy.CopyFrom(message)
        await self._context.write(message)
        self.responses.append(copy)

    async def send_initial_metadata(self, metadata: Any) -> None:  # noqa: ANN401
        self._initial = tuple(metadata)
        await self._context.send_initial_metadata(metadata)

    def set_trailing_metadata(self, metadata: Any) -> None:  # noqa: ANN401
        self._trailers = tuple(metadata)
        self._context.set_trailing_metadata(metadata)

    def set_code(self, code: grpc.StatusCode) -> None:
        self._code = code
        self._context.set_code(code)

    def set_details(self, details: str) -> None:
        self._message = details
        self._context.set_details(details)

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> None:  # noqa: ANN401
        self._code, self._message = code, details
        self._trailers = tuple(trailing_metadata) or self._trailers
        await self._context.abort(code, details, trailing_metadata)

    def ending(self, *, ended: bool) -> Ending:
        """How the call ended; `ended` if its handler returned."""
        task = asyncio.current_task()
        # The gateway raises it too, if it cannot write because the caller has gone, and gRPC cancels the task only afterwards.
        gone = isinstance(sys.exception(), asyncio.CancelledError)
        cancelled = gone or self._context.cancelled() or (task is not None and task.cancelling() > 0)
        code = self._code.name if ended or self._code is not grpc.StatusCode.OK else "UNKNOWN"
        # The caller's deadline arrives as a cancel, too.
        return Ending(code, self._message, self._trailers, self._initial, by_caller=cancelled and not ended)
