"""The events of a completion, and the ends that its caller requests; `test_worker` tests time limits and back-pressure."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from deltawire_server.completions.options import StreamOptions
from deltawire_server.errors import CallerError, GatewayError, ProviderError, Reason
from deltawire_server.fake_vllm import Chunks, FakeVllm, Script
from deltawire_server.sansio.events import (
    ChoiceFinished,
    Completed,
    Heartbeat,
    Notice,
    NoticeKind,
    Provenance,
    Started,
    StopReason,
    TextDelta,
    UsageUpdate,
)
from deltawire_server.upstream.base import Attempts, CallContext, OpenStream, Timeouts
from deltawire_server.upstream.request import FormatKind, TextFormat
from deltawire_server.worker import Caller
from tests.support.fake_provider import FakeProvider
from tests.support.gateway import until
from tests.support.workers import CALLER, MakeWorker, ask, events_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from deltawire_server.completions.completion import Completion
    from deltawire_server.sansio.events import StreamEvent
    from deltawire_server.upstream.request import ChatRequest
    from deltawire_server.worker import Worker

CHUNKS = Chunks()
NEVER_ENDING = Script.generated(tokens=100_000_000, chunks_per_write=50)


def usage(completion_tokens: int) -> dict[str, int]:
    """A running usage report."""
    return {"prompt_tokens": 7, "completion_tokens": completion_tokens, "total_tokens": 7 + completion_tokens}


def types(events: Sequence[StreamEvent]) -> list[type[StreamEvent]]:
    """The types of these events."""
    return [type(event) for event in events]


def text_of(events: Sequence[StreamEvent]) -> str:
    """The text of the answer, from its deltas."""
    return "".join(event.text for event in events if isinstance(event, TextDelta))


async def remaining_events(completion: Completion) -> list[StreamEvent]:
    """The remaining events of a completion."""
    return [event async for batch in completion.batches() for event in batch]


def last_of(events: Sequence[StreamEvent]) -> Completed:
    """The last event."""
    last = events[-1]
    assert isinstance(last, Completed)
    return last


# --- Stream options


async def test_deltas_are_merged_within_the_coalesce_delay(make_worker: MakeWorker, vllm: FakeVllm) -> None:
    """Deltas within the delay become one; the first and the last event are not delayed, and the text is unchanged."""
    pieces = [CHUNKS.text(f"{number} ") for number in range(20)]
    vllm.play(Script.chunks([CHUNKS.role(), *pieces, CHUNKS.finish()], chunk_delay=0.001))
    async with (
        make_worker() as worker,
        worker.completion(ask(), CALLER, StreamOptions(max_coalesce_delay=3600.0)) as completion,
    ):
        batches = [batch async for batch in completion.batches()]
    assert types([event for batch in batches for event in batch]) == [Started, TextDelta, ChoiceFinished, Completed]
    assert text_of([event for batch in batches for event in batch]) == "".join(f"{number} " for number in range(20))


async def test_the_coalesce_delay_is_a_maximum(make_worker: MakeWorker, vllm: FakeVllm) -> None:
    """A delta is sent when the delay ends, even if no other event is received."""
    gate = asyncio.Event()
    vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("a"), CHUNKS.text("b"), gate, CHUNKS.finish()]))
    async with (
        make_worker() as worker,
        worker.completion(ask(), CALLER, StreamOptions(max_coalesce_delay=0.02)) as completion,
    ):
        events: list[StreamEvent] = []
        async for batch in completion.batches():
            events += batch
            if text_of(events) == "ab":
                gate.set()
    assert gate.is_set()
    assert types(events)[-2:] == [ChoiceFinished, Completed]


async def test_heartbeats(make_worker: MakeWorker, vllm: FakeVllm) -> None:
    """Heartbeats are sent while no event is received after `started`; the text is unchanged."""
    gate = asyncio.Event()
    vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("a"), gate, CHUNKS.text("b"), CHUNKS.finish()]))
    async with (
        make_worker() as worker,
        worker.completion(ask(), CALLER, StreamOptions(heartbeat_interval=0.01)) as completion,
    ):
        events: list[StreamEvent] = []
        async for batch in completion.batches():
            events += batch
            if types(events).count(Heartbeat) == 3:
                gate.set()
    assert types(events)[0] is Started
    assert types(events).count(Heartbeat) >= 3
    assert text_of(events) == "ab" == last_of(events).choices[0].text


@pytest.mark.parametrize("before", [False, True])
async def test_early_heartbeats(make_worker: MakeWorker, vllm: FakeVllm, before: bool) -> None:
    """Heartbeats before `started` are sent only on request, because a call cannot be retried after the first one."""
    gate = asyncio.Event()
    vllm.play(Script.chunks([gate, CHUNKS.role(), CHUNKS.finish()]))
    options = StreamOptions(heartbeat_interval=0.01, early_heartbeats=before)
    async with make_worker() as worker, worker.completion(ask(), CALLER, options) as completion:
        batches = completion.batches()
        first = asyncio.ensure_future(anext(batches))
        await vllm.received()
        await asyncio.sleep(0.05)
        assert first.done() == before
        gate.set()
        assert types(await first) == [Heartbeat] if before else types(await first)[0] is Started
        events = [event async for batch in batches for event in batch]
    assert types(events)[-1] is Completed


async def test_a_heartbeat_does_not_lengthen_the_delay(make_worker: MakeWorker, vllm: FakeVllm) -> None:
    """A delayed delta is sent on time, even if heartbeats are sent before it."""
    gate = asyncio.Event()
    vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("a"), gate, CHUNKS.finish()]))
    options = StreamOptions(max_coalesce_delay=0.05, heartbeat_interval=0.01)
    async with make_worker() as worker, worker.completion(ask(), CALLER, options) as completion:
        events: list[StreamEvent] = []
        async for batch in completion.batches():
            events += batch
            if text_of(events) == "a":
                gate.set()
    assert gate.is_set()


async def test_usage_updates(make_worker: MakeWorker, vllm: FakeVllm) -> None:
    """An update follows each change of the usage; the final usage is only in `Completed`."""
    gates = [asyncio.Event() for _ in range(3)]
    pieces: list[object] = []
    for number, gate in enumerate(gates):
        piece = CHUNKS.text("x")
        piece["usage"] = usage(1 if number == 1 else number)
        pieces += [piece, gate]
    vllm.play(Script.chunks([CHUNKS.role(), *pieces, CHUNKS.finish()]))  # type: ignore[list-item]
    async with (
        make_worker() as worker,
        worker.completion(ask(), CALLER, StreamOptions(usage_updates=True)) as completion,
    ):
        events: list[StreamEvent] = []
        async for batch in completion.batches():
            events += batch
            for count, gate in enumerate(gates, 1):
                if len(text_of(events)) >= count:
                    gate.set()
    updates = [event.usage for event in events if isinstance(event, UsageUpdate)]
    figures = [update.completion_tokens for update in updates if update.provenance is Provenance.LOWER_BOUND]
    assert figures == sorted(set(figures))
    assert figures[-1] == 2
    assert types(events)[-2:] == [ChoiceFinished, Completed]


async def test_no_usage_updates_and_heartbeats_by_default(make_worker: MakeWorker) -> None:
    """Without options, a stream has neither usage updates nor heartbeats."""
    async with make_worker() as worker:
        events = await events_of(worker)
    assert {Started, TextDelta, ChoiceFinished, Completed} == set(types(events))


async def test_notices_follow_started(make_worker: MakeWorker) -> None:
    """The provider's notices follow `started`."""
    notice = Notice(NoticeKind.ANOTHER_REPLICA, "one was away")

    class Noticing(FakeProvider):
        @asynccontextmanager
        async def stream_chat(
            self, request: ChatRequest, model: str, call: CallContext, attempts: Attempts | None = None
        ) -> AsyncIterator[OpenStream]:
            async with super().stream_chat(request, model, call, attempts) as answering:
                yield OpenStream(answering.body, (notice,))

    provider = Noticing(served=["fake"])
    provider.chunks = [b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":"stop"}]}\n\n']
    async with make_worker(provider=provider) as worker, worker.completion(ask(), CALLER) as completion:
        events = await remaining_events(completion)
    assert types(events) == [Started, Notice, TextDelta, ChoiceFinished, Completed]
    assert events[1] is notice


async def test_timings(make_worker: MakeWorker, vllm: FakeVllm) -> None:
    """Each timing has its documented start; gaps require two events."""
    gate = asyncio.Event()
    vllm.play(Script.chunks([CHUNKS.role(), gate, CHUNKS.text("a"), CHUNKS.finish()]))
    async with make_worker() as worker, worker.completion(ask(), CALLER) as completion:
        before = completion.timings
        assert (before.queue, before.first_event, before.mean_gap, before.worst_gap) == (None, None, None, None)
        batches = completion.batches()
        await anext(batches)
        begun = completion.timings
        assert begun.queue is not None
        assert begun.first_event is not None
        assert (begun.mean_gap, begun.worst_gap) == (None, None)
        gate.set()
        async for _ in batches:
            pass
        after = completion.timings
    assert after.mean_gap is not None
    assert after.worst_gap is not None
    assert 0 <= begun.queue <= begun.first_event <= after.total
    assert 0 < after.mean_gap <= after.worst_gap <= after.total
    assert completion.timings == after


async def test_the_first_event_is_timed_before_the_end(make_worker: MakeWorker, vllm: FakeVllm) -> None:
    """The first event is timed even if the whole answer is received at once."""
    vllm.play(
        Script.chunks([CHUNKS.role(), CHUNKS.text("a"), CHUNKS.finish(), b"data: [DONE]\n\n"], chunks_per_write=9)
    )
    async with make_worker() as worker, worker.completion(ask(), CALLER) as completion:
        await remaining_events(completion)
    assert completion.timings.first_event is not None
    assert completion.timings.first_event <= completion.timings.total


# --- Soft ends


@pytest.mark.parametrize("begun", [False, True])
async def test_a_soft_cancel_is_a_normal_end(make_worker: MakeWorker, vllm: FakeVllm, begun: bool) -> None:
    """A soft cancel, before or after the first event, returns the text so far and the usage, and the provider stops."""
    script = [CHUNKS.role(), {**CHUNKS.text("so far"), "usage": usage(2)}, asyncio.Event()]
    vllm.play(Script.chunks(script if begun else [asyncio.Event()]))  # type: ignore[arg-type]
    async with make_worker() as worker, worker.completion(ask(completion_id="c"), CALLER) as completion:
        batches = completion.batches()
        events: list[StreamEvent] = []
        while begun and text_of(events) != "so far":
            events += await anext(batches)
        first = asyncio.ensure_future(anext(batches))
        chat = await vllm.received()
        worker.record(CALLER, "c").cancel()
        events += await first
        events += [event async for batch in batches for event in batch]
        await chat.closed_early.wait()
        assert completion.failure is None
    choice = last_of(events).choices[0]
    assert types(events)[0] is Started
    assert (choice.text, choice.stop_reason) == ("so far" if begun else "", StopReason.CANCELLED)
    assert last_of(events).usage.provenance is (Provenance.LOWER_BOUND if begun else Provenance.ESTIMATED)
    record = worker.record(CALLER, "c")
    assert (record.ended, record.outcome, record.usage) == (True, None, last_of(events).usage)


async def test_a_soft_cancel_before_the_model_is_resolved(make_worker: MakeWorker) -> None:
    """The soft cancel applies when the completion begins, which then ends before a chat request is sent."""
    provider = FakeProvider(served=["fake"])
    provider.gate = asyncio.Event()
    async with make_worker(provider=provider) as worker:
        asking = asyncio.create_task(events_of(worker, ask(completion_id="c")))
        await provider.asked.wait()
        record = worker.record(CALLER, "c")
        assert (record.running, record.ended) == (None, False)
        record.cancel()
        provider.gate.set()
        events = await asking
    assert last_of(events).choices[0].stop_reason is StopReason.CANCELLED


async def test_the_soft_time_limit(make_worker: MakeWorker, vllm: FakeVllm) -> None:
    """At the limit, the text so far is the answer, with a normal end, and the provider stops."""
    vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("so far"), asyncio.Event()]))
    async with make_worker() as worker:
        events = await events_of(worker, ask(soft_time_limit=0.2))
        await vllm.chats[0].closed_early.wait()
    choice = last_of(events).choices[0]
    assert (choice.text, choice.stop_reason) == ("so far", StopReason.TIME_LIMIT)
    assert last_of(events).fault is None


