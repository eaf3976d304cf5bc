"""The processes under test, and what they use."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

TICKS = os.sysconf("SC_CLK_TCK")
START_SECONDS = 60.0
MODEL = "fake"


@dataclass(frozen=True, slots=True)
class Server:
    """A running process and where it listens."""

    name: str
    pid: int
    port: int

    @property
    def cpu_seconds(self) -> float:
        """User and system time of all its threads so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    @property
    def memory_kib(self) -> int:
        """What it holds in memory now."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") // 1024


@contextlib.contextmanager
def running(name: str, command: Sequence[str], port: int) -> Iterator[Server]:
    """Start a server and wait until its port takes connections; end it, by pid, in any case."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=_environment())
        try:
            _wait_for(name, process, port)
            yield Server(name, process.pid, port)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def upstream(
    tokens: int, *, per_second: float | None = None, tool_call: bool = False, chunks_per_write: int = 1
) -> contextlib.AbstractContextManager[Server]:
    """What stands in for vLLM, whose every answer has this many tokens: flat out the fastest there is, paced the shipped fake."""
    port = free_port()
    options = [f"--port={port}", f"--model={MODEL}", f"--tokens={tokens}"]
    if tool_call:
        options.append("--tool-call")
    if per_second is not None:
        options.append(f"--tokens-per-second={per_second}")
        return running("fake vLLM", [sys.executable, "-m", "deltawire_server.fake_vllm", *options], port)
    options.append(f"--chunks-per-write={chunks_per_write}")
    return running("upstream", [sys.executable, "-m", "tests.bench.upstream", *options], port)


def gateway(upstream: Server) -> contextlib.AbstractContextManager[Server]:
    """The gateway, with the settings that users get."""
    port = free_port()
    return running(
        "deltawire",
        [
            str(Path(sys.executable).with_name("deltawire-server")),
            f"--listen=127.0.0.1:{port}",
            f"--vllm-url=http://127.0.0.1:{upstream.port}/v1",
            "--database-url=sqlite://",
            "--set=server.drain_delay=0",
            "--set=server.drain_grace=0",
        ],
        port,
    )


def bare_grpc(tokens: int, *, per_second: float | None = None) -> contextlib.AbstractContextManager[Server]:
    """A grpc.aio server that yields ready-made messages."""
    port = free_port()
    command = [sys.executable, "-m", "tests.bench.bare", f"--port={port}", f"--tokens={tokens}"]
    if per_second is not None:
        command.append(f"--tokens-per-second={per_second}")
    return running("bare grpc.aio", command, port)


def vllm_router(binary: Path, upstream: Server) -> contextlib.AbstractContextManager[Server]:
    """vllm-router, passing HTTP through to the same fake."""
    port = free_port()
    command = [
        str(binary),
        "--host=127.0.0.1",
        f"--port={port}",
        "--worker-urls",
        f"http://127.0.0.1:{upstream.port}",
        f"--prometheus-port={free_port()}",
        "--log-level=error",
    ]
    return running("vllm-router", command, port)


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _environment() -> dict[str, str]:
    """Without the user's own settings: they would change what is measured."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("DELTAWIRE_", "VLLM_"))}


def _wait_for(name: str, process: subprocess.Popen[bytes], port: int) -> None:
    give_up = time.monotonic() + START_SECONDS
    while time.monotonic() < give_up:
        if process.poll() is not None:
            raise RuntimeError(f"{name} ended with exit code {process.returncode}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise RuntimeError(f"{name} does not listen on port {port} after {START_SECONDS:g} s")
