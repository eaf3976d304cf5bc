"""What was measured, as text and in the documentation: `python -m tests.bench.report`, after `make bench`, writes the latter."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tests.bench.results import Figure, Row


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
        cost = row.best("cpu_micros")
        ratio = ours.best("cpu_micros") / cost if cost else float("nan")
        lines.append(
            f"  {row.who:<38} {cost:>9.1f} {ratio:>6.2f} {row.best('per_second'):>9.0f} {row.best('seconds'):>8.2f}"
            f" {row.best('first_p50_ms'):>9.2f} {row.best('first_p99_ms'):>8.2f} {row.median('slowest'):>8.2f}"
            f" {row.median('load_cores'):>5.2f}"
        )
    return "\n".join(lines)


def text_of_figures(figures: Iterable[Figure]) -> str:
    """Single figures as text."""
    lines = [f"  {figure.name:<58} {figure.who:<32} {figure.value:>10.2f}" for figure in figures]
    return "\n".join(["", *lines])
