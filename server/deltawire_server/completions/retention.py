"""Retained streams: a caller that lost its connection can resume after its last message.

    the generating task ── put ──▶ RetainedStream: numbered messages, bounded ── follow(after) ──▶ any number of readers

A message gets its sequence number here, once, after merging, so a replay is identical to the first transmission. A stream is
retained while it has a reader and for `retain_for` seconds afterwards; if it is still being generated then, generation stops.

Memory is bounded. At `max_stream_bytes`, a stream drops its oldest messages. At `max_bytes` of all streams, the caller with the
most bytes loses its ended streams in the order of their ends; then the oldest messages of the stream that is written to are
dropped. The same happens within the streams of a caller at its own limit. Independent of these limits, each
running stream keeps its newest message and up to `UNREAD_BYTES` that its slowest reader has not taken, as streams without
retention do, so that readers that keep up can continue.
"""

from __future__ import annotations

import asyncio
import functools
import sys
import time
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltawire_server.completions.info import NOTHING_YET, Outcome, Timings
from deltawire_server.errors import CallerError, DeltawireError, GatewayError, Reason
from deltawire_server.limits import Share, Use
from deltawire_server.memory import Hold, Ledger
from deltawire_server.sansio.coalesce import weight
from deltawire_server.sansio.events import Completed, StopReason

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence

    from deltawire_server.completions.info import ActiveCompletion, CompletionInfo
    from deltawire_server.sansio.events import StreamEvent, Usage

UNREAD_BYTES = 256 * 1024
"""Bytes that are kept for the slowest reader beyond the limits; a slower one fails with SLOW_CALLER and may resume."""

STREAM_BYTES = 2048
"""Memory of a stream without its messages."""

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True, slots=True)
class RetentionLimits:
    """Memory limits of retained streams; the settings explain the defaults.

    Attributes:
        max_stream_bytes: Limit for one stream.
        max_bytes: Limit for all streams together.
        max_completed_bytes: Size above which the last message of a stream does not repeat the answer.
    """

    max_stream_bytes: int = 8 * MIB
    max_bytes: int = 256 * MIB
    max_completed_bytes: int = 1 * MIB


