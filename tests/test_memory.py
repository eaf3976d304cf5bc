"""The account of what calls hold: what counts, who is refused, and who is ended."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from deltawire_server import memory
from deltawire_server.errors import Code, GatewayError, Reason
from deltawire_server.memory import LARGE_BYTES, MIB, SHARE, TRIM_BYTES, Allocator, Hold, Ledger, default_limit
from tests.support.gateway import WAIT

if TYPE_CHECKING:
    from pathlib import Path


def test_the_sum_is_that_of_all() -> None:
    """What each holds counts until it is closed, and afterwards it may say what it wants."""
    ledger = Ledger(1000)
    one, two = ledger.hold(), ledger.hold()
    one.set(100)
    two.set(50)
    assert ledger.held == 150
    one.set(20)
    with two:
        assert ledger.held == 70
    two.set(7)
    two.close()
    assert (ledger.held, two.size) == (20, 0)


def test_a_new_call_is_refused_before_the_limit() -> None:
    """At seven eighths, with what it is about to hold; it may try again soon."""
    ledger = Ledger(800)
    held = ledger.hold()
    held.set(600)
    ledger.admit(100)
    with pytest.raises(GatewayError) as caught:
        ledger.admit(101)
    assert (caught.value.reason, caught.value.code) == (Reason.MEMORY_LIMIT_EXCEEDED, Code.RESOURCE_EXHAUSTED)
    assert caught.value.retry_after is not None
    assert caught.value.metadata == {"limit_bytes": "800"}
    held.close()
    ledger.admit(700)


def test_the_largest_make_room() -> None:
    """In order of size, until there is room; those that cannot are passed over, and one that grows meanwhile ends nothing else."""
    ledger = Ledger(1000)
    ended: list[Hold] = []

    def evict(hold: Hold) -> None:
        ended.append(hold)
        hold.set(hold.size + 5000)
        hold.close()

    fixed, small, middle, large = (ledger.hold() for _ in range(4))
    for hold in (small, middle, large):
        hold.evict = lambda hold=hold: evict(hold)
    fixed.set(550)
    small.set(50)
    middle.set(100)
    large.set(300)
    assert ended == []
    small.set(60)
    assert ended == [large]
    middle.set(500)
    assert ended == [large, middle]
    fixed.set(2000)
    assert ended == [large, middle, small]
    assert ledger.held == 2000


def test_a_caller_that_uses_much_is_not_felt_by_others() -> None:
    """Near the limit a caller is refused only above its fair share; at the limit, the one that uses most makes room."""
    ledger = Ledger(800)
    ended: list[str] = []

    def end(hold: Hold) -> None:
        ended.append(f"{hold.caller} {hold.size}")
        hold.close()

    def call(caller: str, size: int) -> Hold:
        hold = ledger.hold(caller=caller)
        hold.evict = lambda: end(hold)
        hold.set(size)
        return hold

    greedy = [call("greedy", size) for size in (300, 150, 250)]
    with pytest.raises(GatewayError):
        ledger.admit(1, "greedy")
    ledger.admit(350, "modest")
    with pytest.raises(GatewayError):
        ledger.admit(351, "modest")
    assert ended == ["greedy 300"]
    modest = call("modest", 350)
    ledger.admit(50, "third")
    with pytest.raises(GatewayError):
        ledger.admit(250, "third")
    assert ended == ["greedy 300"]
    largest = call("third", 60)
    assert ended == ["greedy 300", "greedy 250"]
    for hold in (*greedy, modest, largest):
        hold.close()
    assert ledger.held == 0
    ledger.admit(700, "greedy")
    with pytest.raises(GatewayError):
        ledger.admit(701, "greedy")


def test_no_call_is_ended_in_vain() -> None:
    """If all that can be ended makes too little room, the new call is refused and nothing ends."""
    ledger = Ledger(800)
    ended: list[None] = []
    ledger.hold(caller="greedy").set(600)
    ledger.hold(lambda: ended.append(None), "greedy").set(150)
    with pytest.raises(GatewayError):
        ledger.admit(210, "modest")
    assert not ended


@pytest.mark.parametrize("callers", [1, 2, 50])
def test_requests_that_cannot_be_ended_stay_below_the_limit(callers: int) -> None:
    """For any number of callers: such requests make no room for others."""
    ledger = Ledger(10_000)
    admitted = 0
    for _ in range(100):
        for number in range(callers):
            with contextlib.suppress(GatewayError):
                ledger.admit(100, f"{number}")
                ledger.hold(caller=f"{number}").set(100)
                admitted += 1
    assert 87 <= admitted <= 100
    assert ledger.held == 100 * admitted


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"memory.max": "1073741824\n"}, 1024 * MIB),
        ({"memory.max": "max\n"}, 8192 * MIB),
        ({"memory/memory.limit_in_bytes": "536870912\n"}, 512 * MIB),
        ({"memory/memory.limit_in_bytes": "9223372036854771712\n"}, 8192 * MIB),
        ({}, 8192 * MIB),
    ],
    ids=["version 2", "no limit", "version 1", "no limit in version 1", "no cgroups"],
)
def test_the_default_is_a_share_of_what_the_process_may_use(files: dict[str, str], limit: int, tmp_path: Path) -> None:
    """The least of the cgroup's limit and the machine's memory."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal:       {8192 * 1024} kB\nMemFree:        1 kB\n")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert default_limit(tmp_path, meminfo) == limit * SHARE
    assert default_limit(tmp_path / "none", tmp_path / "none") == 1024 * MIB * SHARE
    assert 64 * MIB <= default_limit() < sys.maxsize


