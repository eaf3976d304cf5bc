"""What the tests of the registry's PostgreSQL store stand on."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest

from tests.support import postgres as support

if TYPE_CHECKING:
    from tests.support.postgres import PostgresServer


def _write(url: str) -> None:
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE kept (name text)")
        connection.execute("INSERT INTO kept VALUES ('llama')")


def _read(url: str) -> list[tuple[str]]:
    with psycopg.connect(url) as connection:
        return connection.execute("SELECT name FROM kept").fetchall()


@pytest.mark.postgres
@pytest.mark.parametrize("kill", [False, True], ids=["stopped", "killed"])
def test_what_was_committed_is_there_when_the_server_is_back(postgres: PostgresServer, kill: bool) -> None:
    """While it is down connections are refused and open ones are dead; its address and data outlive that."""
    url = postgres.create_database()
    _write(url)
    with psycopg.connect(url) as connection:
        with postgres.down(kill=kill):
            with pytest.raises(psycopg.OperationalError, match="refused"):
                psycopg.connect(url)
            with pytest.raises(psycopg.OperationalError):
                connection.execute("SELECT 1")
        assert connection.broken
    assert _read(url) == [("llama",)]


@pytest.mark.postgres
def test_the_server_is_back_after_a_test_that_failed(postgres: PostgresServer) -> None:
    """One failure while it is down is not the failure of all tests that follow."""
    url = postgres.create_database()
    with pytest.raises(LookupError), postgres.down():
        raise LookupError
    psycopg.connect(url).close()


@pytest.mark.postgres
def test_databases_are_each_tests_own(postgres: PostgresServer) -> None:
    """What one test writes no other finds."""
    first, second = postgres.create_database(), postgres.create_database()
    _write(first)
    with pytest.raises(psycopg.errors.UndefinedTable):
        _read(second)


@pytest.mark.postgres
def test_a_wrong_password_is_refused(postgres: PostgresServer) -> None:
    """Only connections with the password are accepted."""
    url = postgres.create_database().replace(postgres.password, "wrong")
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(url)


@pytest.mark.postgres
def test_nothing_is_left_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of a server that ran nor of one that could not start, whose log says why: its port was taken."""
    with tempfile.TemporaryDirectory() as folder:
        # The server's user has to get through, which it does not in pytest's own folders.
        Path(folder).chmod(0o711)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        with support.PostgresServer():
            (lock,) = Path(folder).glob("*/data/postmaster.pid")
            process = int(lock.read_text().partition("\n")[0])
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
        server = support.PostgresServer()
        with (
            socket.create_server(("127.0.0.1", server.port)),
            pytest.raises(support.PostgresError, match="Address already in use"),
            server,
        ):
            pass
        assert list(Path(folder).iterdir()) == []


def test_without_the_servers_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The failure says what to install."""
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(support, "_DEBIAN", tmp_path)
    with pytest.raises(support.PostgresError, match="install the package postgresql"):
        support.PostgresServer()
