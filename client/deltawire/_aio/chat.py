"""Chats with a model, and answers on their way."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from typing import TYPE_CHECKING, Self, Unpack, cast

from grpc import aio

from deltawire._aio.call import invoke, pause, task_is_cancelled
from deltawire._completion import Resumption, StreamCalls, answer_of, text_of_event
from deltawire._errors import ClientClosedError
from deltawire._failure import failed_call
from deltawire._fields import made
from deltawire._requests import (
    ChatArguments,
    CompletionListArguments,
    CompletionPages,
    Messages,
    StreamArguments,
    ToolRunArguments,
    resume_request,
    split_arguments,
    split_completion_listing,
    split_streaming,
)
from deltawire._tools import shells
from deltawire._tools.loop import ToolLoop
from deltawire._values import RESUME_FOR, Seconds
from deltawire.v1.chat_completion_pb2 import (
    CancelChatCompletionRequest,
    CancelChatCompletionResponse,
    ChatRequest,
    CompletionSummary,
    CountTokensRequest,
    CountTokensResponse,
    CreateChatCompletionRequest,
    GetChatCompletionRequest,
    GetChatCompletionResponse,
    ListChatCompletionsRequest,
    StreamChatCompletionRequest,
    StreamChatCompletionResponse,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable
    from types import TracebackType

    from deltawire._aio.connections import Connections
    from deltawire._answer import Answer
    from deltawire._channel import CallOptions, Defaults
    from deltawire._failure import FailedCall
    from deltawire._tools.loop import OnError, ToolLike, ToolRun
    from deltawire.v1.chat_completion_pb2_grpc import ChatCompletionAsyncStub


class AsyncChat:
    """Chats with a model."""

    def __init__(self, connections: Connections, defaults: Defaults) -> None:
        self._connections = connections
        self._stub = connections.main.chat
        self._defaults = defaults

    async def create(self, messages: Messages | ChatRequest, **arguments: Unpack[ChatArguments]) -> Answer:
        """Send a request, and wait for the whole answer; see `Chat.create`. Canceling the task cancels the call."""
        chat, options = split_arguments(messages, arguments)
        outgoing = self._defaults.outgoing(options).about(chat.completion_id, begins=True)
        response = await invoke(self._stub.CreateChatCompletion, CreateChatCompletionRequest(chat=chat), outgoing)
        outgoing.found(response.started.completion_id)
        return answer_of(response, outgoing.info)

    def stream(self, messages: Messages | ChatRequest, **arguments: Unpack[StreamArguments]) -> AsyncChatStream:
        """Send a request, and read the answer while it is generated; see `Chat.stream`. No `await` here.

        Use the stream in an `async with` block: leaving it ends the call on both sides, which leaving an `async for`
        does not.
        """
        request, options = split_streaming(messages, arguments)
        return AsyncChatStream(self._connections, self._defaults, request, None, options)

    def resume(
        self,
        completion_id: str,
        last_sequence: int | None = None,
        *,
        retention: Seconds = RESUME_FOR,
        **options: Unpack[CallOptions],
    ) -> AsyncChatStream:
        """Read a stream with `retention`, first replayed, then live; see `Chat.resume`. No `await` here."""
        request, resume_for = resume_request(completion_id, last_sequence, retention)
        return AsyncChatStream(self._connections, self._defaults, request, resume_for, options)

    async def cancel(
        self, completion_id: str, *, caller: str = "", **options: Unpack[CallOptions]
    ) -> CancelChatCompletionResponse:
        """End a completion softly; see `Chat.cancel`."""
        request = made(CancelChatCompletionRequest, {"completion_id": completion_id, "caller": caller})
        outgoing = self._defaults.outgoing(options).about(completion_id)
        return await self._connections.find(lambda stub: stub.CancelChatCompletion, request, outgoing)

    async def get(
        self, completion_id: str, *, caller: str = "", **options: Unpack[CallOptions]
    ) -> GetChatCompletionResponse:
        """The state of a completion, and its result if that is retained; see `Chat.get`."""
        request = made(GetChatCompletionRequest, {"completion_id": completion_id, "caller": caller})
        outgoing = self._defaults.outgoing(options).about(completion_id)
        return await self._connections.find(lambda stub: stub.GetChatCompletion, request, outgoing)

    def list(self, **arguments: Unpack[CompletionListArguments]) -> AsyncCompletionList:
        """Your completions, or every caller's; see `Chat.list`. No `await` here."""
        request, options = split_completion_listing(arguments)
        return AsyncCompletionList(self._stub, self._defaults, request, options)

    async def count_tokens(
        self, messages: Messages | ChatRequest, **arguments: Unpack[ChatArguments]
    ) -> CountTokensResponse:
        """Count the tokens of the prompt that `create` would send; see `Chat.count_tokens`."""
        chat, options = split_arguments(messages, arguments)
        outgoing = self._defaults.outgoing(options)
        return await invoke(self._stub.CountTokens, CountTokensRequest(chat=chat), outgoing)

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
        """Send a request, run the functions that the model calls, and repeat until it answers; see `Chat.run_tools`.

        The calls of a turn run concurrently: `async` functions in this event loop, others in threads. `on_event` may be
        `async`. Canceling the task cancels the call and the functions, but a thread runs to its end.
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


class AsyncCompletionList(CompletionPages):
    """Iterates over completions, and fetches each page when it is needed; see `Chat.list`."""

    def __init__(
        self,
        stub: ChatCompletionAsyncStub,
        defaults: Defaults,
        request: ListChatCompletionsRequest,
        options: CallOptions,
    ) -> None:
        super().__init__(request)
        self._stub = stub
        self._defaults = defaults
        self._options = options

    def __aiter__(self) -> AsyncIterator[CompletionSummary]:
        return self

    async def __anext__(self) -> CompletionSummary:
        while not self._completions:
            if self._request is None:
                raise StopAsyncIteration
            outgoing = self._defaults.outgoing(self._options)
            self._receive(await invoke(self._stub.ListChatCompletions, self._request, outgoing))
        return self._completions.popleft()


class AsyncChatStream(StreamCalls):
    """An answer that is being generated: iterate over its events, over `text`, or await `final()`; see `ChatStream`."""

    def __init__(
        self,
        connections: Connections,
        defaults: Defaults,
        request: StreamChatCompletionRequest,
        resume_for: float | None,
        options: CallOptions,
    ) -> None:
        super().__init__(defaults, Resumption(request, resume_for, connections.limit), options)
        self._connections = connections
        self._connection = connections.main
        self._stopped = asyncio.Event()
        # None once the stream has ended: a call that is kept keeps its connection open, even if that was closed.
        self._rpc: aio.UnaryStreamCall[StreamChatCompletionRequest, StreamChatCompletionResponse] | None = None
        self._call()
        connections.add(self)

    def __aiter__(self) -> AsyncIterator[StreamChatCompletionResponse]:
        return self

    async def __anext__(self) -> StreamChatCompletionResponse:
        """The next event; see `ChatStream.__next__`. Canceling the task cancels the call."""
        while self._outcome is None and self._rpc is not None:
            try:
                event = await self._read(self._rpc)
            except asyncio.CancelledError:
                # gRPC raises this too for a call that it ends because its channel is closed.
                self._stop(is_closed=not task_is_cancelled())
                if task_is_cancelled():
                    raise
            else:
                if event is not None:
                    return event
        self._leave()
        self._result()
        raise StopAsyncIteration

    @property
    def text(self) -> AsyncIterator[str]:
        """The text of choice 0, piece by piece; see `ChatStream.text`."""
        return (piece async for event in self if (piece := text_of_event(event)))

    async def final(self) -> Answer:
        """Read to the end; see `ChatStream.final`."""
        async for _ in self:
            pass
        return self._result()

    def cancel(self) -> None:
        """End the call now, on both sides; see `ChatStream.cancel`."""
        self._stop(is_closed=False)

    async def cancel_softly(self) -> CancelChatCompletionResponse:
        """End generation now, and let the stream end normally; see `ChatStream.cancel_softly`."""
        request, outgoing = self._softly()
        first = self._connection
        try:
            return await self._connections.find(lambda stub: stub.CancelChatCompletion, request, outgoing, first)
        except ClientClosedError:
            if first is self._connections.main:
                raise
        # The stream has ended meanwhile, and closed the connection that it had for itself.
        return await self._connections.find(lambda stub: stub.CancelChatCompletion, request, outgoing)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def _call(self) -> None:
        """Make a call.

        Raises:
            ClientClosedError: There is no channel for it; reading raises the same error.
        """
        request = self._begin()
        try:
            self._rpc = self._connection.chat.StreamChatCompletion(request, **self._outgoing.arguments)
        except aio.UsageError as error:
            self._end(failed_call(error))
            self._result()

    async def _read(
        self, rpc: aio.UnaryStreamCall[StreamChatCompletionRequest, StreamChatCompletionResponse]
    ) -> StreamChatCompletionResponse | None:
        """Wait for an event, or for the next call; None if there is no event to return."""
        try:
            event = await anext(aiter(rpc))
        except StopAsyncIteration:
            self._outgoing.ended(await rpc.trailing_metadata())
            await self._go_on(None)
        except (aio.AioRpcError, aio.UsageError) as error:
            await self._go_on(failed_call(error))
        else:
            if await self._take(rpc, event):
                return event
        return None

    async def _go_on(self, failed: FailedCall | None) -> None:
        """Make the next call when it is time, unless the stream is over."""
        seconds = self._end(failed)
        if seconds is None:
            return
        await pause(seconds, self._stopped)
        if self._stopped.is_set():
            return
        if self._resumption.moves:
            self._leave()
            self._connection = self._connections.another()
        with contextlib.suppress(ClientClosedError):
            self._call()

    def _close(self) -> None:
        """End the call because the client is closed."""
        self._stop(is_closed=True)

    def _stop(self, *, is_closed: bool) -> None:
        """End the stream and its call."""
        self._cancelled(is_closed=is_closed)
        self._stopped.set()
        if self._rpc is not None:
            self._rpc.cancel()
        self._leave()

    def _leave(self) -> None:
        """Close the connection that this stream has for itself, if it has one."""
        rpc, self._rpc = self._rpc, None
        connection, self._connection = self._connection, self._connections.main
        if connection is not self._connections.main:
            connection.close(None if rpc is None else aiter(rpc))

    async def _take(
        self,
        rpc: aio.UnaryStreamCall[StreamChatCompletionRequest, StreamChatCompletionResponse],
        event: StreamChatCompletionResponse,
    ) -> bool:
        """Take an event; False if it is not to be returned to the caller."""
        if not self._begun:
            self._begun = True
            self._outgoing.began(await rpc.initial_metadata())
        is_new = self._receive(event)
        if self._outcome is not None:
            rpc.cancel()
        return is_new