def test_a_closed_hold_refers_to_nothing() -> None:
    """What it belongs to refers to it, and would wait for the garbage collector."""
    hold = Ledger(1000).hold(lambda: None)
    hold.close()
    assert hold.evict is None


async def test_large_requests_are_worked_on_in_turn() -> None:
    """After each is received, the memory that gRPC freed is returned to the kernel; small requests do not wait."""
    ledger = Ledger(1000)
    trims: list[None] = []
    ledger.trim = lambda: trims.append(None)
    async with ledger.turn(LARGE_BYTES + 1):
        other = asyncio.create_task(ledger.turn(LARGE_BYTES + 1).__aenter__())
        async with ledger.turn(LARGE_BYTES):
            pass
        assert not other.done()
        assert len(trims) == 1
    await other
    assert len(trims) == 2


async def test_free_memory_is_returned_while_the_process_is_larger(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Than at its smallest, by some MiB; and never where the kernel does not say how large it is."""
    status = tmp_path / "statm"
    status.write_text("0 100 0\n")
    monkeypatch.setattr(memory, "TRIM_SECONDS", 0)
    allocator = Allocator(status)
    trims: list[None] = []
    monkeypatch.setattr(allocator, "trim", lambda: trims.append(None))

    async def turns() -> int:
        trims.clear()
        for _ in range(10):
            await asyncio.sleep(0)
        return len(trims)

    task = asyncio.create_task(allocator.trim_for_ever())
    assert await turns() == 0
    status.write_text(f"0 {100 + TRIM_BYTES // mmap.PAGESIZE} 0\n")
    assert await turns() == 0
    status.write_text(f"0 {101 + TRIM_BYTES // mmap.PAGESIZE} 0\n")
    assert await turns() > 2
    status.unlink()
    await turns()
    assert await turns() == 0
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_one_trim_at_a_time() -> None:
    """It runs in another thread; a second one meanwhile would find nothing."""
    allocator, released = Allocator(), threading.Event()
    allocator._trim = lambda _: released.wait(WAIT)
    allocator.trim()
    first = allocator._trimming
    allocator.trim()
    assert first is not None
    assert allocator._trimming is first
    released.set()
    await first
    allocator.trim()
    assert allocator._trimming is not first
    await allocator._trimming
