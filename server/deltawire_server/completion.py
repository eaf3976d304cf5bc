"""One completion, from the request to the last event: the one place that tells the whole story.

    Completion.batches:   reader task  provider ──bytes──▶ CompletionReader ──events──▶ Handover ─┐
                          the caller   writes a batch, comes back for the next  ◀──── joined ─────┘

One task reads and runs the machine while the caller writes what it got, so a slow write costs no reading, and what comes
meanwhile is joined. The handover is bounded: at its limit reading stops, and with it, through the socket, whoever sends;
vLLM itself generates on, so a caller that takes nothing for too long loses its upstream.

Four things end it: the answer's own end, a fault, a soft end that the caller asked for (`stop`, or its time limit), after which
all is told as after the answer's own, and the caller's going away, after which nothing can be told. Whichever it is, `close`
closes the upstream connection; that is what makes vLLM stop.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from deltawire_server.completions.records import Head, Timings
from deltawire_server.errors import Code, DeltawireError, GatewayError, ProviderError, Reason
from deltawire_server.handover import Handover
from deltawire_server.sansio.completion import CompletionReader, Limits
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
from deltawire_server.upstream.refusals import RETRY_SECONDS, Refusal, error_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence

    from deltawire_server.registry.registry import Resolution
    from deltawire_server.stream_options import StreamOptions
    from deltawire_server.upstream.base import CallContext
    from deltawire_server.upstream.images.load import Images
    from deltawire_server.upstream.request import ChatRequest

_OURS = frozenset({Reason.DURATION_LIMIT_EXCEEDED, Reason.DRAINING})
"""The faults that are this process's and not the provider's."""

TAIL_SECONDS = 0.25
"""How long the end of a body may take after the last event. Read to its end, the connection can be used again."""


@dataclass(frozen=True, slots=True)
class CompletionLimits:
    """What a completion may take; the settings say why each default is what it is.

    Attributes:
        max_duration: Seconds that it may run.
        queue_bytes: What may wait for its caller before reading stops.
        slow_caller_timeout: Seconds that the caller may take nothing while that much waits.
        answer: What the answer may hold.
    """

    max_duration: float = 3600.0
    queue_bytes: int = 256 * 1024
    slow_caller_timeout: float = 30.0
    answer: Limits = field(default_factory=Limits)


class Completion:
    """One completion under way. Made by `Worker.completion`; go through `batches` once.

    Args:
        completion_id: What it is known by.
        request: What to ask.
        call: The caller's metadata.
        resolution: Which model and provider, and the alias that was used.
        options: How the answer is told.
        images: Puts images in the place of their addresses.
        limits: What it may take.
        accepted: When the call was accepted, on the monotonic clock.
        keep_logprobs: Whether the last event repeats the log-probabilities.

    Attributes:
        head: What is settled of it.
        resolution: Which model and provider, and the alias that was used.
        failure: Why it did not end by itself; set before the batch with `Completed` is given, or instead of it.
        attempts: How many replicas of the provider were asked.
        gave_up_on_caller: Whether the caller was cancelled because it took nothing for too long.
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
        keep_logprobs: bool,
    ) -> None:
        self._request = _with_defaults(request, resolution.provider.default_max_tokens)
        self.resolution = resolution
        self.head = Head(
            completion_id,
            resolution.model.id,
            resolution.alias,
            resolution.provider.id,
            time.time(),
            self._request.sampling,
        )
        self.failure: DeltawireError | None = None
        self.attempts = 0
        self.gave_up_on_caller = False
        self._call = call
        self._options = options
        self._images = images
        self._limits = limits
        self._accepted = accepted
        self._begun = False
        self._asked: float | None = None
        self._ended: float | None = None
        self._gaps = _Gaps()
        self._silence = 0.0  # how long the provider may be silent now
        self._limit_passed: float | None = None
        self._clock: asyncio.Timeout | None = None  # while the provider's answer is read
        self._end_by = float("inf")  # on the loop's clock
        self._end_as: Fault | StopReason | None = None  # what happens then; None is the gateway's own limit
        self._notices: Sequence[Notice] = ()
        self._told_usage: Usage | None = None
        self._handover = Handover(limits.queue_bytes, options.max_coalesce_delay)
        self._reader = CompletionReader(
            choice_count=self._request.choice_count,
            offered_tools=[tool.name for tool in self._request.offered_tools],
            stop=self._request.sampling.stop,
            stop_token_ids=self._request.sampling.stop_token_ids,
            incremental=self._request.incremental_tool_calls,
            argument_checks=self._request.argument_checks,
            keep_logprobs=keep_logprobs,
            limits=limits.answer,
        )
        self._task: asyncio.Task[None] | None = None
        self._consumer: asyncio.Task[object] | None = None

    @property
    def begun(self) -> bool:
        """Whether `Started` was given."""
        return self._begun

    @property
    def usage(self) -> Usage:
        """What is known of the tokens used so far."""
        return self._reader.usage

    @property
    def oddities(self) -> Mapping[str, int]:
        """What the engine sent that no vLLM should, and that was got over, with counts."""
        return self._reader.oddities

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
        """The answer's events in order, each time all that wait, joined.

        Write a batch, then come back: what comes meanwhile waits. The last batch ends with `Completed`.

        Raises:
            DeltawireError: The answer did not begin: nothing was given but heartbeats. Or it ended with a fault: raised after
                the batch with `Completed`, the same as `failure`.
        """
        self._consumer = asyncio.current_task()
        self._task = asyncio.create_task(self._read(), name=self.head.completion_id)
        while batch := await self._batch():
            yield batch
        await self._task
        if self.failure is not None:
            raise self.failure

    def stop(self, reason: StopReason) -> None:
        """End it now, as it is: `batches` gives what is left, as after the answer's own end."""
        self._end_now(reason)

    def end(self, fault: Fault) -> None:
        """End it now, with a fault of our own: `batches` gives what is left, as after any other."""
        self._end_now(fault)

    async def close(self) -> None:
        """Stop reading and close the upstream connection, if that has not happened yet; then it is done."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            # Only waits for the connection to be closed: what the task raises now interests nobody.
            await asyncio.wait([self._task])
        self._ended = self._ended or time.monotonic()

    async def _batch(self) -> list[StreamEvent]:
        """What is told next; empty after the end."""
        interval = self._options.heartbeat_interval
        if interval is None or not (self.begun or self._options.early_heartbeats):
            events = await self._handover.take()
        else:
            try:
                async with asyncio.timeout(interval):
                    events = await self._handover.take()
            except TimeoutError:
                return [Heartbeat()]
        if self._options.usage_updates and events and not isinstance(events[-1], Completed):
            usage = self.usage
            if usage != self._told_usage:
                self._told_usage = usage
                events.append(UsageUpdate(usage))
        return events

    def _end_now(self, how: Fault | StopReason) -> None:
        loop = asyncio.get_running_loop()
        if self._end_by > loop.time():  # else it is ending already
            self._end_as = how
            self._end_by = loop.time()
            if self._clock is not None and not self._clock.expired():
                self._clock.reschedule(self._end_by)

    async def _read(self) -> None:
        """The reader task: to the end of the body, whatever that is, and then the handover is closed."""
        try:
            try:
                await self._receive_all()
            finally:
                self._handover.close()
            await self._wait_until_taken()
        except DeltawireError as error:
            self.failure = error
        except Exception as error:  # noqa: BLE001 (a defect must end the call, not hang it)
            self.failure = GatewayError(Reason.INTERNAL, "the gateway failed; report this with the request id")
            self.failure.__cause__ = error

    def _start_clock(self) -> None:
        """Settle when it has to end at the latest, and as what, unless it was ended before it began."""
        now = asyncio.get_running_loop().time()
        spent = time.monotonic() - self._accepted
        self._end_by = min(self._end_by, now + self._limits.max_duration)
        soft = self._request.soft_time_limit
        if soft is not None and now + soft - spent < self._end_by:
            self._end_by = now + soft - spent
            self._end_as = StopReason.TIME_LIMIT

    async def _receive_all(self) -> None:
        """Ask, and read to the end, within the times that are given."""
        loop = asyncio.get_running_loop()
        self._start_clock()
        if self._end_by <= loop.time():  # ended before it began: nobody need be asked
            self._pass_on(self._give_up(overdue=True))
            return
        clock = self._clock = asyncio.timeout_at(self._end_by)
        try:
            async with clock:
                await self._ask(clock)
        except TimeoutError:
            if not self._reader.ended:
                self._pass_on(self._give_up(overdue=clock.when() == self._end_by))
        finally:
            self._clock = None

    async def _ask(self, clock: asyncio.Timeout) -> None:
        loop = asyncio.get_running_loop()
        patience = self.resolution.provider.patience
        model = self.resolution.model.provider_model_id
        self._silence = patience.first_event
        clock.reschedule(min(self._end_by, loop.time() + self._silence))
        request = await self._images.load(self._request)
        self._asked = time.monotonic()
        async with self.resolution.provider.stream_chat(request, model, self._call) as answering:
            self._notices = answering.notices
            self.attempts = answering.replicas_tried
            async for data in answering.body:
                if self._reader.ended:
                    continue
                count = self._reader.event_count
                events = self._reader.receive(data)
                if self._reader.event_count > count:
                    self._gaps.receive(self._reader.event_count - count, time.monotonic())
                self._pass_on(events)
                if self._reader.ended:
                    if self.failure is not None:
                        return
                    self._handover.close()
                    clock.reschedule(loop.time() + TAIL_SECONDS)
                    continue
                if self._reader.event_count == count and not self._handover.full:
                    continue  # only comments: the clock goes on
                self._silence = patience.silence
                if self._handover.full:
                    clock.reschedule(self._end_by)  # while we do not read, the provider is not silent
                    await self._wait_for_room()
                clock.reschedule(min(self._end_by, loop.time() + self._silence))
            self._pass_on(self._reader.finish())

    def _give_up(self, *, overdue: bool) -> list[Event]:
        """What is left to tell when the clock has run out: the provider's for its silence, or the completion's own."""
        if not overdue:
            self._limit_passed = self._silence
            message = f"the provider sent no event for {self._silence:g} seconds"
            return self._reader.finish(Fault(Reason.UPSTREAM_TIMEOUT, message))
        if isinstance(self._end_as, StopReason):
            return self._reader.stop(self._end_as)
        if self._end_as is not None:
            return self._reader.finish(self._end_as)
        limit = self._limit_passed = self._limits.max_duration
        message = f"the call ran for {limit:g} seconds, as long as this gateway allows"
        return self._reader.finish(Fault(Reason.DURATION_LIMIT_EXCEEDED, message))

    def _pass_on(self, events: list[Event]) -> None:
        """Hand events over; a fault among them becomes this completion's failure."""
        if not events:
            return
        last = events[-1]
        if isinstance(last, Refused):
            raise self._error_before_start(last.fault)
        if isinstance(last, Completed):
            self._ended = time.monotonic()
            if last.fault is not None:
                self.failure = self._error_after_start(last.fault)
        if not self._begun:
            self._begun = True
            started, *events = events
            self._handover.put([started, *self._notices])
        self._handover.put(events)

    async def _wait_until_taken(self) -> None:
        """The answer has ended: a caller that does not read it must not hold its place for ever."""
        while not self._handover.exhausted:
            await self._wait_for_room()

    async def _wait_for_room(self) -> None:
        try:
            async with asyncio.timeout(self._limits.slow_caller_timeout):
                await self._handover.room()
        except TimeoutError:
            limit = self._limits.slow_caller_timeout
            self.failure = GatewayError(
                Reason.SLOW_CALLER,
                f"the caller read nothing for {limit:g} seconds while its answer waited",
                metadata={"limit_seconds": f"{limit:g}"},
            )
            if self._consumer is not None:
                # It is stuck in a write: nothing else gets it out of there.
                self.gave_up_on_caller = True
                self._consumer.cancel()
            raise self.failure from None

    def _error_before_start(self, fault: Fault) -> DeltawireError:
        provider_id = self.resolution.provider.id
        if fault.reason is Reason.UPSTREAM_ERROR:
            refusal = Refusal(fault.upstream_code, fault.message, fault.upstream_type, fault.upstream_param)
            callers_token = self._call.token is not None
            return error_of(refusal, provider_id, callers_token=callers_token, model=self._request.model)
        if fault.reason in _OURS:
            return GatewayError(fault.reason, fault.message, metadata=self._metadata(fault))
        return ProviderError(
            fault.reason,
            f"provider {provider_id!r}: {fault.message}",
            metadata=self._metadata(fault),
            retry_after=RETRY_SECONDS if fault.reason is Reason.UPSTREAM_UNAVAILABLE else None,
        )

    def _error_after_start(self, fault: Fault) -> DeltawireError:
        if fault.reason in _OURS:
            code = Code.ABORTED if fault.reason is Reason.DRAINING else None
            return GatewayError(fault.reason, fault.message, code=code, metadata=self._metadata(fault))
        # Whatever is the provider's fault now: start again from the top.
        message = f"provider {self.resolution.provider.id!r}: {fault.message}"
        return ProviderError(fault.reason, message, code=Code.ABORTED, metadata=self._metadata(fault))

    def _metadata(self, fault: Fault) -> dict[str, str]:
        metadata = {"provider": self.resolution.provider.id, "completion_id": self.head.completion_id}
        if self._limit_passed is not None:
            metadata["limit_seconds"] = f"{self._limit_passed:g}"
        if fault.upstream_code:
            metadata["upstream_code"] = str(fault.upstream_code)
        usage = self.usage
        metadata["completion_tokens"] = str(usage.completion_tokens)
        if usage.prompt_tokens is not None:
            metadata["prompt_tokens"] = str(usage.prompt_tokens)
        metadata["usage_provenance"] = usage.provenance.name
        return metadata


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
