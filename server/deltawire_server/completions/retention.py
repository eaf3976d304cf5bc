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
import time
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from deltawire_server.errors import CallerError, DeltawireError, GatewayError, Reason
from deltawire_server.sansio.coalesce import weight
from deltawire_server.sansio.events import Completed, StopReason

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator, Sequence

    from deltawire_server.completions.records import Running, Timings
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


_FIRST_READER = "the first reader"


class RetainedStream:
    """One stream. Made by `Retention.open`; whoever generates calls `put`, then `close`; readers `follow`.

    Attributes:
        head: What is settled of its completion.
        expire_time: Unix time at which it will be dropped; `None` while somebody reads it.
        size: Bytes that are kept of it.
    """

    def __init__(self, retention: Retention, running: Running, retain_for: float, dropped: Callable[[], None]) -> None:
        self.head = running.head
        self.expire_time: float | None = None
        self.size = STREAM_BYTES
        self._retention = retention
        self._running: Running | None = running  # until it is closed; it holds the whole answer
        self._usage = running.usage
        self._timings = running.timings
        self._failure: DeltawireError | None = None
        self._retain_for = retain_for
        self._tell_dropped = dropped
        self._messages: list[StreamEvent] = []
        self._first = 0  # the sequence of the first of them
        self._closed = False
        self._dropped = False
        self._readers = 0
        # Where each reader is: the sequence of what it takes next. Whoever asked for the stream begins with the first.
        self._places: dict[object, int] = {_FIRST_READER: 0}
        self._whole = False  # whether its last message was put
        self._timer: asyncio.TimerHandle | None = None
        self._news = asyncio.Event()
        self._expire_later()

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

    def put(self, events: Sequence[StreamEvent]) -> None:
        """Number these and keep them, as far as the limits allow. Nothing after `close`."""
        if self._dropped:
            return  # nobody reads it, and its completion is about to end
        kept = [self._retention.fitted(event) for event in events]
        self._messages += kept
        self._whole = isinstance(kept[-1], Completed)
        self._grow(sum(map(weight, kept)))
        self._tell()

    def close(self, failure: DeltawireError | None = None) -> None:
        """Nothing more comes; readers that have read all end, with the failure if there was one."""
        self._closed = True
        if self._running is not None:
            self._timings, self._usage, self._failure = self._running.timings, self._running.usage, failure
            self._running = None
        if not self._messages:
            self.drop()  # the answer did not begin: there is nothing to resume
        elif not self._dropped:
            self._retention.ended(self)
        self._tell()

    @contextmanager
    def read(self) -> Iterator[None]:
        """Be a reader: the stream does not expire meanwhile."""
        self._readers += 1
        self._stop_expiring()
        try:
            yield
        finally:
            self._readers -= 1
            if not self._readers:
                self._expire_later()

    async def follow(self, after: int | None = None) -> AsyncGenerator[list[tuple[int, StreamEvent]]]:
        """The messages after a number, or all of them, each with its own; at the end of what there is, waits for more.

        Args:
            after: The sequence of the last message that the reader has; `None` if it has none.

        Raises:
            CallerError: COMPLETION_GONE: what comes next for this reader was dropped, or has never been.
            GatewayError: SLOW_CALLER: the reader was so slow that its next message was dropped.
            DeltawireError: The completion failed; raised after its last message.
        """
        position = 0 if after is None else after + 1
        if position > self._first + len(self._messages):
            raise self._missing(f"it has no message {after}" + ("" if self._closed else " yet"))
        if self._dropped and self._first:
            raise self._missing("it is no longer kept")
        if position < self._first:
            raise self._missing(f"messages before {self._first} are no longer kept")
        reader = object()
        self._places.pop(_FIRST_READER, None)
        try:
            while True:
                if position < self._first:
                    message = "the caller was slower than what is retained of its stream lasts"
                    raise GatewayError(Reason.SLOW_CALLER, message)
                news = self._news
                fresh = self._messages[position - self._first :]
                first, position = position, position + len(fresh)
                self._places[reader] = position
                if fresh:
                    yield list(enumerate(fresh, first))
                elif self._closed:
                    break
                else:
                    await news.wait()
        finally:
            self._places.pop(reader, None)
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
        self._tell_dropped()

    def _grow(self, size: int) -> None:
        self.size += size
        self._retention.grown(self, size)

    def _shrink(self, size: int) -> None:
        self.size -= size
        self._retention.grown(self, -size)

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    def _missing(self, what: str) -> CallerError:
        metadata = {"completion_id": self.head.completion_id}
        if self._messages:
            metadata["first_sequence"] = str(self._first)
        return CallerError(
            Reason.COMPLETION_GONE,
            f"completion {self.head.completion_id!r} cannot be resumed there: {what}",
            metadata=metadata,
        )

    def _expire_later(self) -> None:
        if not self._dropped:
            self.expire_time = time.time() + self._retain_for
            self._timer = asyncio.get_running_loop().call_later(self._retain_for, self._expire)

    def _stop_expiring(self) -> None:
        self.expire_time = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        if self._running is not None:
            self._running.stop(StopReason.CANCELLED)
        self.drop()


class Retention:
    """All retained streams, within their common bounds.

    Args:
        limits: The bounds.
    """

    def __init__(self, limits: RetentionLimits | None = None) -> None:
        self._limits = limits or RetentionLimits()
        self._size = 0
        self._ended: OrderedDict[RetainedStream, None] = OrderedDict()  # the one that ended first is the first

    @property
    def size(self) -> int:
        """Bytes that are kept now."""
        return self._size

    def open(self, running: Running, retain_for: float, dropped: Callable[[], None]) -> RetainedStream:
        """Keep a stream from now on.

        Args:
            running: Its completion, which is stopped if nobody reads it for so long before its end.
            retain_for: Seconds that it is kept while nobody reads it.
            dropped: Called once, when nothing of it is kept any more.
        """
        stream = RetainedStream(self, running, retain_for, dropped)
        self.grown(stream, stream.size)
        return stream

    def fitted(self, event: StreamEvent) -> StreamEvent:
        """An event as it is kept: a last message that is too large does not repeat the answer."""
        if not isinstance(event, Completed) or weight(event) <= self._limits.max_completed_bytes:
            return event
        bare = (
            msgspec.structs.replace(choice, text="", reasoning="", tool_calls=(), failed_tool_calls=(), logprobs=())
            for choice in event.choices
        )
        return msgspec.structs.replace(event, choices=tuple(bare), messages_omitted=True)

    def grown(self, stream: RetainedStream, size: int) -> None:
        """A stream weighs so much more, or less; make room if that is too much."""
        self._size += size
        if size <= 0:
            return
        if stream.size > self._limits.max_stream_bytes:
            # Down to seven eighths, so that not every message has to make room for itself.
            stream.shorten(self._limits.max_stream_bytes * 7 // 8)
        while self._size > self._limits.max_bytes and self._ended:
            next(iter(self._ended)).drop()
        if self._size > self._limits.max_bytes:
            stream.shorten(stream.size - (self._size - self._limits.max_bytes))

    def ended(self, stream: RetainedStream) -> None:
        """From now on it can be dropped as a whole."""
        self._ended[stream] = None

    def dropped(self, stream: RetainedStream) -> None:
        """Nothing of it is kept any more."""
        self._size -= stream.size
        self._ended.pop(stream, None)
