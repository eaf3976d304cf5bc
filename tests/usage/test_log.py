"""The files of usage records: their days and sizes, their age, and what happens if they cannot be written."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import structlog

from deltawire_server.errors import GatewayError, Reason
from deltawire_server.metrics.table import USAGE_RECORDS
from deltawire_server.sansio.events import Provenance, StopReason, Usage
from deltawire_server.usage import log as log_module
from deltawire_server.usage.lines import Line
from deltawire_server.usage.log import UsageLimits, UsageLog
from deltawire_server.usage.report import read
from tests.support.gateway import until

if TYPE_CHECKING:
    from tests.support.gateway import Lines

NOON = datetime(2026, 11, 28, 12, tzinfo=UTC).timestamp()
DAY = 24 * 3600.0
USAGE = Usage(5, Provenance.EXACT, 3, 2, 1)


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> float:
        return self.now


def log_in(folder: Path, clock: Clock | None = None, process: str = "ab120000", **limits: Any) -> UsageLog:  # noqa: ANN401
    """A log with some of its limits."""
    return UsageLog(folder, process, UsageLimits(**limits), clock or Clock())


def complete(log: UsageLog, completion_id: str = "c") -> None:
    """Write both lines of a completion."""
    record = log.record(completion_id=completion_id, caller="ci", model="m", provider="p")
    record.begin()
    record.end(USAGE, [StopReason.END_OF_TURN], "", 1.5)


def lines_in(path: Path) -> list[Line]:
    """The lines of a file."""
    return [msgspec.json.decode(line, type=Line) for line in path.read_bytes().splitlines()]


def names_in(folder: Path) -> list[str]:
    """The names of all files, in order."""
    return sorted(path.name for path in folder.iterdir())


def open_files(folder: Path) -> int:
    """The number of descriptors of this process for files in a folder, removed ones included."""
    names = [str(each.readlink()) for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
    return sum(name.startswith(f"{folder}/") for name in names)


def counted(outcome: str) -> float:
    """The value of the metric."""
    value: float = USAGE_RECORDS.labels(outcome)._value.get()
    return value


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes that each of the next writes can still write; afterwards there is room again."""
    room: list[int] = []
    write = os.write

    def limited(file: int, data: bytes) -> int:
        if not room:
            return write(file, data)
        count = room.pop(0)
        if not count:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data[:count])

    monkeypatch.setattr("deltawire_server.usage.log.os.write", limited)
    return room


def test_both_lines(tmp_path: Path) -> None:
    """The second one repeats the first, so that it can be used alone; only the owner and the group can read the file."""
    complete(log_in(tmp_path))
    [path] = tmp_path.iterdir()
    assert path.name == "usage-2026-11-28-ab120000-0001.jsonl"
    assert path.stat().st_mode & 0o007 == 0
    begun, ended = lines_in(path)
    assert begun == Line(
        event="begun",
        time=datetime.fromtimestamp(NOON, UTC),
        run="ab120000-1",
        completion_id="c",
        caller="ci",
        model="m",
        provider="p",
    )
    assert ended == msgspec.structs.replace(
        begun,
        event="ended",
        seconds=1.5,
        prompt_tokens=3,
        completion_tokens=5,
        cached_prompt_tokens=2,
        reasoning_tokens=1,
        provenance="EXACT",
        stop_reasons=("END_OF_TURN",),
    )


def test_nothing_is_written_of_what_was_not_sent(tmp_path: Path) -> None:
    """A completion that ends before its request is sent has no record."""
    log_in(tmp_path).record(completion_id="c").end(USAGE, [], "", 0.0)
    assert list(tmp_path.iterdir()) == []


def test_a_file_for_each_day(tmp_path: Path) -> None:
    """A completion over midnight begins in one file and ends in the next; its numbers go on after a change of the clock."""
    clock = Clock()
    log = log_in(tmp_path, clock)
    record = log.record(completion_id="over-midnight")
    record.begin()
    clock.now += DAY
    record.end(USAGE, [], "", DAY)
    assert names_in(tmp_path) == [
        "usage-2026-11-28-ab120000-0001.jsonl",
        "usage-2026-11-29-ab120000-0001.jsonl",
    ]
    clock.now -= DAY
    complete(log)  # as after a correction of the clock
    assert len(list(tmp_path.iterdir())) == 3
    assert read(tmp_path).groups[()].completions == 2


def test_a_file_for_each_size(tmp_path: Path) -> None:
    """No file is larger, and no line is in two files."""
    log = log_in(tmp_path, max_file_bytes=1024)
    for number in range(9):
        complete(log, f"c{number}")
    paths = sorted(tmp_path.iterdir())
    assert len(paths) > 3
    assert max(path.stat().st_size for path in paths) <= 1024
    assert len([line for path in paths for line in lines_in(path)]) == 18


def test_a_file_of_an_earlier_process_is_not_continued(tmp_path: Path) -> None:
    """Even if it has the same digits: its last line may be torn."""
    torn = tmp_path / "usage-2026-11-28-ab120000-0001.jsonl"
    torn.write_bytes(b'{"event":')
    complete(log_in(tmp_path))
    assert torn.read_bytes() == b'{"event":'
    assert read(tmp_path).groups[()].completions == 1


