"""Streams that are kept: numbers that stay, bounds that hold, and when a stream goes."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from deltawire_server.completions import retention
from deltawire_server.completions.info import NOTHING_YET, Outcome
from deltawire_server.completions.retention import STREAM_BYTES, RetainedStream, Retention, RetentionLimits
from deltawire_server.errors import CallerError, Code, DeltawireError, GatewayError, ProviderError, Reason
from deltawire_server.limits import Share
from deltawire_server.memory import Ledger
from deltawire_server.sansio.coalesce import weight
from deltawire_server.sansio.events import (
    Completed,
    FinishedChoice,
    Heartbeat,
    Provenance,
    Started,
    StopReason,
    StreamEvent,
    TextDelta,
    ToolCallSucceeded,
    Usage,
)
from tests.completions.test_records import FakeCompletion
from tests.support.gateway import WAIT, until

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence

LONG = 3600.0
STARTED = Started("up", "m")
CHOICE = FinishedChoice(0, "ab", "", (), (), StopReason.END_OF_TURN, "stop", tool_calls_executable=False)
COMPLETED = Completed(Usage(2, Provenance.EXACT, 1), (CHOICE,))
ANSWER: Sequence[StreamEvent] = (STARTED, TextDelta(0, "a"), TextDelta(0, "b"), COMPLETED)
TEXT = TextDelta(0, "x" * 1000)


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep nothing for readers beyond the limits, so that tests can observe the limits."""
    monkeypatch.setattr(retention, "UNREAD_BYTES", 0)


class Kept:
    """A stream, with its completion and how often it was dropped."""

    def __init__(self, kept_by: Retention | None = None, retention: float = LONG) -> None:
        self.retention = kept_by or Retention()
        self.running = FakeCompletion()
        self.dropped = 0
        self.stream = self.retention.open(retention, self._drop)
        self.stream.run(self.running)

    def _drop(self) -> None:
        self.dropped += 1

    def finish(self, *events: StreamEvent) -> Kept:
        """Put these, and close."""
        self.stream.put(events or ANSWER)
        self.stream.close()
        return self


DISCONNECTED = Outcome(Code.CANCELLED, None, "disconnected")


@asynccontextmanager
async def reading(
    stream: RetainedStream, after: int | None = None
) -> AsyncIterator[AsyncGenerator[list[tuple[int, StreamEvent]]]]:
    """A reader after this message, until the block is left."""
    with stream.read(lambda: DISCONNECTED, after) as reader:
        async with aclosing(reader.follow()) as batches:
            yield batches


async def followed(stream: RetainedStream, after: int | None = None) -> list[tuple[int, StreamEvent]]:
    """All messages that a reader gets."""
    async with asyncio.timeout(WAIT), reading(stream, after) as batches:
        return [numbered async for batch in batches for numbered in batch]


async def take_all(stream: RetainedStream, numbered: list[tuple[int, StreamEvent]]) -> None:
    """Take all messages, and raise the failure of the stream."""
    async with reading(stream) as batches:
        async for batch in batches:
            numbered += batch


async def refused(stream: RetainedStream, after: int | None = None) -> DeltawireError:
    """The error of a reader that gets no message."""
    with pytest.raises(DeltawireError) as caught:
        await followed(stream, after)
    return caught.value


@pytest.mark.parametrize("after", [None, 0, 1, 2, 3])
async def test_a_replay_begins_after_the_last_received_message(after: int | None) -> None:
    """A reader can resume after each message, including the last one."""
    kept = Kept().finish()
    assert await followed(kept.stream, after) == list(enumerate(ANSWER))[0 if after is None else after + 1 :]


async def test_readers_get_new_messages() -> None:
    """Two readers at different positions get each message once, with its number."""
    kept = Kept()
    kept.stream.put(ANSWER[:2])
    first = asyncio.create_task(followed(kept.stream))
    second = asyncio.create_task(followed(kept.stream, 0))
    await asyncio.sleep(0)
    for event in ANSWER[2:]:
        kept.stream.put([event])
        await asyncio.sleep(0)
    kept.stream.close()
    numbered = list(enumerate(ANSWER))
    assert await first == numbered
    assert await second == numbered[1:]


async def test_every_reader_gets_the_failure_after_the_last_message() -> None:
    """Current and later readers each get their own exception."""
    kept = Kept()
    kept.stream.put(ANSWER)
    failure = ProviderError(Reason.UPSTREAM_INCOMPLETE, "broke off", metadata={"provider": "p"})
    kept.stream.close(failure)
    caught = []
    for _ in range(2):
        numbered: list[tuple[int, StreamEvent]] = []
        with pytest.raises(ProviderError) as raised:
            await take_all(kept.stream, numbered)
        assert numbered == list(enumerate(ANSWER))
        caught.append(raised.value)
    assert caught[0] is not caught[1]
    assert {(each.reason, each.message, each.code) for each in caught} == {
        (failure.reason, failure.message, failure.code)
    }
    assert str(kept.stream.failure) == str(failure)


