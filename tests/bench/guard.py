"""Fails if the gateway costs much more than the documentation states: `make bench-guard`, in less than a minute.

It compares ratios to bare grpc.aio in one run, because those hold on another machine and beside other work; times do not.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

from tests.bench import report
from tests.bench.measure import SCENARIOS, Field, measure
from tests.bench.results import RESULTS, Results
from tests.bench.servers import BARE, DELTAWIRE, SMALLEST, UPSTREAM

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.bench.results import Row

GUARDED = ("steps-64", "short-16", "flat")
"""A load of each kind: paced as by an engine, short calls, and flat out."""

ALLOWED = 1.5
"""A ratio above this multiple of the stated one fails. Between quiet runs, ratios differ by a fifth."""

REPEAT = 2


def ratio(rows: Mapping[str, Row]) -> float:
    """What the gateway costs, divided by what bare grpc.aio costs in the same run."""
    return rows[DELTAWIRE].fastest.cpu_micros / rows[BARE].fastest.cpu_micros


def regressions(measured: Results, stated: Results) -> list[str]:
    """A line for each guarded load whose ratio is too high; empty if none is.

    Args:
        measured: A run with all guarded loads.
        stated: The run that the documentation shows.
    """
    lines = []
    for name in GUARDED:
        now, then = ratio(measured.of(name)), ratio(stated.of(name))
        if now > ALLOWED * then:
            lines.append(
                f"{name}: the gateway costs {now:.2f} times bare grpc.aio; {then:.2f} is stated and at most"
                f" {ALLOWED * then:.2f} is allowed. If the change is meant, run `make bench` and `make bench-docs`."
            )
    return lines


async def _run(measured: Results) -> None:
    field = Field(Path(), without=(SMALLEST, UPSTREAM))
    for scenario in SCENARIOS:
        if scenario.name in GUARDED:
            rows = await measure(scenario, field, REPEAT)
            print(report.text(rows), flush=True)
            measured.rows += rows


def main() -> None:
    """Measure, print, and end with status 1 and the regressions if there are any."""
    measured = Results({})
    uvloop.run(_run(measured))
    failed = report.failures(measured)
    sys.exit(failed or "\n".join(regressions(measured, Results.read(report.STATED / RESULTS))) or None)


if __name__ == "__main__":
    main()
