"""The sums of usage records: groups, periods, what has not ended, and lines that cannot be read."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from deltawire_server.sansio.events import Provenance, Usage
from deltawire_server.usage.__main__ import main
from deltawire_server.usage.log import UsageLog
from deltawire_server.usage.report import Totals, read

if TYPE_CHECKING:
    from pathlib import Path

NOON = datetime(2026, 11, 28, 12, tzinfo=UTC).timestamp()

DIES = """
import os, signal, sys
from pathlib import Path
from deltawire_server.usage.log import UsageLog
log = UsageLog(Path(sys.argv[1]), "dead0000")
log.record(completion_id="c", caller="ci").begin()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two ended completions, an hour apart."""
    now = NOON
    log = UsageLog(tmp_path, "ab120000", clock=lambda: now)
    for caller, usage, error in (
        ("ci", Usage(5, Provenance.EXACT, 3, 2, 1), ""),
        ("ops\x1b", Usage(7, Provenance.ESTIMATED), "canceled"),
    ):
        record = log.record(completion_id="c", caller=caller, model="m", provider="p")
        record.begin()
        record.end(usage, [], error, 1.0)
        now += 3600
    log.close()
    return tmp_path


def test_groups(folder: Path) -> None:
    """By any keys, in order."""
    assert read(folder).groups == {(): Totals(2, 0, 0, 3, 12, 2, 1, 1)}
    assert read(folder, ["caller", "day"]).groups == {
        ("ci", "2026-11-28"): Totals(1, 0, 0, 3, 5, 2, 1, 0),
        ("ops\x1b", "2026-11-28"): Totals(1, 0, 0, 0, 7, 0, 0, 1),
    }
    assert list(read(folder, ["error", "model", "provider"]).groups) == [("", "m", "p"), ("canceled", "m", "p")]


def test_periods(folder: Path) -> None:
    """From one time on, and before another one."""
    noon, one = datetime(2026, 11, 28, 12, tzinfo=UTC), datetime(2026, 11, 28, 13, tzinfo=UTC)
    assert read(folder, since=noon, until=one).groups[()].completion_tokens == 5
    assert read(folder, since=one).groups[()].completion_tokens == 7
    assert read(folder, until=noon).groups == {}


def test_completions_without_an_end(tmp_path: Path) -> None:
    """Those of a process that still runs are running; those of one that was killed are lost."""
    log = UsageLog(tmp_path, "ab120000")
    log.record(completion_id="c", caller="ci").begin()
    killed = subprocess.run([sys.executable, "-c", DIES, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert read(tmp_path, ["caller"]).groups == {("ci",): Totals(running=1, lost=1)}
    log.close()
    assert read(tmp_path).groups == {(): Totals(lost=2)}


@pytest.mark.parametrize(
    "garbage", [b'{"event":"ended","ti', b"\xff\xfe", b'"\xff"', b"[]", b'{"event":"other"}', b"{}"]
)
def test_a_line_that_cannot_be_read(folder: Path, garbage: bytes) -> None:
    """It is skipped, with its place, at the end and in the middle of a file; the others count."""
    [path] = folder.iterdir()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], garbage + b"\n", *lines[2:], garbage]))
    report = read(folder)
    assert report.groups[()].completions == 2
    assert report.torn == [f"{path.name}:3", f"{path.name}:6"]


def test_a_line_that_is_being_written(tmp_path: Path) -> None:
    """The last line of a process that still runs may be incomplete."""
    log = UsageLog(tmp_path, "ab120000")
    log.record(completion_id="c").begin()
    [path] = tmp_path.iterdir()
    with path.open("ab") as file:
        file.write(b'{"event"')
    assert read(tmp_path).torn == []
    log.close()
    assert read(tmp_path).torn == [f"{path.name}:2"]


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records are written and read; a completion without an end looks lost."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    log = UsageLog(tmp_path, "ab120000")
    log.record(completion_id="c").begin()
    assert read(tmp_path).groups == {(): Totals(lost=1)}
    log.close()


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table without control characters, or JSON; notes go to standard error."""
    assert main([str(folder), "--by", "caller,error"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["caller", "error", "completions", "running"]
    assert [row.split()[:3] for row in rows] == [["ci", "-", "1"], [r"'ops\x1b'", "canceled", "1"]]
    [path] = folder.iterdir()
    with path.open("ab") as file:
        file.write(b"{")
    assert (
        main([str(folder), "--json", "--by", "day", "--since", "2026-11-28T13:00", "--until", "2026-11-29T00:00Z"]) == 0
    )
    captured = capsys.readouterr()
    printed = json.loads(captured.out)
    assert (printed["day"], printed["completion_tokens"], printed["inexact"]) == ("2026-11-28", 7, 1)
    assert captured.err == f"note: {path.name}:5 is not a whole record and was skipped\n"


def test_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that does not exist, an unknown key, and something that is no time."""
    assert main([str(tmp_path / "absent")]) == 1
    assert "No such file or directory" in capsys.readouterr().err
    for arguments, problem in (
        (["--by", "team"], "there is no key 'team'"),
        (["--since", "noon"], "'noon' is not a time"),
    ):
        with pytest.raises(SystemExit):
            main([str(tmp_path), *arguments])
        assert problem in capsys.readouterr().err


def test_the_command_of_the_documentation(folder: Path) -> None:
    """`python -m`, without gRPC and the other parts of the gateway."""
    code = "import runpy, sys; runpy.run_module('deltawire_server.usage', run_name='__main__')"
    command = [sys.executable, "-X", "importtime", "-c", code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    assert "completions" in done.stdout
    assert "grpc" not in done.stderr
