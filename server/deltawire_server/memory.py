"""Accounts for the memory of all calls: their requests, answers, queues and retained streams.

    Ledger ── hold ──▶ Hold: `set` the size of one call's data, `close` at its end

The account includes everything that callers and engines can make large. It excludes what is bounded by a constant: about 100 MiB of
the process itself and, for each call, the last 400 KiB read from the provider and the data that gRPC has queued for the caller.

At seven eighths of the limit, new calls are refused, so that active calls can end, except those of callers below their fair share.
At the limit, the calls of the caller that uses most are ended, the largest first.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import mmap
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Self

from deltawire_server.errors import GatewayError, Reason

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType

SHARE = 0.5
"""The share of the process's memory for the data of calls. The rest is for the process itself, for the copies that gRPC and the
sockets make, and for memory that the allocator cannot reuse."""

REFUSE = 7 / 8
"""The share of the limit above which new calls are refused to callers that would use more than the others: than this share, divided
by the number of callers."""

RETRY_SECONDS = 1.0
"""When a refused call may be retried: calls end all the time."""

MIB = 1024 * 1024

LARGE_BYTES = 1 * MIB
"""Requests above this size are parsed and validated one at a time. One of 20 MiB blocks the event loop in steps of up to 30 ms;
with several at once, each would run a step before any other call."""

REST_SECONDS = 0.005
"""Pause between two such requests for other calls, which need several iterations of the event loop."""

TRIM_BYTES = 8 * MIB
"""Growth of the process after which the allocator returns free memory to the kernel."""

TRIM_SECONDS = 1.0
"""Interval between checks of the process's size, which take 20 us each."""

MMAP_BYTES = 256 * 1024
"""The allocator maps objects of at least this size separately and returns their memory when they are freed. By default, glibc
raises this threshold to the size of the largest freed object, and then keeps up to hundreds of MiB after large requests."""

ARENAS = 1
"""Heaps of the allocator. By default, each of gRPC's many threads gets its own heap, and memory that is freed in one heap is not
reused by others. After receiving 31 MiB with gRPC alone, the process kept 105 MiB by default, and 5 MiB with one heap."""

_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8

_CGROUP_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")
"""The files of cgroup v2 and v1, below the mount of the file system of cgroups."""


_AT_ONCE = contextlib.nullcontext()


class Ledger:
    """The memory of all calls of this process.

    Args:
        limit: Bytes.

    Attributes:
        held: Bytes in use.
        limit: Bytes.
        trim: Called after a large request was received, for which gRPC briefly uses twice its size.
    """

    def __init__(self, limit: int) -> None:
        self.held = 0
        self.limit = limit
        self.trim: Callable[[], object] = lambda: None
        self._holds: set[Hold] = set()
        self._by_caller: Counter[str] = Counter()  # without those that use nothing
        self._making_room = False
        self._turn = asyncio.Lock()

    def turn(self, size: int) -> AbstractAsyncContextManager[None]:
        """Wait until no other large request is processed; a request of at most `LARGE_BYTES` does not wait.

        Args:
            size: Bytes of the request.
        """
        return _AT_ONCE if size <= LARGE_BYTES else self._large_turn()

    @contextlib.asynccontextmanager
    async def _large_turn(self) -> AsyncIterator[None]:
        async with self._turn:
            self.trim()
            await asyncio.sleep(REST_SECONDS)
            yield

    def admit(self, size: int = 0, caller: str = "") -> None:
        """Check that there is memory for a new call.

        Args:
            size: Bytes that it will use.
            caller: Identifies the caller.

        Raises:
            GatewayError: MEMORY_LIMIT_EXCEEDED: there is not. The caller may retry after the error's `retry_after`.
        """
        if self.held + size <= self.limit * REFUSE:
            return
        part = self.limit * REFUSE / (len(self._by_caller) + (caller not in self._by_caller))
        if self._by_caller[caller] + size <= part:
            self._make_room(self.limit - size, part)
            if self.held + size <= self.limit:
                return
        raise GatewayError(
            Reason.MEMORY_LIMIT_EXCEEDED,
            "the active calls use all memory that this gateway may use for calls: retry later, or on another gateway",
            metadata={"limit_bytes": str(self.limit)},
            retry_after=RETRY_SECONDS,
        )

    def hold(self, evict: Callable[[], object] | None = None, caller: str = "") -> Hold:
        """Open the account of one call, with 0 bytes. `close` it at the end of the call.

        Args:
            evict: Called at the limit if this account is among the largest of the caller that uses most. It frees memory, now or
                soon, by `set` or `close`. `None` if the call cannot free memory.
            caller: Identifies the caller.
        """
        hold = Hold(self, evict, caller)
        self._holds.add(hold)
        return hold

    def changed(self, size: int, caller: str) -> None:
        """Add bytes of a caller, or subtract them if negative; at the limit, evict. Called by `Hold`."""
        self.held += size
        self._by_caller[caller] += size
        if not self._by_caller[caller]:
            del self._by_caller[caller]
        if size > 0:
            self._make_room(self.limit)

    def _make_room(self, size: int, part: float = 0.0) -> None:
        """Evict until at most `size` bytes are held, and only calls of callers that use more than `part` bytes."""
        if self.held <= size or self._making_room:
            return
        self._making_room = True
        try:
            used = self._by_caller.copy()
            holds = [hold for hold in self._holds if hold.evict is not None and used[hold.caller] > part]
            if part and self.held - sum(hold.size for hold in holds) > size:
                return  # calls would be ended in vain
            for hold in sorted(holds, key=lambda hold: (used[hold.caller], hold.size), reverse=True):
                if self.held <= size:
                    break
                if hold.evict is not None:  # one of them may have ended with another
                    hold.evict()
        finally:
            self._making_room = False

    def closed(self, hold: Hold) -> None:
        """Remove the account of a call. Called by `Hold`."""
        self._holds.discard(hold)


