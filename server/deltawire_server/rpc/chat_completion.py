"""The ChatCompletion service."""

from __future__ import annotations

import hashlib
import hmac
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from msgspec import structs

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import chat_completion_pb2_grpc
from deltawire_server.errors import DeltawireError, GatewayError, Reason, Violation, invalid_request
from deltawire_server.pacing import give_way
from deltawire_server.rpc import completion_list, convert, validate, validate_options
from deltawire_server.rpc.interceptors import call_record, deadline_passed
from deltawire_server.rpc.writer import StreamWriter
from deltawire_server.sansio.events import Completed
from deltawire_server.telemetry import get_logger
from deltawire_server.worker import Caller

if TYPE_CHECKING:
    from collections.abc import Iterator

    from grpc import aio

    from deltawire_server.access import Terms
    from deltawire_server.completions.completion import Completion
    from deltawire_server.completions.info import CompletionView
    from deltawire_server.completions.records import Record
    from deltawire_server.completions.retention import RetainedStream
    from deltawire_server.rpc.interceptors import CallRecord
    from deltawire_server.rpc.validate_content import ContentLimits
    from deltawire_server.sansio.events import StreamEvent
    from deltawire_server.upstream.request import ChatRequest
    from deltawire_server.worker import Worker

    _Context = aio.ServicerContext[Any, Any]

MAX_COMPLETED_BYTES = 1024 * 1024
"""A quarter of the default receive limit of gRPC clients, so that a stream never fails on its last message."""

MAX_RESPONSE_BYTES = 4 * 1024 * 1024
"""The largest response of CreateChatCompletion: the default receive limit of gRPC clients."""

COPIES = 2
"""Copies of a request in memory during validation: the message and the validated value."""

FINGERPRINT_STEP = 4 * 1024 * 1024
"""Bytes of a request that are hashed before other calls run: about 10 ms without SHA instructions."""

LOGPROBS_STEP = 1000
"""Tokens whose log-probabilities are added to a response before other calls run: up to 20 ms with 20 alternatives each."""

MAX_RETENTION = 600.0
"""Seconds; see `settings.model.RetentionSettings`."""

_log = get_logger(__name__)


