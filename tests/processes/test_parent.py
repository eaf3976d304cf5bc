"""The parent holds the port: for the workers, and against all others."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import sys
import tempfile
from typing import TYPE_CHECKING

import pytest

from deltawire_server.__main__ import main
from deltawire_server.processes import parent
from deltawire_server.processes.parent import _reserve, _Worker
from deltawire_server.processes.worker_process import WorkerProcess
from tests.support.gateway import WAIT

if TYPE_CHECKING:
    from pathlib import Path


def bound(address: str, *, shared: bool) -> socket.socket:
    """A socket that listens, as gRPC does it in a worker (`shared`) or in the only process of a gateway."""
    host, _, port = address.rpartition(":")
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(shared))
    try:
        made.bind((host, int(port)))
        made.listen()
    except OSError:
        made.close()
        raise
    return made


def test_only_workers_share_the_port() -> None:
    """Not before it is reserved, not with a second parent, and not without the option; afterwards it is free."""
    with contextlib.ExitStack() as stack:
        address = _reserve("127.0.0.1:0", stack)
        assert not address.endswith(":0")
        for _ in range(2):
            stack.enter_context(bound(address, shared=True))
        for taken in (lambda: bound(address, shared=False), lambda: _reserve(address, stack)):
            with pytest.raises(OSError) as caught:  # noqa: PT011 (the number is checked)
                taken()
            assert caught.value.errno == errno.EADDRINUSE
    with contextlib.ExitStack() as stack:
        assert _reserve(address, stack) == address


def test_connections_that_are_closing_are_no_obstacle() -> None:
    """A gateway that starts again gets its port at once."""
    with contextlib.ExitStack() as stack:
        address = _reserve("localhost:0", stack)
        listening = stack.enter_context(bound(f"127.0.0.1:{address.rpartition(':')[2]}", shared=True))
        client = stack.enter_context(socket.create_connection(listening.getsockname()))
        listening.accept()[0].close()  # first, so that its end waits
        client.close()
    with contextlib.ExitStack() as stack:
        assert _reserve(address, stack) == address


def test_a_foreign_address() -> None:
    """Is refused."""
    with contextlib.ExitStack() as stack, pytest.raises(OSError, match=r"[Cc]annot assign"):
        _reserve("192.0.2.1:0", stack)


def test_nowhere_for_temporary_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As with a root that is read-only: one sentence with the remedy."""
    registry = ["--database-url", f"sqlite:///{tmp_path}/registry.db"]
    with monkeypatch.context() as nowhere:
        nowhere.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
        assert main(["--workers", "2", "--vllm-url", "http://127.0.0.1:1", "--listen", "127.0.0.1:0", *registry]) == 1
    error = capfd.readouterr().err
    assert error.startswith("deltawire-server: cannot create the private directory of the workers: No such file")
    assert "TMPDIR" in error


def test_a_path_that_is_too_long_for_sockets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Is one sentence with the remedy, too."""
    far = tmp_path / ("x" * 100)
    far.mkdir()
    registry = ["--database-url", f"sqlite:///{tmp_path}/registry.db"]
    with monkeypatch.context() as nowhere:
        nowhere.setattr(tempfile, "tempdir", str(far))
        assert main(["--workers", "2", "--vllm-url", "http://127.0.0.1:1", "--listen", "127.0.0.1:0", *registry]) == 1
    error = capfd.readouterr().err
    assert "has too long a path for unix sockets; set TMPDIR" in error
    assert not list(far.iterdir())


async def test_a_worker_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reports for a while, and then is stopped: its connections are still assigned to it."""
    monkeypatch.setattr(parent, "SILENCE_SECONDS", 0.5)
    ours, theirs = socket.socketpair()
    beats = f"import os, time\nwhile True: os.write({theirs.fileno()}, b'{{\"serving\": true}}\\n'); time.sleep(0.05)"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", beats, pass_fds=[theirs.fileno()])
    theirs.close()
    place = WorkerProcess(0, 2, 0, "aaaa", "", [], control=-1, metrics="", health="")
    worker = _Worker(place, process, *await asyncio.open_connection(sock=ours))
    try:
        async with asyncio.timeout(WAIT):
            assert await worker.serve()
            await asyncio.sleep(3 * parent.SILENCE_SECONDS)
            assert worker.serves
            os.kill(process.pid, signal.SIGSTOP)
            await worker.ended()
        assert process.returncode == -signal.SIGKILL
        assert not worker.serves
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
