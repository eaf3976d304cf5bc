"""Streams that are kept, so that a caller who lost its connection can go on where it was.

    whoever generates ── put ──▶ RetainedStream: numbered messages, bounded ── follow(after) ──▶ any number of readers

A message's number is given here, once, after joining: what is replayed is what was sent. A stream lives as long as somebody
reads it, and `retain_for` seconds longer; if it is still being generated then, it is stopped.

Memory is bounded: a stream drops its oldest messages at `max_stream_bytes`; all streams together drop, at `max_bytes`, the
ended ones that ended first, and if none is left, the oldest messages of the one that is written to. Beyond that, and so that
readers who keep up get on whatever the others do, each stream under way keeps its newest message, and what its slowest reader
has not taken yet as long as that is not more than `UNREAD_BYTES`, which is what other streams hold for a caller too.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltawire_server.completions.info import NOTHING_YET, Outcome, Timings
from deltawire_server.errors import CallerError, DeltawireError, GatewayError, Reason
from deltawire_server.memory import Ledger
from deltawire_server.sansio.coalesce import weight
from deltawire_server.sansio.events import Completed, StopReason

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator, Sequence

    from deltawire_server.completions.info import ActiveCompletion, CompletionInfo
    from deltawire_server.sansio.events import StreamEvent, Usage

UNREAD_BYTES = 256 * 1024
"""What is kept for a reader beyond the limits; one that is further behind has to come back for what is left."""

STREAM_BYTES = 2048
"""What a stream weighs without its messages: head, timings, bookkeeping."""

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True, slots=True)
class RetentionLimits:
    """What may be kept; the settings say why each default is what it is.

    Attributes:
        max_stream_bytes: Of one stream.
        max_bytes: Of all of them.
        max_completed_bytes: Above this, a stream's last message does not repeat the whole answer.
    """

    max_stream_bytes: int = 8 * MIB
    max_bytes: int = 256 * MIB
    max_completed_bytes: int = 1 * MIB


class RetainedStream:
    """One stream. Made by `Retention.open`; the generating task calls `run`, `put` and `close`; readers `follow` within `read`.

    Attributes:
        expire_time: Unix time at which it will be dropped; `None` while it is being read.
        size: Bytes that are kept of it.
        abandoned: Called if its last reader has left before its end and it is not to be kept: there is no one to generate for.
        left: How the last reader left then.
    """

    def __init__(self, retention: Retention, retain_for: float, dropped: Callable[[], None], *, whole: bool) -> None:
        self.expire_time: float | None = None
        self.size = STREAM_BYTES
        self.abandoned: Callable[[], object] = lambda: None
        self.left: Outcome | None = None
        self._retention = retention
        self._head: CompletionInfo | None = None
        self._running: ActiveCompletion | None = None  # until it is closed; it holds the whole answer
        self._attempts = 0
        self._usage = NOTHING_YET
        self._timings = Timings(0.0)
        self._failure: DeltawireError | None = None
        self._retain_for = retain_for
        self._on_dropped = dropped
        self._whole_end = whole
        self._messages: list[StreamEvent] = []
        self._first = 0  # the sequence of the first of them
        self._closed = False
        self._dropped = False
        # Where each reader is: the sequence of what it takes next.
        self._places: dict[object, int] = {}
        self._whole = False  # whether its last message was put
        self._timer: asyncio.TimerHandle | None = None
        self._news = asyncio.Event()

    @property
    def head(self) -> CompletionInfo:
        """What is settled of its completion.

        Raises:
            LookupError: Its model has not been found.
        """
        if self._head is None:
            raise LookupError("the completion's model has not been found")
        return self._head

    @property
    def is_retained(self) -> bool:
        """Whether it outlives its readers."""
        return self._retain_for > 0

    @property
    def attempts(self) -> int:
        """How many replicas of the provider were asked, to its end or so far."""
        return self._attempts if self._running is None else self._running.attempts

    @property
    def usage(self) -> Usage:
        """What its completion has cost so far, or in all."""
        return self._usage if self._running is None else self._running.usage

    @property
    def timings(self) -> Timings:
        """How long things took, to its end or to now."""
        return self._timings if self._running is None else self._running.timings

    @property
    def failure(self) -> DeltawireError | None:
        """Why its completion did not end by itself, if it did not."""
        return self._failure if self._running is None else self._running.failure

    @property
    def last_sequence(self) -> int | None:
        """Of the newest message; `None` before the first."""
        return self._first + len(self._messages) - 1 if self._first or self._messages else None

    @property
    def closed(self) -> bool:
        """Whether its completion has ended, and nothing more comes."""
        return self._closed

    @property
    def completed(self) -> Completed | None:
        """Its last message, if that has come and is kept."""
        last = self._messages[-1] if self._messages else None
        return last if isinstance(last, Completed) else None

    def run(self, running: ActiveCompletion) -> None:
        """Its completion is under way."""
        self._running = running
        self._head = running.head

    def put(self, events: Sequence[StreamEvent]) -> None:
        """Number these and keep them, as far as the limits allow. Nothing after `close`."""
        if self._dropped:
            return  # nobody reads it, and its completion is about to end
        kept = list(events) if self._whole_end else [self._retention.fitted(event) for event in events]
        self._messages += kept
        self._whole = isinstance(kept[-1], Completed)
        self._grow(sum(map(weight, kept)))
        self._tell()

    def close(self, failure: DeltawireError | None = None) -> None:
        """Nothing more comes; readers that have read all end, with the failure if there was one."""
        if not self._closed:
            # Not the exception itself, whose traceback refers to all that the call had.
            self._closed, self._failure = True, failure and failure.again()
        if self._running is not None:
            self._timings, self._usage = self._running.timings, self._running.usage
            self._attempts = self._running.attempts
            self._running = None
        if not self._messages:
            self.drop()  # the answer did not begin: there is nothing to resume
        elif not self._dropped:
            self._retention.ended(self)
        self._tell()

    @contextmanager
    def read(self, left: Callable[[], Outcome], after: int | None = None) -> Iterator[Reader]:
        """Be a reader, who `follow`s; the stream does not expire meanwhile.

        Args:
            left: Asked how the reader left, if it was cancelled.
            after: The sequence of the last message that the reader has; `None` if it has none.

        Raises:
            CallerError: COMPLETION_GONE: what comes next for this reader was dropped, or has never been.
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
        """A reader has taken what comes before this sequence."""
        self._places[reader] = position

    def since(self, position: int) -> list[StreamEvent]:
        """The messages from this sequence on; empty if there is none yet.

        Raises:
            GatewayError: SLOW_CALLER: that one was dropped.
        """
        if position < self._first:
            message = "the caller was slower than what is retained of its stream lasts"
            raise GatewayError(Reason.SLOW_CALLER, message)
        return self._messages[position - self._first :]

    async def news(self) -> bool:
        """Wait for more; whether there may be."""
        if self._closed:
            return False
        await self._news.wait()
        return True

    def finish(self) -> None:
        """Check that a reader that has read all has read a whole stream.

        Raises:
            CallerError: COMPLETION_GONE: it was dropped before its end.
            DeltawireError: The completion failed.
        """
        if self._failure is not None:
            raise self._failure.again()
        if not self._whole:
            raise self._missing("it was dropped before its end")

    def shorten(self, size: int) -> None:
        """Drop the oldest messages, down to this size, or to what readers who keep up have not taken yet."""
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
        """Keep nothing of it any more. Readers that have not read all yet are told so."""
        if self._dropped:
            return
        self._dropped = True
        self._stop_expiring()
        self._retention.dropped(self)
        self._first += len(self._messages)
        self._messages.clear()
        self.size = 0
        self._tell()
        self._on_dropped()

    def _grow(self, size: int) -> None:
        self.size += size
        self._retention.grown(self, size)

    def _shrink(self, size: int) -> None:
        self.size -= size
        self._retention.grown(self, -size)

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    def _check_place(self, position: int, after: int | None) -> None:
        if position > self._first + len(self._messages):
            raise self._missing(f"it has no message {after}" + ("" if self._closed else " yet"))
        if self._dropped and self._first:
            raise self._missing("it is no longer kept")
        if position < self._first:
            raise self._missing(f"messages before {self._first} are no longer kept")

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
        """The last reader has left."""
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
    """A reader of a stream, made by `RetainedStream.read`; `follow` from where it is.

    Args:
        stream: What it reads.
        position: The sequence of the first message that it wants.
    """

    def __init__(self, stream: RetainedStream, position: int) -> None:
        self._stream = stream
        self.position = position

    async def follow(self) -> AsyncGenerator[list[tuple[int, StreamEvent]]]:
        """The messages from here on, each with its sequence; at the end of what there is, waits for more.

        Raises:
            GatewayError: SLOW_CALLER: the reader was so slow that its next message was dropped.
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
    """All retained streams, within their common bounds.

    Args:
        limits: The bounds.
        memory: What all calls of the process hold; what is retained counts there too.
    """

    def __init__(self, limits: RetentionLimits | None = None, memory: Ledger | None = None) -> None:
        self._limits = limits or RetentionLimits()
        self._hold = (memory or Ledger(sys.maxsize)).hold(self._drop_ended)
        self._size = 0
        self._ended: OrderedDict[RetainedStream, None] = OrderedDict()  # the one that ended first is the first

    @property
    def size(self) -> int:
        """Bytes that are kept now."""
        return self._size

    def open(self, retain_for: float, dropped: Callable[[], None], *, whole: bool = False) -> RetainedStream:
        """Keep a stream from now on. `read` it at once: until its first reader it does not expire.

        Args:
            retain_for: Seconds that it is kept without a reader, and for which its completion is under way without one; with 0
                it ends with its last reader.
            dropped: Called once, when nothing of it is kept any more.
            whole: Whether its last message is kept whole, however large it is.
        """
        stream = RetainedStream(self, retain_for, dropped, whole=whole)
        self.grown(stream, stream.size)
        return stream

    def fitted(self, event: StreamEvent) -> StreamEvent:
        """An event as it is kept: a last message that is too large does not repeat the answer."""
        if not isinstance(event, Completed) or weight(event) <= self._limits.max_completed_bytes:
            return event
        return event.without_messages()

    def grown(self, stream: RetainedStream, size: int) -> None:
        """A stream weighs so much more, or less; make room if that is too much."""
        self._size += size
        self._hold.set(self._size)
        if size <= 0:
            return
        if stream.size > self._limits.max_stream_bytes:
            # Down to seven eighths, so that not every message has to make room for itself.
            stream.shorten(self._limits.max_stream_bytes * 7 // 8)
        while self._size > self._limits.max_bytes and self._ended:
            next(iter(self._ended)).drop()
        if self._size > self._limits.max_bytes:
            stream.shorten(stream.size - (self._size - self._limits.max_bytes))

    def _drop_ended(self) -> None:
        """Drop all streams that have ended: there is no memory left for the calls under way."""
        while self._ended:
            next(iter(self._ended)).drop()

    def ended(self, stream: RetainedStream) -> None:
        """From now on it can be dropped as a whole."""
        self._ended[stream] = None

    def dropped(self, stream: RetainedStream) -> None:
        """Nothing of it is kept any more."""
        self._size -= stream.size
        self._hold.set(self._size)
        self._ended.pop(stream, None)