class ChatCompletionServicer(chat_completion_pb2_grpc.ChatCompletionServicer):
    """Implements the ChatCompletion service.

    Args:
        worker: Runs the completions.
        max_completed_bytes: Size above which `Completed` omits the messages, which the stream has sent already.
        max_retention: The longest retention that a caller may request, in seconds; 0 disables retention.
        slow_caller_timeout: Seconds that one message of a stream may wait for its caller.
        content_limits: Limits of the messages in a request.
        worker_number: The number of this process among the workers of its gateway.
    """

    def __init__(
        self,
        worker: Worker,
        *,
        max_completed_bytes: int = MAX_COMPLETED_BYTES,
        max_retention: float = MAX_RETENTION,
        slow_caller_timeout: float = 30.0,
        content_limits: ContentLimits | None = None,
        worker_number: int = 0,
    ) -> None:
        self._worker = worker
        self._worker_number = worker_number
        self._content_limits = content_limits
        self._max_completed_bytes = max_completed_bytes
        self._max_retention = max_retention
        self._slow_caller_timeout = slow_caller_timeout

    async def CreateChatCompletion(  # noqa: N802 (the RPC's name)
        self, request: chat_pb.CreateChatCompletionRequest, context: _Context
    ) -> chat_pb.CreateChatCompletionResponse:
        """Return the whole answer, or fail as the stream would."""
        if not request.HasField("chat"):
            raise invalid_request([Violation("chat", "is required")])
        record = call_record(context)
        caller = _caller(record, context)
        chat = await self._validated(request.chat, record)
        response = chat_pb.CreateChatCompletionResponse()
        if chat.completion_id:
            stream = self._worker.open(chat, caller, fingerprint=await _fingerprint(request), keep_logprobs=True)
            record.opened()
            del request, chat  # the completion has it, until it is sent
            record.span.link(stream.traceparent)
            with stream.read(caller.left) as reader, _noted(record, stream):
                async with aclosing(reader.follow()) as batches:
                    async for numbered in batches:
                        await _fill(response, stream, numbered[-1][1])
            return response
        record.opened()
        running = self._worker.completion(chat, caller, keep_logprobs=True)
        del request, chat
        async with running as completion:
            with _noted(record, completion):
                async with aclosing(completion.batches()) as batches:
                    async for events in batches:
                        await _fill(response, completion, events[-1])
        return response

    async def StreamChatCompletion(  # type: ignore[override]  # noqa: N802 (written to, which is cheaper than yielding)
        self, request: chat_pb.StreamChatCompletionRequest, context: _Context
    ) -> None:
        """Stream an answer as typed events: a new one, with or without retention, or the rest of a retained one."""
        record = call_record(context)
        caller = _caller(record, context)
        start = request.WhichOneof("start")
        if start is None:
            raise invalid_request([Violation("start", "is required: set chat or resume")])
        if start == "resume":
            if record.place is not None:
                record.place.release()  # no new completion
            completion_id, after = validate_options.resume(request)
            await self._follow(self._worker.resume(caller, completion_id), after, caller, record, context)
            return
        # A call with an id that is in use joins that completion, which has a place, or is refused.
        if not self._worker.is_current(caller, request.chat.completion_id):
            await self._wait_for_place(record, context)
        chat = await self._validated(request.chat, record)
        options = validate_options.stream_options(request.options, self._max_retention)
        if chat.completion_id or options.retention is not None:
            fingerprint = await _fingerprint(request)
            if not self._worker.is_current(caller, chat.completion_id):  # it may have ended meanwhile
                await self._wait_for_place(record, context)
            caller = _caller(record, context)  # its terms may have changed while it waited
            stream = self._worker.open(chat, caller, options, fingerprint=fingerprint)
            record.opened()
            del request, chat  # the completion has it, until it is sent
            await self._follow(stream, None, caller, record, context)
            return
        record.opened()
        running = self._worker.completion(chat, _caller(record, context), options)
        del request, chat
        async with running as completion:
            messages = convert.ResponseWriter(completion, self._max_completed_bytes)
            writer = self._writer(context, record)
            sequence = 0
            with _noted(record, completion):
                async with aclosing(completion.batches()) as batches, writer:
                    async for events in batches:
                        for event in events:
                            await writer.write(messages.message(sequence, event), last=_is_whole(event))
                            sequence += 1

    async def CancelChatCompletion(  # noqa: N802 (the RPC's name)
        self, request: chat_pb.CancelChatCompletionRequest, context: _Context
    ) -> chat_pb.CancelChatCompletionResponse:
        """End a completion gracefully; return its state before."""
        completion = self._look_up(request, context)
        response = chat_pb.CancelChatCompletionResponse(
            state=convert.state(completion), usage=convert.usage(completion.usage)
        )
        record = call_record(context)
        if completion.caller != record.owner:
            _log.info(
                "an operator canceled a completion",
                operator=record.caller,
                caller=completion.label,
                completion_id=completion.completion_id,
                request_id=record.call.request_id,
            )
        completion.cancel()
        return response

    async def GetChatCompletion(  # noqa: N802 (the RPC's name)
        self, request: chat_pb.GetChatCompletionRequest, context: _Context
    ) -> chat_pb.GetChatCompletionResponse:
        """Return state and usage, and the result if it is retained."""
        completion = self._look_up(request, context)
        return convert.get_response(completion, has_content=completion.caller == call_record(context).owner)

    async def ListChatCompletions(  # noqa: N802 (the RPC's name)
        self, request: chat_pb.ListChatCompletionsRequest, context: _Context
    ) -> chat_pb.ListChatCompletionsResponse:
        """Return a page of the completions that the caller may see."""
        query = completion_list.query_of(request, call_record(context))
        return await completion_list.page_of(query, self._worker, self._worker_number)

    async def CountTokens(  # noqa: N802 (the RPC's name)
        self, request: chat_pb.CountTokensRequest, context: _Context
    ) -> chat_pb.CountTokensResponse:
        """Count the tokens of a prompt; nothing is generated."""
        if not request.HasField("chat"):
            raise invalid_request([Violation("chat", "is required")])
        record = call_record(context)
        with self._worker.memory.hold(caller=record.share.key) as held:
            self._worker.memory.admit(COPIES * record.request_bytes, record.share.key)
            held.set(COPIES * record.request_bytes)
            chat = await validate.count_request(request.chat, self._content_limits)
            record.values["model_asked"] = chat.model
            count, resolution = await self._worker.count_tokens(chat, record.call, record.terms.permits)
        record.values.update(
            model=resolution.model.id,
            alias=resolution.alias,
            provider=resolution.provider.id,
            prompt_tokens=count.prompt_tokens,
        )
        return chat_pb.CountTokensResponse(
            prompt_tokens=count.prompt_tokens,
            max_context_tokens=count.max_context_tokens,
            model=resolution.model.id,
            provider_id=resolution.provider.id,
        )

    async def _wait_for_place(self, record: CallRecord, context: _Context) -> None:
        """Take the place of a call that might have joined a completion. The memory of its request is accounted meanwhile."""
        if record.place is None or record.place.taken:
            return
        self._worker.memory.admit(record.request_bytes, record.share.key)
        with self._worker.memory.hold(caller=record.share.key) as held:
            held.set(record.request_bytes)
            await record.take_place(context)

    async def _validated(self, chat: chat_pb.ChatRequest, record: CallRecord) -> ChatRequest:
        """The validated request. Its memory is accounted here until the completion does so."""
        size = COPIES * record.request_bytes
        self._worker.memory.admit(size, record.share.key)
        with self._worker.memory.hold(caller=record.share.key) as held:
            held.set(size)
            async with self._worker.memory.turn(record.request_bytes):
                validated = on_terms(await validate.chat_request(chat, self._content_limits), record.terms)
        record.values["model_asked"] = validated.model
        return validated

    def _look_up(
        self, request: chat_pb.CancelChatCompletionRequest | chat_pb.GetChatCompletionRequest, context: _Context
    ) -> Record:
        """The record of the caller's completion, or, for operators, of that of another caller."""
        record = call_record(context)
        validate_options.completion_id(request.completion_id, "completion_id")
        record.values["completion_id"] = request.completion_id
        completion_list.require_operator(record, request.caller)
        try:
            if request.caller not in ("", record.caller):
                raise LookupError
            completion = self._worker.record(_caller(record, context), request.completion_id)
        except (LookupError, DeltawireError):
            if not record.is_operator:
                raise
            completion = self._worker.record_of_any(request.completion_id, request.caller)
            record.values["completion_of"] = completion.label
        completion.note()
        return completion

    async def _follow(
        self, stream: RetainedStream, after: int | None, caller: Caller, record: CallRecord, context: _Context
    ) -> None:
        """Write a stream from the caller's position to its end."""
        messages = convert.ResponseWriter(stream, self._max_completed_bytes)
        more = "; the stream is retained and can be resumed" if stream.is_retained else ""
        writer = self._writer(context, record, more)
        record.span.link(stream.traceparent)
        with stream.read(caller.left, after) as reader, _noted(record, stream):
            async with aclosing(reader.follow()) as batches, writer:
                async for numbered in batches:
                    for sequence, event in numbered:
                        await writer.write(messages.message(sequence, event), last=_is_whole(event))
        if not record.latch.succeeded:
            record.latch.succeed()  # the caller already had the last message, and it had no fault

    def _writer(self, context: _Context, record: CallRecord, more: str = "") -> StreamWriter:
        return StreamWriter(context, record, self._slow_caller_timeout, lambda limit: slow_caller(limit, more))


