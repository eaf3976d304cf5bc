"""Runs completions: admits them, resolves their provider, and finds them by id.

    Worker.completion   a completion of one call, which ends when the caller disconnects
    Worker.open         a completion that its own task generates into a stream with any number of readers: for completions with
                        an id of the caller's, which retries must find, and for retained ones
    Worker.resume       another reader of such a stream
    Worker.record       the record of either, to cancel or look up

`completion` implements a single completion.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from deltawire_server.access import REVOKED
from deltawire_server.admission import Admission
from deltawire_server.completions.completion import Completion, CompletionLimits
from deltawire_server.completions.info import Outcome
from deltawire_server.completions.options import StreamOptions
from deltawire_server.completions.records import Records
from deltawire_server.completions.retention import Retention, RetentionLimits
from deltawire_server.completions.state import State
from deltawire_server.errors import (
    FOR_OPERATORS,
    CallerError,
    Code,
    DeltawireError,
    GatewayError,
    Reason,
    internal_error,
)
from deltawire_server.images.load import Images
from deltawire_server.limits import Share, Use
from deltawire_server.memory import Ledger
from deltawire_server.metrics.table import HELD_BYTES, HELD_LIMIT, QUEUED, RETAINED_STREAMS, STREAMS, STREAMS_LIMIT
from deltawire_server.pacing import give_way
from deltawire_server.registry.model import ModelType, all_models
from deltawire_server.registry.registry import require_type
from deltawire_server.sansio.events import Fault
from deltawire_server.schemas.strict import argument_checks
from deltawire_server.telemetry import get_logger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

    from deltawire_server.admission import Place
    from deltawire_server.completions.adaptive import AdaptiveDelay
    from deltawire_server.completions.records import Record
    from deltawire_server.completions.retention import RetainedStream
    from deltawire_server.registry.model import Permits
    from deltawire_server.registry.registry import ModelRegistry, Resolution
    from deltawire_server.upstream.base import CallContext, TokenCount
    from deltawire_server.upstream.providers import Providers
    from deltawire_server.upstream.request import ChatRequest
    from deltawire_server.usage.log import UsageLog, UsageRecord

_STALE_REASONS = frozenset({Reason.MODEL_NOT_FOUND, Reason.UPSTREAM_UNAVAILABLE, Reason.UPSTREAM_INCOMPLETE})
"""Errors after which a provider's listing may be out of date."""

_SHUTTING_DOWN = "this gateway process is shutting down: start the completion again on a new connection"

_log = get_logger(__name__)


