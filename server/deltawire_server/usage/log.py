"""Writes usage records.

A line is written with one call of the kernel, in the event loop: in a thread it would be lost if the process is killed. On a local
disk this takes 7 us, and 0.1 ms at the 99.9th percentile, also while the file is synchronized to the disk. Once a second a thread
does that, so a failure of the machine loses the lines of about a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import itertools
import os
import re
import time
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any

import msgspec

from deltawire_server.errors import GatewayError, Reason
from deltawire_server.metrics.table import USAGE_RECORDS
from deltawire_server.telemetry import get_logger
from deltawire_server.usage.lines import Line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from deltawire_server.sansio.events import StopReason, Usage

SYNC_SECONDS = 1.0
"""Interval at which lines are synchronized to the disk."""

RETRY_SECONDS = 5.0
"""When to retry a completion that is refused because its record cannot be written: an operator has to make room."""

FILE_MODE = 0o640
"""Of new files: others than the owner and the group, such as a log shipper, cannot read who used what."""

NAME = re.compile(r"usage-(?P<day>\d{4}-\d{2}-\d{2})-(?P<process>[0-9a-f]{8})-\d{4,}\.jsonl")
"""The name of a file: the day of its lines in UTC, the process, and a number."""

_encoder = msgspec.json.Encoder()
_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class UsageLimits:
    """The limits of the files; the settings explain the defaults.

    Attributes:
        max_file_bytes: Size after which the next file begins.
        retention_days: Days after which a file is removed; 0 for never.
        required: Whether a completion is refused if its record cannot be written.
    """

    max_file_bytes: int = 64 * 1024 * 1024
    retention_days: int = 90
    required: bool = False


class UsageLog:
    """The usage records of this process. Run `keep` while it is used, and `close` it at the end.

    Args:
        folder: The folder of the files, which processes may share.
        process: Eight hexadecimal digits that identify this process.
        limits: The limits of the files.
        clock: Unix time in seconds.
    """

    def __init__(
        self, folder: Path, process: str, limits: UsageLimits | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self.limits = limits or UsageLimits()
        self._folder = folder
        self._process = process
        self._clock = clock
        self._runs = itertools.count(1)
        self._file: int | None = None  # the descriptor of the current file
        self._day = ""
        self._part = 0
        self._size = 0
        self._unsynchronized = False
        self._full: list[int] = []  # the descriptors of earlier files, to synchronize and close
        self._torn = False  # whether the file ends within a line
        self._lost = 0
        self._removed_on = ""

    def record(self, **line: Any) -> UsageRecord:  # noqa: ANN401 (fields of a Line)
        """The record of a new completion; nothing is written yet.

        Args:
            line: The fields of `Line` that its first line has, except `event`, `time` and `run`.
        """
        return UsageRecord(self, {"run": f"{self._process}-{next(self._runs)}", **line})

    def write(self, event: str, fields: dict[str, Any]) -> bool:
        """Write a line; return false if that failed, which is counted and logged."""
        now = datetime.fromtimestamp(self._clock(), UTC)
        data = _encoder.encode(Line(event=event, time=now, **fields)) + b"\n"  # type: ignore[arg-type]
        try:
            self._append(data, now.date().isoformat())
        except OSError as error:
            USAGE_RECORDS.labels("lost").inc()
            if not self._lost:
                _log.error("usage records cannot be written", folder=str(self._folder), problem=str(error))
            self._lost += 1
            return False
        USAGE_RECORDS.labels("written").inc()
        if self._lost:
            _log.warning("usage records are written again", folder=str(self._folder), lost=self._lost)
            self._lost = 0
        return True

    async def keep(self) -> None:
        """Synchronize files to the disk and remove old ones, until cancelled."""
        while True:
            await asyncio.sleep(SYNC_SECONDS)
            self._leave_removed()
            if files := self._unsynchronized_files():
                await asyncio.to_thread(self._synchronize, files)
            today = datetime.fromtimestamp(self._clock(), UTC).date()
            if self._removed_on != (day := today.isoformat()):
                self._removed_on = day
                await asyncio.to_thread(self.remove_old, today)

    def remove_old(self, today: date) -> None:
        """Remove the files, of any process, whose day was more than `retention_days` ago."""
        if not self.limits.retention_days:
            return
        first = (today - timedelta(days=self.limits.retention_days)).isoformat()
        try:
            old = [
                path for path in self._folder.iterdir() if (name := NAME.fullmatch(path.name)) and name["day"] < first
            ]
            for path in old:
                path.unlink(missing_ok=True)  # another process may have removed it
        except OSError as error:
            _log.error("old usage records cannot be removed", folder=str(self._folder), problem=str(error))
            return
        if old:
            _log.info("old usage records removed", folder=str(self._folder), files=len(old), before=first)

    def close(self) -> None:
        """Synchronize and close all files. Further lines would begin another one."""
        files = self._unsynchronized_files()
        if self._file is not None:
            files.append(self._file)
            self._file = None
        self._synchronize(files)

    def _append(self, data: bytes, day: str) -> None:
        file = self._file
        if file is None or day != self._day or self._size + len(data) > self.limits.max_file_bytes:
            file = self._begin_file(day)
        if self._torn:
            data = b"\n" + data
        written = os.write(file, data)
        self._size += written
        self._unsynchronized = True
        self._torn = written < len(data)
        if self._torn:
            raise OSError(errno.ENOSPC, "only a part of a line was written")

    def _begin_file(self, day: str) -> int:
        """Create and lock a file. The lock, which ends with the process, means that its completions may still run."""
        parts = itertools.count(self._part + 1 if day == self._day else 1)
        while True:
            part = next(parts)
            try:
                path = self._folder / f"usage-{day}-{self._process}-{part:04}.jsonl"
                file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, FILE_MODE)
                break
            except FileExistsError:
                continue  # of an earlier process
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if self._file is not None:
            self._full.append(self._file)
        self._file, self._day, self._part, self._size, self._torn = file, day, part, 0, False
        return file

    def _leave_removed(self) -> None:
        """Begin another file if the current one was removed: its lines would be lost, and it would keep its space on the disk."""
        if self._file is not None and os.fstat(self._file).st_nlink == 0:
            _log.error(
                "a file of usage records was removed while it was in use: its lines are lost", folder=str(self._folder)
            )
            os.close(self._file)
            self._file, self._unsynchronized = None, False

    def _unsynchronized_files(self) -> list[int]:
        """Descriptors for `_synchronize`: those of full files, and a copy of that of the current one if it has new lines."""
        files, self._full = self._full, []
        if self._unsynchronized and self._file is not None:
            files.append(os.dup(self._file))
            self._unsynchronized = False
        return files

    def _synchronize(self, files: Iterable[int]) -> None:
        """Synchronize and close files."""
        for file in files:
            try:
                os.fsync(file)
            except OSError as error:
                _log.error("usage records may be lost", folder=str(self._folder), problem=str(error))
            finally:
                os.close(file)


class UsageRecord:
    """The record of one completion, created by `UsageLog.record`."""

    def __init__(self, log: UsageLog, fields: dict[str, Any]) -> None:
        self._log = log
        self._fields = fields
        self._begun = False

    def begin(self) -> None:
        """Write the first line. Send the request to the engine only after this.

        Raises:
            GatewayError: STORE_UNAVAILABLE: the line cannot be written, and records are required.
        """
        if not self._log.write("begun", self._fields) and self._log.limits.required:
            raise GatewayError(
                Reason.STORE_UNAVAILABLE,
                "the usage record of this completion cannot be written, and this gateway requires it: retry at another gateway, "
                "and ask the gateway's operator to make room for usage records",
                retry_after=RETRY_SECONDS,
            )
        self._begun = True

    def end(self, usage: Usage, stop_reasons: Iterable[StopReason], error: str, seconds: float) -> None:
        """Write the last line; no effect if the request was not sent to the engine. Send the end of the answer only after this.

        Args:
            usage: The usage.
            stop_reasons: Those of the choices.
            error: Why the completion failed; empty if it did not.
            seconds: Its duration.
        """
        if not self._begun:
            return
        ended = {
            "seconds": round(seconds, 6),
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cached_prompt_tokens": usage.cached_prompt_tokens,
            "reasoning_tokens": usage.reasoning_tokens,
            "provenance": usage.provenance.name,
            "stop_reasons": tuple(reason.name for reason in stop_reasons),
            "error": error,
        }
        self._log.write("ended", {**self._fields, **ended})