class Hold:
    """The account of one call, created by `Ledger.hold`. As a context manager, it closes on exit.

    Attributes:
        size: Bytes.
        evict: See `Ledger.hold`.
        caller: Identifies the caller.
    """

    __slots__ = ("_closed", "_ledger", "caller", "evict", "size")

    def __init__(self, ledger: Ledger, evict: Callable[[], object] | None, caller: str) -> None:
        self.size = 0
        self.evict = evict
        self.caller = caller
        self._ledger = ledger
        self._closed = False

    def set(self, size: int) -> None:
        """Set the bytes that the call uses now. No effect after `close`."""
        if size != self.size and not self._closed:
            more, self.size = size - self.size, size
            self._ledger.changed(more, self.caller)

    def close(self) -> None:
        """Set the bytes to 0 and remove the account."""
        self.set(0)
        self._closed = True
        self.evict = None  # breaks a reference cycle, which only the garbage collector would free
        self._ledger.closed(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Allocator:
    """The memory allocator of the C library, configured to return memory to the kernel. Only glibc supports this.

    Args:
        status: The kernel's file with the size of this process.
    """

    def __init__(self, status: Path = Path("/proc/self/statm")) -> None:
        library = ctypes.CDLL(None)
        self._trim = getattr(library, "malloc_trim", None)
        self._trimming: asyncio.Future[object] | None = None
        self._status = status
        if self._trim is not None:
            library.mallopt(_M_MMAP_THRESHOLD, MMAP_BYTES)
            library.mallopt(_M_ARENA_MAX, ARENAS)

    def trim(self) -> None:
        """Return free memory to the kernel in another thread: 1 ms for 6 MiB. No effect while a trim is running."""
        if self._trim is not None and (self._trimming is None or self._trimming.done()):
            self._trimming = asyncio.get_running_loop().run_in_executor(None, self._trim, 0)

    async def trim_for_ever(self) -> None:
        """Trim periodically while the process has grown by more than `TRIM_BYTES`, until canceled.

        Trims are repeated because the kernel cannot report how much of the growth is free memory.
        """
        least = self._resident()
        while True:
            await asyncio.sleep(TRIM_SECONDS)
            resident = self._resident()
            least = min(least, resident)
            if resident > least + TRIM_BYTES:
                self.trim()

    def _resident(self) -> int:
        """The resident size of this process in bytes; 0 if the kernel does not report it."""
        pages = _read(self._status).split()
        return int(pages[1]) * mmap.PAGESIZE if len(pages) > 1 else 0


def default_limit(cgroup: Path = Path("/sys/fs/cgroup"), meminfo: Path = Path("/proc/meminfo")) -> int:
    """The default limit in bytes: `SHARE` of the memory that the process may use.

    That memory is the limit of its cgroup (version 2 or 1), or the machine's memory if this is less or no limit can be read.

    Args:
        cgroup: The mount point of the cgroup file system; a container sees its own cgroup there.
        meminfo: The kernel's file with the size of the machine's memory.
    """
    limits = [int(text) for name in _CGROUP_LIMITS if (text := _read(cgroup / name).strip()).isdecimal()]
    total = re.search(r"^MemTotal: +(\d+) kB$", _read(meminfo), re.MULTILINE)
    if total is not None:
        limits.append(int(total[1]) * 1024)
    return int(min(limits, default=1024 * MIB) * SHARE)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
