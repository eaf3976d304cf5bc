"""A real PostgreSQL server of this machine's own programs, for tests: on loopback, in a directory that goes with it."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import pwd
import re
import secrets
import select
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import psycopg
from psycopg import sql

from tests.support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType

LIMIT = 60.0
"""Seconds after which a wait has failed. Starting and stopping take half a second each; a busy machine may take more."""

_USER = "postgres"
"""Who is the database's owner and, when the caller is root, whom the server runs as: PostgreSQL refuses root."""

# Debian keeps them off the path, each version in a folder of its own.
_DEBIAN = Path("/usr/lib/postgresql")


class PostgresError(RuntimeError):
    """PostgreSQL is not installed, or did not start or stop as it should; then the last lines of its log are there."""


class PostgresServer:
    """One PostgreSQL on 127.0.0.1 that asks for a password, empty at first.

    As a context manager it creates its files and starts; at the end it stops and removes them. In between,
    `create_database` gives each test a database of its own; `down` makes it unreachable for a while, and `frozen` silent.
    A server that was stopped or killed can be started again and keeps port, password and data. All calls block for up to
    a second; one object is for one thread.

    Attributes:
        port: Where it listens, also after it was started again.
        password: That of its only user, `postgres`.

    Raises:
        PostgresError: Its programs are not installed; the message says what to install.
    """

    def __init__(self) -> None:
        self.port = free_port()
        self.password = secrets.token_hex(16)
        self._programs = _find_programs()
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        # The end to read from of a pipe whose other end only the server's processes hold.
        self._held = -1
        self._numbers = itertools.count(1)

    def url(self, database: str) -> str:
        """The URL of a database: `postgresql://postgres:PASSWORD@127.0.0.1:PORT/NAME`."""
        return f"postgresql://{_USER}:{self.password}@127.0.0.1:{self.port}/{database}"

    def create_database(self) -> str:
        """Create an empty database, and return its URL.

        Raises:
            psycopg.OperationalError: The server does not run.
        """
        name = f"test_{next(self._numbers)}"
        with psycopg.connect(self.url(_USER), autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        return self.url(name)

    def start(self) -> None:
        """Start it and wait until it accepts connections.

        Raises:
            PostgresError: It ended, or does not accept any within a minute; it is not running then.
        """
        if self._process is not None:
            raise PostgresError(f"PostgreSQL runs already, as process {self._process.pid}")
        options = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": "",
            # What is committed is handed to the operating system and so outlives the server, killed or not; only a
            # machine that crashes would lose it.
            "fsync": "off",
            "full_page_writes": "off",
        }
        settings = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        self._held, held_by_server = os.pipe()
        try:
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    [self._programs / "postgres", "-D", self._data, *settings],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=(held_by_server,),
                    # Not ended with the tests by a Ctrl-C: they end it.
                    start_new_session=True,
                    **self._surroundings(),
                )
        finally:
            os.close(held_by_server)
            if self._process is None:
                os.close(self._held)
        try:
            self._wait_until_it_accepts(self._process)
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """End it as its operator would: connections are closed, data is written. Fine if it does not run.

        Raises:
            PostgresError: It does not end within a minute.
        """
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """End it at once, as a crash would. The next start recovers what was committed. Fine if it does not run.

        Raises:
            PostgresError: Its processes do not end within a minute.
        """
        self._end(signal.SIGKILL)

    @contextlib.contextmanager
    def down(self, *, kill: bool = False) -> Iterator[None]:
        """Stopped, or killed, until this is left: then it runs again, whatever has happened to the test.

        Raises:
            PostgresError: As `stop`, `kill` and `start` do.
        """
        if kill:
            self.kill()
        else:
            self.stop()
        try:
            yield
        finally:
            self.start()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Suspend its processes until the end of the block: connections are accepted and stay open, without responses.

        Raises:
            psycopg.OperationalError: The server does not run.
        """
        with psycopg.connect(self.url(_USER)) as connection:
            rows = connection.execute("SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid()").fetchall()
        # The first of them first: it makes no new ones then.
        processes = [*([] if self._process is None else [self._process.pid]), *(pid for (pid,) in rows)]
        try:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGSTOP)
            yield
        finally:
            for process in reversed(processes):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGCONT)

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="deltawire-postgres-"))
        try:
            self._create_cluster(self._folder)
            self.start()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.stop()
        except PostgresError:
            self.kill()
            raise
        finally:
            self._remove()

    @property
    def _root(self) -> Path:
        if self._folder is None:
            raise PostgresError("PostgreSQL has no files: use its object in a with statement")
        return self._folder

    @property
    def _data(self) -> Path:
        return self._root / "data"

    @property
    def _log(self) -> Path:
        return self._root / "log"

    def _create_cluster(self, folder: Path) -> None:
        password = folder / "password"
        password.write_text(self.password)
        if os.geteuid() == 0:
            owner = _unprivileged()
            for path in (folder, password):
                os.chown(path, owner.pw_uid, owner.pw_gid)
        done = subprocess.run(
            [
                self._programs / "initdb",
                *("--pgdata", self._data, "--username", _USER, "--pwfile", password, "--auth", "scram-sha-256"),
                *("--encoding", "UTF8", "--no-locale", "--no-sync"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            **self._surroundings(),
        )
        self._log.write_bytes(done.stdout)
        if done.returncode:
            raise self._error(f"initdb ended with {done.returncode}")

    def _surroundings(self) -> dict[str, Any]:
        """In what PostgreSQL's programs run: a folder they may enter, no settings of the caller's, not as root."""
        surroundings: dict[str, Any] = {
            "cwd": self._root,
            "env": {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", "TZ": "UTC"},
        }
        if os.geteuid() == 0:
            # Not through runuser, which would stay in between: a signal has to reach the server itself.
            owner = _unprivileged()
            surroundings |= {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
        return surroundings

    def _wait_until_it_accepts(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + LIMIT
        while not self._accepts(process.pid):
            if process.poll() is not None:
                raise self._error(f"PostgreSQL ended with {process.returncode} before it accepted connections")
            if time.monotonic() > deadline:
                raise self._error("PostgreSQL does not accept connections")
            time.sleep(0.01)

    def _accepts(self, process_id: int) -> bool:
        """What the server says of itself, as pg_ctl reads it: what answers at the port might be another's."""
        try:
            lines = (self._data / "postmaster.pid").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return False
        # A killed server leaves the file behind; the process id in its first line identifies the server.
        return len(lines) >= 8 and lines[0] == str(process_id) and lines[7].strip() == "ready"

    def _end(self, signal_number: int) -> None:
        if self._process is None:
            return
        # A connection that was given up while it was being made is closed with the garbage, and until then the server
        # waits for its startup message for a minute.
        gc.collect()
        self._process.send_signal(signal_number)
        # Its processes each are a group of their own. Those of a killed server end by themselves as soon as they
        # notice, and the pipe is at its end when the last one is gone: every client has lost its connection.
        ended, _, _ = select.select([self._held], [], [], LIMIT)
        if not ended:
            raise self._error(f"PostgreSQL's processes do not end; the first is {self._process.pid}")
        self._process.wait()
        self._process = None
        os.close(self._held)

    def _remove(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder)
            self._folder = None

    def _error(self, what: str) -> PostgresError:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return PostgresError("\n".join([f"{what}; its log ends with:", *lines[-20:]]))


def _find_programs() -> Path:
    """The folder with `initdb` and `postgres`: the one on the path, else the newest of Debian's."""
    for folder in _folders():
        if all((folder / program).is_file() for program in ("initdb", "postgres")):
            return folder
    raise PostgresError(
        "PostgreSQL's server programs, initdb and postgres, are not installed:"
        " install the package postgresql, for example with `apt-get install postgresql`"
    )


def _folders() -> Iterable[Path]:
    for program in ("initdb", "postgres"):
        if found := shutil.which(program):
            yield Path(found).parent
    if config := shutil.which("pg_config"):
        yield Path(subprocess.run([config, "--bindir"], capture_output=True, text=True, check=True).stdout.strip())
    yield from sorted(_DEBIAN.glob("*/bin"), key=_version, reverse=True)


def _version(folder: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", folder.parent.name)]


def _unprivileged() -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(_USER)
    except KeyError:
        raise PostgresError(
            f"PostgreSQL refuses to run as root, and there is no user {_USER!r} to run it as:"
            " run the tests as another user, or install the package postgresql, which makes that one"
        ) from None
