"""`deltawire-server`: exit codes, what it prints, and a process's life from start to SIGTERM."""

from __future__ import annotations

import asyncio
import builtins
import gc
import json
import os
import signal
import socket
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc import aio

from deltawire.v1 import model_registry_pb2
from deltawire_server.__main__ import main
from deltawire_server.fake_vllm import Chunks, FakeVllm, Script
from deltawire_server.registry.store import Store
from tests.support.gateway import WAIT, Running, ask, kinds, read_well
from tests.support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

URL = "http://127.0.0.1:8000/v1"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Remove the settings of the shell that runs the tests."""
    for name in [*os.environ]:
        if name.startswith(("DELTAWIRE_", "VLLM_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    yield
    # What `main` leaves of its event loop crashes the interpreter if a later test's database happens to be where it is
    # collected: SQLAlchemy works in greenlets. Here it does no harm.
    gc.collect()


class Process:
    """A `deltawire-server` of its own, and what it logs."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def logged(self, event: str) -> dict[str, Any]:
        """The next entry of this event; those before it are passed over."""
        assert self._process.stderr is not None
        while (entry := json.loads(await self._process.stderr.readline()))["event"] != event:
            pass
        result: dict[str, Any] = entry
        return result

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    async def ended(self) -> int:
        """Its exit code, when it has ended."""
        return await self._process.wait()


