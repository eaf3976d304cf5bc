"""The loads, and what each costs the servers under test: in turns, so that other work on the machine affects all alike."""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
import httpx

from tests.bench import servers
from tests.bench.load import Load, load_of
from tests.bench.results import PROGRAMS, Row, Sample
from tests.bench.servers import Pace, Server

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

FAILURES = (RuntimeError, OSError, httpx.HTTPError, grpc.RpcError)
"""What the failure of a server raises; the others are measured all the same."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A load on servers.

    Attributes:
        name: Its name on the command line and in the results.
        title: Its name in tables.
        streams: Callers at once.
        pace: What the upstream does.
        calls: Calls of each caller, in sequence.
        per_call: Whether the cost of a call is the figure, instead of the cost of a token.
        repeat: The most repetitions that are counted.
        settings: Settings of the gateway that the load needs.
        at: The place on a curve; 0 for a load that is not on one.
    """

    name: str
    title: str
    streams: int
    pace: Pace
    calls: int = 1
    per_call: bool = False
    repeat: int = 100
    settings: tuple[str, ...] = ()
    at: int = 0

    @property
    def units(self) -> int:
        """The tokens or calls that the cost is divided by."""
        return self.streams * self.calls * (1 if self.per_call else self.pace.tokens)


STEPS = Pace(250, 50.0, in_steps=True)
THOUSANDS = ("server.max_streams=4000",)
"""More streams than the gateway admits by default."""

MANY_STREAMS = "open-2000"

SCENARIOS = (
    Scenario("steps-64", "64 streams of 50 tokens/s, in steps", 64, STEPS),
    Scenario("steps-200", "200 streams of 50 tokens/s, in steps", 200, STEPS),
    Scenario("short-16", "calls of 4 tokens, 16 at once", 16, Pace(4), calls=25, per_call=True),
    Scenario("flat", "32 streams flat out", 32, Pace(2000)),
    Scenario("flat-joined", "… 32 chunks in a write", 32, Pace(2000, chunks_per_write=32)),
    Scenario("flat-tools", "… a tool call, assembled and validated", 32, Pace(2000, tool_call=True)),
    Scenario("own-64", "64 streams of 50 tokens/s, own clocks", 64, Pace(150, 50.0), repeat=2),
    Scenario("steps-300", "300 streams of 50 tokens/s, in steps", 300, STEPS, repeat=2),
    Scenario(
        MANY_STREAMS,
        "2,000 streams of 2 tokens/s, in steps",
        2000,
        Pace(12, 2.0, in_steps=True),
        repeat=1,
        settings=THOUSANDS,
    ),
    Scenario("short-1", "calls of 4 tokens, 1 at once", 1, Pace(4), calls=200, per_call=True),
    Scenario("short-64", "calls of 4 tokens, 64 at once", 64, Pace(4), calls=8, per_call=True),
)


@dataclass(frozen=True, slots=True)
class Field:
    """The servers that are measured in a run.

    Attributes:
        programs: The folder of the peers' programs; those that are there are measured.
        checkout: The checkout of another version of the gateway to measure as well.
        settings: Settings of the gateway that differ from the defaults.
        only: The names of the only servers to measure, besides bare grpc.aio and the upstream; empty for all.
        without: The names of those not to measure.
    """

    programs: Path
    checkout: Path | None = None
    settings: Sequence[str] = ()
    only: Collection[str] = ()
    without: Collection[str] = ()

    def servers(self, *settings: str) -> Iterator[tuple[str, Callable[[Server], AbstractContextManager[Server]]]]:
        """Names, and functions that start the server in front of an upstream, the gateway with these settings too."""
        for name, start in self._all(*settings):
            if (not self.only or name in self.only) and name not in self.without:
                yield name, start

    def _all(self, *settings: str) -> Iterator[tuple[str, Callable[[Server], AbstractContextManager[Server]]]]:
        given = (*settings, *self.settings)
        yield servers.DELTAWIRE, lambda upstream: servers.gateway(upstream, *given)
        if self.checkout is not None:
            yield servers.OTHER, lambda upstream: servers.gateway(upstream, *settings, checkout=self.checkout)
        starts = dict(zip(PROGRAMS, (servers.vllm_router, servers.smg, servers.litellm), strict=True))
        for name, start in starts.items():
            if (self.programs / name).exists():
                yield name, lambda upstream, start=start: start(self.programs, upstream)  # type: ignore[misc]


@contextlib.contextmanager
def noted(who: str) -> Iterator[None]:
    """A failure of a server is printed, and ends only what is done with it; its row has no sample then."""
    try:
        yield
    except FAILURES as error:
        sys.stderr.write(f"{who} failed: {error}\n")


async def sample(server: Server, load: Load, scenario: Scenario) -> Sample:
    """Run a load once."""
    cpu, own, begin = server.cpu_seconds, time.process_time(), time.perf_counter()
    timings = await load.run(
        scenario.streams, scenario.pace.tokens, calls=scenario.calls, tools=scenario.pace.tool_call
    )
    seconds = time.perf_counter() - begin
    firsts = [timing.first * 1e3 for timing in timings]
    totals = [timing.total for timing in timings]
    return Sample(
        cpu_micros=(server.cpu_seconds - cpu) * 1e6 / scenario.units,
        seconds=seconds,
        per_second=scenario.units / seconds,
        first_p50_ms=statistics.median(firsts),
        first_p99_ms=percentile_99(firsts),
        slowest=max(totals) / statistics.median(totals),
        load_cores=(time.process_time() - own) / seconds,
    )


def percentile_99(values: Sequence[float]) -> float:
    """The 99th percentile of at least one value."""
    return statistics.quantiles(values, n=100, method="inclusive")[98] if len(values) > 1 else values[0]


async def measure(scenario: Scenario, field: Field, repeat: int) -> list[Row]:
    """Run a load on the gateway, on every peer, on the two references in Python, and on the upstream itself, in turns.

    Each is warmed up by one run that is not counted.

    Args:
        scenario: The load.
        field: The servers.
        repeat: Counted repetitions, unless the load allows fewer.

    Returns:
        A row for each server, the gateway's first. The row of a server that failed has no samples.
    """
    async with contextlib.AsyncExitStack() as stack:
        upstream = stack.enter_context(servers.upstream(scenario.pace))
        under_test: list[Server] = []
        for name, start in field.servers(*scenario.settings):
            with noted(name):
                under_test.append(stack.enter_context(start(upstream)))
        texts = not scenario.pace.tool_call
        if texts and servers.SMALLEST not in field.without:
            under_test.append(stack.enter_context(servers.smallest_gateway(upstream)))
        if texts and scenario.pace.chunks_per_write == 1 and servers.BARE not in field.without:
            under_test.append(stack.enter_context(servers.bare_grpc(scenario.pace)))
        if servers.UPSTREAM not in field.without:
            under_test.append(upstream)
        loads = [await stack.enter_async_context(load_of(server)) for server in under_test]
        rows = [Row(scenario.name, scenario.title, server.name, scenario.at) for server in under_test]
        for repetition in range(min(repeat, scenario.repeat) + 1):
            for row, server, load in zip(rows, under_test, loads, strict=True):
                with noted(server.name):
                    figures = await sample(server, load, scenario)
                    if repetition:
                        row.samples.append(figures)
        return rows