async def test_old_files_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: Lines) -> None:
    """Those of any process, at the start and after midnight, and no other file."""
    monkeypatch.setattr(log_module, "SYNC_SECONDS", 0.0)
    clock = Clock()
    for day in ("2026-11-25", "2026-11-26", "2026-11-27"):
        (tmp_path / f"usage-{day}-00000000-0001.jsonl").touch()
    (tmp_path / "usage-2020-01-01.jsonl").touch()
    keeping = asyncio.create_task(log_in(tmp_path, clock, retention_days=2).keep())
    await lines.find("old usage records removed", before="2026-11-26", files=1)
    clock.now += DAY
    await lines.find("old usage records removed", before="2026-11-27", files=1)
    keeping.cancel()
    assert names_in(tmp_path) == [
        "usage-2020-01-01.jsonl",
        "usage-2026-11-27-00000000-0001.jsonl",
    ]


def test_files_may_be_kept_for_ever(tmp_path: Path) -> None:
    """With 0 days."""
    (tmp_path / "usage-1999-01-01-00000000-0001.jsonl").touch()
    log_in(tmp_path, retention_days=0).remove_old(date(2026, 11, 28))
    assert len(list(tmp_path.iterdir())) == 1


async def test_a_folder_that_cannot_be_read(tmp_path: Path, lines: Lines) -> None:
    """Files that cannot be removed are logged."""
    log_in(tmp_path / "absent").remove_old(date(2026, 11, 28))
    entry = await lines.find("old usage records cannot be removed")
    assert entry["level"] == "error"


@pytest.mark.parametrize("room", [[0], [7], [7, 0, 3]])
async def test_a_full_disk(tmp_path: Path, full_disk: list[int], lines: Lines, room: list[int]) -> None:
    """Completions go on; the lost lines are counted and logged once, and a torn line does not spoil the next one."""
    log = log_in(tmp_path)
    lost, written = counted("lost"), counted("written")
    full_disk += room
    for number in range(2):
        complete(log, f"c{number}")
    assert counted("lost") - lost == len(room)
    assert counted("written") - written == 4 - len(room)
    assert [entry["event"] for entry in lines.entries] == [
        "usage records cannot be written",
        "usage records are written again",
    ]
    assert lines.entries[1]["lost"] == len(room)
    report = read(tmp_path)
    assert report.groups[()].completions == (1 if len(room) > 1 else 2)
    assert len(report.torn) == sum(each > 0 for each in room)


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """The kernel writes a part of a line, and then nothing; the lines before and after it can be read."""
    log = log_in(tmp_path)
    complete(log, "before")
    [path] = tmp_path.iterdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
    try:
        complete(log, "lost")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    complete(log, "after")
    report = read(tmp_path)
    assert report.groups[()].completions == 2
    assert report.torn == [f"{path.name}:3"]


def test_a_required_record(tmp_path: Path, full_disk: list[int]) -> None:
    """Without it the completion is refused, and has no end either; with room again it is not."""
    log = log_in(tmp_path, required=True)
    full_disk.append(0)
    record = log.record(completion_id="c")
    with pytest.raises(GatewayError) as caught:
        record.begin()
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    assert caught.value.retry_after
    record.end(USAGE, [], "STORE_UNAVAILABLE", 0.1)
    complete(log)
    [path] = tmp_path.iterdir()
    assert len(lines_in(path)) == 2


async def test_a_file_that_is_removed_while_it_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one begins, the log says that lines are lost, and the space of the first is free."""
    monkeypatch.setattr(log_module, "SYNC_SECONDS", 0.0)
    log = log_in(tmp_path)
    complete(log, "lost")
    before = open_files(tmp_path)
    [name] = names_in(tmp_path)
    os.unlink(tmp_path / name)  # noqa: PTH108 (as by another program)
    keeping = asyncio.create_task(log.keep())
    with structlog.testing.capture_logs() as logs:
        await until(lambda: bool(logs))
    keeping.cancel()
    assert "was removed" in logs[0]["event"]
    assert open_files(tmp_path) == before - 1
    complete(log, "kept")
    [name] = names_in(tmp_path)
    assert [line.completion_id for line in lines_in(tmp_path / name)] == ["kept", "kept"]
    log.close()


async def test_lines_are_synchronized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of full files and of the current one, each once; a failure is logged, and every descriptor is closed."""
    synchronized: list[int] = []
    done = asyncio.Event()
    loop = asyncio.get_running_loop()

    def fsync(file: int) -> None:
        synchronized.append(os.fstat(file).st_ino)
        if len(synchronized) == 2:  # each file once
            loop.call_soon_threadsafe(done.set)

    monkeypatch.setattr("deltawire_server.usage.log.os.fsync", fsync)
    monkeypatch.setattr(log_module, "SYNC_SECONDS", 0.0)
    log = log_in(tmp_path, max_file_bytes=600, retention_days=0)
    for _ in range(2):
        complete(log)
    assert len(names_in(tmp_path)) > 1
    before = open_files(tmp_path)
    keeping = asyncio.create_task(log.keep())
    await done.wait()
    keeping.cancel()
    log.close()
    assert len(set(synchronized)) == len(names_in(tmp_path))
    assert len(synchronized) == len(names_in(tmp_path)) + 1  # the current one once more, by `close`
    assert open_files(tmp_path) < before


def test_a_failure_to_synchronize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is logged, and the file is closed."""

    def fsync(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("deltawire_server.usage.log.os.fsync", fsync)
    before = open_files(tmp_path)
    log = log_in(tmp_path)
    complete(log)
    log.close()
    assert open_files(tmp_path) == before
