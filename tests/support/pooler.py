"""A real pgbouncer in transaction mode in front of the tests' PostgreSQL."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from typing import TYPE_CHECKING

import psycopg
from sqlalchemy import make_url

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

START_SECONDS = 30

CONFIGURATION = """\
[databases]
* = host=127.0.0.1 port={server}

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = plain
auth_file = {folder}/users
pool_mode = transaction
default_pool_size = 5
# As server/README.md says.
query_wait_timeout = 5
server_login_retry = 1
server_connect_timeout = 2
ignore_startup_parameters = extra_float_digits
"""


class Pooler:
    """One pgbouncer; `url` is a database through it.

    Args:
        folder: For its files.
        url: The database without it.
    """

    def __init__(self, folder: Path, url: str) -> None:
        direct = make_url(url)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = direct.set(port=self.port).render_as_string(hide_password=False)
        self._folder = folder
        folder.mkdir()
        (folder / "users").write_text(f'"{direct.username}" "{direct.password}"\n')
        text = CONFIGURATION.format(folder=folder, port=self.port, server=direct.port)
        (folder / "pgbouncer.ini").write_text(text)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it serves."""
        program = shutil.which("pgbouncer") or "/usr/sbin/pgbouncer"
        command = [program, str(self._folder / "pgbouncer.ini")]
        user = None
        if os.geteuid() == 0:  # as which it refuses to run
            user = pwd.getpwnam("nobody").pw_uid
            for parent in (self._folder, *self._folder.parents[:3]):
                parent.chmod(parent.stat().st_mode | 0o055)
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, user=user)
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                psycopg.connect(self.url, connect_timeout=5).close()
            except psycopg.OperationalError:
                assert time.monotonic() < end, (self._folder / "log").read_text()
                time.sleep(0.05)
            else:
                return

    def stop(self) -> None:
        """Kill it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Let it be silent, with its connections open."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def pooler(folder: Path, url: str) -> Iterator[Pooler]:
    """A pgbouncer that runs."""
    running = Pooler(folder, url)
    try:
        running.start()
        yield running
    finally:
        running.stop()
