"""What one caller may use: counts and rates for each caller, over all workers of a gateway.

    Callers ── share ──▶ Share: `take` and `give_back` what is used at once, `admit` and `charge` what is used per minute

Each worker counts in its own column of a table in a file that all workers map into memory, so that the counts of a worker that has
ended can be cleared. A rate is a leaky bucket that all workers fill: it holds a minute's budget and empties evenly. It is written
here, because libraries keep their state in one process or in a database.
"""

from __future__ import annotations

import array
import contextlib
import enum
import fcntl
import hashlib
import mmap
import os
import time
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from deltawire_server.errors import GatewayError, Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    _Integers = array.array[int] | memoryview[int]
    _Numbers = array.array[float] | memoryview[float]

RETRY_SECONDS = 1.0
"""When a call that exceeds a count may be retried: calls end all the time."""

ROWS = 8192
"""Rows of callers that the workers count together, until they are restarted. Each worker counts further callers alone."""

STEPS = 64
"""Rows that are tried for a caller. If all were, each new caller of a full table would block all workers for milliseconds."""

MAX_IDLE = 10_000
"""Callers that are kept although they use nothing now, for their rates."""

_MINUTE = 60.0
_BUCKET = 3
_KEY_BYTES = 16
_NUMBER_BYTES = 8
_NO_KEY = bytes(_KEY_BYTES)


class Use(enum.IntEnum):
    """What is counted; the names are those of limits, except KEPT."""

    STREAMS = 0
    RETAINED_STREAMS = 1
    RETAINED_BYTES = 2
    WATCHES = 3
    KEPT = 4
    """Streams that a call may resume or join, of which there is no limit."""

    @property
    def setting(self) -> str:
        """The name of the limit."""
        return self.name.lower()


