"""One completion, from admission to the last event, over a look-alike of vLLM: clocks, back-pressure, and who stops whom."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from deltawire_server.completions.options import StreamOptions
from deltawire_server.completions.retention import RetainedStream
from deltawire_server.errors import CallerError, Code, GatewayError, ProviderError, Reason
from deltawire_server.fake_vllm import Chunks, FakeVllm, Script
from deltawire_server.sansio.events import ChoiceFinished, Completed, Provenance, Started, StreamEvent, TextDelta
from deltawire_server.sansio.reader import CompletionReader
from deltawire_server.upstream.base import OpenStream, Timeouts
from deltawire_server.upstream.request import ChatRequest, Sampling
from deltawire_server.upstream.vllm import VllmProvider
from tests.support.fake_provider import FakeProvider
from tests.support.gateway import until
from tests.support.pushed import PushedBody
from tests.support.workers import CALLER, MakeWorker, ask, events_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from deltawire_server.sansio.events import Fault
    from deltawire_server.upstream.base import Attempts, CallContext
    from deltawire_server.worker import Caller, Worker


CHUNKS = Chunks()
NEVER_ENDING = Script.generated(tokens=100_000_000, chunks_per_write=50)
LONG = 3600.0


async def rest_of(batches: AsyncIterator[list[StreamEvent]], events: list[StreamEvent]) -> None:
    """Take all that still comes, and fail as it fails."""
    async for batch in batches:
        events += batch


async def take_one_and_get_stuck(worker: Worker) -> None:
    """Be a caller that takes what there is first, and never comes back."""
    async with worker.completion(ask(), CALLER) as completion:
        async for _ in completion.batches():
            await asyncio.Event().wait()


def writable(vllm: FakeVllm) -> bool:
    """Whether the look-alike can send on every connection."""
    return all(connection.writable.is_set() for connection in vllm._connections)


async def test_a_completion(make_worker: MakeWorker, vllm: FakeVllm) -> None:
    """Begins with `Started`, ends with `Completed`, and is counted for as long as it lasts."""
    async with make_worker() as worker:
        assert worker.active == 0
        async with worker.completion(ask(sampling=Sampling(seed=1)), CALLER) as completion:
            assert worker.active == 1
            assert completion.timings.first_event is None
            events = [event async for batch in completion.batches() for event in batch]
            assert completion.failure is None
            assert completion.usage.provenance is Provenance.EXACT
            assert completion.anomalies == {}
            assert completion.head.sampling == Sampling(seed=1)
            assert completion.timings.first_event is not None
            assert 0 < completion.timings.first_event <= completion.timings.total
        assert worker.active == 0
        total = completion.timings.total
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], Completed)
    assert completion.timings.total == total
    assert vllm.running == 0


async def test_nothing_is_asked_before_batches(make_worker: MakeWorker, vllm: FakeVllm) -> None:
    """Admission and resolution come first; a completion without a reader sends no request."""
    async with make_worker() as worker:
        async with worker.completion(ask(), CALLER):
            pass
        assert not vllm.chats
        assert worker.active == 0


async def test_what_waits_is_joined(make_worker: MakeWorker, vllm: FakeVllm) -> None:
    """A caller that is slower than the engine gets neighbouring deltas as one."""
    gate = asyncio.Event()
    texts = [CHUNKS.text(f"{number} ") for number in range(100)]
    vllm.play(Script.chunks([CHUNKS.role(), gate, *texts, CHUNKS.finish()]))
    async with make_worker() as worker, worker.completion(ask(), CALLER) as completion:
        batches = completion.batches()
        assert [type(event) for event in await anext(batches)] == [Started]
        gate.set()
        await until(lambda: completion._reader.ended)
        (rest,) = [batch async for batch in batches]
    assert [type(event) for event in rest] == [TextDelta, ChoiceFinished, Completed]
    assert isinstance(rest[0], TextDelta)
    assert rest[0].text == "".join(f"{number} " for number in range(100))


async def test_reading_stops_at_the_limit_and_with_it_the_provider(make_worker: MakeWorker, vllm: FakeVllm) -> None:
    """What waits for a caller that takes nothing is bounded; when it comes back, all goes on and nothing is lost."""
    vllm.play(Script.generated(tokens=60_000, chunks_per_write=100))
    async with (
        make_worker(queue_bytes=4096) as worker,
        worker.completion(ask(), CALLER) as completion,
    ):
        batches = completion.batches()
        events = await anext(batches)
        await until(lambda: not writable(vllm))
        assert completion._queue.full
        assert completion._queue._waiting.size < 200_000
        async for batch in batches:
            events += batch
    last = events[-1]
    assert isinstance(last, Completed)
    assert last.usage.completion_tokens == 60_000
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == last.choices[0].text


async def test_while_we_do_not_read_the_provider_is_not_silent(make_worker: MakeWorker, vllm: FakeVllm) -> None:
    """Its clock stands while a full queue waits for the caller."""
    vllm.play(Script.generated(tokens=20_000, chunks_per_write=100))
    async with (
        make_worker(queue_bytes=1024, timeouts=Timeouts(first_event=LONG, silence=0.5)) as worker,
        worker.completion(ask(), CALLER) as completion,
    ):
        batches = completion.batches()
        await anext(batches)
        await until(lambda: not writable(vllm))
        await asyncio.sleep(0.8)  # longer than the provider may be silent
        events = [event async for batch in batches for event in batch]
    assert isinstance(events[-1], Completed)
    assert completion.failure is None


async def test_a_time_limit_while_the_queue_is_full(make_worker: MakeWorker, vllm: FakeVllm) -> None:
    """It ends the answer, and queued events are still returned."""
    vllm.play(NEVER_ENDING)
    async with (
        make_worker(queue_bytes=1024, max_duration=0.3) as worker,
        worker.completion(ask(), CALLER) as completion,
    ):
        batches = completion.batches()
        events = await anext(batches)
        await vllm.chats[0].closed_early.wait()
        with pytest.raises(GatewayError) as caught:
            await rest_of(batches, events)
    assert caught.value.reason is Reason.DURATION_LIMIT_EXCEEDED
    assert isinstance(events[-1], Completed)
    assert events[-1].fault is not None


async def test_comments_do_not_keep_a_silent_provider(make_worker: MakeWorker, vllm: FakeVllm) -> None:
    """An engine that sleeps may send them for ever, before the first event and after it."""
    never = asyncio.Event()
    vllm.play(
        Script.chunks([never], keep_alive=0.01),
        Script.chunks([CHUNKS.role(), never], keep_alive=0.01),
    )
    async with make_worker(timeouts=Timeouts(first_event=0.1, silence=0.1)) as worker:
        for _ in range(2):
            with pytest.raises(ProviderError) as caught:
                await events_of(worker)
            assert caught.value.reason is Reason.UPSTREAM_TIMEOUT
            assert caught.value.retry_after is None
            await vllm.chats[-1].closed_early.wait()


async def test_each_event_starts_the_clock_anew(make_worker: MakeWorker, vllm: FakeVllm) -> None:
    """An answer may take longer than any silence in it."""
    vllm.play(Script.generated(tokens=12, chunk_delay=0.1))
    async with make_worker(timeouts=Timeouts(first_event=LONG, silence=1.0)) as worker:
        events = await events_of(worker)
    assert isinstance(events[-1], Completed)


async def test_what_comes_after_the_end_is_not_waited_for(make_worker: MakeWorker, vllm: FakeVllm) -> None:
    """A body that goes on and on after `[DONE]` ends the call all the same; so does one that just stays open."""
    end: list[dict[str, Any] | bytes] = [CHUNKS.role(), CHUNKS.finish(), b"data: [DONE]\n\n"]
    vllm.play(Script.chunks([*end, asyncio.Event()], keep_alive=0.01), Script.chunks(end, end="hang"))
    async with make_worker() as worker:
        for _ in range(2):
            assert isinstance((await events_of(worker))[-1], Completed)
            await vllm.chats[-1].closed_early.wait()


async def test_events_after_the_end_are_none(make_worker: MakeWorker, vllm: FakeVllm) -> None:
    """Whatever a provider sends after `[DONE]`."""
    vllm.play(
        Script.chunks([CHUNKS.role(), CHUNKS.finish(), b"data: [DONE]\n\n", CHUNKS.text("late"), b"data: {oops\n\n"])
    )
    async with make_worker() as worker:
        last = (await events_of(worker))[-1]
    assert isinstance(last, Completed)
    assert (last.choices[0].text, last.fault) == ("", None)


async def test_leaving_early_stops_the_provider(make_worker: MakeWorker, vllm: FakeVllm) -> None:
    """A caller that has enough just goes."""
    vllm.play(NEVER_ENDING)
    async with make_worker() as worker:
        async with worker.completion(ask(), CALLER) as completion:
            async for _ in completion.batches():
                break
        assert worker.active == 0
        await vllm.chats[0].closed_early.wait()
        assert completion.failure is None


@pytest.mark.parametrize(
    "script", [NEVER_ENDING, Script.generated(headers_delay=LONG), Script.generated(first_delay=LONG)]
)
async def test_a_cancelled_caller_stops_the_provider(make_worker: MakeWorker, vllm: FakeVllm, script: Script) -> None:
    """However far the answer is; and its cancellation stays one."""
    vllm.play(script)
    async with make_worker() as worker:
        task = asyncio.create_task(events_of(worker))
        chat = await vllm.received()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert worker.active == 0
        await chat.closed_early.wait()
        assert vllm.running == 0


async def test_admission(make_worker: MakeWorker) -> None:
    """The limit counts completions in whatever state, and a look-up that fails gives its place back."""
    async with make_worker(max_streams=2) as worker:
        async with worker.completion(ask(), CALLER), worker.completion(ask(), CALLER):
            with pytest.raises(GatewayError) as caught:
                await events_of(worker)
            assert caught.value.reason is Reason.TOO_MANY_STREAMS
        with pytest.raises(CallerError):
            async with worker.completion(ChatRequest("other", ask().messages), CALLER):
                pass
        assert worker.active == 0


class DefectiveBody(PushedBody):
    """Pushes a chunk and then raises, in place of a provider with a bug."""

    def __init__(self) -> None:
        """There are no further chunks."""

    def follow(self, receive: Callable[[bytes], None], end: Callable[[Fault | None], None]) -> None:  # noqa: ARG002
        receive(b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n')
        raise ZeroDivisionError


class Defective(FakeProvider):
    """Its answers have a `DefectiveBody`."""

    @asynccontextmanager
    async def stream_chat(
        self, request: ChatRequest, model: str, call: CallContext, attempts: Attempts | None = None
    ) -> AsyncIterator[OpenStream]:
        async with super().stream_chat(request, model, call, attempts):
            yield OpenStream(DefectiveBody())


async def test_a_defect_ends_the_call(make_worker: MakeWorker) -> None:
    """It is INTERNAL, with its cause kept for the log, and what came before it is reported; a call does not hang in it."""
    async with make_worker(provider=Defective(served=["fake"])) as worker:
        events: list[StreamEvent] = []
        async with worker.completion(ask(), CALLER) as completion:
            with pytest.raises(GatewayError) as caught:
                await rest_of(completion.batches(), events)
    assert caught.value.reason is Reason.INTERNAL
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert [type(event) for event in events] == [Started, TextDelta, ChoiceFinished, Completed]


@pytest.mark.parametrize("method", ["receive", "finish"])
async def test_a_defect_of_the_reader_ends_the_call(
    make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Its methods are called by the connection and not by the call's task, which must end all the same."""

    def defective(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(CompletionReader, method, defective)
    provider = FakeProvider(served=["fake"])
    provider.chunks = [b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n']
    async with make_worker(provider=provider) as worker, worker.completion(ask(), CALLER) as completion:
        with pytest.raises(GatewayError) as caught:
            await rest_of(completion.batches(), [])
    assert caught.value.reason is Reason.INTERNAL
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


async def test_the_operators_limit_is_for_requests_without_one(make_worker: MakeWorker, vllm: FakeVllm) -> None:
    """And leaves the rest of the sampling alone."""
    provider = VllmProvider("vllm", vllm.base_url, tls=False, default_max_tokens=9)
    async with make_worker(provider=provider) as worker:
        for given, sent in ((None, 9), (3, 3)):
            async with worker.completion(ask(sampling=Sampling(max_tokens=given, seed=1)), CALLER) as completion:
                assert completion.head.sampling == Sampling(max_tokens=sent, seed=1)


async def test_anomalies_are_counted(make_worker: MakeWorker, vllm: FakeVllm) -> None:
    """What was got over is there for the log."""
    vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.finish("because")]))
    async with make_worker() as worker, worker.completion(ask(), CALLER) as completion:
        async for _ in completion.batches():
            pass
        assert completion.anomalies == {"finish reason 'because'": 1}


