"""One account of the memory that calls hold: their requests, answers, queues and retained streams.

    Ledger ── hold ──▶ Hold: `set` what one call holds now, `close` at its end

The account has what callers and engines can make large. It lacks what is bounded by a constant: about 100 MiB of the process
itself, and for each call the last 400 KiB that were read from the provider and what gRPC has queued for the caller.

At seven eighths of the limit new calls are refused, so that those under way can end. At the limit the largest ones are ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import mmap
import re
from pathlib import Path
from typing import TYPE_CHECKING, Self

from deltawire_server.errors import GatewayError, Reason

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from types import TracebackType

SHARE = 0.5
"""Of the memory that the process may use, for what calls hold. The rest is for the process itself, for the copies that gRPC and
the sockets make, and for what the allocator cannot reuse."""

REFUSE = 7 / 8
"""Of the limit: from there on new calls are refused."""

RETRY_SECONDS = 1.0
"""When a refused call should try again: calls end all the time."""

MIB = 1024 * 1024

LARGE_BYTES = 1 * MIB
"""Requests above this are parsed and validated one after the other. One of 30 MiB takes steps of 10 to 40 ms, in which nothing else
runs; of several at once, all would have a step before any other call."""

REST_SECONDS = 0.005
"""Between two such requests, for other calls: one takes several turns of the event loop."""

TRIM_BYTES = 8 * MIB
"""Growth of the process after which the allocator is asked to return what is free to the kernel."""

TRIM_SECONDS = 1.0
"""Between two looks at the size of the process, which take 20 us each."""

MMAP_BYTES = 256 * 1024
"""What the allocator gets from the kernel for each such object, and returns when that is freed. Without it glibc raises the size
to that of the largest object that was freed, and then keeps up to hundreds of MiB in pieces after large requests."""

ARENAS = 1
"""Heaps of the allocator. By default each thread gets one of its own, and gRPC has many threads: what one of them frees stays in
its heap, unused by the others. Receiving 31 MiB with gRPC alone kept 105 MiB with the default, and 5 MiB with one heap."""

_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8

_CGROUP_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")
"""The files of cgroup v2 and v1, below the mount of the file system of cgroups."""


class Ledger:
    """What all calls of this process hold.

    Args:
        limit: Bytes.

    Attributes:
        held: Bytes that are held now.
        limit: Bytes.
        trim: Called when a large request was received, which takes gRPC twice its bytes for a moment.
    """

    def __init__(self, limit: int) -> None:
        self.held = 0
        self.limit = limit
        self.trim: Callable[[], object] = lambda: None
        self._holds: set[Hold] = set()
        self._making_room = False
        self._turn = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def turn(self, size: int) -> AsyncIterator[None]:
        """Wait until no other large request is worked on; a request of at most `LARGE_BYTES` does not wait.

        Args:
            size: Bytes of the request.
        """
        if size <= LARGE_BYTES:
            yield
            return
        async with self._turn:
            self.trim()
            await asyncio.sleep(REST_SECONDS)
            yield

    def admit(self, size: int = 0) -> None:
        """Check that there is memory for a new call.

        Args:
            size: Bytes that it is about to hold.

        Raises:
            GatewayError: MEMORY_LIMIT_EXCEEDED: there is not. The caller retries after the time that the error names.
        """
        if self.held + size > self.limit * REFUSE:
            raise GatewayError(
                Reason.MEMORY_LIMIT_EXCEEDED,
                "this gateway holds as much as it may for the calls under way: retry later, or elsewhere",
                metadata={"limit_bytes": str(self.limit)},
                retry_after=RETRY_SECONDS,
            )

    def hold(self, evict: Callable[[], object] | None = None) -> Hold:
        """What one call holds, nothing yet; `close` it at its end.

        Args:
            evict: Called at the limit if it is among the largest: gives back what it can, at once or soon, by `set` or `close`.
                `None` if it cannot.
        """
        hold = Hold(self, evict)
        self._holds.add(hold)
        return hold

    def changed(self, size: int) -> None:
        """So many bytes more are held, or fewer; at the limit, make room. Called by `Hold`."""
        self.held += size
        if size <= 0 or self.held <= self.limit or self._making_room:
            return
        self._making_room = True
        try:
            for hold in sorted(self._holds, key=lambda hold: hold.size, reverse=True):
                if self.held <= self.limit:
                    break
                if hold.evict is not None:
                    hold.evict()
        finally:
            self._making_room = False

    def closed(self, hold: Hold) -> None:
        """It holds nothing any more. Called by `Hold`."""
        self._holds.discard(hold)


class Hold:
    """What one call holds, made by `Ledger.hold`. Leaving its `with` block closes it.

    Attributes:
        size: Bytes.
        evict: See `Ledger.hold`.
    """

    __slots__ = ("_closed", "_ledger", "evict", "size")

    def __init__(self, ledger: Ledger, evict: Callable[[], object] | None) -> None:
        self.size = 0
        self.evict = evict
        self._ledger = ledger
        self._closed = False

    def set(self, size: int) -> None:
        """It holds so many bytes now. No effect after `close`."""
        if size != self.size and not self._closed:
            more, self.size = size - self.size, size
            self._ledger.changed(more)

    def close(self) -> None:
        """It holds nothing any more."""
        self.set(0)
        self._closed = True
        self.evict = None  # what it belongs to has it, and both would wait for the garbage collector
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
        status: The kernel's account of this process's memory.
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
        """Return what is free to the kernel, in another thread: 1 ms for 6 MiB. No effect while that is under way."""
        if self._trim is not None and (self._trimming is None or self._trimming.done()):
            self._trimming = asyncio.get_running_loop().run_in_executor(None, self._trim, 0)

    async def trim_for_ever(self) -> None:
        """Trim again and again while the process has grown by more than `TRIM_BYTES`, until canceled.

        Again and again, since the kernel cannot say how much of it is free.
        """
        least = self._resident()
        while True:
            await asyncio.sleep(TRIM_SECONDS)
            resident = self._resident()
            least = min(least, resident)
            if resident > least + TRIM_BYTES:
                self.trim()

    def _resident(self) -> int:
        """Bytes of this process in memory; 0 where the kernel does not say."""
        pages = _read(self._status).split()
        return int(pages[1]) * mmap.PAGESIZE if len(pages) > 1 else 0


def default_limit(cgroup: Path = Path("/sys/fs/cgroup"), meminfo: Path = Path("/proc/meminfo")) -> int:
    """The limit, in bytes, where the operator sets none: `SHARE` of what the process may use.

    That is the limit of its cgroup, of version 2 or 1, or the machine's memory if that is less or no limit can be read.

    Args:
        cgroup: Where the file system of cgroups is mounted: what a container sees there is its own.
        meminfo: The kernel's account of the machine's memory.
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
