"""The loads, and what each costs the servers under test: in turns, so that other work on the machine affects all alike."""

from __future__ import annotations

import contextlib
import resource
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.bench import servers
from tests.bench.load import Load, load_of
from tests.bench.servers import Pace, Server

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

Peer = Callable[[Server], AbstractContextManager[Server]]
"""Starts a server in front of an upstream."""


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
    """

    name: str
    title: str
    streams: int
    pace: Pace
    calls: int = 1
    per_call: bool = False

    @property
    def units(self) -> int:
        """The tokens or calls that the cost is divided by."""
        return self.streams * self.calls * (1 if self.per_call else self.pace.tokens)


SCENARIOS = (
    Scenario("flat", "32 streams flat out", 32, Pace(2000)),
    Scenario("flat-joined", "… 32 chunks in a write", 32, Pace(2000, chunks_per_write=32)),
    Scenario("flat-tools", "… a tool call, assembled and validated", 32, Pace(2000, tool_call=True)),
    Scenario("own-64", "64 streams of 50 tokens/s, own clocks", 64, Pace(250, 50.0)),
    Scenario("steps-64", "64 streams of 50 tokens/s, in steps", 64, Pace(250, 50.0, in_steps=True)),
    Scenario("steps-200", "200 streams of 50 tokens/s, in steps", 200, Pace(250, 50.0, in_steps=True)),
    Scenario("steps-300", "300 streams of 50 tokens/s, in steps", 300, Pace(250, 50.0, in_steps=True)),
    Scenario("short-1", "calls of 4 tokens, 1 at once", 1, Pace(4), calls=100, per_call=True),
    Scenario("short-16", "calls of 4 tokens, 16 at once", 16, Pace(4), calls=20, per_call=True),
    Scenario("short-64", "calls of 4 tokens, 64 at once", 64, Pace(4), calls=8, per_call=True),
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One repetition.

    Attributes:
        cpu_micros: CPU time of the server, user and system, per token or call.
        seconds: From the first request to the end of the last answer.
        per_second: Tokens or calls per second.
        first_p50_ms: Median time to the first event.
        first_p99_ms: The same, 99th percentile.
        slowest: The longest answer's duration over the median's.
        load_cores: CPU time of the load generator per second. Near 1, the load generator is the limit, because it has one thread
            for Python.
    """

    cpu_micros: float
    seconds: float
    per_second: float
    first_p50_ms: float
    first_p99_ms: float
    slowest: float
    load_cores: float


@dataclass(slots=True)
class Row:
    """The measurement of one server under one load."""

    scenario: str
    title: str
    who: str
    samples: list[Sample] = field(default_factory=list)

    def best(self, figure: str) -> float:
        """A figure's least disturbed repetition: other work on the machine only ever adds to times, and lowers rates."""
        choose = max if figure == "per_second" else min
        return float(choose(getattr(sample, figure) for sample in self.samples))

    def median(self, figure: str) -> float:
        """The median of a figure's repetitions."""
        return float(statistics.median(getattr(sample, figure) for sample in self.samples))


async def sample(server: Server, load: Load, scenario: Scenario) -> Sample:
    """Run a load once."""
    cpu, own, begin = server.cpu_seconds, _own_cpu_seconds(), time.perf_counter()
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
        first_p99_ms=statistics.quantiles(firsts, n=100)[98] if len(firsts) > 1 else firsts[0],
        slowest=max(totals) / statistics.median(totals),
        load_cores=(_own_cpu_seconds() - own) / seconds,
    )


async def measure(scenario: Scenario, peers: Mapping[str, Peer], repeat: int) -> list[Row]:
    """Run a load on the gateway, on every peer, on bare grpc.aio, and on the upstream itself; those not asked are idle.

    Each is warmed up by one run that is not counted.

    Args:
        scenario: The load.
        peers: The peers that forward to the upstream, by name.
        repeat: Counted repetitions.
    """
    async with contextlib.AsyncExitStack() as stack:
        upstream = stack.enter_context(servers.upstream(scenario.pace))
        under_test = [stack.enter_context(start(upstream)) for start in peers.values()]
        if not scenario.pace.tool_call and scenario.pace.chunks_per_write == 1:
            under_test.append(stack.enter_context(servers.bare_grpc(scenario.pace)))
        under_test.append(upstream)
        loads = [await stack.enter_async_context(load_of(server)) for server in under_test]
        rows = [Row(scenario.name, scenario.title, server.name) for server in under_test]
        for repetition in range(repeat + 1):
            for row, server, load in zip(rows, under_test, loads, strict=True):
                figures = await sample(server, load, scenario)
                if repetition:
                    row.samples.append(figures)
        return rows


def peers(programs: Path, checkout: Path | None, settings: Sequence[str]) -> dict[str, Peer]:
    """The gateway and the peers that are installed.

    Args:
        programs: The folder of the peers' programs.
        checkout: The checkout of another version of the gateway to measure as well.
        settings: Settings of the gateway that differ from the defaults.
    """
    found: dict[str, Peer] = {servers.DELTAWIRE: lambda upstream: servers.gateway(upstream, *settings)}
    if checkout is not None:
        found[servers.OTHER] = lambda upstream: servers.gateway(upstream, checkout=checkout)
    for name, start in (("vllm-router", servers.vllm_router), ("smg", servers.smg), ("litellm", servers.litellm)):
        if (programs / name).exists():
            found[name] = lambda upstream, start=start: start(programs, upstream)  # type: ignore[misc]
    return found


def _own_cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