async def test_a_provider_that_is_replaced_before_it_is_asked(make_worker: MakeWorker) -> None:
    """A resolved provider stays open to the end of the answer, and is closed after it."""
    async with make_worker() as worker:
        async with worker.completion(ask(), CALLER) as completion:
            provider = completion.resolution.provider
            worker._providers.replace([])
            events = [event async for batch in completion.batches() for event in batch]
            assert isinstance(events[-1], Completed)
            assert completion.failure is None
            assert not provider._api._client.is_closed  # type: ignore[attr-defined]
        await until(lambda: provider._api._client.is_closed)  # type: ignore[attr-defined]


async def test_another_attempt_finds_the_same_stream(make_worker: MakeWorker, vllm: FakeVllm) -> None:
    """An equal request with the same id, under way or retained; not another request's, caller's or id's."""
    options = StreamOptions(retention=LONG)
    async with make_worker() as worker:

        def begin(fingerprint: bytes, caller: Caller = CALLER) -> RetainedStream:
            return worker.open(ask(completion_id="c"), caller, options, fingerprint=fingerprint)

        first = begin(b"a")
        assert begin(b"a") is first
        with pytest.raises(CallerError) as caught:
            begin(b"b")
        assert caught.value.reason is Reason.COMPLETION_ALREADY_EXISTS
        other = begin(b"a", replace(CALLER, name="other"))
        assert other is not first
        await until(lambda: first.closed and other.closed)
        assert begin(b"a") is first
        first.drop()
        second = begin(b"a")
        assert second is not first
        await until(lambda: second.closed)
        assert len(vllm.chats) == 3


