"""Chats with a model, and answers on their way."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from typing import TYPE_CHECKING, Self, Unpack, cast
from weakref import WeakSet

from grpc import aio

from deltawire._aio.call import invoke, task_is_cancelled
from deltawire._completion import Answer, Resumption, StreamCalls, answer_of, text_of_event
from deltawire._errors import ProtocolError
from deltawire._fields import made
from deltawire._requests import (
    ChatArguments,
    Messages,
    StreamArguments,
    ToolRunArguments,
    resume_request,
    split_arguments,
    split_streaming,
)
from deltawire._tools import shells
from deltawire._tools.loop import ToolLoop
from deltawire._values import RESUME_FOR, Seconds
from deltawire.v1.chat_completion_pb2 import (
    CancelChatCompletionRequest,
    CancelChatCompletionResponse,
    ChatRequest,
    CountTokensRequest,
    CountTokensResponse,
    CreateChatCompletionRequest,
    GetChatCompletionRequest,
    GetChatCompletionResponse,
    StreamChatCompletionResponse,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable
    from types import TracebackType

    from deltawire._channel import CallOptions, Defaults
    from deltawire._failure import FailedCall
    from deltawire._tools.loop import OnError, ToolLike, ToolRun
    from deltawire.v1.chat_completion_pb2_grpc import ChatCompletionAsyncStub


class AsyncChat:
    """Chats with a model."""

    def __init__(self, stub: ChatCompletionAsyncStub, defaults: Defaults) -> None:
        self._stub = stub
        self._defaults = defaults
        self._streams: WeakSet[AsyncChatStream] = WeakSet()

    async def create(self, messages: Messages | ChatRequest, **arguments: Unpack[ChatArguments]) -> Answer:
        """Ask, and wait for the whole answer; see `Chat.create`. Cancelling the task cancels the call."""
        chat, options = split_arguments(messages, arguments)
        outgoing = self._defaults.outgoing(options)
        response = await invoke(self._stub.CreateChatCompletion, CreateChatCompletionRequest(chat=chat), outgoing)
        return answer_of(response, outgoing.info)

    def stream(self, messages: Messages | ChatRequest, **arguments: Unpack[StreamArguments]) -> AsyncChatStream:
        """Ask, and read the answer while it is generated; see `Chat.stream`. No `await` here.

        Use the stream in an `async with` block: leaving it ends the call on both sides, which leaving an `async for`
        does not.
        """
        request, options = split_streaming(messages, arguments)
        return self._going_on(AsyncChatStream(self._stub, self._defaults, Resumption(request), options))

    def resume(
        self,
        completion_id: str,
        last_sequence: int | None = None,
        *,
        retention: Seconds = RESUME_FOR,
        **options: Unpack[CallOptions],
    ) -> AsyncChatStream:
        """Read a stream that was asked for with `retention`, replayed and then live; see `Chat.resume`. No `await` here."""
        request, patience = resume_request(completion_id, last_sequence, retention)
        return self._going_on(AsyncChatStream(self._stub, self._defaults, Resumption(request, patience), options))

    async def cancel(self, completion_id: str, **options: Unpack[CallOptions]) -> CancelChatCompletionResponse:
        """End a completion softly; see `Chat.cancel`."""
        request = made(CancelChatCompletionRequest, {"completion_id": completion_id})
        return await invoke(self._stub.CancelChatCompletion, request, self._defaults.outgoing(options))

    async def get(self, completion_id: str, **options: Unpack[CallOptions]) -> GetChatCompletionResponse:
        """How far a completion has come, and its result if that is retained; see `Chat.get`."""
        request = made(GetChatCompletionRequest, {"completion_id": completion_id})
        return await invoke(self._stub.GetChatCompletion, request, self._defaults.outgoing(options))

    async def count_tokens(
        self, messages: Messages | ChatRequest, **arguments: Unpack[ChatArguments]
    ) -> CountTokensResponse:
        """How many tokens the prompt has that `create` would send; see `Chat.count_tokens`."""
        chat, options = split_arguments(messages, arguments)
        outgoing = self._defaults.outgoing(options)
        return await invoke(self._stub.CountTokens, CountTokensRequest(chat=chat), outgoing)

    def _going_on(self, stream: AsyncChatStream) -> AsyncChatStream:
        """Take note of a stream that goes on by itself: closing the client ends it."""
        if stream._resumption.is_retained:
            self._streams.add(stream)
        return stream

    async def run_tools(
        self,
        messages: Messages | ChatRequest,
        *,
        tools: Iterable[ToolLike],
        max_rounds: int = 10,
        on_error: OnError = "raise",
        on_event: Callable[[StreamChatCompletionResponse], object] | None = None,
        **arguments: Unpack[ToolRunArguments],
    ) -> ToolRun:
        """Ask, run the functions that the model calls, and ask again, until it answers; see `Chat.run_tools`.

        The calls of a turn are run at the same time: functions with `async` here, others in threads. `on_event` may have to
        be awaited. Cancelling the task cancels the call and the functions, but a thread runs on to its end.
        """
        request, options = split_arguments(messages, cast("ChatArguments", arguments))

        async def ask(request: ChatRequest) -> Answer:
            if on_event is None:
                return await self.create(request, **options)
            async with self.stream(request, **options) as stream:
                async for event in stream:
                    if inspect.isawaitable(waiting := on_event(event)):
                        await waiting
                return await stream.final()

        return await shells.run_async(ToolLoop(request, tools, max_rounds=max_rounds, on_error=on_error), ask)


class AsyncChatStream(StreamCalls):
    """An answer on its way: iterate over its events, over `text`, or go straight to `final()`.

    All three read the same stream, so what one has taken the others do not see again; `final()` always has everything.
    """

    def __init__(
        self, stub: ChatCompletionAsyncStub, defaults: Defaults, resumption: Resumption, options: CallOptions
    ) -> None:
        super().__init__(defaults, resumption, options)
        self._stub = stub
        self._stopped = asyncio.Event()
        self._call()

    def __aiter__(self) -> AsyncIterator[StreamChatCompletionResponse]:
        return self

    async def __anext__(self) -> StreamChatCompletionResponse:
        """The next event; see `ChatStream.__next__`. Cancelling the task cancels the call."""
        while self._outcome is None:
            try:
                event = await self._read()
            except asyncio.CancelledError:
                self._cancelled()
                if task_is_cancelled():
                    raise
            else:
                if event is not None:
                    return event
        self._result()
        raise StopAsyncIteration

    @property
    def text(self) -> AsyncIterator[str]:
        """The text of choice 0, piece by piece. Raises what iterating over events raises."""
        return (piece async for event in self if (piece := text_of_event(event)))

    async def final(self) -> Answer:
        """Read to the end; see `ChatStream.final`."""
        async for _ in self:
            pass
        return self._result()

    def cancel(self) -> None:
        """End the call now, on both sides; see `ChatStream.cancel`."""
        self._cancelled()
        self._stopped.set()
        self._rpc.cancel()

    async def cancel_softly(self) -> CancelChatCompletionResponse:
        """End generation now, and let the stream end normally; see `ChatStream.cancel_softly`."""
        request, outgoing = self._softly()
        return await invoke(self._stub.CancelChatCompletion, request, outgoing)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def _call(self) -> None:
        """Make a call."""
        self._rpc = self._stub.StreamChatCompletion(self._begin(), **self._outgoing.arguments)
        self._events = self._rpc.__aiter__()

    async def _read(self) -> StreamChatCompletionResponse | None:
        """Wait for an event, or for the next call; None if there is no event to hand on."""
        try:
            event = await anext(self._events)
        except StopAsyncIteration:
            self._outgoing.ended(await self._rpc.trailing_metadata())
            await self._go_on(None)
        except aio.AioRpcError as error:
            await self._go_on(error)
        else:
            if await self._take(event):
                return event
        return None

    async def _go_on(self, failed: FailedCall | None) -> None:
        """Make the next call when it is time, unless the stream is over."""
        pause = self._end(failed)
        if pause is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await self._stopped.wait()
        if self._stopped.is_set():
            return
        try:
            self._call()
        except aio.UsageError:
            # A channel of the caller's own, which has been closed meanwhile.
            self._cancelled()

    async def _take(self, event: StreamChatCompletionResponse) -> bool:
        """Take note of an event; whether it is to be handed on."""
        if not self._begun:
            self._begun = True
            self._outgoing.began(await self._rpc.initial_metadata())
        try:
            return self._receive(event)
        except ProtocolError:
            self._rpc.cancel()
            raise
