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
    """Nothing is kept for readers beyond the limits, so that these can be seen."""
    monkeypatch.setattr(retention, "UNREAD_BYTES", 0)


class Kept:
    """A stream, with its completion and how often it was told to be dropped."""

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


GONE = Outcome(Code.CANCELLED, None, "gone")


@asynccontextmanager
async def reading(
    stream: RetainedStream, after: int | None = None
) -> AsyncIterator[AsyncGenerator[list[tuple[int, StreamEvent]]]]:
    """A reader at this place, until left."""
    with stream.read(lambda: GONE, after) as reader:
        async with aclosing(reader.follow()) as batches:
            yield batches


async def followed(stream: RetainedStream, after: int | None = None) -> list[tuple[int, StreamEvent]]:
    """All that a reader gets, to the end."""
    async with asyncio.timeout(WAIT), reading(stream, after) as batches:
        return [numbered async for batch in batches for numbered in batch]


async def take_all(stream: RetainedStream, numbered: list[tuple[int, StreamEvent]]) -> None:
    """Take all that comes, and fail as it fails."""
    async with reading(stream) as batches:
        async for batch in batches:
            numbered += batch


async def refused(stream: RetainedStream, after: int | None = None) -> DeltawireError:
    """Why a reader gets nothing at all."""
    with pytest.raises(DeltawireError) as caught:
        await followed(stream, after)
    return caught.value


@pytest.mark.parametrize("after", [None, 0, 1, 2, 3])
async def test_a_replay_begins_after_what_the_reader_has(after: int | None) -> None:
    """Every place in the stream, also the last, after which nothing is left but the end."""
    kept = Kept().finish()
    assert await followed(kept.stream, after) == list(enumerate(ANSWER))[0 if after is None else after + 1 :]


async def test_readers_get_what_comes_live() -> None:
    """Two of them, at different places: each message once, with the number it was given."""
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


async def test_a_failure_comes_after_the_last_message_for_every_reader() -> None:
    """Live or late; each gets an exception of its own."""
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


async def test_an_answer_that_did_not_begin_is_not_kept() -> None:
    """Whoever waits for it gets the failure, and there is nothing to resume."""
    kept = Kept()
    waiting = asyncio.create_task(refused(kept.stream))
    await asyncio.sleep(0)
    kept.stream.close(ProviderError(Reason.UPSTREAM_UNAVAILABLE, "away"))
    assert (await waiting).reason is Reason.UPSTREAM_UNAVAILABLE
    assert kept.dropped == 1
    assert kept.retention.size == 0
    assert (await refused(kept.stream)).reason is Reason.UPSTREAM_UNAVAILABLE


async def test_a_number_that_has_never_been() -> None:
    """A reader that has more than there is reads another stream."""
    kept = Kept()
    error = await refused(kept.stream, 0)
    assert (error.reason, error.message) == (
        Reason.COMPLETION_GONE,
        "completion 'c' cannot be resumed there: it has no message 0 yet",
    )
    assert error.metadata == {"completion_id": "c"}
    assert isinstance(error, CallerError)


@pytest.mark.usefixtures("strict")
async def test_old_messages_go_first() -> None:
    """At the limit of one stream; what is left can be resumed, what is gone cannot, and the reader hears where it begins."""
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
async def test_the_newest_message_is_kept_however_large() -> None:
    """So that readers get on."""
    kept = Kept(Retention(RetentionLimits(max_stream_bytes=1, max_bytes=1)))
    kept.stream.put([STARTED, TEXT])
    kept.stream.put([TEXT])
    async with reading(kept.stream, 1) as batches:
        assert await anext(batches) == [(2, TEXT)]
    assert kept.retention.size == STREAM_BYTES + weight(TEXT)


@pytest.mark.usefixtures("strict")
async def test_a_reader_that_falls_behind_is_slow() -> None:
    """It had its place in the stream, and what comes next for it was dropped."""
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
async def test_all_streams_share_a_bound() -> None:
    """Those that have ended go first, in the order of their ends; then the oldest messages of the one that is written to."""
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


