"""What was measured, as tables and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from tests.bench.measure import Row


def table(rows: Sequence[Row]) -> str:
    """The rows of one load as text: costs with their ratios to the gateway's, rates, and times to the first event."""
    ours = rows[0]
    head = (
        f"{'CPU µs':>9} {'÷':>6} {'per s':>9} {'seconds':>8} {'first p50':>9} {'p99 ms':>8} {'slowest':>8} {'load':>5}"
    )
    lines = [f"\n{ours.title:<34} {head}"]
    for row in rows:
        cost = row.best("cpu_micros")
        ratio = ours.best("cpu_micros") / cost if cost else float("nan")
        lines.append(
            f"  {row.who:<32} {cost:>9.1f} {ratio:>6.2f} {row.best('per_second'):>9.0f} {row.best('seconds'):>8.2f}"
            f" {row.best('first_p50_ms'):>9.2f} {row.best('first_p99_ms'):>8.2f} {row.median('slowest'):>8.2f}"
            f" {row.median('load_cores'):>5.2f}"
        )
    return "\n".join(lines)


def write(path: Path, machine: Mapping[str, object], rows: Sequence[Row]) -> None:
    """Write all figures of a run."""
    path.write_text(json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")