class RetainedStream:
    """One stream. Created by `Retention.open`. The generating task calls `run`, `put` and `close`; readers `follow` within `read`.

    Attributes:
        share: What its caller uses.
        expire_time: Unix time at which it is dropped; `None` while it has a reader.
        size: Its memory in bytes.
        abandoned: Called if its last reader leaves before its end and it is not retained, to stop generation.
        left: The outcome of the last reader in that case.
        traceparent: The context of the call that began it, to which the spans of other readers are linked; `None` without one.
    """

    def __init__(
        self, retention: Retention, retain_for: float, dropped: Callable[[], None], share: Share, *, whole: bool
    ) -> None:
        self.share = share
        self.expire_time: float | None = None
        self.size = STREAM_BYTES
        self.abandoned: Callable[[], object] = lambda: None
        self.left: Outcome | None = None
        self.traceparent: str | None = None
        self._retention = retention
        self._head: CompletionInfo | None = None
        self._running: ActiveCompletion | None = None  # `None` after `close`, because it holds the whole answer
        self._log_values: Mapping[str, object] = {}
        self._usage = NOTHING_YET
        self._timings = Timings(0.0)
        self._failure: DeltawireError | None = None
        self._retain_for = retain_for
        self._on_dropped = dropped
        self._whole_end = whole
        self._messages: list[StreamEvent] = []
        self._first = 0  # the sequence number of the first of them
        self._closed = False
        self._dropped = False
        # The sequence number of the next message of each reader.
        self._places: dict[object, int] = {}
        self._whole = False  # whether it has its last message
        self._timer: asyncio.TimerHandle | None = None
        self._news = asyncio.Event()

    @property
    def head(self) -> CompletionInfo:
        """The fixed data of its completion.

        Raises:
            LookupError: Its model is not resolved yet.
        """
        if self._head is None:
            raise LookupError("the completion's model is not resolved yet")
        return self._head

    @property
    def is_retained(self) -> bool:
        """Whether it is retained without a reader."""
        return self._retain_for > 0

    @property
    def log_values(self) -> Mapping[str, object]:
        """The values of a log line about its completion so far; empty before its model is resolved."""
        return self._log_values if self._running is None else self._running.log_values

    @property
    def usage(self) -> Usage:
        """The usage of its completion so far."""
        return self._usage if self._running is None else self._running.usage

    @property
    def timings(self) -> Timings:
        """The durations up to its end or to now."""
        return self._timings if self._running is None else self._running.timings

    @property
    def failure(self) -> DeltawireError | None:
        """The error that ended its completion, if any."""
        return self._failure if self._running is None else self._running.failure

    @property
    def last_sequence(self) -> int | None:
        """The sequence number of the newest message; `None` before the first."""
        return self._first + len(self._messages) - 1 if self._first or self._messages else None

    @property
    def closed(self) -> bool:
        """Whether its completion has ended."""
        return self._closed

    @property
    def completed(self) -> Completed | None:
        """Its last message, if it has one and it is retained."""
        last = self._messages[-1] if self._messages else None
        return last if isinstance(last, Completed) else None

    def run(self, running: ActiveCompletion) -> None:
        """Set its running completion."""
        self._running = running
        self._head = running.head

    def put(self, events: Sequence[StreamEvent]) -> None:
        """Append events with the next sequence numbers, within the limits. Must not be called after `close`."""
        if self._dropped:
            return  # no reader is left, and the completion is about to end
        kept = list(events) if self._whole_end else [self._retention.fitted(event) for event in events]
        self._messages += kept
        self._whole = isinstance(kept[-1], Completed)
        self._grow(sum(map(weight, kept)))
        self._wake()

    def close(self, failure: DeltawireError | None = None) -> None:
        """Mark the end. Readers end after the last message, with the error if there is one."""
        if not self._closed:
            # A copy, because the traceback of the exception refers to all data of the call.
            self._closed, self._failure = True, failure and failure.again()
        if self._running is not None:
            self._timings, self._usage = self._running.timings, self._running.usage
            self._log_values = self._running.log_values
            self._running = None
        if not self._messages:
            self.drop()  # the answer did not begin, so there is nothing to resume
        elif not self._dropped:
            self._retention.ended(self)
        self._wake()

    @contextmanager
    def read(self, left: Callable[[], Outcome], after: int | None = None) -> Iterator[Reader]:
        """Register a reader; the stream does not expire while the context is entered. Call `follow` on the yielded reader.

        Args:
            left: Returns the outcome of the reader if it is cancelled.
            after: The sequence number of the last message that the reader has; `None` if it has none.

        Raises:
            CallerError: COMPLETION_GONE: the next message of this reader was dropped, or does not exist.
        """
        reader = Reader(self, 0 if after is None else after + 1)
        self._check_place(reader.position, after)
        self._places[reader] = reader.position
        self._stop_expiring()
        outcome: Outcome | None = None
        try:
            yield reader
        except DeltawireError as error:
            outcome = Outcome.of(error)
            raise
        except asyncio.CancelledError:
            outcome = left()
            raise
        finally:
            del self._places[reader]
            if not self._places:
                self._leave(outcome)

    def moved(self, reader: Reader, position: int) -> None:
        """Record that a reader has taken all messages before this sequence number."""
        self._places[reader] = position

    def since(self, position: int) -> list[StreamEvent]:
        """The messages from this sequence number on; empty if there are none yet.

        Raises:
            GatewayError: SLOW_CALLER: the first of them was dropped.
        """
        if position < self._first:
            message = "the caller was too slow: its next message was dropped from the retained stream"
            raise GatewayError(Reason.SLOW_CALLER, message)
        return self._messages[position - self._first :]

    async def news(self) -> bool:
        """Wait for a change; return false if the stream has ended."""
        if self._closed:
            return False
        await self._news.wait()
        return True

    def finish(self) -> None:
        """Check that a reader that has read all messages has read the whole stream.

        Raises:
            CallerError: COMPLETION_GONE: the stream was dropped before its end.
            DeltawireError: The completion failed.
        """
        if self._failure is not None:
            raise self._failure.again()
        if not self._whole:
            raise self._missing("it was dropped before its end")

    def shorten(self, size: int) -> None:
        """Drop the oldest messages down to this size, but keep up to `UNREAD_BYTES` that readers have not taken."""
        unread = min(self._places.values(), default=self._first + len(self._messages)) - self._first
        count = 0
        freed = 0
        while self.size - freed > size and count < len(self._messages) - 1:
            if count >= unread and self.size - freed <= STREAM_BYTES + UNREAD_BYTES:
                break
            freed += weight(self._messages[count])
            count += 1
        del self._messages[:count]
        self._first += count
        self._shrink(freed)

    def drop(self) -> None:
        """Drop all messages. Readers that have not read all of them fail with COMPLETION_GONE or SLOW_CALLER."""
        if self._dropped:
            return
        self._dropped = True
        self._stop_expiring()
        self._retention.dropped(self)
        self._first += len(self._messages)
        self._messages.clear()
        self.size = 0
        self._wake()
        self._on_dropped()

    def _grow(self, size: int) -> None:
        self.size += size
        self._retention.grown(self, size)

    def _shrink(self, size: int) -> None:
        self.size -= size
        self._retention.grown(self, -size)

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    def _check_place(self, position: int, after: int | None) -> None:
        if position > self._first + len(self._messages):
            raise self._missing(f"it has no message {after}" + ("" if self._closed else " yet"))
        if self._dropped and self._first:
            raise self._missing("it is no longer retained")
        if position < self._first:
            raise self._missing(f"messages before {self._first} are no longer retained")

    def _missing(self, what: str) -> CallerError:
        metadata = {"completion_id": self.head.completion_id}
        if self._messages:
            metadata["first_sequence"] = str(self._first)
        return CallerError(
            Reason.COMPLETION_GONE,
            f"completion {self.head.completion_id!r} cannot be resumed there: {what}",
            metadata=metadata,
        )

    def _leave(self, outcome: Outcome | None) -> None:
        """Handle the end of the last reader."""
        if self._dropped:
            return
        if self._retain_for:
            self.expire_time = time.time() + self._retain_for
            self._timer = asyncio.get_running_loop().call_later(self._retain_for, self._expire)
            return
        if not self._closed:
            self.left = outcome
            self.abandoned()
        self.drop()

    def _stop_expiring(self) -> None:
        self.expire_time = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        if self._running is not None:
            self._running.stop(StopReason.CANCELLED)
        self.drop()


