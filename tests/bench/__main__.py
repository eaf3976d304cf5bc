"""Measures and prints: CPU per token flat out and paced, with and without tool calls, and the added time to first event."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import uvloop

from tests.bench import servers
from tests.bench.load import GrpcLoad, HttpLoad

if TYPE_CHECKING:
    from tests.bench.servers import Server

FLAT_STREAMS, FLAT_TOKENS = 32, 2000
PACED_STREAMS, PACED_TOKENS, PACED_RATE = 64, 500, 50.0
FIRST_STREAMS, FIRST_ROUNDS, FIRST_TOKENS = (1, 16), 60, 8
RESULTS = Path(".cache/bench.json")
ROUTER = Path(".cache/peers/bin/vllm-router")

Run = Callable[[], Awaitable[list[float]]]


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement: which load, who, and the CPU microseconds per token of each repetition."""

    load: str
    who: str
    micros_per_token: list[float]

    @property
    def best(self) -> float:
        """The least disturbed repetition: what others do on the machine only ever adds."""
        return min(self.micros_per_token)


async def measure(load: str, under_test: Sequence[tuple[Server, Run]], tokens: int, repeat: int) -> list[Row]:
    """Warm each up, then measure them in turns: what else happens on the machine meets all of them alike."""
    rows = [Row(load, server.name, []) for server, _ in under_test]
    for repetition in range(repeat + 1):
        for row, (server, run) in zip(rows, under_test, strict=True):
            before = server.cpu_seconds
            await run()
            if repetition:
                row.micros_per_token.append((server.cpu_seconds - before) * 1e6 / tokens)
    return rows


async def cpu_rows(
    load: str,
    streams: int,
    tokens: int,
    rate: float | None,
    repeat: int,
    router: Path | None,
    chunks_per_write: int = 1,
) -> list[Row]:
    """The same load on the gateway and on every peer there is; those that are not asked are idle."""
    async with contextlib.AsyncExitStack() as stack:
        upstream = stack.enter_context(servers.upstream(tokens, per_second=rate, chunks_per_write=chunks_per_write))
        under_test: list[tuple[Server, Run]] = []
        gateway = stack.enter_context(servers.gateway(upstream))
        callers = await stack.enter_async_context(GrpcLoad(gateway))
        under_test.append((gateway, partial(callers.run, streams, tokens)))
        if router is not None:
            peer = stack.enter_context(servers.vllm_router(router, upstream))
            readers = await stack.enter_async_context(HttpLoad(peer))
            under_test.append((peer, partial(readers.run, streams, tokens)))
        bare = stack.enter_context(servers.bare_grpc(tokens, per_second=rate))
        others = await stack.enter_async_context(GrpcLoad(bare))
        under_test.append((bare, partial(others.run, streams, tokens)))
        return await measure(load, under_test, streams * tokens, repeat)


async def tool_row(streams: int, tokens: int, repeat: int) -> Row:
    """A call whose arguments come in as many fragments, assembled and judged."""
    with servers.upstream(tokens, tool_call=True) as upstream, servers.gateway(upstream) as server:
        async with GrpcLoad(server) as callers:
            run = partial(callers.run, streams, tokens, tools=True)
            (row,) = await measure("tool call, flat out", [(server, run)], streams * tokens, repeat)
            return row


async def first_event(streams: int) -> dict[str, float]:
    """Milliseconds to the first event through the gateway and straight from the upstream, in turns."""
    direct: list[float] = []
    through: list[float] = []
    with servers.upstream(FIRST_TOKENS) as upstream, servers.gateway(upstream) as server:
        async with HttpLoad(upstream) as readers, GrpcLoad(server) as callers:
            for round_number in range(FIRST_ROUNDS):
                straight = await readers.run(streams, FIRST_TOKENS)
                gateway = await callers.run(streams, FIRST_TOKENS)
                if round_number:  # the first one opens connections
                    direct += straight
                    through += gateway

    def percentile(times: list[float], hundredth: int) -> float:
        return statistics.quantiles(times, n=100)[hundredth - 1] * 1e3

    return {
        "direct_p50_ms": percentile(direct, 50),
        "direct_p99_ms": percentile(direct, 99),
        "gateway_p50_ms": percentile(through, 50),
        "gateway_p99_ms": percentile(through, 99),
        "added_p50_ms": percentile(through, 50) - percentile(direct, 50),
        "added_p99_ms": percentile(through, 99) - percentile(direct, 99),
    }


def print_table(rows: list[Row]) -> None:
    """One line per row, with its ratio to the gateway's under the same load."""
    print(f"\n{'load':<36}{'who':<16}{'CPU µs/token':>14}   {'repetitions':<28}{'deltawire ÷ this':>16}")
    for row in rows:
        ours = next(other.best for other in rows if other.load == row.load and other.who == "deltawire")
        repetitions = " ".join(f"{figure:.1f}" for figure in row.micros_per_token)
        print(f"{row.load:<36}{row.who:<16}{row.best:>14.1f}   {repetitions:<28}{ours / row.best:>16.2f}")


async def measure_all(
    arguments: argparse.Namespace, router: Path | None
) -> tuple[list[Row], dict[int, dict[str, float]]]:
    """Run all measurements, one after the other."""
    repeat = arguments.repeat
    rows = await cpu_rows(f"{FLAT_STREAMS} streams, flat out", FLAT_STREAMS, FLAT_TOKENS, None, repeat, router)
    rows += await cpu_rows("the same, 32 chunks in a write", FLAT_STREAMS, FLAT_TOKENS, None, repeat, router, 32)
    rows.append(await tool_row(FLAT_STREAMS, FLAT_TOKENS, repeat))
    if not arguments.quick:
        name = f"{PACED_STREAMS} streams at {PACED_RATE:g} tokens/s"
        rows += await cpu_rows(name, PACED_STREAMS, PACED_TOKENS, PACED_RATE, repeat, router)
    return rows, {streams: await first_event(streams) for streams in FIRST_STREAMS}


def main() -> None:
    """Measure, print, and write the figures down."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--router", type=Path, default=ROUTER, help=f"the vllm-router program (default {ROUTER})")
    parser.add_argument("--repeat", type=int, default=3, help="repetitions of each CPU measurement (default 3)")
    parser.add_argument("--quick", action="store_true", help="leave out the paced load")
    arguments = parser.parse_args()
    router = arguments.router if arguments.router.exists() else None
    if router is None:
        print(f"vllm-router is not measured: {arguments.router} is not there ('make bench-peers' installs it)")
    rows, first = uvloop.run(measure_all(arguments, router))
    print_table(rows)
    for streams, figures in first.items():
        print(f"\n{f'ms to the first event, {streams} at once':<36}{'p50':>8}{'p99':>8}")
        for who in ("direct", "gateway", "added"):
            print(f"  {who:<34}{figures[f'{who}_p50_ms']:>8.2f}{figures[f'{who}_p99_ms']:>8.2f}")
    RESULTS.parent.mkdir(exist_ok=True)
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "grpcio": grpc.__version__}
    results = {"machine": machine, "rows": [asdict(row) for row in rows], "first_event": first}
    RESULTS.write_text(json.dumps(results, indent=2))
    print(f"\nwritten to {RESULTS}")


if __name__ == "__main__":
    main()