class Rate(enum.IntEnum):
    """What is limited per minute."""

    REQUESTS = 0
    TOKENS = 1

    @property
    def setting(self) -> str:
        """The name of the limit."""
        return f"{self.name.lower()}_per_minute"


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one caller, each 0 for none; `settings.model.LimitsSettings` explains them."""

    streams: int = 0
    retained_streams: int = 0
    retained_bytes: int = 0
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    image_fetches: int = 0
    watches: int = 0
    queued: int = 0


MAX_LIMIT = 10**12
"""The largest value of a limit."""

LIMITS = tuple(row.name for row in fields(Limits))
"""The names of all limits."""

_WHAT = {
    "streams": "completions at once",
    "retained_streams": "running completions with retention",
    "watches": "watches of models at once",
    "queued": "calls in the queue",
    "requests_per_minute": "requests per minute",
    "tokens_per_minute": "tokens per minute",
}


class _Row:
    """The counts of one caller.

    Args:
        columns: The counts of each worker, by `Use`.
        number: The column of this process, the only one that it writes.
        buckets: For each `Rate`, what is in the bucket, at which time on the monotonic clock, and how much leaves it per second.
        locked: Excludes the other workers while it is entered.
    """

    __slots__ = ("__weakref__", "buckets", "columns", "locked", "own")

    def __init__(
        self,
        columns: Sequence[_Integers],
        number: int,
        buckets: _Numbers,
        locked: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.columns = columns
        self.own = columns[number]
        self.buckets = buckets
        self.locked = locked

    def total(self, use: Use) -> int:
        """The count of all workers."""
        return sum(column[use] for column in self.columns)

    def level(self, rate: Rate, per_second: float, now: float) -> float:
        """What is in a bucket now, if so much leaves it per second."""
        first = rate * _BUCKET
        return max(0.0, self.buckets[first] - (now - self.buckets[first + 1]) * per_second)

    def fill(self, rate: Rate, amount: float, per_second: float, now: float) -> None:
        """Add to a bucket."""
        first = rate * _BUCKET
        self.buckets[first] = self.level(rate, per_second, now) + amount
        self.buckets[first + 1], self.buckets[first + 2] = now, per_second

    def is_empty(self, now: float) -> bool:
        """Whether nothing is in the buckets."""
        return not any(self.level(rate, self.buckets[rate * _BUCKET + 2], now) for rate in Rate)


def _local_row() -> _Row:
    return _Row(
        [array.array("q", [0] * len(Use))], 0, array.array("d", [0.0] * _BUCKET * len(Rate)), contextlib.nullcontext
    )


class Table:
    """The counts that the workers of a gateway share, in a file.

    Args:
        path: The file; it is created if it does not exist.
        workers: The number of columns.
    """

    def __init__(self, path: str, workers: int) -> None:
        self._workers = workers
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        buckets = ROWS * _KEY_BYTES
        counts = buckets + ROWS * len(Rate) * _BUCKET * _NUMBER_BYTES
        self._column_bytes = ROWS * len(Use) * _NUMBER_BYTES
        size = counts + workers * self._column_bytes
        os.truncate(self._file, size)  # sparse: only the rows in use take memory
        self._memory = memoryview(mmap.mmap(self._file, size))
        self._buckets = self._memory[buckets:counts].cast("d")
        self._counts = self._memory[counts:]

    def row(self, key: str, number: int) -> _Row | None:
        """The row of a caller; `None` if all rows that it may have are taken.

        Args:
            key: The caller.
            number: The column of this process.
        """
        digest = hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=_KEY_BYTES).digest()
        first = int.from_bytes(digest[:8], "big") % ROWS
        with self._locked(0, ROWS * _KEY_BYTES):
            for step in range(STEPS):
                index = (first + step) % ROWS
                name = self._memory[index * _KEY_BYTES : (index + 1) * _KEY_BYTES]
                if name == _NO_KEY:
                    name[:] = digest
                if name == digest:
                    return self._row_at(index, number)
        return None

    def clear(self, number: int) -> None:
        """Set the counts of a worker that has ended to 0. Rates stay."""
        start = number * self._column_bytes
        self._counts[start : start + self._column_bytes] = bytes(self._column_bytes)

    def close(self) -> None:
        """Close the file. Rows may be used until their end, without the other workers."""
        os.close(self._file)

    def _row_at(self, index: int, number: int) -> _Row:
        width = len(Use) * _NUMBER_BYTES
        starts = (worker * self._column_bytes + index * width for worker in range(self._workers))
        columns = [self._counts[start : start + width].cast("q") for start in starts]
        width = len(Rate) * _BUCKET
        buckets = self._buckets[index * width : (index + 1) * width]
        place = ROWS * _KEY_BYTES + index  # any byte that no other row locks

        def locked() -> AbstractContextManager[None]:
            return self._locked(place, 1)

        return _Row(columns, number, buckets, locked)

    @contextlib.contextmanager
    def _locked(self, start: int, length: int) -> Iterator[None]:
        """Lock bytes of the file: for microseconds, and the kernel releases the locks of a process that ends."""
        fcntl.lockf(self._file, fcntl.LOCK_EX, length, start)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, length, start)


class Share:
    """What one caller uses, with its limits. Created by `Callers.share` for each call.

    Args:
        key: Identifies the caller.
        name: The caller's name for error messages; empty if it has none.
        limits: Its limits.
        row: Its counts; by default new ones.

    Attributes:
        key: Identifies the caller.
        limits: Its limits.
    """

    __slots__ = ("_name", "_row", "key", "limits")

    def __init__(self, key: str = "", name: str = "", limits: Limits | None = None, row: _Row | None = None) -> None:
        self.key = key
        self.limits = limits or Limits()
        self._name = name
        self._row = row or _local_row()

    def used(self, use: Use) -> int:
        """How much the caller uses now, over all workers."""
        return self._row.total(use)

    def take(self, use: Use) -> None:
        """Count one more. Call `give_back` at its end.

        Raises:
            GatewayError: CALLER_LIMIT_EXCEEDED. Nothing was counted. The caller may retry after the error's `retry_after`.
        """
        limit: int = getattr(self.limits, use.setting, 0)
        if not limit:
            self.add(use, 1)
            return
        with self._row.locked():
            if self._row.total(use) >= limit:
                raise self.exceeded(use.setting)
            self.add(use, 1)

    def give_back(self, use: Use) -> None:
        """Count one less."""
        self.add(use, -1)

    def add(self, use: Use, amount: int) -> None:
        """Count more, or less, whatever the limit is."""
        self._row.own[use] += amount

    def admit(self) -> None:
        """Count a request.

        Raises:
            GatewayError: CALLER_LIMIT_EXCEEDED: too many requests, or tokens, in the last minute. Nothing was counted. The
                error's `retry_after` is the time until the next request is possible.
        """
        limits = {Rate.REQUESTS: self.limits.requests_per_minute, Rate.TOKENS: self.limits.tokens_per_minute}
        if not any(limits.values()):
            return
        with self._row.locked():
            now = time.monotonic()
            for rate, limit in limits.items():
                excess = self._row.level(rate, limit / _MINUTE, now) + 1 - limit if limit else 0.0
                if excess > 1e-6:  # not an error of rounding
                    raise self.exceeded(rate.setting, excess * _MINUTE / limit)
            self._spend(Rate.REQUESTS, 1, now)

    def charge(self, tokens: int) -> None:
        """Count tokens of a completion. The caller is refused by `admit` from then on if they exceed its limit."""
        if tokens and self.limits.tokens_per_minute:
            with self._row.locked():
                self._spend(Rate.TOKENS, tokens, time.monotonic())

    def exceeded(self, setting: str, wait: float = RETRY_SECONDS) -> GatewayError:
        """The error of a call that exceeds a limit: CALLER_LIMIT_EXCEEDED.

        Args:
            setting: The name of the limit.
            wait: Seconds after which the caller may retry.
        """
        value = getattr(self.limits, setting)
        who = self._name or "this caller"
        again = f"in {wait:.3g} seconds" if wait != RETRY_SECONDS else "when some have ended"
        return GatewayError(
            Reason.CALLER_LIMIT_EXCEEDED,
            f"{who} has reached its limit of {value} {_WHAT[setting]}: call again {again}, or ask the gateway's operator to"
            f" raise {setting}",
            metadata={"caller": self._name, "limit": setting, "value": str(value)},
            retry_after=wait,
        )

    def _spend(self, rate: Rate, amount: int, now: float) -> None:
        limit: int = getattr(self.limits, rate.setting)
        if limit:
            self._row.fill(rate, amount, limit / _MINUTE, now)


UNCOUNTED = Share()
"""The share of calls that are not counted for any caller."""


class Callers:
    """What all callers use. There is one for the process.

    Args:
        defaults: The limits of a caller without limits of its own.
        table: The counts of all workers, if there are several.
        number: The column of this worker.

    Attributes:
        defaults: The limits of calls that come from now on.
    """

    def __init__(self, defaults: Limits | None = None, table: Table | None = None, number: int = 0) -> None:
        self.defaults = defaults or Limits()
        self._table = table
        self._number = number
        self._rows: WeakValueDictionary[str, _Row] = WeakValueDictionary()
        self._recent: dict[str, _Row] = {}
        self._keep = MAX_IDLE

    def share(self, key: str, name: str = "", own: Mapping[str, int] | None = None) -> Share:
        """The share of a call.

        Args:
            key: Identifies the caller.
            name: The caller's name, if it has one.
            own: The caller's own limits, by their names, which replace the defaults.
        """
        row = self._rows.get(key)
        if row is None:
            row = (self._table and self._table.row(key, self._number)) or _local_row()
            self._rows[key] = row
            if len(self._recent) >= self._keep:
                self._forget()
            self._recent[key] = row
        return Share(key, name, replace(self.defaults, **own) if own else self.defaults, row)

    def close(self) -> None:
        """Close the table."""
        if self._table is not None:
            self._table.close()

    def _forget(self) -> None:
        """Forget callers whose rates have recovered; those with counts are kept by their calls."""
        now = time.monotonic()
        self._recent = {key: row for key, row in self._recent.items() if not row.is_empty(now)}
        self._keep = max(MAX_IDLE, 2 * len(self._recent))