class Reader:
    """A reader of a stream, created by `RetainedStream.read`.

    Args:
        stream: The stream.
        position: The sequence number of the first message that it reads.
    """

    def __init__(self, stream: RetainedStream, position: int) -> None:
        self._stream = stream
        self.position = position

    async def follow(self) -> AsyncGenerator[list[tuple[int, StreamEvent]]]:
        """The messages from `position` on, each with its sequence number, to the end of the stream.

        Raises:
            GatewayError: SLOW_CALLER: the reader was too slow, and its next message was dropped.
            CallerError: COMPLETION_GONE: the stream was dropped before its end.
            DeltawireError: The completion failed; raised after its last message.
        """
        while True:
            fresh = self._stream.since(self.position)
            if fresh:
                first = self.position
                self.position += len(fresh)
                self._stream.moved(self, self.position)
                yield list(enumerate(fresh, first))
            elif not await self._stream.news():
                break
        self._stream.finish()


class Retention:
    """All retained streams, with their common memory limits.

    Args:
        limits: The limits.
        memory: The memory ledger of the process, which includes retained streams.
    """

    def __init__(self, limits: RetentionLimits | None = None, memory: Ledger | None = None) -> None:
        self._limits = limits or RetentionLimits()
        self._memory = memory or Ledger(sys.maxsize)
        self._size = 0
        self.count = 0
        """The number of streams."""
        self._holds: dict[str, Hold] = {}  # by caller
        self._running: dict[str, set[RetainedStream]] = {}  # by caller
        # By caller, in the order of their ends.
        self._ended: dict[str, OrderedDict[RetainedStream, None]] = {}

    @property
    def size(self) -> int:
        """Memory of all streams, in bytes."""
        return self._size

    def open(
        self, retain_for: float, dropped: Callable[[], None], *, whole: bool = False, share: Share | None = None
    ) -> RetainedStream:
        """Create a stream. Call its `read` at once: it does not expire before its first reader.

        Args:
            retain_for: Seconds for which it is retained, and its completion runs, without a reader; with 0 it ends with its last
                reader.
            dropped: Called once, when it is dropped.
            whole: Whether to keep its last message unchanged, however large it is.
            share: What its caller uses, with its limits; by default without any.
        """
        stream = RetainedStream(self, retain_for, dropped, share or Share(), whole=whole)
        self.count += 1
        self._running.setdefault(stream.share.key, set()).add(stream)
        stream.share.add(Use.KEPT, 1)
        self.grown(stream, stream.size)
        return stream

    def fitted(self, event: StreamEvent) -> StreamEvent:
        """The event to retain: a last message that is too large is replaced by one without the answer."""
        if not isinstance(event, Completed) or weight(event) <= self._limits.max_completed_bytes:
            return event
        return event.without_messages()

    def grown(self, stream: RetainedStream, size: int) -> None:
        """Record that the memory of a stream changed by `size` bytes; drop messages or streams if a limit is exceeded."""
        self._count(stream.share, size)
        if size <= 0:
            return
        if stream.size > self._limits.max_stream_bytes:
            # Down to seven eighths, so that not every further message drops one.
            stream.shorten(self._limits.max_stream_bytes * 7 // 8)
        own_limit = stream.share.limits.retained_bytes
        while own_limit and (excess := stream.share.used(Use.RETAINED_BYTES) - own_limit) > 0:
            if not self._drop_one(stream.share.key):
                stream.shorten(stream.size - excess)
                break
        while self._size > self._limits.max_bytes and self._ended:
            self._drop_one(max(self._ended, key=lambda key: self._holds[key].size))
        if self._size > self._limits.max_bytes:
            stream.shorten(stream.size - (self._size - self._limits.max_bytes))

    def ended(self, stream: RetainedStream) -> None:
        """Record that a stream has ended, so that it may be dropped as a whole."""
        self._runs_no_more(stream)
        self._ended.setdefault(stream.share.key, OrderedDict())[stream] = None

    def dropped(self, stream: RetainedStream) -> None:
        """Record that a stream was dropped."""
        key = stream.share.key
        self._runs_no_more(stream)
        self.count -= 1
        stream.share.give_back(Use.KEPT)
        self._count(stream.share, -stream.size)
        ended = self._ended.get(key)
        if ended is not None:
            ended.pop(stream, None)
            if not ended:
                del self._ended[key]

    def _count(self, share: Share, size: int) -> None:
        """Count more bytes, or less."""
        self._size += size
        share.add(Use.RETAINED_BYTES, size)
        hold = self._holds.get(share.key)
        if hold is None:
            evict = functools.partial(self._make_room, share.key)
            hold = self._holds[share.key] = self._memory.hold(evict, share.key)
        hold.set(hold.size + size)
        if not hold.size and self._holds.get(share.key) is hold:
            del self._holds[share.key]
            hold.close()

    def _drop_one(self, key: str) -> bool:
        """Drop the ended stream of a caller that ended first; return false if it has none."""
        if key in self._ended:
            next(iter(self._ended[key])).drop()
            return True
        return False

    def _runs_no_more(self, stream: RetainedStream) -> None:
        running = self._running.get(stream.share.key, set())
        running.discard(stream)
        if not running:
            self._running.pop(stream.share.key, None)

    def _make_room(self, key: str) -> None:
        """Drop all ended streams of a caller and shorten its running ones, because the process is at its memory limit."""
        while self._drop_one(key):
            pass
        for stream in self._running.get(key, ()):
            stream.shorten(0)
