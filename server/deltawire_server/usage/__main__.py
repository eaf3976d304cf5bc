"""`python -m deltawire_server.usage FOLDER`: sums up the usage records of a folder, as a table or as JSON lines."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from deltawire_server.usage.report import KEYS, Report, Totals, read

if TYPE_CHECKING:
    from collections.abc import Sequence

_EPILOG = """\
A completion counts in the period in which it ended. `running` has begun and not ended; `lost` too, and its process has ended, so
that its usage is not known. `inexact` are completions whose usage is not the engine's own final one.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the sums; see `--help`.

    Args:
        arguments: Without the program's name; by default the process's own.

    Returns:
        The exit status for `sys.exit`: 0, or 1 if the folder cannot be read.

    Raises:
        SystemExit: 0 after --help, 2 for wrong usage.
    """
    options = _parser().parse_args(arguments)
    try:
        report = read(options.folder, options.by, options.since, options.until)
    except OSError as error:
        print(f"error: {error.filename or options.folder}: {error.strerror or error}", file=sys.stderr)
        return 1
    (_print_json if options.json else _print_table)(report, options.by)
    for place in report.torn:
        print(f"note: {place} is not a whole record and was skipped", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deltawire_server.usage",
        description="Sum up the usage records that deltawire-server writes to the folder of usage.folder.",
        epilog=_EPILOG,
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the folder, or a copy of it")
    parser.add_argument(
        "--by", metavar="KEYS", type=_keys, default=(), help=f"group by some of {', '.join(KEYS)}, separated by commas"
    )
    parser.add_argument("--since", metavar="TIME", type=_time, help="from this time on: 2026-11-28, 2026-11-28T12:30")
    parser.add_argument("--until", metavar="TIME", type=_time, help="before this time; times are in UTC")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each group, one per line")
    return parser


def _keys(text: str) -> tuple[str, ...]:
    keys = tuple(part.strip() for part in text.split(","))
    unknown = [key for key in keys if key not in KEYS]
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no key {unknown[0]!r}: use some of {', '.join(KEYS)}")
    return keys


def _time(text: str) -> datetime:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time: write for example 2026-11-28T12:30") from None
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)


def _print_json(report: Report, by: Sequence[str]) -> None:
    for values, totals in report.groups.items():
        print(json.dumps({**dict(zip(by, values, strict=True)), **asdict(totals)}))


def _print_table(report: Report, by: Sequence[str]) -> None:
    names = [each.name for each in fields(Totals)]
    rows = [(*by, *names), *((*values, *map(str, asdict(totals).values())) for values, totals in report.groups.items())]
    # Names come from callers and providers, and may have control characters.
    cells = [[(cell if cell.isprintable() else repr(cell)) or "-" for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        padded = [
            cell.ljust(width) if column < len(by) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(padded).rstrip())


if __name__ == "__main__":
    sys.exit(main())
