"""The table of outcomes in `README.md`: what came of every cell, with counts. `make faults` writes it."""

from __future__ import annotations

import textwrap
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.generated import write_part

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from tests.faults.lab import Result

README = Path(__file__).with_name("README.md")

WIDTH = 100
"""Columns of the prose."""

COMMAND = "make faults"
"""Writes the generated parts."""

Row = tuple[str, str, "Result[Any]"]
"""What went wrong, where, and what came of it."""


class Tally:
    """Counts outcomes for one of the generated parts.

    Args:
        name: Of the part: "faults", "callers" or "races".
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._counts: dict[str, dict[str, Counter[str]]] = {}

    def add(self, rows: Iterable[Row]) -> None:
        """Count results; what broke the contract is marked."""
        for what, where, result in rows:
            mark = " (wrong)" if result.problems else ""
            self._counts.setdefault(what, {}).setdefault(where, Counter())[result.outcome + mark] += 1

    def write(self, complete: Collection[str]) -> None:
        """Write the part, if everything that it is about was counted; a run of single tests changes nothing."""
        if set(self._counts) == set(complete):
            write_part(README, self._name, COMMAND, self._table())

    def _table(self) -> str:
        totals: Counter[str] = Counter()
        lines = ["| what | where | outcomes |", "| --- | --- | --- |"]
        for what, places in self._counts.items():
            # Places with the same outcomes share a row.
            same: dict[str, list[str]] = {}
            for where, counts in places.items():
                totals += counts
                same.setdefault(_shown(counts), []).append(where)
            lines += [f"| {what} | {', '.join(wheres)} | {shown} |" for shown, wheres in same.items()]
        summary = textwrap.fill(f"{totals.total()} cells: {_shown(totals)}", WIDTH, break_long_words=False)
        return f"\n{summary}\n\n" + "\n".join(lines) + "\n\n"


def _shown(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())


def check(results: Sequence[Result[Any]]) -> None:
    """Check that nothing was wrong.

    Raises:
        AssertionError: Something was; a line for each problem.
    """
    problems = [f"{result.cell}: {problem}" for result in results for problem in result.problems]
    if problems:
        raise AssertionError("\n".join(problems))
