"""Calls of all kinds at saturation, with a fault a second, each checked against the contract; memory must stay flat.

    python -m tests.faults.soak [--minutes 10] [--calls 32]

Gateway, upstream and callers are in this process, so its memory is theirs together. Exit status: 0 if nothing was wrong,
else 1.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltawire_server.telemetry import configure_logging
from tests.faults.callers import caller_cells, run_caller
from tests.faults.lab import CallKind, Lab, cells, lab, nothing_left, received
from tests.faults.script import WHOLE, Said
from tests.faults.upstream import Plan

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from tests.faults.lab import Result

SAMPLE_SECONDS = 2.0
"""Between two measurements of memory."""

MAX_SLOPE = 1.0
"""MiB per minute, over the second half: what the allocator's noise comes to. A leak of 10 KB per fault is above it."""

SHOWN = 20
"""Problems that are printed; the others are counted."""


@dataclass
class Soak:
    """What runs, and what has happened.

    Args:
        lab: Where.
        seconds: For how long.
        seed: Of the choice of faults.

    Attributes:
        outcomes: How often each call or cell ended how.
        problems: What was wrong.
        memory: Seconds since the start and MiB, in turn.
    """

    lab: Lab
    seconds: float
    seed: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)
    _start: float = 0.0

    @property
    def slope(self) -> float:
        """MiB per minute over the second half: by then everything that is kept for a while is full."""
        later = self.memory[len(self.memory) // 2 :]
        mean_time = sum(at for at, _ in later) / len(later)
        mean_size = sum(size for _, size in later) / len(later)
        spread = sum((at - mean_time) ** 2 for at, _ in later) or 1.0
        return 60 * sum((at - mean_time) * (size - mean_size) for at, size in later) / spread

    async def run(self, calls: int) -> None:
        """Run it, with so many calls without a fault under way at any time."""
        self._start = time.monotonic()
        async with nothing_left(self.lab), asyncio.TaskGroup() as group:
            for number in range(calls):
                group.create_task(self._healthy(number))
            group.create_task(self._each_second())
            group.create_task(self._measure())

    def _passed(self) -> float:
        return time.monotonic() - self._start

    async def _healthy(self, number: int) -> None:
        kinds = list(CallKind)
        while self._passed() < self.seconds:
            kind = kinds[number % len(kinds)]
            number += 1
            seen = await self.lab.call(Plan(WHOLE), kind)
            self.outcomes[f"{kind.value}: {seen.outcome}"] += 1
            self.problems.extend(f"{kind.value}: {broken}" for broken in seen.broken)
            if seen.outcome != "OK" or received(seen) != Said():
                self.problems.append(f"{kind.value} without a fault ended {seen.outcome} with {received(seen)}")

    async def _each_second(self) -> None:
        choose = random.Random(self.seed)  # noqa: S311 (no secrets)
        faults = [cell for cell in cells() if not cell.fault.alone]
        callers = caller_cells()
        async with asyncio.TaskGroup() as group:
            while self._passed() < self.seconds:
                if choose.randrange(4):
                    group.create_task(self._fault(self.lab.run(choose.choice(faults))))
                else:
                    group.create_task(self._fault(run_caller(self.lab, choose.choice(callers))))
                await asyncio.sleep(1.0)

    async def _fault(self, running: Awaitable[Result[Any]]) -> None:
        result = await running
        self.outcomes[f"fault: {result.outcome}"] += 1
        self.problems.extend(f"{result.cell}: {problem}" for problem in result.problems)

    async def _measure(self) -> None:
        while self._passed() < self.seconds:
            self.memory.append((self._passed(), _resident()))
            await asyncio.sleep(SAMPLE_SECONDS)


def _resident() -> float:
    """The process's memory in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


async def _main(seconds: float, calls: int, seed: int) -> int:
    # A log line per call, printed, would be what is measured.
    configure_logging("error", "json")
    with tempfile.TemporaryDirectory() as folder:
        async with lab(Path(folder)) as made:
            # What is retained is full long before the second half.
            made.retention = 5
            soaked = Soak(made, seconds, seed)
            await soaked.run(calls)
    total = sum(soaked.outcomes.values())
    print(f"{total} calls in {seconds:.0f} seconds, {total / seconds:.0f} a second")
    for outcome, count in sorted(soaked.outcomes.items()):
        print(f"  {count:8} {outcome}")
    sizes = [size for _, size in soaked.memory]
    quarters = " ".join(f"{sizes[(len(sizes) - 1) * quarter // 4]:.1f}" for quarter in range(5))
    print(f"memory {quarters} MiB at each quarter, {soaked.slope:+.2f} MiB per minute over the second half")
    print(f"{len(soaked.problems)} violations")
    for problem in soaked.problems[:SHOWN]:
        print(f"  {problem}")
    return 1 if soaked.problems or soaked.slope > MAX_SLOPE else 0


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="for how long (default 10)")
    parser.add_argument("--calls", type=int, default=32, help="calls under way at any time (default 32)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of faults (default 0)")
    arguments = parser.parse_args()
    return asyncio.run(_main(arguments.minutes * 60, arguments.calls, arguments.seed))


if __name__ == "__main__":
    sys.exit(main())
