"""One completion, from the request to the last event.

    Completion.batches:   the socket   pushes bytes ──▶ CompletionReader ──events──▶ EventBuffer ─┐
                          the caller   writes a batch, then takes the next one  ◀──── merged ─────┘

The provider's answer is read while the caller writes a batch, so a slow write does not block reading, and queued deltas are
merged. The queue is bounded: at its limit, reading stops, and TCP flow control stops the sender. A task sends the request and then
only waits for the end: no task is woken for the pieces of an answer.

`completions.state` defines the states and transitions. A completion ends only in `_end`, which runs without an `await` as soon as
there is a cause (an event, a timer, a call of `stop` or `end`, an exception), so two causes cannot race. Later causes, such as
the cancellation of the task, have no effect.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from deltawire_server.clock import Clock
from deltawire_server.completions import measures
from deltawire_server.completions.event_buffer import EventBuffer
from deltawire_server.completions.info import CompletionInfo, Timings, log_values
from deltawire_server.completions.state import Cause, State, advance
from deltawire_server.errors import Code, DeltawireError, GatewayError, ProviderError, Reason, internal_error
from deltawire_server.limits import Share
from deltawire_server.sansio.events import (
    Completed,
    Event,
    Fault,
    Heartbeat,
    Notice,
    Refused,
    Started,
    StopReason,
    StreamEvent,
    Usage,
    UsageUpdate,
)
from deltawire_server.sansio.reader import CompletionReader, Limits
from deltawire_server.telemetry import get_logger
from deltawire_server.tracing.tracer import NO_ATTEMPT
from deltawire_server.upstream.base import Attempts
from deltawire_server.upstream.failures import RETRY_SECONDS, UpstreamError, failure_of
from deltawire_server.upstream.vllm_fields import format_field

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

    from deltawire_server.completions.adaptive import AdaptiveDelay
    from deltawire_server.completions.options import StreamOptions
    from deltawire_server.images.load import Images
    from deltawire_server.memory import Hold
    from deltawire_server.registry.registry import Resolution
    from deltawire_server.sansio.events import FinishedChoice
    from deltawire_server.sansio.tool_calls import Check
    from deltawire_server.upstream.base import Body, CallContext
    from deltawire_server.upstream.request import ChatRequest
    from deltawire_server.usage.log import UsageRecord

_OURS = frozenset(
    {
        Reason.ACCESS_CHANGED,
        Reason.ANSWER_TOO_LARGE,
        Reason.MEMORY_LIMIT_EXCEEDED,
        Reason.DURATION_LIMIT_EXCEEDED,
        Reason.DRAINING,
        Reason.SLOW_CALLER,
    }
)
"""The reasons of faults of this gateway instead of the provider."""

DRAIN_SECONDS = 0.25
"""Time limit for the end of the body after the true end. A connection can be reused only if the body was read to its end."""

DRAIN_BYTES = 64 * 1024
"""Limit for the bytes of the body after the true end, usually `[DONE]`. The connection is closed if there are more."""

_ENDED: State = State.ENDED  # not a literal, so that the type checker does not narrow `state` across method calls

T = TypeVar("T")

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class CompletionLimits:
    """The limits of a completion; the settings explain the defaults.

    Attributes:
        max_duration: Time limit in seconds.
        queue_bytes: Size of the queued events in bytes at which reading stops.
        tail: Seconds to wait for the usage and the true end after the last finish reason; then the answer ends without them.
        answer: The limits for the answer.
    """

    max_duration: float = 3600.0
    queue_bytes: int = 256 * 1024
    tail: float = 2.0
    answer: Limits = field(default_factory=Limits)


class Completion:
    """One running completion. Created by `Worker.completion`; iterate over `batches` once.

    Args:
        completion_id: Its id.
        request: The request.
        call: The caller's metadata.
        resolution: The model, the provider, and the alias in the request.
        options: The stream options.
        images: Replaces image URLs by the images.
        limits: Its limits.
        accepted: When the call was accepted, on the monotonic clock.
        checks: The argument checks by tool name.
        keep_logprobs: Whether the last event repeats the log-probabilities.
        hold: Accounts for its memory; at the limit of the process, it may be evicted.
        request_bytes: Size of the request message, which is held until the provider's first event.
        adaptive: How long deltas are delayed under load, if the options do not say; not at all by default.
        usage_record: Its usage record, if records are written.
        create_time: When the call was accepted, as Unix time in seconds; now by default.
        share: The caller, whose tokens are counted; by default without limits.

    Attributes:
        head: Its id, model, provider and sampling.
        resolution: The model, the provider, and the alias in the request.
        state: Its state.
        begun: Whether `Started` was returned.
        ended_by: The cause of its end; `None` before.
        failure: The error that ended it; `None` before the end and without an error.
        attempts: The attempts at replicas.
        time_limit: Seconds after its acceptance at which it is ended at the latest.
        stop_reasons: Those of its choices, after its end.
    """

    def __init__(
        self,
        completion_id: str,
        request: ChatRequest,
        call: CallContext,
        resolution: Resolution,
        options: StreamOptions,
        images: Images,
        limits: CompletionLimits,
        accepted: float,
        *,
        checks: Mapping[str, Check],
        keep_logprobs: bool,
        hold: Hold,
        request_bytes: int,
        adaptive: AdaptiveDelay | None = None,
        usage_record: UsageRecord | None = None,
        create_time: float | None = None,
        share: Share | None = None,
    ) -> None:
        request = _with_defaults(request, resolution.provider.default_max_tokens)
        self.resolution = resolution
        self.head = CompletionInfo(
            completion_id,
            resolution.model.id,
            resolution.alias,
            resolution.provider.id,
            time.time() if create_time is None else create_time,
            request.sampling,
        )
        self.state = State.QUEUED
        self.ended_by: Cause | None = None
        self.failure: DeltawireError | None = None
        self.attempts = Attempts(completion_id)
        self.stop_reasons: tuple[StopReason, ...] = ()
        self._unsent = [request]
        self._soft_time_limit = request.soft_time_limit
        soft = float("inf") if request.soft_time_limit is None else request.soft_time_limit
        self.time_limit = min(limits.max_duration, soft)
        self._format_field = format_field(request)
        self._call = call
        self._options = options
        self._images = images
        self._limits = limits
        self._accepted = accepted
        self.begun = False
        self._sent: float | None = None
        self._ended: float | None = None
        self._gaps = measures.Gaps()
        self._notices: Sequence[Notice] = ()
        self._provider_failed: Callable[[Reason], None] = lambda _: None
        self._upstream_id = ""
        self._sent_usage: Usage | None = None
        self._queue = EventBuffer(limits.queue_bytes, options.max_coalesce_delay, adaptive)
        self._reader = CompletionReader(
            choice_count=request.choice_count,
            offered_tools={tool.name: tool.input_schema for tool in request.offered_tools},
            stop=request.sampling.stop,
            stop_token_ids=request.sampling.stop_token_ids,
            incremental=request.incremental_tool_calls,
            argument_checks=checks,
            whole=keep_logprobs,
            limits=limits.answer,
        )
        self._usage_record = usage_record
        self._share = share or Share()
        self._charged = 0
        self._hold = hold
        self._request_bytes = request_bytes
        hold.evict = self._evict
        self._body: Body | None = None  # while it is followed
        self._body_end: asyncio.Future[None]
        self._is_reading = False
        self._drained = 0
        self._task: asyncio.Task[None] | None = None
        # Set while the provider's answer is read; it has no deadline of its own.
        self._reading: asyncio.Timeout | None = None
        self._clock = Clock(self._time_out)

    @property
    def usage(self) -> Usage:
        """The usage so far."""
        return self._reader.usage

    @property
    def joined_deltas(self) -> int:
        """How many deltas shared the message of an earlier one."""
        return self._queue.joined

    @property
    def anomalies(self) -> Mapping[str, int]:
        """Anomalies in the engine's stream that were repaired or ignored, with counts."""
        return self._reader.anomalies

    @property
    def timings(self) -> Timings:
        """The durations up to its end or to now."""
        return Timings(
            total=(self._ended or time.monotonic()) - self._accepted,
            queue=None if self._sent is None else self._sent - self._accepted,
            first_event=self._gaps.first - self._accepted if self.begun and self._gaps.first is not None else None,
            mean_gap=self._gaps.mean,
            worst_gap=self._gaps.worst,
        )

    @property
    def log_values(self) -> Mapping[str, object]:
        """The values of a log line about it."""
        return log_values(self)

    async def batches(self) -> AsyncGenerator[list[StreamEvent]]:
        """The answer's events in order; each batch has all queued events, merged.

        Write a batch, then take the next one; meanwhile, events are queued. The last batch ends with `Completed`. The completion
        has succeeded if the iteration then ends without an exception.

        Raises:
            DeltawireError: The same as `failure`. The answer did not begin, and only heartbeats were yielded; or it ended with
                a fault, and this is raised after the batch with `Completed`.
        """
        self._task = asyncio.create_task(self._run(), name=self.head.completion_id)
        whole = False
        while not whole and (batch := await self._batch()):
            yield batch
            whole = isinstance(batch[-1], Completed)
        await self._task
        if self.failure is not None:
            raise self.failure
        if not whole:
            raise internal_error("a completion ended without an answer or a failure")

    def stop(self, reason: StopReason) -> None:
        """End it now without a fault; `batches` yields the remaining events. No effect after its end."""
        if self.state is not State.ENDED:
            self._take(self._reader.stop(reason), soft=True)

    def end(self, fault: Fault, limit_seconds: float | None = None) -> None:
        """End it now with a fault; `batches` yields the remaining events. No effect after its end.

        Args:
            fault: The fault.
            limit_seconds: The time limit, if the fault is that it was exceeded.
        """
        if self.state is not State.ENDED:
            self._take(self._reader.finish(fault), limit_seconds=limit_seconds)

    def _evict(self) -> None:
        """End it because the process is at its memory limit, and it is among the largest of the caller that uses most."""
        message = (
            "the gateway is at its memory limit for calls in progress, of which this caller uses most: retry later"
        )
        self._reader.forget()
        self.end(Fault(Reason.MEMORY_LIMIT_EXCEEDED, message))
        self._hold.close()

    def _charge(self) -> None:
        """Count the tokens that were not counted yet among those of the caller."""
        usage = self.usage
        tokens = (usage.prompt_tokens or 0) + usage.completion_tokens
        self._share.charge(tokens - self._charged)
        self._charged = tokens

    def _weigh(self) -> None:
        """Report its current memory to the ledger."""
        self._hold.set(self._request_bytes + self._reader.held + self._queue.size)

    async def close(self) -> None:
        """End it if it has not ended, and close the upstream connection."""
        if self.state is not State.ENDED:
            self._end(Cause.CALLER)
        if self._task is not None and not self._task.done():
            self._task.cancel()
            # Only waits until the connection is closed; the completion has already ended.
            await asyncio.wait([self._task])
        self._task = None  # the traceback of its exception refers to this object, which would be a reference cycle
        self._hold.close()

    async def _batch(self) -> list[StreamEvent]:
        """The next batch; empty at the end."""
        interval = self._options.heartbeat_interval
        if interval is None or not (self.begun or self._options.early_heartbeats):
            events = await self._queue.take()
        else:
            try:
                async with asyncio.timeout(interval):
                    events = await self._queue.take()
            except TimeoutError:
                return [Heartbeat()]
        self._weigh()
        if self._options.usage_updates and events and not isinstance(events[-1], Completed):
            usage = self.usage
            if usage != self._sent_usage:
                self._sent_usage = usage
                events.append(UsageUpdate(usage))
        return events

    async def _run(self) -> None:
        """The task: ends at the end of the body or when the completion ends for another cause."""
        try:
            if self.state is State.QUEUED:
                self._start_clock()
            if self.state is State.QUEUED:
                await self._read()
            if self.state is not State.ENDED:
                raise internal_error("reading an answer ended without an end of the completion")
        except DeltawireError as failure:
            self._fail(failure)
        except Exception as bug:  # noqa: BLE001 (a bug must end the call, not hang it)
            reported = internal_error(cause=bug)
            self._fail(reported)
            if self.failure is not reported:
                # Otherwise the log line of the call has it.
                _log.exception(
                    "unexpected exception after the end of a completion", completion_id=self.head.completion_id
                )

    def _start_clock(self) -> None:
        """Set the deadline, counted from the acceptance of the call, which may already have passed."""
        loop = asyncio.get_running_loop()
        accepted = loop.time() - (time.monotonic() - self._accepted)
        self._clock.end_by = accepted + self.time_limit
        self._clock.check()

    async def _read(self) -> None:
        """Send the request and read the answer; returns early if the completion ends."""
        try:
            async with asyncio.timeout(None) as self._reading:
                await self._send_and_read()
        except TimeoutError:
            if self.state is not State.ENDED:
                raise  # not from `_end`
        finally:
            self._reading = None

    async def _send_and_read(self) -> None:
        timeouts = self.resolution.provider.timeouts
        model = self.resolution.model.provider_model_id
        self.state = advance(self.state, Cause.ASKED)
        self._clock.allow(timeouts.first_event)
        # Only the provider has the request from here on; it drops it at the first event.
        request = await self._images.load(self._unsent.pop(), self._share)
        # Up to the first event, the provider applies its timeout, because it has to attribute it to a replica.
        self._clock.pause()
        if self._usage_record is not None:
            self._usage_record.begin()
        self._sent = time.monotonic()
        opening = self.resolution.provider.stream_chat(request, model, self._call, self.attempts)
        del request
        async with opening as stream:
            self._request_bytes = 0
            self._clock.allow(timeouts.first_event)
            self._provider_failed = stream.failed
            self._notices = stream.notices
            self._body = stream.body
            self._body_end = asyncio.get_running_loop().create_future()
            try:
                stream.body.follow(self._pushed, self._body_ended)
                await self._body_end
            finally:
                # Both are reference cycles, which would last until a garbage collection.
                self._body = None
                self._queue.on_room = None

    def _pushed(self, data: bytes) -> None:
        """Process bytes of the body."""
        self._guard(self._read_piece, data)

    def _body_ended(self, fault: Fault | None) -> None:
        """Process the end of the body."""
        self._guard(self._read_end, fault)

    def _guard(self, step: Callable[[T], None], value: T) -> None:
        """Process what the body pushes. A bug must end the call: the body's own callbacks cannot."""
        if self._body_end.done():
            return
        self._is_reading = True
        try:
            step(value)
        except Exception as bug:  # noqa: BLE001 (the task reports it)
            self._body_end.set_exception(bug)
        finally:
            self._is_reading = False

    def _read_piece(self, data: bytes) -> None:
        if self.ended_by is None:
            self._receive(data)
            if self._queue.full and self.state is not _ENDED and self._body is not None:
                self._clock.pause()  # the timeout must not run while reading is paused
                self._body.pause()
                self._queue.on_room = self._go_on
        elif self.ended_by is Cause.ANSWER:
            # Read the rest so that the connection can be reused; further events count as anomalies.
            self._reader.receive(data)
            self._drained += len(data)
        if self.ended_by not in (None, Cause.ANSWER) or self._drained > DRAIN_BYTES:
            self._body_end.set_result(None)

    def _read_end(self, fault: Fault | None) -> None:
        if fault is not None:
            self.end(fault)
        elif self.state is not _ENDED:
            self._take(self._reader.finish())
        self._body_end.set_result(None)

    def _go_on(self) -> None:
        """Read on, because the queued events were taken."""
        self._queue.on_room = None
        if self._body is not None:
            self._await_event()
            self._body.resume()

    def _await_event(self) -> None:
        """Start the timeout for the next event."""
        tail = self.state is State.TAIL
        self._clock.allow(self._limits.tail if tail else self.resolution.provider.timeouts.silence)

    def _receive(self, data: bytes) -> None:
        """Process bytes of the answer."""
        count = self._reader.event_count
        events = self._reader.receive(data)
        if self._reader.event_count == count and not events:
            return  # only comments, which do not reset the timeout
        if self._reader.event_count > count:
            self._gaps.receive(self._reader.event_count - count, time.monotonic())
        if events:
            self._take(events)
        self._weigh()
        if self.state is not State.ENDED:
            if self._reader.in_tail and self.state is State.STREAMING:
                self.state = advance(self.state, Cause.FINISHED)
            self._await_event()

    def _time_out(self) -> None:
        """Handle a timeout: the provider's between events, or the completion's own time limit."""
        if not self._clock.is_over and self.state is State.TAIL:
            self._take(self._reader.finish())
        elif not self._clock.is_over:
            limit = self._clock.allowed
            self.end(Fault(Reason.UPSTREAM_TIMEOUT, f"the provider sent no event for {limit:g} seconds"), limit)
        elif (soft := self._soft_time_limit) is not None and soft <= self._limits.max_duration:
            self.stop(StopReason.TIME_LIMIT)
        else:
            limit = self._limits.max_duration
            message = f"the call reached the gateway's time limit of {limit:g} seconds"
            self.end(Fault(Reason.DURATION_LIMIT_EXCEEDED, message), limit)

    def _take(
        self,
        events: list[Event],
        *,
        soft: bool = False,
        limit_seconds: float | None = None,
        failure: DeltawireError | None = None,
    ) -> None:
        """Queue events; the last event of an answer ends the completion.

        Args:
            events: The events; at least one.
            soft: Whether they are the result of `stop`.
            limit_seconds: The time limit, if it caused the fault.
            failure: The error for the fault; by default it is derived from the fault.
        """
        last = events[-1]
        if isinstance(last, Refused):
            self._end(Cause.FAULT, self._failure_of(last.fault, limit_seconds))
            return
        if not self.begun:
            self.begun = True
            if self.state is State.ASKING and not soft:
                self.state = advance(self.state, Cause.BEGUN)
            self._charge()
            started, *events = events
            if isinstance(started, Started):
                self._upstream_id = started.upstream_id
            self._queue.put([started, *self._notices])
        self._queue.put(events)
        if not isinstance(last, Completed):
            return
        if last.fault is not None:
            self._end(Cause.FAULT, failure or self._failure_of(last.fault, limit_seconds), last.choices)
        else:
            self._end(Cause.SOFT_END if soft and self.state is not State.TAIL else Cause.ANSWER, choices=last.choices)

    def _fail(self, error: DeltawireError) -> None:
        """End it with an error from outside of the event stream: a rejection, or an exception while reading."""
        if self.state is State.ENDED:
            return
        events: list[Event] = []
        if self.begun:
            # Return the events so far, unless the exception is in the reader itself.
            with contextlib.suppress(Exception):
                events = self._reader.finish(Fault(error.reason, error.message))
        if events:
            self._take(events, failure=error)
        else:
            self._end(Cause.FAULT, error)

    def _end(self, cause: Cause, failure: DeltawireError | None = None, choices: Sequence[FinishedChoice] = ()) -> None:
        """End the completion. No other method sets ENDED."""
        self.state = advance(self.state, cause)
        self.ended_by = cause
        self.failure = failure
        self._ended = time.monotonic()
        self._clock.stop()
        self._queue.close()
        self._charge()
        self.stop_reasons = tuple([choice.stop_reason for choice in choices])
        error = measures.error_type(failure, canceled=cause is Cause.CALLER)
        if self._sent is not None:
            measures.ended(self, self._gaps, choices, error)
        if self._usage_record is not None:
            self._usage_record.end(self.usage, self.stop_reasons, error, self.timings.total)
        if self.attempts.span is not NO_ATTEMPT:
            self._end_span(choices)
        if isinstance(failure, ProviderError):
            self._provider_failed(failure.reason)
        if self._reading is None or self._reading.expired():
            return
        now = asyncio.get_running_loop().time()
        if not self._is_reading:
            self._reading.reschedule(now)
        elif failure is None:
            self._reading.reschedule(now + DRAIN_SECONDS)

    def _end_span(self, choices: Sequence[FinishedChoice]) -> None:
        """End the span of the last attempt, whether it waits for its first event or was answered."""
        usage = self.usage
        self.attempts.span.end(
            measures.error_type(self.failure, canceled=self.ended_by is Cause.CALLER),
            response_id=self._upstream_id,
            finish_reasons=tuple(choice.engine_finish_reason for choice in choices if choice.engine_finish_reason),
            input_tokens=usage.prompt_tokens,
            output_tokens=usage.completion_tokens,
        )

    def _failure_of(self, fault: Fault, limit_seconds: float | None) -> DeltawireError:
        """The error for a fault. After the first event, all faults of the provider are ABORTED."""
        provider_id = self.resolution.provider.id
        metadata = self._metadata(limit_seconds)
        if fault.reason is Reason.UPSTREAM_ERROR:
            return failure_of(
                UpstreamError(fault.upstream_code, fault.message, fault.upstream_type, fault.upstream_param),
                provider_id,
                callers_token=self._call.token is not None,
                token_withheld=self._call.token_withheld,
                model=self.head.alias or self.head.model,
                format_field=self._format_field,
                begun=self.begun,
                metadata=metadata if self.begun else None,
            )
        if fault.reason in _OURS:
            code = Code.ABORTED if fault.reason is Reason.DRAINING and self.begun else None
            retry_after = RETRY_SECONDS if fault.reason is Reason.MEMORY_LIMIT_EXCEEDED else None
            return GatewayError(fault.reason, fault.message, code=code, metadata=metadata, retry_after=retry_after)
        return ProviderError(
            fault.reason,
            f"provider {provider_id!r}: {fault.message}",
            code=Code.ABORTED if self.begun else None,
            metadata=metadata,
            retry_after=RETRY_SECONDS if fault.reason is Reason.UPSTREAM_UNAVAILABLE and not self.begun else None,
        )

    def _metadata(self, limit_seconds: float | None) -> dict[str, str]:
        metadata = {"provider": self.resolution.provider.id, "completion_id": self.head.completion_id}
        if limit_seconds is not None:
            metadata["limit_seconds"] = f"{limit_seconds:g}"
        usage = self.usage
        metadata["completion_tokens"] = str(usage.completion_tokens)
        if usage.prompt_tokens is not None:
            metadata["prompt_tokens"] = str(usage.prompt_tokens)
        metadata["usage_provenance"] = usage.provenance.name
        return metadata


def _with_defaults(request: ChatRequest, max_tokens: int | None) -> ChatRequest:
    if max_tokens is None or request.sampling.max_tokens is not None:
        return request
    return replace(request, sampling=replace(request.sampling, max_tokens=max_tokens))