async def test_the_soft_time_limit_counts_from_the_call(make_worker: MakeWorker, vllm: FakeVllm) -> None:
    """The limit applies even if it passes before the request is sent."""
    async with make_worker() as worker, worker.completion(ask(soft_time_limit=0.01), CALLER) as completion:
        await asyncio.sleep(0.05)
        events = await remaining_events(completion)
    assert last_of(events).choices[0].stop_reason is StopReason.TIME_LIMIT
    assert not vllm.chats


async def test_the_duration_limit_before_a_later_soft_limit(make_worker: MakeWorker, vllm: FakeVllm) -> None:
    """The duration limit of the gateway is a fault, even if a later soft limit is set."""
    vllm.play(NEVER_ENDING)
    async with make_worker(max_duration=0.1) as worker:
        with pytest.raises(GatewayError) as caught:
            await events_of(worker, ask(soft_time_limit=3600.0))
    assert caught.value.reason is Reason.DURATION_LIMIT_EXCEEDED


async def test_the_silence_timeout_before_a_later_soft_limit(make_worker: MakeWorker, vllm: FakeVllm) -> None:
    """The silence timeout of the provider is a fault, even if a later soft limit is set."""
    vllm.play(Script.chunks([asyncio.Event()]))
    async with make_worker(timeouts=Timeouts(first_event=0.05)) as worker:
        with pytest.raises(ProviderError) as caught:
            await events_of(worker, ask(soft_time_limit=3600.0))
    assert caught.value.reason is Reason.UPSTREAM_TIMEOUT


