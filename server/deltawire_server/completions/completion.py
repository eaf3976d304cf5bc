"""One completion, from the request to the last event.

    Completion.batches:   reader task  provider ──bytes──▶ CompletionReader ──events──▶ EventBuffer ─┐
                          the caller   writes a batch, comes back for the next  ◀──── merged ─────┘

One task reads the provider's answer while the caller writes what it got, so a slow write does not block reading, and queued
deltas are merged. The queue is bounded: at its limit reading stops, and with it, through the socket, the sender.

`completions.state` has the states and everything that can happen. An end is decided in one place, `_end`, at the moment at which
its cause is seen (an event, a clock, a call to `stop` or `end`, an exception) and without waiting for anything, so no two causes
can race. What comes later, such as the cancellation that stops the reading, changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from deltawire_server.completions.event_buffer import EventBuffer
from deltawire_server.completions.info import CompletionInfo, Timings
from deltawire_server.completions.state import Cause, State, advance
from deltawire_server.errors import Code, DeltawireError, GatewayError, ProviderError, Reason, internal_error
from deltawire_server.sansio.events import (
    Completed,
    Event,
    Fault,
    Heartbeat,
    Notice,
    Refused,
    StopReason,
    StreamEvent,
    Usage,
    UsageUpdate,
)
from deltawire_server.sansio.reader import CompletionReader, Limits
from deltawire_server.telemetry import get_logger
from deltawire_server.upstream.base import BrokenBodyError
from deltawire_server.upstream.failures import RETRY_SECONDS, UpstreamError, failure_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

    from deltawire_server.completions.options import StreamOptions
    from deltawire_server.images.load import Images
    from deltawire_server.memory import Hold
    from deltawire_server.registry.registry import Resolution
    from deltawire_server.sansio.tool_calls import Check
    from deltawire_server.upstream.base import CallContext
    from deltawire_server.upstream.request import ChatRequest

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
"""The faults that are this process's and not the provider's."""

DRAIN_SECONDS = 0.25
"""How long the end of a body may take after the answer's. Read to its end, the connection can be used again."""

DRAIN_BYTES = 64 * 1024
"""What is read of a body after the answer's end: `[DONE]` and a little more. A connection with more than that is closed."""

_ENDED: State = State.ENDED  # not a literal, so that a type checker sees that methods change `state`

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class CompletionLimits:
    """What a completion may take; the settings say why each default is what it is.

    Attributes:
        max_duration: Seconds that it may run.
        queue_bytes: What may wait for its caller before reading stops.
        tail: Seconds that the usage and the end of an answer may take after the last finish reason; then it is whole without.
        answer: What the answer may hold.
    """

    max_duration: float = 3600.0
    queue_bytes: int = 256 * 1024
    tail: float = 2.0
    answer: Limits = field(default_factory=Limits)


