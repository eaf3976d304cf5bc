"""Measures and prints what the gateway costs, beside its peers; `make bench` runs it with all loads."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import uvloop

from tests.bench import costs, report
from tests.bench.measure import SCENARIOS, Field, measure
from tests.bench.results import PEERS, RESULTS, RUN, Results, machine

NAMES = (*(scenario.name for scenario in SCENARIOS), *costs.COSTS)


async def run(results: Results, names: list[str], field: Field, repeat: int) -> None:
    """Run the chosen loads and measure the chosen costs, one after the other; after each, print its table and write the file."""
    for scenario in SCENARIOS:
        if scenario.name in names:
            rows = await measure(scenario, field, repeat)
            print(report.text(rows), flush=True)
            results.rows += rows
            results.write(RUN / RESULTS)
    for name, cost in costs.COSTS.items():
        if name in names:
            figures = await cost(field)
            print(report.text_of_figures(figures), flush=True)
            results.figures += figures
            results.write(RUN / RESULTS)


def main() -> None:
    """Measure, print, and write the figures down."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to measure (default: all): {', '.join(NAMES)}")
    parser.add_argument("--repeat", type=int, default=3, help="repetitions of each load (default 3)")
    parser.add_argument("--peers", type=Path, default=PEERS, help=f"the folder of the peers (default {PEERS})")
    parser.add_argument("--only", action="append", help="measure only this server, bare grpc.aio and the upstream")
    parser.add_argument("--other", type=Path, help="a checkout of another version of the gateway to measure as well")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the gateway")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(NAMES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    results = Results(machine(arguments.peers))
    field = Field(arguments.peers.absolute(), arguments.other, arguments.set, arguments.only or ())
    uvloop.run(run(results, arguments.names or list(NAMES), field, arguments.repeat))
    print(f"written to {RUN / RESULTS}")
    sys.exit(report.failures(results) or None)


if __name__ == "__main__":
    main()