async def test_the_first_end_counts(make_worker: MakeWorker, vllm: FakeVllm) -> None:
    """Of a soft cancel and a shutdown, the first one determines the end."""
    for soft_first in (True, False):
        vllm.play(Script.chunks([CHUNKS.role(), asyncio.Event()]))
        async with make_worker() as worker, worker.completion(ask(completion_id="c"), CALLER) as completion:
            batches = completion.batches()
            await anext(batches)
            ends = [worker.record(CALLER, "c").cancel, worker.end_all]
            for end in ends if soft_first else reversed(ends):
                end()
            (event,) = [e for batch in [await anext(batches)] for e in batch if isinstance(e, Completed)]
            assert (event.fault is None) == soft_first


# --- Ids and what is known by them


async def test_an_id_cannot_be_used_twice_at_once(make_worker: MakeWorker) -> None:
    """One caller cannot use an id twice at once, but again after the end."""
    async with make_worker() as worker:
        async with worker.completion(ask(completion_id="c"), CALLER):
            with pytest.raises(CallerError) as caught:
                await events_of(worker, ask(completion_id="c"))
            assert caught.value.reason is Reason.COMPLETION_ALREADY_EXISTS
            async with worker.completion(ask(completion_id="c"), Caller(CALLER.call, "somebody else")):
                assert worker.active == 2
        assert worker.active == 0
        await events_of(worker, ask(completion_id="c"))


