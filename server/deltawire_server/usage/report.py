"""Reads usage records and sums them up."""

from __future__ import annotations

import fcntl
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from deltawire_server.sansio.events import Provenance
from deltawire_server.usage.lines import Line
from deltawire_server.usage.log import NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from datetime import datetime
    from pathlib import Path
    from typing import BinaryIO

_decoder = msgspec.json.Decoder(Line)

KEYS: Mapping[str, Callable[[Line], str]] = {
    "caller": lambda line: line.caller,
    "model": lambda line: line.model,
    "provider": lambda line: line.provider,
    "day": lambda line: line.time.date().isoformat(),
    "error": lambda line: line.error,
}
"""By what records can be grouped."""


@dataclass(slots=True)
class Totals:
    """The sums of a group.

    Attributes:
        completions: Those that have ended.
        running: Those that have begun in a process that still runs on this machine.
        lost: Those that have begun, and whose process has ended before them; their usage is not known.
        prompt_tokens: Of ended completions, as far as the engine reported it; so are the following ones.
        completion_tokens: Generated tokens.
        cached_prompt_tokens: Prompt tokens from the engine's cache.
        reasoning_tokens: Generated tokens that are reasoning.
        inexact: Ended completions whose usage is not the engine's own final one.
    """

    completions: int = 0
    running: int = 0
    lost: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_prompt_tokens: int = 0
    reasoning_tokens: int = 0
    inexact: int = 0

    def add(self, line: Line) -> None:
        """Add an ended completion."""
        self.completions += 1
        self.prompt_tokens += line.prompt_tokens or 0
        self.completion_tokens += line.completion_tokens or 0
        self.cached_prompt_tokens += line.cached_prompt_tokens or 0
        self.reasoning_tokens += line.reasoning_tokens or 0
        self.inexact += line.provenance != Provenance.EXACT.name


@dataclass(slots=True)
class Report:
    """What the files of a folder contain.

    Attributes:
        groups: The sums by the values of the keys, by ascending values.
        torn: The places of lines that cannot be read and were skipped, such as "usage-….jsonl:12".
    """

    groups: dict[tuple[str, ...], Totals] = field(default_factory=dict)
    torn: list[str] = field(default_factory=list)


def read(folder: Path, by: Sequence[str] = (), since: datetime | None = None, until: datetime | None = None) -> Report:
    """Sum up the usage records of a folder, while processes may write to it.

    A completion counts in the period in which it ended; one without an end, in that in which it began.

    Args:
        folder: The folder of `usage.folder`, or a copy of it, in which no completion counts as running.
        by: Names of `KEYS`.
        since: The beginning of the period, inclusive; `None` for the first record.
        until: The end of the period, exclusive; `None` for the last record.

    Raises:
        OSError: The folder or a file cannot be read.
    """
    report = Report()
    sums: dict[tuple[str, ...], Totals] = {}
    unended: dict[tuple[str, str], tuple[Line, str]] = {}
    alive: set[str] = set()

    def totals(line: Line) -> Totals | None:
        if (since is not None and line.time < since) or (until is not None and line.time >= until):
            return None
        return sums.setdefault(tuple(KEYS[name](line) for name in by), Totals())

    for line, process in _records(folder, alive, report.torn):
        key = (line.run, line.completion_id)
        if line.event == "begun":
            unended[key] = (line, process)
            continue
        unended.pop(key, None)
        if (group := totals(line)) is not None:
            group.add(line)
    for line, process in unended.values():
        if (group := totals(line)) is not None:
            group.running += process in alive
            group.lost += process not in alive
    report.groups = dict(sorted(sums.items()))
    return report


def _records(folder: Path, alive: set[str], torn: list[str]) -> Iterator[tuple[Line, str]]:
    """All lines with the process of each, in the order of each process; adds the processes that still run to `alive`."""
    # By name: a completion may begin in one file of its process and end in a later one.
    for path in sorted(folder.iterdir()):
        if (name := NAME.fullmatch(path.name)) is None:
            continue
        process = name["process"]
        with path.open("rb") as file:
            written = _is_written(file)
            if written:
                alive.add(process)
            yield from ((line, process) for line in _lines(file, path.name, torn=torn, whole=not written))


def _is_written(file: BinaryIO) -> bool:
    """Whether a process of this machine still writes a file: then the process has locked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    fcntl.flock(file, fcntl.LOCK_UN)
    return False


def _lines(file: BinaryIO, name: str, *, torn: list[str], whole: bool) -> Iterator[Line]:
    """The lines of a file. Those that cannot be read are added to `torn`, except the last one if the file is not `whole`."""
    for number, line in enumerate(file, 1):
        try:
            yield _decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            if whole or line.endswith(b"\n"):
                torn.append(f"{name}:{number}")
