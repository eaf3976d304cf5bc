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
    from collections.abc import Iterator, Mapping, Sequence

CPU_CLOCK = 2
"""The low bits of a process's clock id in Linux, for the CPU time of all its threads in nanoseconds; see `man clock_getres`."""

START_SECONDS = 90.0
MODEL = "fake"
DELTAWIRE = "deltawire"
OTHER = "other version"
BARE = "bare grpc.aio"
SMALLEST = "smallest gateway"
UPSTREAM = "upstream"


@dataclass(frozen=True, slots=True)
class Server:
    """A running process and where it listens."""

    name: str
    pid: int
    port: int

    @property
    def cpu_seconds(self) -> float:
        """User and system time of all its threads and of its child processes so far."""
        return sum(map(_cpu_seconds, (self.pid, *_descendants(self.pid))))

    @property
    def worker_seconds(self) -> list[float]:
        """The CPU time of each worker process so far; of the process itself if it has none."""
        return [_cpu_seconds(pid) for pid in _descendants(self.pid) or [self.pid]]

    @property
    def memory_kib(self) -> int:
        """The resident memory of it and of its child processes in KiB."""
        statms = (Path(f"/proc/{pid}/statm").read_text() for pid in (self.pid, *_descendants(self.pid)))
        return sum(int(statm.split()[1]) for statm in statms) * os.sysconf("SC_PAGE_SIZE") // 1024


@dataclass(frozen=True, slots=True)
class Pace:
    """How an upstream sends its answers.

    Attributes:
        tokens: Of every answer.
        per_second: Tokens per second and stream; `None` for flat out.
        in_steps: Whether all streams get their tokens at the same time, as from an engine; otherwise each has its own clock.
        chunks_per_write: How many chunks go into one write; vLLM writes each alone.
        tool_call: Whether the answer is a call of the first tool offered.
    """

    tokens: int
    per_second: float | None = None
    in_steps: bool = False
    chunks_per_write: int = 1
    tool_call: bool = False


@contextlib.contextmanager
def running(
    name: str,
    command: Sequence[str],
    port: int,
    path: Path | None = None,
    variables: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Start a server and wait until its port takes connections; end it, by pid, in any case."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**_environment(path), **(variables or {})})
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


def upstream(pace: Pace) -> contextlib.AbstractContextManager[Server]:
    """The program that stands in for vLLM."""
    port = free_port()
    options = [f"--chunks-per-write={pace.chunks_per_write}", f"--model={MODEL}"]
    if pace.tool_call:
        options.append("--tool-call")
    command = [sys.executable, "-m", "tests.bench.upstream", f"--port={port}", *options, *_pace_options(pace)]
    return running(UPSTREAM, command, port)


def gateway(
    upstream: Server,
    *settings: str,
    checkout: Path | None = None,
    database: str = "sqlite://",
    module: str = "deltawire_server",
    variables: Mapping[str, str] | None = None,
) -> contextlib.AbstractContextManager[Server]:
    """The gateway, with the settings that users get.

    Args:
        upstream: Its provider.
        settings: Settings that differ, as `NAME=VALUE`.
        checkout: The checkout of another version to run instead of this one.
        database: The URL of its database.
        module: What runs it.
        variables: Further environment variables.
    """
    port = free_port()
    command = [
        sys.executable,
        *("-m", module),
        f"--listen=127.0.0.1:{port}",
        f"--vllm-url=http://127.0.0.1:{upstream.port}/v1",
        f"--database-url={database}",
        "--set=server.drain_delay=0",
        "--set=server.drain_grace=0",
        *(f"--set={setting}" for setting in settings),
    ]
    return running(OTHER if checkout else DELTAWIRE, command, port, checkout, variables)


def bare_grpc(pace: Pace, *options: str) -> contextlib.AbstractContextManager[Server]:
    """A grpc.aio server that yields ready-made messages, unless `options` has `--refuse`."""
    port = free_port()
    command = [sys.executable, "-m", "tests.bench.bare", f"--port={port}", *_pace_options(pace), *options]
    return running(BARE, command, port)


def smallest_gateway(upstream: Server) -> contextlib.AbstractContextManager[Server]:
    """A gateway that forwards answers as typed messages, and does nothing else."""
    port = free_port()
    options = [f"--port={port}", f"--upstream=http://127.0.0.1:{upstream.port}"]
    return running(SMALLEST, [sys.executable, "-m", "tests.bench.smallest", *options], port)


def vllm_router(programs: Path, upstream: Server) -> contextlib.AbstractContextManager[Server]:
    """vllm-router, which forwards HTTP without parsing answers."""
    return _router("vllm-router", [str(programs / "vllm-router")], upstream)


def smg(programs: Path, upstream: Server) -> contextlib.AbstractContextManager[Server]:
    """SMG, the model gateway, which forwards HTTP as well."""
    return _router("smg", [str(programs / "smg"), "launch"], upstream)


def litellm(programs: Path, upstream: Server) -> contextlib.AbstractContextManager[Server]:
    """LiteLLM's proxy, which parses and encodes every chunk in Python."""
    port = free_port()
    config = Path(tempfile.mkdtemp()) / "config.yaml"
    config.write_text(
        f"model_list: [{{model_name: {MODEL}, litellm_params: {{model: openai/{MODEL}, api_key: none,"
        f" api_base: 'http://127.0.0.1:{upstream.port}/v1'}}}}]\n"
    )
    command = [str(programs / "litellm"), f"--config={config}", "--host=127.0.0.1", f"--port={port}"]
    return running("litellm", command, port)


def _router(name: str, command: list[str], upstream: Server) -> contextlib.AbstractContextManager[Server]:
    """A descendant of SGLang's router; all of them have these options."""
    port = free_port()
    options = ["--host=127.0.0.1", f"--port={port}", f"--prometheus-port={free_port()}", "--log-level=error"]
    return running(name, [*command, *options, "--worker-urls", f"http://127.0.0.1:{upstream.port}"], port)


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _pace_options(pace: Pace) -> list[str]:
    options = [f"--tokens={pace.tokens}"]
    if pace.per_second is not None:
        options.append(f"--tokens-per-second={pace.per_second}")
    return [*options, "--in-steps"] if pace.in_steps else options


def _environment(checkout: Path | None) -> dict[str, str]:
    """Without the user's own settings, which would change what is measured."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("DELTAWIRE_", "VLLM_"))}
    return own if checkout is None else {**own, "PYTHONPATH": f"{checkout}/server:{checkout}/client"}


def _cpu_seconds(pid: int) -> float:
    return time.clock_gettime(~pid << 3 | CPU_CLOCK)


def _descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    direct = [int(child) for child in children.read_text().split()] if children.exists() else []
    return [*direct, *(later for child in direct for later in _descendants(child))]


def _wait_for(name: str, process: subprocess.Popen[bytes], port: int) -> None:
    give_up = time.monotonic() + START_SECONDS
    while time.monotonic() < give_up:
        if process.poll() is not None:
            raise RuntimeError(f"{name} ended with exit code {process.returncode}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise RuntimeError(f"{name} does not listen on port {port} after {START_SECONDS:g} s")