def _no_deadline() -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller of a completion.

    Attributes:
        call: The caller's metadata that is forwarded to the provider.
        name: Separates the completions of different callers: `CallRecord.owner`; empty if they cannot be distinguished.
        label: Its name for operators: `CallRecord.caller`.
        deadline_passed: Returns whether the call's deadline has passed; called when the call is cancelled.
        place: The call's place, which its completion takes over; if there is none, the completion takes a new one.
        request_bytes: Bytes of the serialized request.
        assertion: From `access.Trust`, if a trusted proxy asserts who the caller is.
        share: What the caller uses, with its limits; by default without any.
        permits: Whether a model exists for the caller, by its id.
    """

    call: CallContext
    name: str = ""
    label: str = ""
    deadline_passed: Callable[[], bool] = _no_deadline
    place: Place | None = None
    request_bytes: int = 0
    assertion: str = ""
    share: Share = field(default_factory=Share)
    permits: Permits = all_models

    def left(self) -> Outcome:
        """The outcome of a completion whose caller has disconnected."""
        if self.deadline_passed():
            return Outcome(Code.DEADLINE_EXCEEDED, None, "the call's deadline passed")
        return Outcome(Code.CANCELLED, None, "the caller cancelled the call, or its connection was lost")


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """Limits of completions; see `settings.model` for the defaults.

    Attributes:
        max_streams: Active completions at once.
        queue_size: Calls that may wait for a place.
        queue_timeout: Seconds that a call may wait for a place.
        completion: Limits of one completion.
        retention: Limits of retained streams.
    """

    max_streams: int = 1000
    completion: CompletionLimits = field(default_factory=CompletionLimits)
    retention: RetentionLimits = field(default_factory=RetentionLimits)
    queue_size: int = 0
    queue_timeout: float = 10.0


class Worker:
    """Runs completions.

    Args:
        registry: Resolves models.
        providers: The providers of the registry; each is kept open while a completion needs it.
        limits: Limits of completions.
        images: Loads images from URLs; by default it refuses them.
        memory: The memory of all calls; by default without a limit.
        records: The records of the completions.
        adaptive: How long deltas are delayed under load; not at all by default.
        usage_log: Where usage records are written; nowhere by default.

    Attributes:
        admission: The places of completions.
        memory: The memory of all calls.
    """

    def __init__(
        self,
        registry: ModelRegistry,
        providers: Providers,
        limits: WorkerLimits | None = None,
        images: Images | None = None,
        memory: Ledger | None = None,
        records: Records | None = None,
        adaptive: AdaptiveDelay | None = None,
        usage_log: UsageLog | None = None,
    ) -> None:
        self._adaptive = adaptive
        self._usage_log = usage_log
        self._registry = registry
        self._providers = providers
        self._limits = limits or WorkerLimits()
        self._images = images or Images()
        self.admission = Admission(self._limits.max_streams, self._limits.queue_size, self._limits.queue_timeout)
        self._completions: set[Completion] = set()
        self._records = records or Records()
        self.memory = memory or Ledger(sys.maxsize)
        self._retention = Retention(self._limits.retention, self.memory)
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def active(self) -> int:
        """The number of active completions, including calls that may start one."""
        return self.admission.active

    @property
    def utilization(self) -> float:
        """The part of the places or of the memory that is in use, whichever is more; above 1 if calls wait for a place.

        At least one place, so that it is never 0.
        """
        streams = max(1, self.active + self.admission.queued) / self._limits.max_streams
        return max(streams, self.memory.held / self.memory.limit)

    @property
    def process(self) -> str:
        """Eight hexadecimal digits that identify this process."""
        return self._records.mark

    def measure(self) -> None:
        """Set the metrics of the current state."""
        STREAMS.set(self.active)
        QUEUED.set(self.admission.queued)
        STREAMS_LIMIT.set(self._limits.max_streams)
        HELD_LIMIT.set(self.memory.limit)
        HELD_BYTES.labels("calls").set(self.memory.held)
        HELD_BYTES.labels("retained").set(self._retention.size)
        HELD_BYTES.labels("remembered").set(self._records.size)
        RETAINED_STREAMS.set(self._retention.count)

    def end_all(self) -> None:
        """End every completion on shutdown. Each sends the answer so far, and then the error."""
        for completion in tuple(self._completions):
            completion.end(Fault(Reason.DRAINING, _SHUTTING_DOWN))

    async def end_revoked(self, admits: Callable[[str, str], bool]) -> None:
        """End the completions of revoked callers, including retained ones. Each sends the answer so far, and then the error.

        Other tasks run in between: ending a thousand completions takes a tenth of a second.

        Args:
            admits: Whether the caller with this name may still call, if it was named by this assertion.
        """
        fault = Fault(Reason.ACCESS_CHANGED, REVOKED)
        for record in self._records.kept():
            if not admits(record.caller, record.assertion):
                record.fail(fault)
                await give_way()

    async def close(self) -> None:
        """Stop the completions that have their own task, and drop retained streams."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def record(self, caller: Caller, completion_id: str) -> Record:
        """The record of a caller's completion, which changes while the completion runs.

        Raises:
            DeltawireError: COMPLETION_NOT_FOUND or WRONG_REPLICA.
        """
        return self._records.find(caller.name, completion_id)

    def record_of_any(self, completion_id: str, label: str) -> Record:
        """The record of a completion of any caller, for operators: see `Records.find_any`."""
        return self._records.find_any(completion_id, label)

    def newest(self, before: int | None) -> list[Record]:
        """All records, newest first: see `Records.newest`."""
        return self._records.newest(before)

    def resume(self, caller: Caller, completion_id: str) -> RetainedStream:
        """A retained stream of the caller's. `read` it, and `follow` it from where the caller stopped.

        Raises:
            DeltawireError: COMPLETION_NOT_FOUND or WRONG_REPLICA; COMPLETION_GONE: it was not retained, or its retention has ended.
        """
        stream = self.record(caller, completion_id).stream
        if stream is None or not stream.is_retained:
            raise CallerError(
                Reason.COMPLETION_GONE,
                f"completion {completion_id!r} is not retained, or its retention has ended: GetChatCompletion returns how it ended",
                metadata={"completion_id": completion_id},
            )
        return stream

    def open(
        self,
        request: ChatRequest,
        caller: Caller,
        options: StreamOptions | None = None,
        *,
        fingerprint: bytes,
        keep_logprobs: bool = False,
    ) -> RetainedStream:
        """Open the stream of a completion that its own task generates for as long as the stream is read or retained.

        An equal request with the same id returns the same stream: it is a retry of the same call. `read` the stream immediately.
        All errors, even those before the engine is called, are raised to its readers.

        Args:
            request: The request.
            caller: The owner of the completion.
            options: The options of the stream, including retention; by default there is none.
            fingerprint: A digest that is the same for equal requests.
            keep_logprobs: Whether the last event repeats the log-probabilities and is kept whole.

        Raises:
            CallerError: COMPLETION_ALREADY_EXISTS.
            GatewayError: Too many completions, or CALLER_LIMIT_EXCEEDED: too many of the caller's with retention.
        """
        options = options or StreamOptions()
        earlier = self._records.current(caller.name, request.completion_id)
        if earlier is not None and earlier.stream is not None and earlier.fingerprint == fingerprint:
            if caller.place is not None:
                caller.place.release()  # the completion has its own
            return earlier.stream
        if options.retention:
            caller.share.take(Use.RETAINED_STREAMS)
        try:
            record, place = self._admit(caller, request.completion_id, fingerprint)
        except DeltawireError:
            if options.retention:
                caller.share.give_back(Use.RETAINED_STREAMS)
            raise
        stream = record.stream = self._retention.open(
            options.retention or 0.0,
            functools.partial(self._records.released, record),
            whole=keep_logprobs,
            share=caller.share,
        )
        stream.traceparent = caller.call.traceparent
        running = self._run(record, place, request, caller, options, keep_logprobs=keep_logprobs)
        task = asyncio.create_task(self._generate(running, stream, caller), name=record.completion_id)
        # Cancel only after the task has started: a task that is cancelled earlier never runs its cleanup.
        stream.abandoned = functools.partial(asyncio.get_running_loop().call_soon, task.cancel)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if options.retention:
            task.add_done_callback(lambda _: caller.share.give_back(Use.RETAINED_STREAMS))
        return stream

    def is_current(self, caller: Caller, completion_id: str) -> bool:
        """Whether a completion of the caller with this id is active or retained: then `open` joins it or refuses the id."""
        record = self._records.current(caller.name, completion_id)
        return record is not None and not record.is_abandoned

    def completion(
        self,
        request: ChatRequest,
        caller: Caller,
        options: StreamOptions | None = None,
        *,
        keep_logprobs: bool = False,
    ) -> AbstractAsyncContextManager[Completion]:
        """Admit a completion. Enter the result at once, which resolves the provider; it is called only by `batches`.

        Args:
            request: The request.
            caller: The owner of the completion.
            options: The options of the stream.
            keep_logprobs: Whether the last event repeats the log-probabilities.

        Raises:
            GatewayError: Too many completions.
            DeltawireError: The completion's id is taken; or, on entering, the model cannot be found or cannot chat.
        """
        record, place = self._admit(caller, request.completion_id)
        return self._run(record, place, request, caller, options or StreamOptions(), keep_logprobs=keep_logprobs)

    @contextlib.asynccontextmanager
    async def _run(
        self,
        record: Record,
        place: Place,
        request: ChatRequest,
        caller: Caller,
        options: StreamOptions,
        *,
        keep_logprobs: bool,
    ) -> AsyncIterator[Completion]:
        """Run an admitted completion to its end, and record the outcome."""
        accepted = time.monotonic() - place.waited
        outcome: Outcome | None = Outcome.of(internal_error())  # the default
        try:
            resolution = await self._registry.resolve(request.model, caller.call.token, caller.permits)
            call = caller.call if resolution.sends_token else caller.call.without_token()
            with self._providers.held(resolution.provider):
                require_type(resolution.model, ModelType.LLM)
                completion = Completion(
                    record.completion_id,
                    request,
                    call,
                    resolution,
                    options,
                    self._images,
                    self._limits.completion,
                    accepted,
                    checks=await argument_checks(request, resolution.provider.engine) if request.offered_tools else {},
                    keep_logprobs=keep_logprobs,
                    hold=self.memory.hold(caller=caller.share.key),
                    request_bytes=caller.request_bytes,
                    adaptive=self._adaptive,
                    usage_record=self._usage_record(record.completion_id, caller, resolution),
                    create_time=record.created / 1e6,
                    share=caller.share,
                )
                del request  # the completion has it, until it is sent
                record.run(completion)
                self._completions.add(completion)
                try:
                    yield completion
                    if completion.state is State.ENDED and completion.failure is None:
                        outcome = None
                finally:
                    await self._close(completion)
        except DeltawireError as error:
            outcome = Outcome.of(error)
            raise
        except asyncio.CancelledError:
            outcome = caller.left()
            if record.stream is not None and record.stream.left is not None:
                outcome = record.stream.left
            raise
        finally:
            self._records.end(record, outcome)
            place.release()

    def _usage_record(self, completion_id: str, caller: Caller, resolution: Resolution) -> UsageRecord | None:
        if self._usage_log is None:
            return None
        return self._usage_log.record(
            completion_id=completion_id,
            request_id=caller.call.request_id,
            caller=caller.label,
            model=resolution.model.id,
            alias=resolution.alias,
            provider=resolution.provider.id,
        )

    async def _close(self, completion: Completion) -> None:
        self._completions.discard(completion)
        await completion.close()
        provider_id = completion.resolution.provider.id
        if completion.anomalies:
            _log.warning(
                "the provider's answer had anomalies",
                provider=provider_id,
                completion_id=completion.head.completion_id,
                anomalies=dict(completion.anomalies),
            )
        if completion.failure is not None and completion.failure.reason in _STALE_REASONS:
            self._registry.mark_stale(provider_id)

    async def count_tokens(
        self, request: ChatRequest, call: CallContext, permits: Permits = all_models
    ) -> tuple[TokenCount, Resolution]:
        """Count the prompt tokens of a request, by the provider that would serve it.

        Args:
            request: The request.
            call: The caller's metadata.
            permits: Whether a model exists for the caller, by its id.

        Returns:
            The count, and the model and provider.

        Raises:
            DeltawireError: The model cannot be found or cannot chat, or its provider cannot count tokens.
        """
        resolution = await self._registry.resolve(request.model, call.token, permits)
        if not resolution.sends_token:
            call = call.without_token()
        with self._providers.held(resolution.provider):
            require_type(resolution.model, ModelType.LLM)
            count = await resolution.provider.count_tokens(request, resolution.model.provider_model_id, call)
        return count, resolution

    def _admit(self, caller: Caller, completion_id: str, fingerprint: bytes = b"") -> tuple[Record, Place]:
        """The record of a new completion, and its place, which `_run` releases at its end.

        Raises:
            CallerError: COMPLETION_ALREADY_EXISTS.
            GatewayError: TOO_MANY_STREAMS.
        """
        place = (caller.place or self.admission.place()).hand_over()
        try:
            record = self._records.begin(caller.name, completion_id, fingerprint, caller.label)
        except DeltawireError:
            place.release()
            raise
        record.assertion = caller.assertion
        return record, place

    async def _generate(
        self, running: AbstractAsyncContextManager[Completion], stream: RetainedStream, caller: Caller
    ) -> None:
        """The task of a completion that is generated into a stream."""
        failure: DeltawireError | None = internal_error("a completion's task ended without an end")
        try:
            async with running as completion:
                try:
                    async for events in completion.batches():
                        stream.put(events)
                finally:
                    _log_end(completion, caller)
            failure = None
        except DeltawireError as error:
            failure = error
        except asyncio.CancelledError:
            failure = GatewayError(Reason.DRAINING, _SHUTTING_DOWN)
            raise
        except Exception as defect:  # noqa: BLE001 (readers get an error, and the cause is logged)
            _log.exception("a completion's task failed")
            failure = internal_error(cause=defect)
        finally:
            stream.close(failure)


def _log_end(completion: Completion, caller: Caller) -> None:
    """Log the end of a completion, which may have outlived all its calls."""
    failure = completion.failure
    log = _log.warning if failure is not None and failure.reason in FOR_OPERATORS else _log.info
    log(
        "completion ended",
        request_id=caller.call.request_id,
        trace_id=caller.call.trace_id,
        seconds=round(completion.timings.total, 6),
        reason=None if failure is None else failure.reason.name,
        **({"caller": caller.label} if caller.label else {}),
        **completion.log_values,
    )