async def test_the_record_of_an_abandoned_call(make_worker: MakeWorker, vllm: FakeVllm) -> None:
    """The record has the usage, and whether the caller or the deadline ended the call."""
    for passed, code in ((False, "CANCELLED"), (True, "DEADLINE_EXCEEDED")):
        vllm.play(Script.chunks([CHUNKS.role(), {**CHUNKS.text("a"), "usage": usage(5)}, asyncio.Event()]))
        caller = Caller(CALLER.call, deadline_passed=lambda passed=passed: passed)  # type: ignore[misc]
        async with make_worker() as worker:
            seen: list[StreamEvent] = []
            call = asyncio.create_task(_read_into(seen, worker, caller))
            await until(lambda seen=seen: text_of(seen) == "a")  # type: ignore[misc]
            call.cancel()
            await asyncio.wait([call])
            record = worker.record(CALLER, "c")
        assert record.outcome is not None
        assert (record.outcome.code.name, record.outcome.reason) == (code, None)
        assert (record.usage.completion_tokens, record.begun, record.ended) == (5, True, True)


async def _read_into(seen: list[StreamEvent], worker: Worker, caller: Caller) -> None:
    async with worker.completion(ask(completion_id="c"), caller) as completion:
        async for batch in completion.batches():
            seen += batch


async def test_an_error_event_that_comes_first_names_the_format(make_worker: MakeWorker) -> None:
    """Like one that the provider's own code reads."""
    provider = FakeProvider(served=["fake"])
    provider.chunks = [b'data: {"error":{"message":"Grammar error: no","type":"BadRequestError","code":400}}\n\n']
    request = ask(response_format=TextFormat(FormatKind.REGEX, "("))
    async with make_worker(provider=provider) as worker, worker.completion(request, CALLER) as completion:
        with pytest.raises(CallerError) as caught:
            await remaining_events(completion)
    assert [violation.field for violation in caught.value.violations] == ["chat.response_format.regex"]


async def test_the_record_of_a_failed_completion(make_worker: MakeWorker, vllm: FakeVllm) -> None:
    """The record has the failure, even if the completion never began."""
    vllm.play(Script.error(500, "broken"))
    async with make_worker() as worker:
        with pytest.raises(ProviderError):
            await events_of(worker, ask(completion_id="c"))
        record = worker.record(CALLER, "c")
        assert record.outcome is not None
        assert (record.outcome.reason, record.begun) == (Reason.UPSTREAM_ERROR, False)
        with pytest.raises(CallerError):
            await events_of(worker, replace(ask(completion_id="c"), model="other"))
        record = worker.record(CALLER, "c")
    assert record.outcome is not None
    assert (record.outcome.reason, record.head) == (Reason.MODEL_NOT_FOUND, None)