@asynccontextmanager
async def started(*arguments: str) -> AsyncIterator[tuple[Process, Running]]:
    """A process that serves on a free port, and a channel to it; it is killed in the end if it has not ended."""
    process = await asyncio.create_subprocess_exec(
        *(
            sys.executable,
            "-m",
            "deltawire_server",
            "--listen",
            "127.0.0.1:0",
            "--set",
            "server.drain_delay=0",
            *arguments,
        ),
        stderr=asyncio.subprocess.PIPE,
    )
    server = Process(process)
    try:
        async with asyncio.timeout(WAIT):
            (address,) = (await server.logged("serving"))["addresses"]
            async with aio.insecure_channel(address) as channel:
                yield server, Running(None, channel)  # type: ignore[arg-type]
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def test_check_config(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings in effect are printed, without secrets, and nothing is started."""
    monkeypatch.setenv("VLLM_API_TOKEN", "hush")
    assert main(["--vllm-url", URL, "--check-config"]) == 0
    captured = capsys.readouterr()
    assert URL in captured.out
    assert "hush" not in captured.out
    assert not captured.err


def test_the_processs_own_arguments(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Are taken unless others are given."""
    monkeypatch.setattr(sys, "argv", ["deltawire-server", "--vllm-url", URL, "--check-config"])
    assert main() == 0
    assert URL in capsys.readouterr().out


def test_wrong_settings(capsys: pytest.CaptureFixture[str]) -> None:
    """Every problem on a line of its own, and 2."""
    assert main(["--set", "server.max_streams=0", "--set", "stream.queue_bytes=x", "--vllm-url", URL]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("deltawire-server: ") for line in lines)


@pytest.mark.parametrize("missing", ["deltawire_server.settings", "uvloop", "deltawire_server.app"])
def test_without_the_servers_libraries(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    """The light client installs this command too: it says what to install, and 2."""
    real = builtins.__import__

    def without(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:  # noqa: A002, ANN401
        if missing in (name, *(f"{name}.{each}" for each in fromlist or ())):
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return real(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["--vllm-url", URL]) == 2
    error = capsys.readouterr().err
    assert missing in error
    assert "pip install 'deltawire[server]'" in error


def test_a_port_that_is_taken(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """One sentence with the remedy, and 1; no database was created."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        database = ["--database-url", f"sqlite:///{tmp_path}/registry.db"]
        assert main(["--vllm-url", URL, "--listen", address, *database, "--log-level", "error"]) == 1
    problem = f"deltawire-server: cannot listen on {address}: Address already in use; use another address (--listen)\n"
    assert capfd.readouterr().err.endswith(problem)
    assert not [*tmp_path.iterdir()]


def test_a_database_that_cannot_be_used(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """One sentence, and 1."""
    (tmp_path / "file").write_text("not a folder")
    url = f"sqlite:///{tmp_path}/file/registry.db"
    assert main(["--vllm-url", URL, "--listen", "127.0.0.1:0", "--database-url", url, "--log-level", "error"]) == 1
    written = capfd.readouterr().err
    assert "deltawire-server: cannot use the database" in written
    assert "set --database-url to" in written


@pytest.mark.parametrize("url", ["postgresql://u:geheim@{host}/d", "postgresql://u@{host}/d?password=geheim"])
def test_a_database_that_cannot_be_used_shows_no_password(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    """In the error, in the log, and in printed settings; the host is shown, to the operator."""
    monkeypatch.setattr(Store, "is_away", lambda *_: False)  # the gateway starts without a database that may come back
    host = f"127.0.0.1:{free_port()}"
    arguments = ["--vllm-url", URL, "--listen", "127.0.0.1:0", "--database-url", url.format(host=host)]
    assert main([*arguments, "--check-config"]) == 0
    assert main(arguments) == 1
    written = "".join(capfd.readouterr())
    assert f"cannot use the database postgresql+psycopg://u{':***' if 'u:' in url else ''}@{host}/d" in written
    assert "geheim" not in written


@pytest.mark.parametrize("insist", [False, True])
async def test_a_process_from_start_to_sigterm(vllm: FakeVllm, insist: bool) -> None:
    """It serves, drains at the first signal, and ends with 0: when the last call has, or at a second signal."""
    gate = asyncio.Event()
    vllm.play(Script.chunks([Chunks().role(), gate, Chunks().finish()]))
    async with started("--vllm-url", vllm.base_url) as (process, gateway):
        messages = aiter(gateway.stream())
        await anext(messages)
        await read_well(gateway.stream())
        process.signal(signal.SIGTERM)
        await process.logged("draining")
        if insist:
            process.signal(signal.SIGTERM)
            await vllm.chats[0].closed_early.wait()
        else:
            gate.set()
            assert kinds([event async for event in messages])[-1] == "completed"
        await process.logged("stopped")
        assert await process.ended() == 0


async def test_grpc_writes_nothing_of_its_own(vllm: FakeVllm) -> None:
    """A caller without a key can make it complain for each call; all that the process writes is its log."""
    async with started("--vllm-url", vllm.base_url) as (process, gateway):
        request = model_registry_pb2.ListProvidersRequest(page_token="x" * 10_000)
        with pytest.raises(aio.AioRpcError) as caught:
            await gateway.models.ListProviders(request, compression=grpc.Compression.Gzip)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        process.signal(signal.SIGTERM)
        await process.logged("stopped")  # every line before it was read as an entry of the log


async def test_a_process_that_hangs_up(vllm: FakeVllm, tmp_path: Path) -> None:
    """SIGHUP reads the file again: a wrong one is refused, a right one taken over, and the stream under way goes on."""
    gate = asyncio.Event()
    vllm.play(Script.chunks([Chunks().role(), gate, Chunks().finish()]))
    file = tmp_path / "deltawire.toml"
    table = '[providers.vllm]\nbase_url = "{}"\ntls_verify = false\nheaders = {{x-team = "hush"}}\n'
    async with FakeVllm(models=("other",)) as other:
        file.write_text(table.format(vllm.base_url))
        async with started("--config", str(file)) as (process, gateway):
            messages = aiter(gateway.stream())
            await anext(messages)
            file.write_text(table.format("hush@nowhere"))
            process.signal(signal.SIGHUP)
            refused = await process.logged("settings refused")
            (problem,) = refused["problems"]
            assert problem.startswith(f"providers.vllm.base_url (from file {file}): must not contain credentials")
            assert "hush" not in str(refused)
            await read_well(gateway.stream())
            file.write_text(f"{table.format(other.base_url)}[server]\nmax_streams = 7\n")
            process.signal(signal.SIGHUP)
            assert (await process.logged("settings reloaded"))["providers_changed"] == ["vllm"]
            assert (await process.logged("changed settings need a restart"))["keys"] == ["server.max_streams"]
            await read_well(gateway.stream(ask(model="other")))
            gate.set()
            assert kinds([event async for event in messages])[-1] == "completed"
            process.signal(signal.SIGTERM)
            await process.logged("stopped")
            assert await process.ended() == 0
    assert {chat.headers["x-team"] for chat in (*vllm.chats, *other.chats)} == {"hush"}


def test_a_ca_file_without_certificates(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """One sentence that names key and file, and 2."""
    file = tmp_path / "ca.pem"
    file.write_text("no certificate")
    assert main(["--vllm-url", "https://127.0.0.1:1", "--set", f"providers.vllm.tls_verify={file}"]) == 2
    assert f"deltawire-server: providers.vllm.tls_verify: {file} cannot be used" in capfd.readouterr().err


EARLY = """
import os, runpy, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            for number in sys.argv[2].split():
                os.kill(os.getpid(), int(number))
        return None

sys.meta_path.insert(0, Finder())
from deltawire_server.__main__ import main
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.parametrize(
    "module", ["uvloop", "grpc", "deltawire_server.worker", "sqlalchemy.dialects.sqlite.aiosqlite"]
)
async def test_signals_before_it_serves(module: str) -> None:
    """SIGHUP does not end a process that is starting, and SIGTERM ends it as one that had served."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", EARLY, module, f"{signal.SIGHUP.value} {signal.SIGTERM.value}"),
        *("--vllm-url", URL, "--listen", "127.0.0.1:0", "--set", "server.drain_delay=0"),
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(WAIT):
        _, lines = await process.communicate()
    assert process.returncode == 0, lines.decode()
    assert "stopped" in json.loads(lines.splitlines()[-1])["event"]