async def test_an_answer_without_events_is_not_retained() -> None:
    """Waiting readers get the failure, and the stream cannot be resumed."""
    kept = Kept()
    waiting = asyncio.create_task(refused(kept.stream))
    await asyncio.sleep(0)
    kept.stream.close(ProviderError(Reason.UPSTREAM_UNAVAILABLE, "away"))
    assert (await waiting).reason is Reason.UPSTREAM_UNAVAILABLE
    assert kept.dropped == 1
    assert kept.retention.size == 0
    assert (await refused(kept.stream)).reason is Reason.UPSTREAM_UNAVAILABLE


async def test_resuming_after_an_unknown_number() -> None:
    """A number beyond the last message is an error."""
    kept = Kept()
    error = await refused(kept.stream, 0)
    assert (error.reason, error.message) == (
        Reason.COMPLETION_GONE,
        "completion 'c' cannot be resumed there: it has no message 0 yet",
    )
    assert error.metadata == {"completion_id": "c"}
    assert isinstance(error, CallerError)


@pytest.mark.usefixtures("strict")
async def test_the_oldest_messages_are_dropped_first() -> None:
    """At the limit of a stream, only the kept messages can be resumed, and the error has the first kept number."""
    kept = Kept(Retention(RetentionLimits(max_stream_bytes=STREAM_BYTES + 10 * weight(TEXT))))
    for _ in range(20):
        kept.stream.put([TEXT])
        assert kept.stream.size <= STREAM_BYTES + 10 * weight(TEXT)
        assert kept.retention.size == kept.stream.size
    assert kept.stream.last_sequence == 19
    error = await refused(kept.stream)
    first = int(error.metadata["first_sequence"])
    assert 9 < first < 20
    assert error.reason is Reason.COMPLETION_GONE
    kept.stream.put([COMPLETED])
    kept.stream.close()
    assert await followed(kept.stream, first - 1) == [*((n, TEXT) for n in range(first, 20)), (20, COMPLETED)]


@pytest.mark.usefixtures("strict")
async def test_the_newest_message_is_always_kept() -> None:
    """The newest message is kept even above the limit, so that readers can continue."""
    kept = Kept(Retention(RetentionLimits(max_stream_bytes=1, max_bytes=1)))
    kept.stream.put([STARTED, TEXT])
    kept.stream.put([TEXT])
    async with reading(kept.stream, 1) as batches:
        assert await anext(batches) == [(2, TEXT)]
    assert kept.retention.size == STREAM_BYTES + weight(TEXT)


@pytest.mark.usefixtures("strict")
async def test_a_reader_whose_next_message_was_dropped_is_slow() -> None:
    """A reader gets SLOW_CALLER if its next message was dropped."""
    kept = Kept(Retention(RetentionLimits(max_stream_bytes=STREAM_BYTES + 2 * weight(TEXT))))
    kept.stream.put([TEXT])
    async with reading(kept.stream) as batches:
        await anext(batches)
        for _ in range(5):
            kept.stream.put([TEXT])
        with pytest.raises(GatewayError) as caught:
            await anext(batches)
    assert caught.value.reason is Reason.SLOW_CALLER


@pytest.mark.usefixtures("strict")
async def test_all_streams_share_a_limit() -> None:
    """At the limit, ended streams are dropped in the order of their ends, then the oldest messages of the written stream."""
    size = STREAM_BYTES + weight(TEXT)
    common = Retention(RetentionLimits(max_bytes=3 * size))
    first, second = Kept(common).finish(TEXT), Kept(common).finish(TEXT)
    live = Kept(common)
    live.stream.put([TEXT])
    assert (first.dropped, second.dropped) == (0, 0)
    live.stream.put([TEXT])
    assert (first.dropped, second.dropped) == (1, 0)
    for _ in range(10):
        live.stream.put([TEXT])
        assert common.size <= 3 * size
    assert (second.dropped, live.dropped) == (1, 0)
    assert (await refused(first.stream)).message == "completion 'c' cannot be resumed there: it is no longer retained"
    assert (await refused(live.stream)).reason is Reason.COMPLETION_GONE
    assert live.stream.last_sequence == 11


