"""What was measured, as text and in the documentation: after a run, `python -m tests.bench.report` writes the latter."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.bench import costs
from tests.bench.measure import MANY_STREAMS, SCENARIOS
from tests.bench.results import CURVES, PROGRAMS, RESULTS, RUN, Figure, Results, Row
from tests.bench.servers import BARE, DELTAWIRE, SMALLEST, UPSTREAM
from tests.support.generated import write_part

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

README = Path(__file__).parents[2] / "server/README.md"
PART, COMMAND = "speed", "make bench-docs"
STATED = Path(__file__).parent
"""The folder of the results that the documentation states."""

PLOTS = {"costs.svg": RESULTS, "growth.svg": CURVES}
"""The plots in that folder, and what each is drawn from."""

SERVERS = (DELTAWIRE, BARE, SMALLEST, *PROGRAMS)
SINGLE = (costs.MEMORY, costs.CANCEL_P50, costs.CANCEL_P99, costs.PACED_BYTES, costs.FLAT_BYTES)


def text(rows: Sequence[Row]) -> str:
    """The rows of one load as text: costs with their ratios to the gateway's, rates, and times to the first event."""
    ours = rows[0]
    head = (
        f"{'CPU µs':>9} {'÷':>6} {'per s':>9} {'seconds':>8} {'first p50':>9} {'p99 ms':>8} {'slowest':>8} {'load':>5}"
    )
    lines = [f"\n{ours.title:<40} {head}"]
    for row in rows:
        if not row.samples:
            lines.append(f"  {row.who:<38} {'failed':>9}")
            continue
        cost = row.fastest.cpu_micros
        ratio = ours.fastest.cpu_micros / cost if cost and ours.samples else float("nan")
        lines.append(
            f"  {row.who:<38} {cost:>9.1f} {ratio:>6.2f} {row.fastest.per_second:>9.0f} {row.fastest.seconds:>8.2f}"
            f" {row.fastest.first_p50_ms:>9.2f} {row.fastest.first_p99_ms:>8.2f} {row.fastest.slowest:>8.2f}"
            f" {row.fastest.load_cores:>5.2f}"
        )
    return "\n".join(lines)


def failures(results: Results) -> str:
    """The loads that the gateway did not complete, in a sentence; empty if there are none."""
    names = [
        row.scenario + (f" at {row.at}" if row.at else "")
        for row in results.rows
        if row.who == DELTAWIRE and not row.samples
    ]
    return f"{DELTAWIRE} failed: {', '.join(names)}" if names else ""


def text_of_figures(figures: Iterable[Figure]) -> str:
    """Single figures as text."""
    lines = [f"  {figure.name:<58} {figure.who:<32} {figure.value:>10.2f}" for figure in figures]
    return "\n".join(["", *lines])


def card(machine: Mapping[str, Any]) -> str:
    """The machine in a sentence."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"{machine['cores']} cores ({machine['cpu']}), {machine['memory_gib']} GiB, Linux {machine['kernel']}; {versions}."


def markdown(results: Results) -> str:
    """The tables of the documentation, for a run of all loads; one with many open streams, which takes longest, may be left out.

    Raises:
        ValueError: The run has only some of the loads.
    """
    loads = {scenario.name: results.of(scenario.name) for scenario in SCENARIOS}
    loads = {name: rows for name, rows in loads.items() if rows or name != MANY_STREAMS}
    if missing := [name for name, rows in loads.items() if not rows]:
        raise ValueError(f"the results are not those of a whole `make bench`: {', '.join(missing)} missing")
    parts = [card(results.machine), _cpu(loads), _pace(loads), _single(results), _workers(results), _imports(results)]
    return "\n" + "\n\n".join(parts) + "\n\n"


def _cpu(loads: Mapping[str, Mapping[str, Row]]) -> str:
    peers = [name for name in SERVERS[1:] if any(name in rows for rows in loads.values())]
    lines = []
    for rows in loads.values():
        cost = {name: row.fastest.cpu_micros for name, row in rows.items()}
        ours = cost[DELTAWIRE]
        lines.append(
            [
                rows[DELTAWIRE].title,
                number(ours),
                *(number(cost[name]) if name in cost else "" for name in peers),
                *(number(ours / cost[name]) if name in cost else "" for name in peers),
            ]
        )
    return table(["CPU µs per token, or per call", DELTAWIRE, *peers, *(f"÷ {name}" for name in peers)], lines)


def _pace(loads: Mapping[str, Mapping[str, Row]]) -> str:
    lines = []
    for rows in loads.values():
        ours, upstream = rows[DELTAWIRE], rows[UPSTREAM]
        lines.append(
            [
                ours.title,
                number(ours.fastest.per_second),
                number(ours.fastest.seconds / upstream.fastest.seconds),
                number(ours.fastest.slowest),
                *(
                    " / ".join(number(getattr(row.fastest, figure)) for figure in ("first_p50_ms", "first_p99_ms"))
                    for row in (ours, upstream)
                ),
                f"{ours.fastest.load_cores:.0%}",
            ]
        )
    head = [
        f"{DELTAWIRE} in the same run",
        "tokens or calls per s",
        "time ÷ upstream alone",
        "slowest ÷ median",
        "ms to first event, p50 / p99",
        "of the upstream alone",
        "load generator, of a core",
    ]
    return table(head, lines)


def _single(results: Results) -> str:
    columns = [*SERVERS, UPSTREAM, costs.PLAIN_SSE]
    values = {name: results.values(name) for name in SINGLE}
    columns = [name for name in columns if any(name in of for of in values.values())]
    lines = [[name, *(number(of[who]) if who in of else "" for who in columns)] for name, of in values.items()]
    return table(["", *columns], lines)


def _workers(results: Results) -> str:
    carried = results.values(costs.CAPACITY)
    one = carried["1 worker"]
    lines = [[name, number(calls), number(calls / one)] for name, calls in carried.items()]
    return table(["", costs.CAPACITY, "÷ 1 worker"], lines)


def _imports(results: Results) -> str:
    times = results.values(costs.IMPORT)
    grpc = times["import grpc"]
    lines = [[f"`{statement}`", number(took), number(took / grpc)] for statement, took in times.items()]
    return table(["", costs.IMPORT, "÷ `import grpc`"], lines)


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, with numbers in all columns but the first."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))


def number(value: float) -> str:
    """A number with as many digits as a comparison needs: two at least, and none behind the point from 100 on."""
    if value >= 100:
        return f"{value:,.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def digest(path: Path) -> str:
    """Identifies the results that a plot was drawn from."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    """Take the results of the last runs, write the tables into the documentation and draw the plots."""
    from tests.bench import plots

    for name in (RESULTS, CURVES):
        if (RUN / name).exists():
            shutil.copyfile(RUN / name, STATED / name)
    write_part(README, PART, COMMAND, markdown(Results.read(STATED / RESULTS)))
    plots.draw(STATED)


if __name__ == "__main__":
    main()