async def test_readers_wait_for_the_same_beginning(make_worker: MakeWorker) -> None:
    """Each gets its failure; one that has left takes nothing from the others, and a later attempt begins anew."""
    provider = FakeProvider(served=["other"])
    provider.gate = asyncio.Event()
    async with make_worker(provider=provider) as worker:

        async def attempt() -> None:
            stream = worker.open(ask(completion_id="c"), CALLER, StreamOptions(retention=LONG), fingerprint=b"a")
            with stream.read(CALLER.left) as reader:
                async for _ in reader.follow():
                    pass

        attempts = [asyncio.create_task(attempt()) for _ in range(3)]
        await provider.asked.wait()
        attempts[0].cancel()
        provider.gate.set()
        results = await asyncio.gather(*attempts, return_exceptions=True)
        assert isinstance(results[0], asyncio.CancelledError)
        assert [type(result) for result in results[1:]] == [CallerError, CallerError]
        assert worker.active == 0
        assert worker.record(CALLER, "c").outcome is not None


async def test_a_stream_that_is_not_retained_stops_with_its_reader(make_worker: MakeWorker, vllm: FakeVllm) -> None:
    """At any time, also before its task has begun; the record says how the reader left, and its id can be used again."""
    vllm.play(NEVER_ENDING)
    async with make_worker() as worker:
        for events in (0, 1):
            stream = worker.open(ask(completion_id="c"), CALLER, fingerprint=b"a")
            reading = asyncio.create_task(take(stream, events))
            await asyncio.wait([reading], timeout=None if events else 0)
            reading.cancel()
            await asyncio.wait([reading])
            await until(lambda: worker.active == 0)
            outcome = worker.record(CALLER, "c").outcome
            assert outcome is not None
            assert (outcome.code, outcome.reason) == (Code.CANCELLED, None)
        await until(lambda: vllm.running == 0)


async def take(stream: RetainedStream, batches: int) -> None:
    """Read so many batches, and then be cancelled."""
    with stream.read(CALLER.left) as reader:
        async with aclosing(reader.follow()) as numbered:
            for _ in range(batches):
                await anext(numbered)
            raise asyncio.CancelledError


async def test_a_defect_of_a_completion_with_a_stream(make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its readers get INTERNAL, and wait for nothing."""
    monkeypatch.setattr(RetainedStream, "put", lambda *_: 1 / 0)
    async with make_worker() as worker:
        stream = worker.open(ask(completion_id="c"), CALLER, StreamOptions(retention=LONG), fingerprint=b"a")
        with pytest.raises(GatewayError) as caught:
            await take(stream, 1)
        assert caught.value.reason is Reason.INTERNAL
        assert worker.active == 0


async def test_a_completion_that_is_left_without_an_end_is_a_defect(make_worker: MakeWorker) -> None:
    """Nothing recorded is never success: the record says INTERNAL."""
    async with make_worker() as worker:
        async with worker.completion(ask(completion_id="c"), CALLER):
            pass
        outcome = worker.record(CALLER, "c").outcome
    assert outcome is not None
    assert outcome.reason is Reason.INTERNAL