async def test_a_stream_without_messages_counts() -> None:
    """A stream without messages has a size, which limits the number of streams."""
    common = Retention(RetentionLimits(max_bytes=2 * STREAM_BYTES + weight(STARTED)))
    ended = Kept(common).finish(STARTED)
    Kept(common)
    assert ended.dropped == 0
    Kept(common)
    assert ended.dropped == 1


async def test_a_large_completed_omits_its_messages() -> None:
    """`Completed` reports that its messages are omitted, and keeps the rest."""
    common = Retention(RetentionLimits(max_completed_bytes=500))
    call = ToolCallSucceeded(0, 0, "c", "t", '{"a": 1}')
    large = FinishedChoice(
        0, "x" * 501, "y", (call,), (), StopReason.END_OF_MESSAGE, "tool_calls", tool_calls_executable=True
    )
    kept = Kept(common).finish(STARTED, Completed(COMPLETED.usage, (large,)))
    bare = FinishedChoice(0, "", "", (), (), StopReason.END_OF_MESSAGE, "tool_calls", tool_calls_executable=True)
    assert kept.stream.completed == Completed(COMPLETED.usage, (bare,), messages_omitted=True)
    kept = Kept(common).finish()
    assert kept.stream.completed == COMPLETED


async def test_an_unread_running_stream_expires() -> None:
    """The completion of an expired stream is stopped, and later messages are not kept."""
    kept = Kept(retention=0.01)
    kept.stream.put(ANSWER[:2])
    async with reading(kept.stream):
        pass
    await until(lambda: kept.dropped == 1)
    assert kept.running.stopped == [StopReason.CANCELLED]
    kept.stream.put(ANSWER[2:])
    kept.stream.close()
    assert kept.retention.size == 0
    assert kept.dropped == 1
    assert kept.stream.completed is None
    assert (await refused(kept.stream)).reason is Reason.COMPLETION_GONE


async def test_an_ended_stream_expires() -> None:
    """An ended stream expires without stopping a completion."""
    kept = Kept(retention=0.01).finish()
    assert len(await followed(kept.stream)) == len(ANSWER)
    await until(lambda: kept.dropped == 1)
    assert kept.running.stopped == []
    assert (await refused(kept.stream, 1)).reason is Reason.COMPLETION_GONE


async def test_a_stream_that_is_read_does_not_expire() -> None:
    """The retention time begins when the last reader leaves."""
    kept = Kept(retention=0.02)
    assert kept.stream.expire_time is None
    with kept.stream.read(lambda: DISCONNECTED):
        with kept.stream.read(lambda: DISCONNECTED):
            assert kept.stream.expire_time is None
        await asyncio.sleep(0.06)
        assert kept.stream.expire_time is None
        assert kept.dropped == 0
    assert kept.stream.expire_time is not None
    await until(lambda: kept.dropped == 1)
    assert kept.stream.expire_time is None


async def test_the_state_of_a_streams_completion() -> None:
    """A stream returns the state of its running completion; after the close it keeps the last state and releases the completion."""
    kept = Kept()
    assert kept.stream.last_sequence is None
    assert not kept.stream.closed
    kept.running.usage = Usage(9, Provenance.LOWER_BOUND)
    assert kept.stream.usage is kept.running.usage
    assert kept.stream.timings is kept.running.timings
    kept.running.failure = GatewayError(Reason.DRAINING, "ends")
    assert kept.stream.failure is kept.running.failure
    kept.stream.put([*ANSWER[:-1], Heartbeat()])
    assert kept.stream.completed is None
    kept.stream.put([COMPLETED])
    kept.stream.close(kept.running.failure)
    assert kept.stream._running is None
    assert kept.stream.closed
    assert kept.stream.usage is kept.running.usage
    assert kept.stream.timings is kept.running.timings
    assert kept.stream.last_sequence == 4
    kept.stream.close()
    assert str(kept.stream.failure) == str(kept.running.failure)
    assert kept.stream.failure is not kept.running.failure  # whose traceback keeps all that the call had


async def test_limits_do_not_affect_a_reader_that_keeps_up() -> None:
    """A reader that keeps up gets every message; messages that it has taken are not kept for it."""
    kept = Kept(Retention(RetentionLimits(max_stream_bytes=1, max_bytes=1)))
    numbers = []
    async with reading(kept.stream) as batches:
        for _ in range(300):
            kept.stream.put([TEXT])
            numbers += [number for number, _ in await anext(batches)]
        assert kept.stream.size == STREAM_BYTES + weight(TEXT)
        kept.stream.put([COMPLETED])
        kept.stream.close()
        assert (await anext(batches))[-1] == (300, COMPLETED)
    assert numbers == list(range(300))


