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
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType

    from grpc import _CallIterator

    from deltawire._answer import Answer
    from deltawire._channel import CallOptions, Defaults
    from deltawire._client.connections import Connections
    from deltawire._failure import FailedCall
    from deltawire._tools.loop import OnError, ToolLike, ToolRun
    from deltawire.v1.chat_completion_pb2_grpc import ChatCompletionStub


class Chat:
    """Chats with a model."""

    def __init__(self, connections: Connections, defaults: Defaults) -> None:
        self._connections = connections
        self._stub = connections.main.chat
        self._defaults = defaults

    def create(self, messages: Messages | ChatRequest, **arguments: Unpack[ChatArguments]) -> Answer:
        """Send a request, and wait for the whole answer.

        Args:
            messages: The conversation, or a whole `ChatRequest`.
            arguments: See `ChatOptions` and `CallOptions`; with a `ChatRequest`, only the latter.

        Raises:
            CallError: The call failed; see `deltawire._errors`.
            ProtocolError: The answer has no choice.
            TypeError, ValueError: An argument does not exist or cannot be sent; the message names it.

        Append the answer's `message` to the history; if `tool_calls_executable`, run its `tool_calls` next.
        """
        chat, options = split_arguments(messages, arguments)
        outgoing = self._defaults.outgoing(options).about(chat.completion_id, begins=True)
        response = invoke(self._stub.CreateChatCompletion, CreateChatCompletionRequest(chat=chat), outgoing)
        outgoing.found(response.started.completion_id)
        return answer_of(response, outgoing.info)

    def stream(self, messages: Messages | ChatRequest, **arguments: Unpack[StreamArguments]) -> ChatStream:
        """Send a request, and read the answer while it is generated.

        Args:
            messages: The conversation, or a whole `ChatRequest`.
            arguments: See `ChatOptions`, `StreamingOptions` and `CallOptions`; with a `ChatRequest`, not the first.

        Raises:
            TypeError, ValueError: An argument does not exist or cannot be sent; the message names it.

        This returns when the request is sent; reading raises the errors of the call. Use the stream in a `with` block:
        leaving it ends the call on both sides.

        With `retention` the gateway retains the stream. If the connection is lost, the stream resumes automatically and
        returns each event once, until no new event has arrived for that long. Generation ends normally, by
        `soft_time_limit`, by `cancel_softly`, or when no client has read for `retention`. Leaving the block ends only the
        call; `resume` reads the stream again. Without a `completion_id` the client generates an unguessable one.
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
        """Read a stream with `retention` from its beginning or after a given event: first replayed, then live.

        Args:
            completion_id: Its id.
            last_sequence: The `sequence` of the last event that you have, 0 or above. None begins with the first event.
            retention: For how long (seconds, or a `timedelta`) without a new event the stream resumes automatically; pass
                the `retention` of the request.
            options: See `CallOptions`.

        Raises:
            TypeError, ValueError: An argument does not exist or cannot be sent; the message names it.

        After `last_sequence`, `final()` has the messages of `completed`; if its `messages_omitted` is set, only the text
        that was received here. After the last event of an ended stream there are no events: `final()` returns an answer
        without text whose stop reason is STOP_REASON_UNSPECIFIED, and `get` has the result.
        Reading raises CompletionNotFoundError, CompletionGoneError, and WrongReplicaError if no new connection reaches
        the process that has the stream.
        """
        request, resume_for = resume_request(completion_id, last_sequence, retention)
        return ChatStream(self._connections, self._defaults, request, resume_for, options)

    def cancel(
        self, completion_id: str, *, caller: str = "", **options: Unpack[CallOptions]
    ) -> CancelChatCompletionResponse:
        """End a completion softly: its stream ends normally, with the text so far and the usage.

        Args:
            completion_id: Its id.
            caller: The name of the caller whose completion it is, for operators; by default your own, or any caller's if the
                gateway generated the id.
            options: See `CallOptions`.

        Raises:
            CompletionNotFoundError: This caller has no completion with this id.
            PermissionDeniedError: It is another caller's, and you are not an operator.
            WrongReplicaError: Another gateway process has it, and no new connection reached that one.

        The returned `state` and `usage` are those before the cancel. Canceling an ended completion has no effect.
        """
        request = made(CancelChatCompletionRequest, {"completion_id": completion_id, "caller": caller})
        outgoing = self._defaults.outgoing(options).about(completion_id)
        return self._connections.find(lambda stub: stub.CancelChatCompletion, request, outgoing)

    def get(self, completion_id: str, *, caller: str = "", **options: Unpack[CallOptions]) -> GetChatCompletionResponse:
        """The state of a completion, its usage so far in tokens, and its result if that is retained.

        Args:
            completion_id: Its id.
            caller: As for `cancel`. Operators do not get the content of other callers' completions.
            options: See `CallOptions`.

        Raises:
            CompletionNotFoundError: This caller has no completion with this id, or it ended too long ago.
            PermissionDeniedError: It is another caller's, and you are not an operator.
            WrongReplicaError: Another gateway process has it, and no new connection reached that one.

        Read `completed` if the response has it, else branch on `state`; `last_sequence` is what `resume` continues after.
        """
        request = made(GetChatCompletionRequest, {"completion_id": completion_id, "caller": caller})
        outgoing = self._defaults.outgoing(options).about(completion_id)
        return self._connections.find(lambda stub: stub.GetChatCompletion, request, outgoing)

    def list(self, **arguments: Unpack[CompletionListArguments]) -> CompletionList:
        """Your completions at this gateway, or every caller's if you are an operator; newest first, without content.

        Running and ended ones, the latter for as long as `get` returns them, fetched page by page while you iterate.

        Args:
            arguments: See `CompletionListOptions` and `CallOptions`; `timeout` is for each page.

        Raises:
            TypeError, ValueError: An argument cannot be sent.

        Iterating raises CallError. After the last completion, read `unreachable_workers`.
        """
        request, options = split_completion_listing(arguments)
        return CompletionList(self._stub, self._defaults, request, options)

    def count_tokens(self, messages: Messages | ChatRequest, **arguments: Unpack[ChatArguments]) -> CountTokensResponse:
        """Count the tokens of the prompt that `create` would send, with the same arguments. Nothing is generated.

        Raises:
            NotSupportedByProviderError: The provider cannot count tokens.
            CallError: The call failed otherwise.

        Read `prompt_tokens`, and `max_context_tokens`, which is for prompt and answer, if the response has it.
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
        """Send a request, run the functions that the model calls, send the results, and repeat until it answers.

        The calls of a turn are run only if all of them can be: otherwise none is run, and the model receives the problem of
        each. The run also ends with an answer that was cut off, and with a call of a tool that is only a definition.

        Args:
            messages: The conversation, or a whole `ChatRequest`.
            tools: Functions, see `function_tool`, or definitions alone.
            max_rounds: The maximum number of requests, 1 or above.
            on_error: "raise" raises an exception in a function to the caller; "return" returns its type and message to the
                model as the result. A result that cannot be sent is treated in the same way; its exception names the tool.
            on_event: Is called with each event of each answer as it arrives.
            arguments: See `PlainChatOptions` and `CallOptions`. `timeout` is for each answer. A `tool_choice` that makes the
                model call a tool applies only to the first round: otherwise the model would never answer.

        Raises:
            CallError: A call failed; see `deltawire._errors`.
            ToolRoundsExceededError: The model still called tools in the last round; `run` has the conversation.
            TypeError: A function cannot be a tool, or must be awaited.
            ValueError: Several choices, a completion id, which only one answer can have, or two tools with one name.

        Read `run.text`. If `run.answer` has calls, they were not run: execute or refuse them yourself.
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


class CompletionList(CompletionPages):
    """Iterates over completions, and fetches each page when it is needed; see `Chat.list`."""

    def __init__(
        self, stub: ChatCompletionStub, defaults: Defaults, request: ListChatCompletionsRequest, options: CallOptions
    ) -> None:
        super().__init__(request)
        self._stub = stub
        self._defaults = defaults
        self._options = options

    def __iter__(self) -> Iterator[CompletionSummary]:
        return self

    def __next__(self) -> CompletionSummary:
        while not self._completions:
            if self._request is None:
                raise StopIteration
            outgoing = self._defaults.outgoing(self._options)
            self._receive(invoke(self._stub.ListChatCompletions, self._request, outgoing))
        return self._completions.popleft()


class ChatStream(StreamCalls):
    """An answer that is being generated: iterate over its events, over `text`, or call `final()`.

    All three read the same stream: an event that one has read is not returned by the others. `final()` has the whole answer.
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

        A stream with `retention` resumes after lost connections, and logs each to `deltawire`.

        Raises:
            CallError: The call failed. After a fault it is raised after the `completed` event, which has the same error.
            ProtocolError: The gateway violated the rules of the stream; the call is canceled.
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
        """The text of choice 0, piece by piece. It raises the same errors as `__next__`; call `final()` afterwards."""
        return (piece for event in self if (piece := text_of_event(event)))

    def final(self) -> Answer:
        """Read to the end, and return the whole answer; later calls return the same.

        Raises:
            CallError, ProtocolError: See `__next__`; the `answer` of a CallError has what was received.

        Append the answer's `message` to the history, as after `Chat.create`.
        """
        for _ in self:
            pass
        return self._result()

    def cancel(self) -> None:
        """End the call now, on both sides. Reading then raises `CallCancelledError`, unless the stream had ended.

        With `retention` the gateway continues to generate: `cancel_softly` ends that, `Chat.resume` reads it.
        """
        self._stop(is_closed=False)

    def cancel_softly(self) -> CancelChatCompletionResponse:
        """End generation now. Reading then returns the normal end: the text so far, STOP_REASON_CANCELLED, and the usage.

        Any thread may call it, any number of times.

        Raises:
            RuntimeError: The completion's id is not known: `started` has not arrived, and the request has no
                `completion_id`. Call `cancel()` instead.
            CallError: See `Chat.cancel`.

        The response has the state and the usage before the cancel. Continue to read until the stream ends.
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
        # Another thread may have canceled the previous call instead of this one.
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
