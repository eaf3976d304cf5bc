"""The table in `README.md`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tests.hostile.bars import MIB
from tests.support.generated import write_part

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.hostile.attack import Result

README = Path(__file__).with_name("README.md")
COMMAND = "make hostile"
PART = "results"


def table(results: Iterable[Result]) -> str:
    """The results in Markdown."""
    lines = [
        "| area | attack | sent | ends | worst check | grows by | keeps | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        ends = ", ".join(f"{count} {code}" for code, count in sorted(result.outcomes.items()))
        lines.append(
            f"| {result.attack.area} | {result.attack.name} | {_size(result.size)} | {ends} | {result.delay * 1e3:.0f} ms "
            f"| {_size(result.growth)} | {_size(max(0, result.kept))} | {'above' if result.problems else 'ok'} |"
        )
    return "\n" + "\n".join(lines) + "\n\n"


def write(results: Iterable[Result]) -> None:
    """Write the table into the document."""
    write_part(README, PART, COMMAND, table(results))


def _size(size: int) -> str:
    return f"{size / MIB:.1f} MiB" if size >= MIB // 10 else f"{size / 1024:.1f} KiB"