async def test_messages_are_kept_for_the_slowest_reader() -> None:
    """Messages are kept for the slowest reader up to a limit; beyond it, that reader is slow and the others continue."""
    kept = Kept(Retention(RetentionLimits(max_stream_bytes=1)))
    async with reading(kept.stream) as quick, reading(kept.stream) as slow:
        kept.stream.put([TEXT])
        assert [await anext(quick), await anext(slow)] == [[(0, TEXT)]] * 2
        for number in range(1, 10):
            kept.stream.put([TEXT])
            assert await anext(quick) == [(number, TEXT)]
        assert [number for number, _ in await anext(slow)] == list(range(1, 10))
        for _ in range(retention.UNREAD_BYTES // weight(TEXT) + 1):
            kept.stream.put([TEXT])
            await anext(quick)
        with pytest.raises(GatewayError) as caught:
            await anext(slow)
    assert caught.value.reason is Reason.SLOW_CALLER


async def test_a_dropped_running_stream_fails_its_readers() -> None:
    """A reader of a dropped stream gets an error, not a normal end."""
    kept = Kept(retention=0.01)
    kept.stream.put(ANSWER[:1])
    async with reading(kept.stream):
        pass
    await until(lambda: kept.dropped == 1)
    kept.stream.put(ANSWER)
    kept.stream.close()
    error = await refused(kept.stream, 0)
    assert (error.reason, error.message) == (
        Reason.COMPLETION_GONE,
        "completion 'c' cannot be resumed there: it is no longer retained",
    )


async def test_a_number_beyond_an_ended_stream() -> None:
    """A number beyond the end of an ended stream is an error."""
    error = await refused(Kept().finish().stream, 9)
    assert error.message == "completion 'c' cannot be resumed there: it has no message 9"


async def test_a_stream_that_is_not_retained_ends_with_its_last_reader() -> None:
    """The generation is abandoned with the outcome of that reader; an ended stream is only dropped."""
    kept = Kept(retention=0.0)
    abandoned: list[Outcome | None] = []
    kept.stream.abandoned = lambda: abandoned.append(kept.stream.left)
    kept.stream.put(ANSWER[:1])
    first, second = (asyncio.create_task(followed(kept.stream)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    assert (abandoned, kept.dropped) == ([], 0)
    second.cancel()
    await asyncio.wait([second])
    assert (abandoned, kept.dropped) == ([DISCONNECTED], 1)
    ended = Kept(retention=0.0).finish()
    assert len(await followed(ended.stream)) == len(ANSWER)
    assert (ended.dropped, ended.stream.left) == (1, None)


async def test_a_slow_last_reader_determines_the_outcome() -> None:
    """A completion whose only reader was too slow ends with SLOW_CALLER."""
    kept = Kept(retention=0.0)
    with pytest.raises(GatewayError), kept.stream.read(lambda: DISCONNECTED):
        raise GatewayError(Reason.SLOW_CALLER, "slow")
    assert kept.stream.left == Outcome(Code.RESOURCE_EXHAUSTED, Reason.SLOW_CALLER, "slow")


async def test_a_stream_before_its_model_is_resolved() -> None:
    """A stream has no head and no usage before its model is resolved; a reader may already wait."""
    stream = Retention().open(LONG, lambda: None)
    assert (stream.usage, stream.log_values, stream.failure) == (NOTHING_YET, {}, None)
    with pytest.raises(LookupError):
        _ = stream.head
    waiting = asyncio.create_task(refused(stream))
    await asyncio.sleep(0)
    stream.close(CallerError(Reason.MODEL_NOT_FOUND, "no such model"))
    assert (await waiting).reason is Reason.MODEL_NOT_FOUND


@pytest.mark.usefixtures("strict")
def test_running_streams_make_room_at_the_memory_limit() -> None:
    """Those of the caller that uses most, before any call of others ends."""
    memory = Ledger(1000 * weight(TEXT))
    kept_by = Retention(memory=memory)
    greedy, modest = (kept_by.open(LONG, lambda: None, share=Share(name)) for name in ("greedy", "modest"))
    evicted: list[str] = []
    call = memory.hold(lambda: evicted.append("modest"), "modest")
    for stream in (greedy, modest):
        stream.run(FakeCompletion())
    greedy.put([TEXT] * 900)
    modest.put([TEXT] * 10)
    call.set(90 * weight(TEXT))
    assert greedy.size == STREAM_BYTES + weight(TEXT)
    assert modest.size == STREAM_BYTES + 10 * weight(TEXT)
    assert not evicted
    greedy.drop()
    modest.drop()
    call.close()
    assert memory.held == 0