async def test_a_new_stream_makes_room_too() -> None:
    """Streams without a message weigh something: their number is bounded by it."""
    common = Retention(RetentionLimits(max_bytes=2 * STREAM_BYTES + weight(STARTED)))
    ended = Kept(common).finish(STARTED)
    Kept(common)
    assert ended.dropped == 0
    Kept(common)
    assert ended.dropped == 1


async def test_a_last_message_that_is_too_large_does_not_repeat_the_answer() -> None:
    """It says so; what it is about stays."""
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


async def test_a_stream_nobody_reads_expires() -> None:
    """While it is generated: its completion is stopped, and what still comes is not kept."""
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
    """Nothing is left to stop."""
    kept = Kept(retention=0.01).finish()
    assert len(await followed(kept.stream)) == len(ANSWER)
    await until(lambda: kept.dropped == 1)
    assert kept.running.stopped == []
    assert (await refused(kept.stream, 1)).reason is Reason.COMPLETION_GONE


async def test_a_stream_that_is_read_does_not_expire() -> None:
    """By however many; its time begins when the last has left."""
    kept = Kept(retention=0.02)
    assert kept.stream.expire_time is None
    with kept.stream.read(lambda: GONE):
        with kept.stream.read(lambda: GONE):
            assert kept.stream.expire_time is None
        await asyncio.sleep(0.06)
        assert kept.stream.expire_time is None
        assert kept.dropped == 0
    assert kept.stream.expire_time is not None
    await until(lambda: kept.dropped == 1)
    assert kept.stream.expire_time is None


async def test_what_a_stream_knows_of_its_completion() -> None:
    """While it runs, what that says; after the close, what it said last, and the completion is let go."""
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


async def test_a_reader_that_keeps_up_gets_all_whatever_the_limits() -> None:
    """They bound what can be resumed; who reads has nothing to do with them. What it has taken is not kept for it."""
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


async def test_the_slowest_of_several_readers_is_kept_for() -> None:
    """As long as it is not too far behind; then it is slow, and the others go on."""
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


async def test_a_stream_that_was_dropped_under_way_does_not_end_well() -> None:
    """Whoever still looks at it is told that its end is missing, rather than that all is well."""
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
    """It will never come."""
    error = await refused(Kept().finish().stream, 9)
    assert error.message == "completion 'c' cannot be resumed there: it has no message 9"


async def test_a_stream_that_is_not_retained_ends_with_its_last_reader() -> None:
    """Its generation is abandoned, with how that reader left; one that has ended is only dropped."""
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
    assert (abandoned, kept.dropped) == ([GONE], 1)
    ended = Kept(retention=0.0).finish()
    assert len(await followed(ended.stream)) == len(ANSWER)
    assert (ended.dropped, ended.stream.left) == (1, None)


async def test_a_reader_that_was_too_slow_leaves_with_that() -> None:
    """It is what became of a completion that had no other reader."""
    kept = Kept(retention=0.0)
    with pytest.raises(GatewayError), kept.stream.read(lambda: GONE):
        raise GatewayError(Reason.SLOW_CALLER, "slow")
    assert kept.stream.left == Outcome(Code.RESOURCE_EXHAUSTED, Reason.SLOW_CALLER, "slow")


async def test_before_its_model_is_found_a_stream_knows_nothing() -> None:
    """No head, no cost; a reader may wait already."""
    stream = Retention().open(LONG, lambda: None)
    assert (stream.usage, stream.attempts, stream.failure) == (NOTHING_YET, 0, None)
    with pytest.raises(LookupError):
        _ = stream.head
    waiting = asyncio.create_task(refused(stream))
    await asyncio.sleep(0)
    stream.close(CallerError(Reason.MODEL_NOT_FOUND, "no such model"))
    assert (await waiting).reason is Reason.MODEL_NOT_FOUND
