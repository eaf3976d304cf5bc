"""What an attack is, and what comes of one."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.hostile.bars import MIB, Bars, bars
from tests.hostile.target import Target, target

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

ROUNDS = 3
"""How often an attack is repeated: what is kept each time adds up."""

SETTLE_SECONDS = 2.0
"""After the last round: what is given back is given back by then."""

Run = Callable[[Target], Awaitable[Counter[str]]]
"""Sends everything once; how many calls ended with which status code."""


@dataclass(frozen=True)
class Prepared:
    """An attack that is ready: to build it takes no time of what is measured.

    Attributes:
        run: Sends it.
        size: Bytes of the requests that it sends at once.
        calls: How many these are.
    """

    run: Run
    size: int
    calls: int = 1


@dataclass(frozen=True)
class Attack:
    """A hostile input.

    Attributes:
        name: What it is, for the table.
        area: What it is about.
        prepare: Builds it.
        outcomes: The status codes that its calls may end with.
        keyed: Whether its calls have an access key.
        settings: The gateway's that differ from the defaults, by `section.key`.
    """

    name: str
    area: str
    prepare: Callable[[], Prepared]
    outcomes: frozenset[str]
    keyed: bool = True
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What came of an attack.

    Attributes:
        attack: Which.
        size: Bytes of its requests.
        calls: How many were sent at once.
        outcomes: How many calls ended with which status code, over all rounds.
        delay: Seconds of the worst health check of another caller.
        growth: Bytes by which the process grew at most, over what it had before the first round.
        kept: Bytes that it had more after the last round.
    """

    attack: Attack
    size: int
    calls: int
    outcomes: Counter[str]
    delay: float
    growth: int
    kept: int

    @property
    def bars(self) -> Bars:
        """What was allowed."""
        return bars(self.size, keyed=self.attack.keyed, calls=self.calls)

    @property
    def problems(self) -> list[str]:
        """What was above a bar, or ended otherwise than it may."""
        allowed = self.bars
        problems = [f"{self.outcomes[code]} calls ended {code}" for code in self.outcomes.keys() - self.attack.outcomes]
        if self.delay > allowed.delay:
            problems.append(f"a health check took {self.delay * 1e3:.0f} ms, allowed are {allowed.delay * 1e3:.0f}")
        if self.growth > allowed.growth:
            problems.append(f"the process grew by {self.growth / MIB:.0f} MiB, allowed are {allowed.growth / MIB:.0f}")
        if self.kept > allowed.kept:
            problems.append(f"{self.kept / MIB:.0f} MiB were kept, allowed are {allowed.kept / MIB:.0f}")
        return problems


async def run(attack: Attack, folder: Path) -> Result:
    """Attack a new gateway process and measure.

    Args:
        attack: With what.
        folder: For the gateway's files.
    """
    prepared = attack.prepare()
    async with target(folder, attack.settings) as gateway, _probe(gateway.address) as worst:
        # Everything is used once before: what is loaded by the first call is no growth.
        await gateway.call("/deltawire.v1.ModelRegistry/ListModels", b"")
        await asyncio.sleep(SETTLE_SECONDS)
        await worst()
        before = gateway.resident
        gateway.reset_peak()
        outcomes: Counter[str] = Counter()
        for _ in range(ROUNDS):
            outcomes += await prepared.run(gateway)
        growth = gateway.peak - before
        delay = await worst()
        await asyncio.sleep(SETTLE_SECONDS)
        return Result(attack, prepared.size, prepared.calls, outcomes, delay, growth, gateway.resident - before)


@asynccontextmanager
async def _probe(address: str) -> AsyncIterator[Callable[[], Awaitable[float]]]:
    """The worst health check since the last time, seen by another process."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.hostile.probe",
        address,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the probe has no pipes")
    stdin, stdout = process.stdin, process.stdout

    async def worst() -> float:
        stdin.write(b"\n")
        return float(await stdout.readline())

    try:
        if await stdout.readline() != b"ready\n":
            raise RuntimeError("the probe did not start")
        yield worst
    finally:
        stdin.close()
        await process.wait()