def on_terms(request: ChatRequest, terms: Terms) -> ChatRequest:
    """The request with the priority and the salt of the caller's access line.

    The caller's own salt separates its requests from each other, but never leads to the cache of another caller.
    """
    if terms.priority is not None:
        request = replace(request, priority=terms.priority)
    if not terms.cache_salt:
        return request
    own = request.cache_salt
    salt = hmac.digest(terms.cache_salt.encode(), own.encode(), "sha256").hex() if own else terms.cache_salt
    return replace(request, cache_salt=salt)


def _is_whole(event: StreamEvent) -> bool:
    """Whether an event ends a stream without an error."""
    return isinstance(event, Completed) and event.fault is None


def slow_caller(limit: float, more: str = "") -> GatewayError:
    """SLOW_CALLER: the caller did not receive a message of its stream within the limit in seconds; `more` ends the message."""
    message = f"the caller did not receive a message for {limit:g} seconds{more}"
    return GatewayError(Reason.SLOW_CALLER, message, metadata={"limit_seconds": f"{limit:g}"})


async def _fill(response: chat_pb.CreateChatCompletionResponse, completion: CompletionView, event: StreamEvent) -> None:
    """Make the response from the last event of an answer; if that is a fault, the call fails.

    Raises:
        GatewayError: ANSWER_TOO_LARGE.
    """
    if not isinstance(event, Completed) or event.fault is not None:
        return
    response.started.CopyFrom(convert.started(completion.head))
    # Without log-probabilities, of which there may be so many that they are added in steps.
    bare = [structs.replace(choice, logprobs=()) for choice in event.choices]
    response.completed.CopyFrom(convert.completed(completion, structs.replace(event, choices=tuple(bare))))
    for message, choice in zip(response.completed.choices, event.choices, strict=True):
        for start in range(0, len(choice.logprobs), LOGPROBS_STEP):
            message.logprobs.extend(convert.logprobs(choice.logprobs[start : start + LOGPROBS_STEP]))
            await give_way()
    if response.ByteSize() > MAX_RESPONSE_BYTES:
        raise GatewayError(
            Reason.ANSWER_TOO_LARGE,
            f"the response would have more than {MAX_RESPONSE_BYTES} bytes, too many for one message: stream the answer",
            metadata={"limit_bytes": str(MAX_RESPONSE_BYTES), "completion_id": completion.head.completion_id},
        )


async def _fingerprint(request: chat_pb.CreateChatCompletionRequest | chat_pb.StreamChatCompletionRequest) -> bytes:
    """A digest that is the same for equal requests of one method: an equal request is a retry of the same call."""
    digest = hashlib.sha256(request.DESCRIPTOR.name.encode())
    data = memoryview(request.SerializeToString(deterministic=True))
    for start in range(0, len(data), FINGERPRINT_STEP):
        digest.update(data[start : start + FINGERPRINT_STEP])
        await give_way()
    return digest.digest()


def _caller(record: CallRecord, context: _Context) -> Caller:
    return Caller(
        record.call,
        record.owner,
        record.caller,
        lambda: deadline_passed(context),
        record.place,
        record.request_bytes,
        record.assertion,
        record.share,
        record.terms.permits,
    )


@contextmanager
def _noted(record: CallRecord, completion: Completion | RetainedStream) -> Iterator[None]:
    """Add a completion's result to the log line, however it ends."""
    try:
        yield
    finally:
        record.values.update(completion.log_values)