class Completion:
    """One completion under way. Made by `Worker.completion`; go through `batches` once.

    Args:
        completion_id: What it is known by.
        request: What to ask.
        call: The caller's metadata.
        resolution: Which model and provider, and the alias that was used.
        options: How the answer is sent.
        images: Puts images in the place of their addresses.
        limits: What it may take.
        accepted: When the call was accepted, on the monotonic clock.
        checks: The checks of its calls' arguments, by the tool's name.
        keep_logprobs: Whether the last event repeats the log-probabilities.
        hold: What it holds in memory; at the limit of all together, it ends itself.
        request_bytes: Of the request as it came, which is held until the provider's first event.

    Attributes:
        head: What is settled of it.
        resolution: Which model and provider, and the alias that was used.
        state: Where it is.
        ended_by: What ended it; `None` until then.
        failure: Why it did not end by itself; set when it ends.
        attempts: How many replicas of the provider were asked.
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
    ) -> None:
        self._request = _with_defaults(request, resolution.provider.default_max_tokens)
        self.resolution = resolution
        self.head = CompletionInfo(
            completion_id,
            resolution.model.id,
            resolution.alias,
            resolution.provider.id,
            time.time(),
            self._request.sampling,
        )
        self.state = State.QUEUED
        self.ended_by: Cause | None = None
        self.failure: DeltawireError | None = None
        self.attempts = 0
        self._call = call
        self._options = options
        self._images = images
        self._limits = limits
        self._accepted = accepted
        self._begun = False
        self._asked: float | None = None
        self._ended: float | None = None
        self._gaps = _Gaps()
        self._notices: Sequence[Notice] = ()
        self._provider_failed: Callable[[Reason], None] = lambda _: None
        self._sent_usage: Usage | None = None
        self._queue = EventBuffer(limits.queue_bytes, options.max_coalesce_delay)
        self._reader = CompletionReader(
            choice_count=self._request.choice_count,
            offered_tools={tool.name: tool.input_schema for tool in self._request.offered_tools},
            stop=self._request.sampling.stop,
            stop_token_ids=self._request.sampling.stop_token_ids,
            incremental=self._request.incremental_tool_calls,
            argument_checks=checks,
            whole=keep_logprobs,
            limits=limits.answer,
        )
        self._hold = hold
        self._request_bytes = request_bytes
        hold.evict = self._evict
        self._task: asyncio.Task[None] | None = None
        self._reading: asyncio.Timeout | None = None  # while the provider's answer is read; never expires by itself
        self._clock = _Clock(self._time_out)

    @property
    def begun(self) -> bool:
        """Whether `Started` was given."""
        return self._begun

    @property
    def usage(self) -> Usage:
        """What is known of the tokens used so far."""
        return self._reader.usage

    @property
    def anomalies(self) -> Mapping[str, int]:
        """What the engine sent that no vLLM should, and that did no harm, with counts."""
        return self._reader.anomalies

    @property
    def timings(self) -> Timings:
        """How long things took, to its end or to now."""
        return Timings(
            total=(self._ended or time.monotonic()) - self._accepted,
            queue=None if self._asked is None else self._asked - self._accepted,
            first_event=self._gaps.first - self._accepted if self._begun and self._gaps.first is not None else None,
            mean_gap=self._gaps.mean,
            worst_gap=self._gaps.worst,
        )

    async def batches(self) -> AsyncGenerator[list[StreamEvent]]:
        """The answer's events in order, each time all that are queued, merged.

        Write a batch, then come back: what comes meanwhile is queued. The last batch ends with `Completed`, and then the call has
        succeeded if this ends without raising.

        Raises:
            DeltawireError: The answer did not begin: nothing was given but heartbeats. Or it ended with a fault: raised after
                the batch with `Completed`, the same as `failure`.
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
        """End it now: what came is the answer, and `batches` gives what is left of it. After its end, nothing changes."""
        if self.state is not State.ENDED:
            self._take(self._reader.stop(reason), soft=True)

    def end(self, fault: Fault, limit_seconds: float | None = None) -> None:
        """End it now, with a fault that no event brought: `batches` gives what is left. After its end, nothing changes.

        Args:
            fault: What happened.
            limit_seconds: The limit that was passed, if that is what happened.
        """
        if self.state is not State.ENDED:
            self._take(self._reader.finish(fault), limit_seconds=limit_seconds)

    def _evict(self) -> None:
        """End it: it is among the largest when there is no memory left for all."""
        message = (
            "the gateway holds as much as it may for the calls under way, and this was among the largest: retry later"
        )
        self._reader.forget()
        self.end(Fault(Reason.MEMORY_LIMIT_EXCEEDED, message))
        self._hold.close()

    def _weigh(self) -> None:
        """Account for what it holds now."""
        self._hold.set(self._request_bytes + self._reader.held + self._queue.size)

    async def close(self) -> None:
        """Stop reading and close the upstream connection, if that has not happened yet; then it is done."""
        if self.state is not State.ENDED:
            self._end(Cause.CALLER)
        if self._task is not None and not self._task.done():
            self._task.cancel()
            # Only waits for the connection to be closed: the end is decided.
            await asyncio.wait([self._task])
        self._task = None  # its exception refers to the frames that it came through, and these to this object
        self._hold.close()

    async def _batch(self) -> list[StreamEvent]:
        """What is sent next; empty if nothing comes any more."""
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
        """The reader task: to the end of the body, or until the completion has ended otherwise."""
        try:
            if self.state is State.QUEUED:
                self._start_clock()
            if self.state is State.QUEUED:
                await self._read()
            if self.state is not State.ENDED:
                raise internal_error("reading an answer ended without an end of the completion")
        except BrokenBodyError as error:
            self.end(error.fault)
        except DeltawireError as failure:
            self._fail(failure)
        except Exception as defect:  # noqa: BLE001 (a defect must end the call, not hang it)
            reported = internal_error(cause=defect)
            self._fail(reported)
            if self.failure is not reported:
                # Else the call's own log line has it.
                _log.exception("a defect after a completion's end", completion_id=self.head.completion_id)

    def _start_clock(self) -> None:
        """Settle when it has to end at the latest, counted from when the call was accepted; that may be now."""
        loop = asyncio.get_running_loop()
        accepted = loop.time() - (time.monotonic() - self._accepted)
        self._clock.end_by = accepted + min(
            self._limits.max_duration,
            float("inf") if self._request.soft_time_limit is None else self._request.soft_time_limit,
        )
        self._clock.check()

    async def _read(self) -> None:
        """Ask, and read to the end; leaves early once the completion has ended."""
        try:
            async with asyncio.timeout(None) as self._reading:
                await self._ask()
        except TimeoutError:
            if self.state is not State.ENDED:
                raise  # not from leaving early
        finally:
            self._reading = None

    async def _ask(self) -> None:
        timeouts = self.resolution.provider.timeouts
        model = self.resolution.model.provider_model_id
        self.state = advance(self.state, Cause.ASKED)
        self._clock.allow(timeouts.first_event)
        request = await self._images.load(self._request)
        # The provider has the only copy from here on, and lets go of it at the first event.
        self._request = replace(self._request, messages=())
        # From here to the first event the provider keeps the time: it knows which of its replicas is silent.
        self._clock.pause()
        self._asked = time.monotonic()
        drained = 0
        asking = self.resolution.provider.stream_chat(request, model, self._call)
        del request
        async with asking as answering:
            self._request_bytes = 0
            self._clock.allow(timeouts.first_event)
            self._provider_failed = answering.failed
            self._notices = answering.notices
            self.attempts = answering.replicas_tried
            async for data in answering.body:
                if self.ended_by is Cause.ANSWER:
                    # Read to its end, the connection can be used again; what comes is counted as an anomaly.
                    self._reader.receive(data)
                    drained += len(data)
                    if drained > DRAIN_BYTES:
                        return
                    continue
                if self.ended_by is None:
                    self._receive(data, timeouts.silence)
                if self.ended_by not in (None, Cause.ANSWER):
                    return
                if self._queue.full and self.state is not _ENDED:
                    self._clock.pause()  # while we do not read, the provider is not silent
                    await self._queue.room()
                    self._clock.allow(timeouts.silence)
            if self.state is not _ENDED:
                self._take(self._reader.finish())

    def _receive(self, data: bytes, silence: float) -> None:
        """Take bytes of the answer."""
        count = self._reader.event_count
        events = self._reader.receive(data)
        if self._reader.event_count == count and not events:
            return  # only comments: the clock goes on
        if self._reader.event_count > count:
            self._gaps.receive(self._reader.event_count - count, time.monotonic())
        if events:
            self._take(events)
        self._weigh()
        if self.state is not State.ENDED:
            if self._reader.in_tail and self.state is State.STREAMING:
                self.state = advance(self.state, Cause.FINISHED)
            self._clock.allow(self._limits.tail if self.state is State.TAIL else silence)

    def _time_out(self) -> None:
        """A limit has passed: the provider's for its silence, or the completion's own."""
        if not self._clock.is_over:
            self._silent()
        elif (soft := self._request.soft_time_limit) is not None and soft <= self._limits.max_duration:
            self.stop(StopReason.TIME_LIMIT)
        else:
            limit = self._limits.max_duration
            message = f"the call ran for {limit:g} seconds, as long as this gateway allows"
            self.end(Fault(Reason.DURATION_LIMIT_EXCEEDED, message), limit)

    def _silent(self) -> None:
        if self.state is State.TAIL:
            self._take(self._reader.finish())
        else:
            limit = self._clock.allowed
            self.end(Fault(Reason.UPSTREAM_TIMEOUT, f"the provider sent no event for {limit:g} seconds"), limit)

    def _take(
        self,
        events: list[Event],
        *,
        soft: bool = False,
        limit_seconds: float | None = None,
        failure: DeltawireError | None = None,
    ) -> None:
        """Queue events; the last of an answer ends the completion.

        Args:
            events: At least one.
            soft: Whether they are the end that the caller asked for.
            limit_seconds: The limit that was passed, if a fault is that.
            failure: What the fault is to the caller, if that is known already.
        """
        last = events[-1]
        if isinstance(last, Refused):
            self._end(Cause.FAULT, self._failure_of(last.fault, limit_seconds))
            return
        if not self._begun:
            self._begun = True
            if self.state is State.ASKING and not soft:
                self.state = advance(self.state, Cause.BEGUN)
            started, *events = events
            self._queue.put([started, *self._notices])
        self._queue.put(events)
        if not isinstance(last, Completed):
            return
        if last.fault is not None:
            self._end(Cause.FAULT, failure or self._failure_of(last.fault, limit_seconds))
        else:
            self._end(Cause.SOFT_END if soft and self.state is not State.TAIL else Cause.ANSWER)

    def _fail(self, error: DeltawireError) -> None:
        """End it with a failure that is not of the answer: it was refused, or cannot be read on."""
        if self.state is State.ENDED:
            return
        events: list[Event] = []
        if self._begun:
            # What came is reported; unless the defect is where that is known.
            with contextlib.suppress(Exception):
                events = self._reader.finish(Fault(error.reason, error.message))
        if events:
            self._take(events, failure=error)
        else:
            self._end(Cause.FAULT, error)

    def _end(self, cause: Cause, failure: DeltawireError | None = None) -> None:
        """The one place where a completion ends."""
        self.state = advance(self.state, cause)
        self.ended_by = cause
        self.failure = failure
        self._ended = time.monotonic()
        self._clock.stop()
        self._queue.close()
        if isinstance(failure, ProviderError):
            self._provider_failed(failure.reason)
        if self._reading is None or self._reading.expired():
            return
        now = asyncio.get_running_loop().time()
        if asyncio.current_task() is not self._task:
            self._reading.reschedule(now)
        elif failure is None:
            self._reading.reschedule(now + DRAIN_SECONDS)

    def _failure_of(self, fault: Fault, limit_seconds: float | None) -> DeltawireError:
        """What a fault is to the caller. After the first event all that is the provider's is ABORTED: start again from the top."""
        provider_id = self.resolution.provider.id
        metadata = self._metadata(limit_seconds)
        if fault.reason is Reason.UPSTREAM_ERROR:
            return failure_of(
                UpstreamError(fault.upstream_code, fault.message, fault.upstream_type, fault.upstream_param),
                provider_id,
                callers_token=self._call.token is not None,
                token_withheld=self._call.token_withheld,
                model=self._request.model,
                begun=self._begun,
                metadata=metadata if self._begun else None,
            )
        if fault.reason in _OURS:
            code = Code.ABORTED if fault.reason is Reason.DRAINING and self._begun else None
            retry_after = RETRY_SECONDS if fault.reason is Reason.MEMORY_LIMIT_EXCEEDED else None
            return GatewayError(fault.reason, fault.message, code=code, metadata=metadata, retry_after=retry_after)
        return ProviderError(
            fault.reason,
            f"provider {provider_id!r}: {fault.message}",
            code=Code.ABORTED if self._begun else None,
            metadata=metadata,
            retry_after=RETRY_SECONDS if fault.reason is Reason.UPSTREAM_UNAVAILABLE and not self._begun else None,
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


class _Clock:
    """The two limits of one completion, its own and that of the provider's silence, on one timer of the loop.

    Moving the silence's limit costs no timer: one that fires too early is set anew.

    Args:
        time_out: Called once, when a limit has passed.

    Attributes:
        end_by: When the completion has to end, on the loop's clock.
        allowed: Seconds of silence that are allowed now.
    """

    def __init__(self, time_out: Callable[[], None]) -> None:
        self.end_by = float("inf")
        self.allowed = float("inf")
        self._quiet_until = float("inf")
        # None once it is stopped. Else the completion and it would refer to each other until the garbage is collected, which may
        # be much later.
        self._time_out: Callable[[], None] | None = time_out
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_over(self) -> bool:
        """Whether the completion's own limit has passed."""
        return asyncio.get_running_loop().time() >= self.end_by

    def allow(self, seconds: float) -> None:
        """Allow so much silence from now on."""
        if self._time_out is None:
            return
        self.allowed = seconds
        self._quiet_until = asyncio.get_running_loop().time() + seconds
        if self._timer is None or self._timer.when() > self._quiet_until:
            self._set()

    def pause(self) -> None:
        """Allow any silence until the next `allow`."""
        self._quiet_until = float("inf")

    def check(self) -> None:
        """Time out if a limit has passed, else wait for that."""
        self._timer = None
        if self._time_out is None:
            return
        if asyncio.get_running_loop().time() >= min(self.end_by, self._quiet_until):
            self._time_out()
        else:
            self._set()

    def stop(self) -> None:
        """No limit counts any more."""
        self._time_out = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        due = min(self.end_by, self._quiet_until)
        if due < float("inf"):
            self._timer = asyncio.get_running_loop().call_at(due, self.check)


class _Gaps:
    """The times between the engine's events, on the monotonic clock. Events of one read came together."""

    __slots__ = ("_count", "_last", "_worst", "first")

    def __init__(self) -> None:
        self.first: float | None = None
        self._last = 0.0
        self._worst = 0.0
        self._count = 0

    def receive(self, count: int, now: float) -> None:
        """Take note of so many events that came now."""
        if self.first is None:
            self.first = now
        else:
            self._worst = max(self._worst, now - self._last)
        self._last = now
        self._count += count

    @property
    def mean(self) -> float | None:
        """Between two events; `None` if there were fewer."""
        return (self._last - self.first) / (self._count - 1) if self.first is not None and self._count > 1 else None

    @property
    def worst(self) -> float | None:
        """The longest; `None` if there were fewer than two events."""
        return self._worst if self._count > 1 else None


def _with_defaults(request: ChatRequest, max_tokens: int | None) -> ChatRequest:
    if max_tokens is None or request.sampling.max_tokens is not None:
        return request
    return replace(request, sampling=replace(request.sampling, max_tokens=max_tokens))
