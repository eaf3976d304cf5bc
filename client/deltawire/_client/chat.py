"""Chats with a model, and answers on their way."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Self, Unpack, cast
from weakref import WeakSet

import grpc

from deltawire._client.call import invoke
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
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType

    from grpc import _CallIterator

    from deltawire._channel import CallOptions, Defaults
    from deltawire._failure import FailedCall
    from deltawire._tools.loop import OnError, ToolLike, ToolRun
    from deltawire.v1.chat_completion_pb2_grpc import ChatCompletionStub


class Chat:
    """Chats with a model."""

    def __init__(self, stub: ChatCompletionStub, defaults: Defaults) -> None:
        self._stub = stub
        self._defaults = defaults
        self._streams: WeakSet[ChatStream] = WeakSet()

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
        """Ask, and read the answer while it is generated. It takes what `create` takes, and how the stream is told.

        Args:
            messages: The conversation, or a whole `ChatRequest`.
            arguments: See `ChatOptions`, `TellingOptions` and `CallOptions`.

        Raises:
            TypeError: An argument that does not exist.

        The request is on its way when this returns; its errors come from reading. Use the stream in a `with` block:
        leaving it ends the call on both sides.

        With `retention` the gateway keeps the stream, and it goes on by itself, each event once, if the connection is
        lost, until nothing new has come for that long. Generation then ends by itself, by `soft_time_limit`, by
        `cancel_softly`, or when nobody has read for `retention`: leaving the block ends the call alone, and
        `resume` takes the stream up again. Without a `completion_id` one is made up, which nobody can guess.
        """
        request, options = split_streaming(messages, arguments)
        return self._going_on(ChatStream(self._stub, self._defaults, Resumption(request), options))

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
        From reading come CompletionNotFoundError, CompletionGoneError and WrongReplicaError.
        """
        request, patience = resume_request(completion_id, last_sequence, retention)
        return self._going_on(ChatStream(self._stub, self._defaults, Resumption(request, patience), options))

    def cancel(self, completion_id: str, **options: Unpack[CallOptions]) -> CancelChatCompletionResponse:
        """End a completion softly: whoever reads it gets a normal end, with the text so far, and the usage.

        Raises:
            CompletionNotFoundError: There is none of this id.
            WrongReplicaError: Another gateway process has it.

        The `state` that comes back is the one before: one that had ended already is no error.
        """
        request = made(CancelChatCompletionRequest, {"completion_id": completion_id})
        return invoke(self._stub.CancelChatCompletion, request, self._defaults.outgoing(options))

    def get(self, completion_id: str, **options: Unpack[CallOptions]) -> GetChatCompletionResponse:
        """How far a completion has come, what it has cost, and its result if that is retained.

        Raises:
            CompletionNotFoundError: There is none of this id, or it ended long ago.
            WrongReplicaError: Another gateway process has it.
        """
        request = made(GetChatCompletionRequest, {"completion_id": completion_id})
        return invoke(self._stub.GetChatCompletion, request, self._defaults.outgoing(options))

    def count_tokens(self, messages: Messages | ChatRequest, **arguments: Unpack[ChatArguments]) -> CountTokensResponse:
        """How many tokens the prompt has that `create` would send; nothing is generated. It takes what `create` takes.

        Raises:
            NotSupportedByProviderError: The provider does not count.

        Read `prompt_tokens`, and `max_context_tokens` if it is there.
        """
        chat, options = split_arguments(messages, arguments)
        return invoke(self._stub.CountTokens, CountTokensRequest(chat=chat), self._defaults.outgoing(options))

    def _going_on(self, stream: ChatStream) -> ChatStream:
        """Take note of a stream that goes on by itself: closing the client ends it."""
        if stream._resumption.is_retained:
            self._streams.add(stream)
        return stream

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
        """Ask, run the functions that the model calls, tell it the results, and ask again, until it answers.

        A turn's calls are run only if all of them can be: else the model is told what was wrong with each, and none is run.
        The run also ends with an answer that was cut off, and with a call of a tool that is no function: then the calls in
        `run.answer` are yours to look at.

        Args:
            messages: The conversation, or a whole `ChatRequest`.
            tools: Functions, see `function_tool`; definitions alone are offered too.
            max_rounds: How often to ask.
            on_error: "raise" lets an exception in a function through; "tell" tells the model its type and message. A
                result that cannot be sent to the model is the same: "raise" names the tool, "tell" tells what is wrong.
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
        self, stub: ChatCompletionStub, defaults: Defaults, resumption: Resumption, options: CallOptions
    ) -> None:
        super().__init__(defaults, resumption, options)
        self._stub = stub
        self._stopped = threading.Event()
        self._rpc = self._call()

    def __iter__(self) -> Iterator[StreamChatCompletionResponse]:
        return self

    def __next__(self) -> StreamChatCompletionResponse:
        """The next event; branch on `event.WhichOneof("event")` and skip None, an event of a later version.

        Lost connections of a retained stream are waited out and noted in the log `deltawire`.

        Raises:
            CallError: The call failed. After a fault this comes after the `completed` event, which tells the same.
            ProtocolError: The gateway broke the rules of the stream; the call is cancelled.
        """
        while self._outcome is None:
            try:
                event = next(self._rpc)
            except StopIteration:
                self._outgoing.ended(self._rpc.trailing_metadata())
                self._go_on(None)
            except grpc.RpcError as error:
                self._go_on(cast("FailedCall", error))
            else:
                if self._take(event):
                    return event
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
        self._cancelled()
        self._stopped.set()
        self._rpc.cancel()

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
        return invoke(self._stub.CancelChatCompletion, request, outgoing)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def _call(self) -> _CallIterator[StreamChatCompletionResponse]:
        """Make a call."""
        return self._stub.StreamChatCompletion(self._begin(), **self._outgoing.arguments)

    def _go_on(self, failed: FailedCall | None) -> None:
        """Make the next call when it is time, unless the stream is over."""
        pause = self._end(failed)
        if pause is None or self._stopped.wait(pause):
            return
        try:
            self._rpc = self._call()
        except ValueError:
            # A channel of the caller's own, which has been closed meanwhile.
            self._cancelled()
            return
        # Another thread may have cancelled the call before.
        if self._stopped.is_set():
            self._rpc.cancel()

    def _take(self, event: StreamChatCompletionResponse) -> bool:
        """Take note of an event; whether it is to be handed on."""
        if not self._begun:
            self._begun = True
            self._outgoing.began(self._rpc.initial_metadata())
        try:
            return self._receive(event)
        except ProtocolError:
            self._rpc.cancel()
            raise
