"""Measures and prints what the gateway costs, beside its peers; `make bench` runs it with all loads."""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path

import grpc
import uvloop

from tests.bench import report
from tests.bench.measure import SCENARIOS, Row, measure, peers

RESULTS = Path(".cache/bench")
PROGRAMS = Path(".cache/peers/bin")


async def run(arguments: argparse.Namespace) -> list[Row]:
    """Run the chosen loads, one after the other; each one's table is printed at its end."""
    under_test = peers(arguments.peers, arguments.other, arguments.set)
    if arguments.only:
        under_test = {name: start for name, start in under_test.items() if name in arguments.only}
    rows: list[Row] = []
    for scenario in SCENARIOS:
        if not arguments.loads or scenario.name in arguments.loads:
            measured = await measure(scenario, under_test, arguments.repeat)
            print(report.table(measured), flush=True)
            rows += measured
    return rows


def main() -> None:
    """Measure, print, and write the figures down."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    names = ", ".join(scenario.name for scenario in SCENARIOS)
    parser.add_argument("loads", nargs="*", help=f"the loads to run (default: all): {names}")
    parser.add_argument("--repeat", type=int, default=3, help="repetitions of each measurement (default 3)")
    parser.add_argument("--peers", type=Path, default=PROGRAMS, help=f"the folder of the peers (default {PROGRAMS})")
    parser.add_argument("--only", action="append", help="measure only this server, bare grpc.aio and the upstream")
    parser.add_argument("--other", type=Path, help="a checkout of another version of the gateway to measure as well")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the gateway")
    arguments = parser.parse_args()
    rows = uvloop.run(run(arguments))
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "grpcio": grpc.__version__}
    RESULTS.mkdir(parents=True, exist_ok=True)
    report.write(RESULTS / "results.json", machine, rows)
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
