"""Run the real vLLM as a child process in its own process group, and end every process of that group."""

import atexit
import contextlib
import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .environment import Environment, tail

_TEMPLATE = Path(__file__).with_name("tools_template.jinja")

# Never through a proxy, whatever the caller's environment says: the server is on this machine.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerError(RuntimeError):
    """vLLM did not start, answer or stop. The message ends with the last lines of its log."""


class VllmServer:
    """One vLLM with SmolLM2-135M-Instruct on 127.0.0.1, with OpenAI's HTTP API.

    As a context manager it starts, waits until the server is healthy, warms it up and, on leaving, stops it.
    By hand: :meth:`start`, :meth:`wait_healthy`, :meth:`warm_up`, :meth:`stop`. A stopped or killed server
    can be started again and keeps its port and key; what is set as ``model_name``, ``arguments`` or ``variables``
    in between applies to the next start. One object is for one thread.

    - ``environment``: from ``set_up()``, which must have run
    - ``port``: a free one is chosen when it is 0
    - ``api_key``: a random one is generated when it is None; when it is empty, requests need no key
    - ``log``: the file for the server's output, emptied by the constructor; one in the environment's ``logs`` when None
    - ``arguments``: further vLLM flags, put last, so that they win
    - ``variables``: further environment variables of the server
    """

    model_name = "smollm2"

    def __init__(
        self,
        environment: Environment,
        *,
        port: int = 0,
        api_key: str | None = None,
        log: Path | None = None,
        arguments: tuple[str, ...] = (),
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.port = port or _free_port()
        self.api_key = secrets.token_hex(16) if api_key is None else api_key
        self.log = log or environment.logs / f"server-{self.port}.log"
        self._environment = environment
        self.arguments = arguments
        self.variables = dict(variables or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_bytes(b"")

    @property
    def base_url(self) -> str:
        """``http://127.0.0.1:PORT``, without ``/v1`` and without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """The API server's process id, which is also its process group; ServerError if there is none."""
        if self._process is None:
            raise ServerError("vLLM was not started, or was stopped")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the API server's process runs; it may be unhealthy."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the process and return at once; call :meth:`wait_healthy` next.

        Raises :class:`ServerError` when it already runs or the environment is missing.
        """
        if self.running:
            raise ServerError(f"vLLM already runs, as process {self.pid}")
        self.stop()  # what a killed API server left behind
        # vLLM leaves sockets and files behind when it is killed, so it gets a directory of its own for them.
        # Not in the cache: a socket's path may have at most 107 characters.
        self._temporary = tempfile.TemporaryDirectory(prefix="vllm-cpu-", ignore_cleanup_errors=True)
        with self.log.open("ab") as log:
            try:
                self._process = subprocess.Popen(
                    self._command(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self._env(self._temporary.name),
                    cwd=self._environment.root,  # so that Python imports nothing from the caller's directory
                    start_new_session=True,  # its own group, so that the engine can be ended with it
                )
            except OSError as error:
                raise ServerError(f"cannot start vLLM ({error}); was it set up?") from error
        # If the caller exits without calling `stop`: the engine holds gigabytes.
        atexit.register(self.stop)

    def wait_healthy(self, timeout: float = 300.0) -> float:
        """Wait until ``/health`` returns 200, and return how many seconds that took; call :meth:`warm_up` next.

        Raises :class:`ServerError` when the process ends or ``timeout`` seconds pass. A running process is not stopped.
        """
        started = time.monotonic()
        while time.monotonic() - started < timeout:
            if not self.running:
                code = None if self._process is None else self._process.returncode
                raise self._error(f"vLLM ended with {code} before it was healthy")
            try:
                _opener.open(f"{self.base_url}/health", timeout=5.0).close()
                return time.monotonic() - started
            except (OSError, http.client.HTTPException):
                pass  # not listening yet, or not healthy yet
            time.sleep(0.25)
        raise self._error(f"vLLM was not healthy after {timeout:.0f} s")

    def warm_up(self) -> float:
        """Make one short chat and one call forced by a grammar; return the seconds it took.

        The first of each kind can take many seconds on a new server, and a test would time out.
        Raises :class:`ServerError` when vLLM rejects one or takes longer than two minutes.
        """
        started = time.monotonic()
        chat = {"messages": [{"role": "user", "content": "Say hello."}], "temperature": 0}
        self._chat({**chat, "max_tokens": 8})
        parameters = {
            "type": "object",
            "properties": {"on": {"type": "boolean"}},
            "required": ["on"],
            "additionalProperties": False,
        }
        function = {"name": "switch", "strict": True, "parameters": parameters}
        tools = [{"type": "function", "function": function}]
        # The grammar ends the answer after about 20 tokens; max_tokens is only a safety limit.
        self._chat({**chat, "max_tokens": 64, "tools": tools, "tool_choice": "required"})
        return time.monotonic() - started

    def kill_group(self, signal_number: int = signal.SIGKILL) -> None:
        """Send a signal to the API server and all its child processes; returns at once. No effect when none runs.

        After SIGKILL call :meth:`stop` to wait until they have ended, or :meth:`start` for the next server.
        """
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal_number)

    def stop(self, grace: float = 10.0) -> None:
        """End all of the server's processes and wait until they have ended; no effect when it is not running.

        The API server gets SIGTERM first and ``grace`` seconds to end its engine. Processes that still run,
        or that a killed API server left, then get SIGKILL. Raises ServerError when they still run 10 s later.
        """
        atexit.unregister(self.stop)
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.terminate()
            self._wait_gone(grace)
        if self._group():
            self.kill_group(signal.SIGKILL)
            self._wait_gone(10.0)
        if left := self._group():
            raise self._error(f"processes {left} of vLLM do not end")
        self._process.wait()
        self._process = None  # the operating system may reuse the id
        if self._temporary is not None:
            self._temporary.cleanup()

    def __enter__(self) -> Self:
        try:
            self.start()
            self.wait_healthy()
            self.warm_up()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _command(self) -> list[str]:
        flags: dict[str, str] = {
            "--model": str(self._environment.model),
            "--served-model-name": self.model_name,
            "--host": "127.0.0.1",
            "--port": str(self.port),
            "--dtype": "bfloat16",
            "--max-model-len": "4096",
            "--chat-template": str(_TEMPLATE),
            "--tool-call-parser": "hermes",
        }
        # Not `vllm serve`: it asks for the version of a package called "vllm", and ours is called "vllm-cpu".
        command = [str(self._environment.python), "-m", "vllm.entrypoints.openai.api_server"]
        if self.api_key:
            flags["--api-key"] = self.api_key
        for flag, value in flags.items():
            command += [flag, value]
        return [*command, "--enable-auto-tool-choice", "--enforce-eager", *self.arguments]

    def _env(self, temporary: str) -> dict[str, str]:
        # Without the caller's own Python and vLLM settings, which differ from machine to machine. The gateway's
        # variables, such as VLLM_URL, also go: vLLM logs a warning for each VLLM_ name that it does not know.
        caller = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VLLM_"))}
        state = self._environment.root / "state"
        return {
            **caller,
            "TMPDIR": temporary,
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_CACHE_ROOT": str(state / "cache"),
            "VLLM_CONFIG_ROOT": str(state / "config"),
            **self.variables,
        }

    def _chat(self, body: Mapping[str, Any]) -> None:
        request = urllib.request.Request(  # noqa: S310 - the URL is ours, always http:
            f"{self.base_url}/v1/chat/completions",
            data=json.dumps({"model": self.model_name, **body}).encode(),
            headers={"Content-Type": "application/json", **self._authorization()},
        )
        try:
            with _opener.open(request, timeout=120.0) as response:
                response.read()
        except urllib.error.HTTPError as error:
            answer = error.read().decode(errors="replace")
            raise self._error(f"vLLM returned {error.code} for the warm-up: {answer}") from error
        except (OSError, http.client.HTTPException) as error:
            raise self._error(f"vLLM did not answer the warm-up: {error!r}") from error

    def _authorization(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def _wait_gone(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while self._group() and time.monotonic() < deadline:
            time.sleep(0.05)

    def _group(self) -> list[int]:
        """Return the ids of the group's live processes, and reap the API server if it has ended."""
        if self._process is None:
            return []
        self._process.poll()
        # Not os.killpg(pid, 0): that also finds zombies, and in a container no process may ever reap those.
        live: list[int] = []
        for entry in Path("/proc").glob("[0-9]*/stat"):
            try:
                # "PID (NAME) STATE PPID PGRP ...", and the name may hold spaces and brackets
                state, _, group = entry.read_bytes().rpartition(b")")[2].split()[:3]
            except (OSError, ValueError):
                continue  # ended meanwhile
            if int(group) == self._process.pid and state not in (b"Z", b"X"):
                live.append(int(entry.parent.name))
        return sorted(live)

    def _error(self, what: str) -> ServerError:
        return ServerError(f"{what}; the log is {self.log}, its end:\n{tail(self.log)}")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
