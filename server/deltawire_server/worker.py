"""One completion, from the request to the last event: the one place that tells the whole story.

    Worker.completion ── admits, resolves the model ──▶ Completion
    Completion.batches:   reader task  provider ──bytes──▶ CompletionReader ──events──▶ Handover ─┐
                          the caller   writes a batch, comes back for the next  ◀──── joined ─────┘

One task reads and runs the machine while the caller writes what it got, so a slow write costs no reading, and what comes
meanwhile is joined. The handover is bounded: at its limit reading stops, and with it, through the socket, whoever sends;
vLLM itself generates on, so a caller that takes nothing for too long loses its upstream.

Leaving `completion` by whatever door (the end, a fault, the caller's cancel or deadline) closes the upstream connection;
that is what makes vLLM stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from deltawire_server.errors import Code, DeltawireError, GatewayError, ProviderError, Reason
from deltawire_server.handover import Handover
from deltawire_server.registry.model import ModelType
from deltawire_server.registry.registry import require_type
from deltawire_server.sansio.completion import CompletionReader, Limits
from deltawire_server.sansio.events import Completed, Event, Fault, Refused, Started, Usage
from deltawire_server.upstream.refusals import RETRY_SECONDS, Refusal, error_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping

    from deltawire_server.registry.registry import ModelRegistry, Resolution
    from deltawire_server.upstream.base import CallContext
    from deltawire_server.upstream.providers import Providers
    from deltawire_server.upstream.request import ChatRequest, Sampling

_OURS = frozenset({Reason.DURATION_LIMIT_EXCEEDED, Reason.DRAINING})
"""The faults that are this process's and not the provider's."""

_TELLING = frozenset({Reason.MODEL_NOT_FOUND, Reason.UPSTREAM_UNAVAILABLE, Reason.UPSTREAM_INCOMPLETE})
"""The failures after which a provider may serve something else than it did, or nothing."""

TAIL_SECONDS = 0.25
"""How long the end of a body may take after the last event. Read to its end, the connection can be used again."""


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """What completions may take; the settings say why each default is what it is.

    Attributes:
        max_streams: Completions at once.
        max_duration: Seconds that one may run.
        queue_bytes: What may wait for one caller before reading stops.
        slow_caller_timeout: Seconds that a caller may take nothing while that much waits.
        answer: What one answer may hold.
    """

    max_streams: int = 1000
    max_duration: float = 3600.0
    queue_bytes: int = 256 * 1024
    slow_caller_timeout: float = 30.0
    answer: Limits = field(default_factory=Limits)


class Worker:
    """Runs completions.

    Args:
        registry: Says who serves a model.
        providers: Those of the registry; each is held while a completion needs it.
        limits: What completions may take.
    """

    def __init__(self, registry: ModelRegistry, providers: Providers, limits: WorkerLimits | None = None) -> None:
        self._registry = registry
        self._providers = providers
        self._limits = limits or WorkerLimits()
        self._active = 0
        self._under_way: set[Completion] = set()

    @property
    def active(self) -> int:
        """How many completions there are now."""
        return self._active

    def end_all(self) -> None:
        """End every completion now: this process stops. Each tells what came, and then that it was ended."""
        for completion in tuple(self._under_way):
            completion.end(Fault(Reason.DRAINING, "this process is shutting down; start again, another one serves"))

    @contextlib.asynccontextmanager
    async def completion(
        self, request: ChatRequest, call: CallContext, *, keep_logprobs: bool = False
    ) -> AsyncIterator[Completion]:
        """Admit a completion and find out who serves it; nothing is asked of the provider before `batches`.

        Args:
            request: What to ask.
            call: The caller's metadata.
            keep_logprobs: Whether the last event repeats the log-probabilities.

        Raises:
            GatewayError: Too many completions.
            DeltawireError: The model cannot be found or cannot chat; or, out of whatever the caller was doing, SLOW_CALLER
                because it did that for too long.
        """
        if self._active >= self._limits.max_streams:
            raise GatewayError(
                Reason.TOO_MANY_STREAMS,
                f"this gateway serves {self._limits.max_streams} completions at once and no more",
                metadata={"limit": str(self._limits.max_streams)},
                retry_after=RETRY_SECONDS,
            )
        self._active += 1
        try:
            accepted = time.monotonic()
            resolution = await self._registry.resolve(request.model, call.token)
            with self._providers.held(resolution.provider):
                require_type(resolution.model, ModelType.LLM)
                completion = Completion(request, call, resolution, self._limits, accepted, keep_logprobs=keep_logprobs)
                self._under_way.add(completion)
                try:
                    yield completion
                except asyncio.CancelledError:
                    task = asyncio.current_task()
                    if completion.gave_up_on_caller and completion.failure is not None and task is not None:
                        task.uncancel()  # that cancel was ours
                        raise completion.failure from None
                    raise
                finally:
                    self._under_way.discard(completion)
                    await completion.close()
                    if completion.failure is not None and completion.failure.reason in _TELLING:
                        self._registry.suspect(resolution.provider.id)
        finally:
            self._active -= 1


class Completion:
    """One completion under way. Made by `Worker.completion`; go through `batches` once.

    Attributes:
        id: Unguessable: "cmpl-" and 32 hexadecimal digits.
        resolution: Which model and provider, and the alias that was used.
        sampling: As it is sent, the operator's default included.
        create_time: Unix time, in seconds.
        failure: Why it did not end by itself; set before the batch with `Completed` is given, or instead of it.
        gave_up_on_caller: Whether the caller was cancelled because it took nothing for too long.
    """

    def __init__(
        self,
        request: ChatRequest,
        call: CallContext,
        resolution: Resolution,
        limits: WorkerLimits,
        accepted: float,
        *,
        keep_logprobs: bool,
    ) -> None:
        self.id = f"cmpl-{secrets.token_hex(16)}"
        self.resolution = resolution
        self.create_time = time.time()
        self.failure: DeltawireError | None = None
        self.gave_up_on_caller = False
        self._request = _with_defaults(request, resolution.provider.default_max_tokens)
        self._call = call
        self._limits = limits
        self._accepted = accepted
        self._first_event: float | None = None
        self._ended: float | None = None
        self._limit_passed: float | None = None
        self._clock: asyncio.Timeout | None = None  # while the provider's answer is read
        self._end_by = float("inf")  # on the loop's clock
        self._ended_by: Fault | None = None
        self._handover = Handover(limits.queue_bytes)
        self._reader = CompletionReader(
            choice_count=self._request.choice_count,
            offered_tools=[tool.name for tool in self._request.offered_tools],
            stop=self._request.sampling.stop,
            stop_token_ids=self._request.sampling.stop_token_ids,
            keep_logprobs=keep_logprobs,
            limits=limits.answer,
        )
        self._task: asyncio.Task[None] | None = None
        self._consumer: asyncio.Task[object] | None = None

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen, as it is sent."""
        return self._request.sampling

    @property
    def usage(self) -> Usage:
        """What is known of the tokens used so far."""
        return self._reader.usage

    @property
    def oddities(self) -> Mapping[str, int]:
        """What the engine sent that no vLLM should, and that was got over, with counts."""
        return self._reader.oddities

    @property
    def seconds_to_first_event(self) -> float | None:
        """From accepting the call to the engine's first event; `None` before it."""
        return None if self._first_event is None else self._first_event - self._accepted

    @property
    def seconds_total(self) -> float:
        """From accepting the call to its end, or to now."""
        return (self._ended or time.monotonic()) - self._accepted

    async def batches(self) -> AsyncGenerator[list[Event]]:
        """The answer's events in order, each time all that wait, joined.

        Write a batch, then come back: what comes meanwhile waits. The last batch ends with `Completed`.

        Raises:
            DeltawireError: The answer did not begin: nothing was given. Or it ended with a fault: raised after the batch
                with `Completed`, the same as `failure`.
        """
        self._consumer = asyncio.current_task()
        self._task = asyncio.create_task(self._read(), name=self.id)
        while batch := await self._handover.take():
            yield batch
        await self._task
        if self.failure is not None:
            raise self.failure

    def end(self, fault: Fault) -> None:
        """End it now, with a fault of our own: `batches` gives what is left, as after any other."""
        self._ended_by = fault
        self._end_by = asyncio.get_running_loop().time()
        if self._clock is not None and not self._clock.expired():
            self._clock.reschedule(self._end_by)

    async def close(self) -> None:
        """Stop reading and close the upstream connection, if that has not happened yet; then it is done."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            # Only waits for the connection to be closed: what the task raises now interests nobody.
            await asyncio.wait([self._task])
        self._ended = self._ended or time.monotonic()

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

    async def _receive_all(self) -> None:
        loop = asyncio.get_running_loop()
        patience = self.resolution.provider.patience
        self._end_by = min(self._end_by, loop.time() + self._limits.max_duration)
        silence = patience.first_event
        clock = self._clock = asyncio.timeout_at(min(self._end_by, loop.time() + silence))
        try:
            async with clock:
                model = self.resolution.model.provider_model_id
                async with self.resolution.provider.stream_chat(self._request, model, self._call) as body:
                    async for data in body:
                        if self._reader.ended:
                            continue
                        count = self._reader.event_count
                        self._pass_on(self._reader.receive(data))
                        if self._reader.ended:
                            if self.failure is not None:
                                return
                            self._handover.close()
                            clock.reschedule(loop.time() + TAIL_SECONDS)
                            continue
                        if self._reader.event_count == count and not self._handover.full:
                            continue  # only comments: the clock goes on
                        silence = patience.silence
                        if self._handover.full:
                            clock.reschedule(self._end_by)  # while we do not read, the provider is not silent
                            await self._wait_for_room()
                        clock.reschedule(min(self._end_by, loop.time() + silence))
                    self._pass_on(self._reader.finish())
        except TimeoutError:
            if not self._reader.ended:
                overdue = clock.when() == self._end_by
                self._pass_on(self._reader.finish(self._ended_by or self._fault_of_timeout(silence, overdue=overdue)))
        finally:
            self._clock = None

    def _pass_on(self, events: list[Event]) -> None:
        """Hand events over; a fault among them becomes this completion's failure."""
        if not events:
            return
        last = events[-1]
        if isinstance(last, Refused):
            raise self._error_before_start(last.fault)
        if isinstance(events[0], Started):
            self._first_event = time.monotonic()
        if isinstance(last, Completed):
            self._ended = time.monotonic()
            if last.fault is not None:
                self.failure = self._error_after_start(last.fault)
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

    def _fault_of_timeout(self, silence: float, *, overdue: bool) -> Fault:
        self._limit_passed = self._limits.max_duration if overdue else silence
        if overdue:
            limit = self._limits.max_duration
            return Fault(
                Reason.DURATION_LIMIT_EXCEEDED, f"the call ran for {limit:g} seconds, as long as this gateway allows"
            )
        return Fault(Reason.UPSTREAM_TIMEOUT, f"the provider sent no event for {silence:g} seconds")

    def _error_before_start(self, fault: Fault) -> DeltawireError:
        provider_id = self.resolution.provider.id
        if fault.reason is Reason.UPSTREAM_ERROR:
            refusal = Refusal(fault.upstream_code, fault.message, fault.upstream_type, fault.upstream_param)
            callers_token = self._call.token is not None
            return error_of(refusal, provider_id, callers_token=callers_token, model=self._request.model)
        if fault.reason in _OURS:
            return GatewayError(fault.reason, fault.message, metadata=self._metadata(fault))
        retriable = fault.reason in (Reason.UPSTREAM_UNAVAILABLE, Reason.UPSTREAM_TIMEOUT)
        return ProviderError(
            fault.reason,
            f"provider {provider_id!r}: {fault.message}",
            metadata=self._metadata(fault),
            retry_after=RETRY_SECONDS if retriable else None,
        )

    def _error_after_start(self, fault: Fault) -> DeltawireError:
        if fault.reason in _OURS:
            code = Code.ABORTED if fault.reason is Reason.DRAINING else None
            return GatewayError(fault.reason, fault.message, code=code, metadata=self._metadata(fault))
        # Whatever is the provider's fault now: start again from the top.
        message = f"provider {self.resolution.provider.id!r}: {fault.message}"
        return ProviderError(fault.reason, message, code=Code.ABORTED, metadata=self._metadata(fault))

    def _metadata(self, fault: Fault) -> dict[str, str]:
        metadata = {"provider": self.resolution.provider.id, "completion_id": self.id}
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


def _with_defaults(request: ChatRequest, max_tokens: int | None) -> ChatRequest:
    if max_tokens is None or request.sampling.max_tokens is not None:
        return request
    return replace(request, sampling=replace(request.sampling, max_tokens=max_tokens))
