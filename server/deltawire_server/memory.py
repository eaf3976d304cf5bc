"""One account of the memory that calls hold: their requests, answers, queues and retained streams.

    Ledger ── hold ──▶ Hold: `set` what one call holds now, `close` at its end

The account has what callers and engines can make large. It lacks what is bounded by a constant: about 100 MiB of the process
itself, some KiB for each call, and up to 64 KiB that gRPC and the sockets queue for each.

At seven eighths of the limit new calls are refused, so that those under way can end. At the limit the largest ones are ended.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Self

from deltawire_server.errors import GatewayError, Reason

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

SHARE = 0.5
"""Of the memory that the process may use, for what calls hold. The rest is for the process itself, for the copies that gRPC and
the sockets make, and for what the allocator cannot reuse."""

REFUSE = 7 / 8
"""Of the limit: from there on new calls are refused."""

RETRY_SECONDS = 1.0
"""When a refused call should try again: calls end all the time."""

MIB = 1024 * 1024

_CGROUP_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")
"""The files of cgroup v2 and v1, below the mount of the file system of cgroups."""


class Ledger:
    """What all calls of this process hold.

    Args:
        limit: Bytes.

    Attributes:
        held: Bytes that are held now.
        limit: Bytes.
    """

    def __init__(self, limit: int) -> None:
        self.held = 0
        self.limit = limit
        self._holds: set[Hold] = set()
        self._making_room = False

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
        self._ledger.closed(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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
