"""The ChatCompletion service."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import chat_completion_pb2_grpc
from deltawire_server.errors import Violation, invalid_request
from deltawire_server.rpc import convert, validate
from deltawire_server.rpc.interceptors import REQUEST_ID, call_record
from deltawire_server.sansio.events import Completed
from deltawire_server.telemetry import get_logger

if TYPE_CHECKING:
    from grpc import aio

    from deltawire_server.rpc.interceptors import CallRecord
    from deltawire_server.worker import Completion, Worker

MAX_COMPLETED_BYTES = 1024 * 1024
"""A quarter of what other languages receive by default: a stream must not die on its last message."""

_log = get_logger(__name__)


class ChatCompletionServicer(chat_completion_pb2_grpc.ChatCompletionServicer):
    """Answers chat requests.

    Args:
        worker: Runs them.
        max_completed_bytes: Above this, `Completed` leaves out the messages, which the stream has said already.
    """

    def __init__(self, worker: Worker, *, max_completed_bytes: int = MAX_COMPLETED_BYTES) -> None:
        self._worker = worker
        self._max_completed_bytes = max_completed_bytes

    async def CreateChatCompletion(  # noqa: N802 (the RPC's name)
        self, request: chat_pb.CreateChatCompletionRequest, context: aio.ServicerContext[Any, Any]
    ) -> chat_pb.CreateChatCompletionResponse:
        """The whole answer, or the failure that the stream would end with."""
        if not request.HasField("chat"):
            raise invalid_request([Violation("chat", "is required")])
        record = call_record(context)
        chat = validate.chat_request(request.chat)
        response = chat_pb.CreateChatCompletionResponse()
        async with self._worker.completion(chat, record.call, keep_logprobs=True) as completion:
            try:
                async with aclosing(completion.batches()) as batches:
                    async for events in batches:
                        last = events[-1]
                        if isinstance(last, Completed):
                            response.started.CopyFrom(convert.started(completion))
                            response.completed.CopyFrom(convert.completed(completion, last))
            finally:
                _note(record, completion)
        return response

    async def StreamChatCompletion(  # type: ignore[override]  # noqa: N802 (written to, which is cheaper than yielding)
        self, request: chat_pb.StreamChatCompletionRequest, context: aio.ServicerContext[Any, Any]
    ) -> None:
        """The answer as typed events."""
        if request.WhichOneof("start") is None:
            raise invalid_request([Violation("start", "is required: set chat")])
        record = call_record(context)
        chat = validate.chat_request(request.chat)
        async with self._worker.completion(chat, record.call) as completion:
            writer = convert.ResponseWriter(completion, self._max_completed_bytes)
            first = True
            try:
                async with aclosing(completion.batches()) as batches:
                    async for events in batches:
                        if first:
                            # Not before the engine has begun: once these are out, no proxy can retry.
                            await context.send_initial_metadata(((REQUEST_ID, record.call.request_id),))
                            first = False
                        for event in events:
                            await context.write(writer.message(event))
            finally:
                _note(record, completion)


def _note(record: CallRecord, completion: Completion) -> None:
    """What the log line says of a completion, whatever its end."""
    usage = completion.usage
    first_event = completion.seconds_to_first_event
    record.values.update(
        completion_id=completion.id,
        model=completion.resolution.model.id,
        alias=completion.resolution.alias,
        provider=completion.resolution.provider.id,
        attempts=1,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        usage=usage.provenance.name,
        seconds_to_first_event=None if first_event is None else round(first_event, 6),
    )
    if completion.oddities:
        _log.warning(
            "the provider's answer was odd",
            provider=completion.resolution.provider.id,
            completion_id=completion.id,
            oddities=dict(completion.oddities),
        )
