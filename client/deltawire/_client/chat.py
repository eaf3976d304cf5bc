"""Chats with a model, and answers on their way."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Self, Unpack, cast

import grpc

from deltawire._client.call import invoke
from deltawire._completion import Resumption, StreamCalls, answer_of, text_of_event
from deltawire._errors import ClientClosedError
from deltawire._failure import failed_call
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
    StreamChatCompletionRequest,
    StreamChatCompletionResponse,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType

    from grpc import _CallIterator

    from deltawire._answer import Answer
    from deltawire._channel import CallOptions, Defaults
    from deltawire._client.connections import Connections
    from deltawire._failure import FailedCall
    from deltawire._tools.loop import OnError, ToolLike, ToolRun


class Chat:
    """Chats with a model."""

    def __init__(self, connections: Connections, defaults: Defaults) -> None:
        self._connections = connections
        self._stub = connections.main.chat
        self._defaults = defaults

    def create(self, messages: Messages | ChatRequest, **arguments: Unpack[ChatArguments]) -> Answer:
        """Ask, and wait for the whole answer.

        Args:
            messages: The conversation, or a whole `ChatRequest`.
            arguments: See `ChatOptions` and `CallOptions`.

        Raises:
            CallError: The call failed; see `deltawire._errors`.
            TypeError: An argument that does not exist.

        The answer's `message` goes into the history; if `tool_calls_executable`, run its `tool_calls` next.
        """
        chat, options = split_arguments(messages, arguments)
        outgoing = self._defaults.outgoing(options)
        response = invoke(self._stub.CreateChatCompletion, CreateChatCompletionRequest(chat=chat), outgoing)
        return answer_of(response, outgoing.info)

    def stream(self, messages: Messages | ChatRequest, **arguments: Unpack[StreamArguments]) -> ChatStream:
        """Ask, and read the answer while it is generated. It takes what `create` takes, and the options of the stream.

        Args:
            messages: The conversation, or a whole `ChatRequest`.
            arguments: See `ChatOptions`, `StreamingOptions` and `CallOptions`.

        Raises:
            TypeError: An argument that does not exist.

        The request is on its way when this returns; its errors come from reading. Use the stream in a `with` block:
        leaving it ends the call on both sides.

        With `retention` the gateway keeps the stream, and it goes on by itself, each event once, if the connection is
        lost, until nothing new has come for that long. Generation then ends by itself, by `soft_time_limit`, by
        `cancel_softly`, or when no client has read for `retention`. Leaving the block ends only the call; `resume` reads the
        stream again. Without a `completion_id` the client generates an unguessable one.
        """
        request, options = split_streaming(messages, arguments)
        return ChatStream(self._connections, self._defaults, request, None, options)

    def resume(
        self,
        completion_id: str,
        last_sequence: int | None = None,
        *,
        retention: Seconds = RESUME_FOR,
        **options: Unpack[CallOptions],
    ) -> ChatStream:
        """Read a stream that was asked for with `retention`, replayed and then live.

        Args:
            completion_id: Its id.
            last_sequence: The `sequence` of the last event that you have. None begins with the first.
            retention: For how long (seconds, or a `timedelta`) without anything new to go on by itself if the connection
                is lost; give what the stream was asked with.
            options: See `CallOptions`.

        Raises:
            ValueError: A length of time that is none.

        From the middle, `final()` gives what `completed` says of the answer; if its `messages_omitted` is set, only what
        came here. After the last event of an ended stream nothing comes: `final()` gives an answer without text whose
        stop reason is STOP_REASON_UNSPECIFIED, and `get` says how it ended.
        Reading raises CompletionNotFoundError, CompletionGoneError, and WrongReplicaError if no new connection reaches
        the process that has the stream.
        """
        request, resume_for = resume_request(completion_id, last_sequence, retention)
        return ChatStream(self._connections, self._defaults, request, resume_for, options)

    def cancel(self, completion_id: str, **options: Unpack[CallOptions]) -> CancelChatCompletionResponse:
        """End a completion softly: its stream ends normally, with the text so far and the usage.

        Raises:
            CompletionNotFoundError: There is none of this id.
            WrongReplicaError: Another gateway process has it, and no new connection reached that one.

        The `state` that comes back is the one before: one that had ended already is no error.
        """
        request = made(CancelChatCompletionRequest, {"completion_id": completion_id})
        outgoing = self._defaults.outgoing(options)
        return self._connections.find(lambda stub: stub.CancelChatCompletion, request, outgoing)

    def get(self, completion_id: str, **options: Unpack[CallOptions]) -> GetChatCompletionResponse:
        """How far a completion has come, what it has cost, and its result if that is retained.

        Raises:
            CompletionNotFoundError: There is none of this id, or it ended long ago.
            WrongReplicaError: Another gateway process has it, and no new connection reached that one.
        """
        request = made(GetChatCompletionRequest, {"completion_id": completion_id})
        outgoing = self._defaults.outgoing(options)
        return self._connections.find(lambda stub: stub.GetChatCompletion, request, outgoing)

    def count_tokens(self, messages: Messages | ChatRequest, **arguments: Unpack[ChatArguments]) -> CountTokensResponse:
        """How many tokens the prompt has that `create` would send; nothing is generated. It takes what `create` takes.

        Raises:
            NotSupportedByProviderError: The provider does not count.

        Read `prompt_tokens`, and `max_context_tokens` if it is there.
        """
        chat, options = split_arguments(messages, arguments)
        return invoke(self._stub.CountTokens, CountTokensRequest(chat=chat), self._defaults.outgoing(options))

    def run_tools(
        self,
        messages: Messages | ChatRequest,
        *,
        tools: Iterable[ToolLike],
        max_rounds: int = 10,
        on_error: OnError = "raise",
        on_event: Callable[[StreamChatCompletionResponse], object] | None = None,
        **arguments: Unpack[ToolRunArguments],
    ) -> ToolRun:
        """Ask, run the functions that the model calls, send it the results, and ask again, until it answers.

        A turn's calls are run only if all of them can be: else none is run, and the model gets what was wrong with each.
        The run also ends with an answer that was cut off, and with a call of a tool that is no function: then the calls in
        `run.answer` are yours to look at.

        Args:
            messages: The conversation, or a whole `ChatRequest`.
            tools: Functions, see `function_tool`; definitions alone are offered too.
            max_rounds: How often to ask.
            on_error: "raise" lets an exception in a function through; "tell" sends the model its type and message. A
                result that cannot be sent to the model is treated the same; the exception that is raised names the tool.
            on_event: Is called with every event of every answer as it comes.
            arguments: See `PlainChatOptions` and `CallOptions`. `timeout` is for each answer. A `tool_choice` that makes the
                model call is for the first round only: it would never answer.

        Raises:
            CallError: A call failed; see `deltawire._errors`.
            ToolRoundsExceededError: The model still called in the last round; its `run` has all that was said.
            TypeError: A function that cannot be a tool, or that has to be awaited.
            ValueError: Arguments that make no sense here: several choices, an id for one answer, two tools of one name.
        """
        request, options = split_arguments(messages, cast("ChatArguments", arguments))

        def ask(request: ChatRequest) -> Answer:
            if on_event is None:
                return self.create(request, **options)
            with self.stream(request, **options) as stream:
                for event in stream:
                    on_event(event)
                return stream.final()

        return shells.run(ToolLoop(request, tools, max_rounds=max_rounds, on_error=on_error), ask)


class ChatStream(StreamCalls):
    """An answer on its way: iterate over its events, over `text`, or go straight to `final()`.

    All three read the same stream, so what one has taken the others do not see again; `final()` always has everything.
    """

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
        self._stopped = threading.Event()
        self._rpc: _CallIterator[StreamChatCompletionResponse]
        self._call()
        connections.add(self)

    def __iter__(self) -> Iterator[StreamChatCompletionResponse]:
        return self

    def __next__(self) -> StreamChatCompletionResponse:
        """The next event; branch on `event.WhichOneof("event")` and skip None, an event of a later version.

        A retained stream waits out lost connections, and logs each to `deltawire`.

        Raises:
            CallError: The call failed. After a fault this comes after the `completed` event, which has the same error.
            ProtocolError: The gateway broke the rules of the stream; the call is cancelled.
        """
        while self._outcome is None:
            try:
                event = next(self._rpc)
            except StopIteration:
                self._outgoing.ended(self._rpc.trailing_metadata())
                self._go_on(None)
            except (grpc.RpcError, ValueError) as error:
                self._go_on(failed_call(error))
            else:
                if self._take(event):
                    return event
        self._leave()
        self._result()
        raise StopIteration

    @property
    def text(self) -> Iterator[str]:
        """The text of choice 0, piece by piece. Raises what iterating over events raises."""
        return (piece for event in self if (piece := text_of_event(event)))

    def final(self) -> Answer:
        """Read to the end.

        Raises:
            CallError: See `__next__`; its `answer` has what had come.

        Call it as often as you like: the stream is read once.
        """
        for _ in self:
            pass
        return self._result()

    def cancel(self) -> None:
        """End the call now, on both sides. Reading on raises `CallCancelledError`, unless the stream had ended.

        With `retention` the gateway goes on all the same: `cancel_softly` ends that, `Chat.resume` reads it.
        """
        self._stop(is_closed=False)

    def cancel_softly(self) -> CancelChatCompletionResponse:
        """End generation now. Reading on gives the normal end: the text so far, STOP_REASON_CANCELLED, and the usage.

        Any thread may call it, as often as it likes.

        Raises:
            RuntimeError: The completion's id is not known: `started` has not come, and the request has no
                `completion_id`. Then nothing has been generated: `cancel()`.
            CallError: See `Chat.cancel`.

        What comes back says what it met, and what the completion had cost by then.
        """
        request, outgoing = self._softly()
        first = self._connection
        try:
            return self._connections.find(lambda stub: stub.CancelChatCompletion, request, outgoing, first)
        except ClientClosedError:
            if first is self._connections.main:
                raise
        # The stream has ended meanwhile, and closed the connection that it had for itself.
        return self._connections.find(lambda stub: stub.CancelChatCompletion, request, outgoing)

    def __enter__(self) -> Self:
        return self

    def __exit__(
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
        except ValueError as error:
            self._end(failed_call(error))
            self._result()

    def _go_on(self, failed: FailedCall | None) -> None:
        """Make the next call when it is time, unless the stream is over."""
        pause = self._end(failed)
        if pause is None or self._stopped.wait(pause):
            return
        if self._resumption.moves:
            self._leave()
            self._connection = self._connections.another()
        with contextlib.suppress(ClientClosedError):
            self._call()
        # Another thread may have cancelled the previous call instead of this one.
        if self._stopped.is_set():
            self._rpc.cancel()
            self._leave()

    def _close(self) -> None:
        """End the call because the client is closed."""
        self._stop(is_closed=True)

    def _stop(self, *, is_closed: bool) -> None:
        """End the stream and its call, from any thread."""
        self._cancelled(is_closed=is_closed)
        self._stopped.set()
        self._rpc.cancel()
        self._leave()

    def _leave(self) -> None:
        """Close the connection that this stream has for itself, if it has one."""
        connection, self._connection = self._connection, self._connections.main
        if connection is not self._connections.main:
            connection.close()

    def _take(self, event: StreamChatCompletionResponse) -> bool:
        """Take an event; False if it is not to be returned to the caller."""
        if not self._begun:
            self._begun = True
            self._outgoing.began(self._rpc.initial_metadata())
        is_new = self._receive(event)
        if self._outcome is not None:
            self._rpc.cancel()
        return is_new
