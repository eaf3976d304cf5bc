"""`make run`: starts a model and a gateway in front of it, shows one answer and one tool call, and serves.

    python -m tests.support.run [--once] [--port N]

VLLM_URL names the vLLM (and VLLM_API_TOKEN its key). Without it, `tests.support.vllm_cpu` sets up and starts a small one on
127.0.0.1:8000, or on a free port if that one is in use; it needs no key, because only this machine reaches it. The gateway is
the command `deltawire-server`, in its own process. Its registry is in a temporary directory, so that models that are
registered for a trial never reach the registry of a real gateway; DELTAWIRE_REGISTRY_DATABASE_URL names another one.

Exit status: 0 after a signal while it served, or after --once; 1 a failure; 2 wrong usage; 130 or 143 after a signal (Ctrl-C,
SIGTERM) before it served. In every case all processes that it started have ended.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

from deltawire import Client, DeltawireError, RequestError, ToolCall, tool_definition
from deltawire.v1.model_registry_pb2 import Model, ModelType
from tests.support.vllm_cpu import ServerError, SetupError, VllmServer, set_up

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import FrameType, TracebackType

HOST = "127.0.0.1"
DEFAULT_PORT = 50051
VLLM_PORT = 8000
"""Of the small vLLM, if it is free: the port of `vllm serve`, and the one in the README."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""They end the program: Ctrl-C, a supervisor, a closed terminal."""
CALL_SECONDS = 300.0
"""Timeout of one call: the first request of a kind can take many seconds, and a large model takes longer."""

LIMIT = {"VLLM_MAX_TOKENS": "256"}
"""For the small model, which often does not end its answer: without a limit it fills its context, for minutes."""

PROMPT = "Write one short sentence about the sea."
LIGHT = tool_definition(
    "set_light",
    "Set how bright the light in a room is",
    input_schema={
        "type": "object",
        "properties": {
            "room": {"type": "string", "enum": ["kitchen", "bedroom", "hall"]},
            "percent": {"type": "integer", "minimum": 0, "maximum": 100},
        },
        "required": ["room", "percent"],
        "additionalProperties": False,
    },
    strict=True,
)


class RunError(Exception):
    """The run failed; the message says why."""


class ToldToStopError(BaseException):
    """A signal arrived. Like KeyboardInterrupt, this is no failure, and so no Exception."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class GatewayProcess:
    """The command `deltawire-server` of this environment, as a process; its log is a file of JSON lines.

    `with GatewayProcess(...) as gateway:` starts it and waits until it serves; leaving lets it drain and ends it. One that
    has ended can be started again.

    Args:
        arguments: Its flags.
        variables: Environment variables over this process's own; an empty value is the same as none.
        log: Where its standard error goes; emptied with each start.
    """

    def __init__(self, arguments: Sequence[str], variables: Mapping[str, str], log: Path) -> None:
        self.log = log
        self._command = [str(Path(sys.executable).with_name("deltawire-server")), "--log-format", "json", *arguments]
        self._variables = dict(variables)
        self._process: subprocess.Popen[bytes] | None = None
        self._addresses: list[str] = []

    @property
    def address(self) -> str:
        """The first address that it listens on; it serves there."""
        return self._addresses[0]

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def records(self) -> Iterator[dict[str, Any]]:
        """Its log so far, entry by entry."""
        for line in self.log.read_bytes().splitlines():
            with contextlib.suppress(ValueError):  # a warning of a library, or a line that is being written
                record = json.loads(line)
                if isinstance(record, dict):
                    yield record

    def start(self, timeout: float = 60.0) -> None:
        """Start it and wait until it serves.

        Raises:
            RunError: It ended, or does not serve within `timeout` seconds. It is not there then.
        """
        self._addresses = []
        with self.log.open("wb") as log:
            # In its own session: Ctrl-C is for this process, which then lets the gateway drain.
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self._variables},
                start_new_session=True,
            )
        deadline = time.monotonic() + timeout
        while not self._addresses:
            if not self.running:
                raise RunError(
                    f"the gateway exited with {self._process.returncode}; the end of its log:\n{self.last_words()}"
                )
            if time.monotonic() > deadline:
                self.stop(grace=0.0)
                raise RunError(
                    f"the gateway does not serve after {timeout:g} s; the end of its log:\n{self.last_words()}"
                )
            time.sleep(0.05)
            self._addresses = next((each["addresses"] for each in self.records() if each["event"] == "serving"), [])

    def last_words(self, lines: int = 20) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self, grace: float = 45.0) -> int | None:
        """Let it drain and end; after `grace` seconds it is ended by force. Fine when it is not running.

        Returns:
            Its exit status; `None` if it was never started.
        """
        if self._process is None:
            return None
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace)
        if self._process.poll() is None:
            self._process.kill()
        return self._process.wait()

    def pause(self) -> None:
        """Have it do nothing any more, as if it hung; it must run. It can still be killed."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def kill(self) -> None:
        """End it at once, as a crash would; it must run."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop(grace=5.0)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program, and return its exit status; both are described at the top of this file."""
    options = _parser().parse_args(arguments)
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, _stop)
    try:
        with contextlib.ExitStack() as stack:
            try:
                _run(options, stack)
            finally:
                _ignore_signals()  # the stops have time limits and must not be interrupted
    except ToldToStopError as told:
        return 128 + told.number
    except (RunError, SetupError, ServerError, DeltawireError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.run",
        description="Start a gateway in front of a model, show one answer and one tool call, and serve until Ctrl-C. "
        "VLLM_URL and VLLM_API_TOKEN name your vLLM; without them, a small one is set up on the CPU.",
    )
    parser.add_argument("--once", action="store_true", help="end after the answer and the tool call")
    parser.add_argument(
        "--port", type=int, default=DEFAULT_PORT, metavar="N", help=f"on {HOST} (default %(default)s; 0: any free one)"
    )
    return parser


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    _ignore_signals()  # later ones change nothing
    raise ToldToStopError(number)


def _ignore_signals() -> None:
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)


def _run(options: argparse.Namespace, stack: contextlib.ExitStack) -> None:
    _check_port(options.port)  # before anything that takes long
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="deltawire-run-")))
    variables = {
        "DELTAWIRE_REGISTRY_DATABASE_URL": os.environ.get("DELTAWIRE_REGISTRY_DATABASE_URL")
        or f"sqlite:///{directory / 'registry.db'}"
    }
    vllm = None
    if os.environ.get("VLLM_URL"):
        _say(f"vLLM: {os.environ['VLLM_URL']} (from VLLM_URL)")
    else:
        _say("vLLM: a small one on the CPU, because VLLM_URL is not set")
        vllm = _start_vllm(stack)
        variables |= {"VLLM_URL": vllm.base_url, "VLLM_API_TOKEN": vllm.api_key, **LIMIT}
        _say(
            f"the gateway sends max_tokens={LIMIT['VLLM_MAX_TOKENS']} for requests without it: a model this small may not stop"
        )

    # No load balancer waits for the drain, and Ctrl-C should take seconds.
    flags = ["--listen", f"{HOST}:{options.port}", "--set", "server.drain_delay=0", "--set", "server.drain_grace=5"]
    gateway = GatewayProcess(flags, variables, directory / "gateway.log")
    stack.callback(_say, "stopped")
    stack.enter_context(gateway)
    stack.callback(_say, "stopping")
    _say(f"gateway: serving on {gateway.address}; its log is {gateway.log}")

    with Client(gateway.address, timeout=CALL_SECONDS) as client:
        model = _model(client)
        _say(f"model: {model.id}")
        _show_answer(gateway.address, model.id)
        _show_call(client, model.id, required=vllm is not None)
    _show_ways(gateway.address, model.provider_model_id, vllm)
    if not options.once:
        _serve(gateway, vllm)


def _check_port(port: int) -> None:
    try:
        _bind(port)
    except (OSError, OverflowError) as error:
        raise RunError(
            f"cannot listen on {HOST}:{port}: {error}. Is another gateway running? End it, or give another port: "
            f"{os.path.relpath(sys.executable)} -m tests.support.run --port N"
        ) from error


def _bind(port: int) -> None:
    """Listen on the port for a moment.

    Raises:
        OSError: It is in use, or this user may not use it.
        OverflowError: It is not a port.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((HOST, port))


def _vllm_port() -> int:
    """`VLLM_PORT`, or 0 for any free port if it is in use."""
    try:
        _bind(VLLM_PORT)
    except OSError:
        return 0
    return VLLM_PORT


def _start_vllm(stack: contextlib.ExitStack) -> VllmServer:
    """Set it up, start it, and wait until it is warm; the stack stops it."""
    environment = set_up()
    vllm = VllmServer(environment, port=_vllm_port(), api_key="")
    stack.callback(vllm.stop)
    vllm.start()
    _say(f"vLLM: starting, which takes about a minute; its log is {vllm.log}")
    started = time.monotonic()
    while True:
        try:
            vllm.wait_healthy(10.0)
            break
        except ServerError:
            seconds = time.monotonic() - started
            if not vllm.running or seconds > CALL_SECONDS:
                raise
            _say(f"vLLM: still loading after {seconds:.0f} s")
    _say(f"vLLM: healthy after {time.monotonic() - started:.0f} s, warming up")
    _say(f"vLLM: warm after {vllm.warm_up():.0f} s more, at {vllm.base_url}; it needs no key")
    return vllm


def _model(client: Client) -> Model:
    """The first chat model."""
    listing = client.models.list()
    for model in listing:
        if model.type == ModelType.MODEL_TYPE_LLM:
            return model
    if listing.unreachable_provider_ids:
        health = client.providers.health(listing.unreachable_provider_ids[0])
        cause = health.message or "its health check passes"
        raise RunError(f"vLLM does not list its models ({cause}): are VLLM_URL and VLLM_API_TOKEN right?")
    raise RunError("vLLM serves no model")


def _show_answer(target: str, model: str) -> None:
    """Run the client's command, which prints one answer while it is generated."""
    deltawire = Path(sys.executable).with_name("deltawire")
    arguments = ["chat", "--target", target, "--model", model, "--temperature", "0", "--max-tokens", "120", PROMPT]
    _say(f"an answer while it is generated: {shlex.join(['deltawire', *arguments])}\n")
    done = subprocess.run(
        [deltawire, *arguments, "--timeout", str(CALL_SECONDS)], stdin=subprocess.DEVNULL, check=False
    )
    print(flush=True)
    if done.returncode:
        raise RunError("the command failed")


def _show_call(client: Client, model: str, *, required: bool) -> None:
    """Request one tool call with the tool choice REQUIRED, and print it with its verdict.

    Raises:
        RunError: No executable call came, and `required` says that this server supports calls.
    """
    _say("a tool call that follows its schema: set_light(room, percent)\n")
    problem = "the answer has no call"
    try:
        answer = client.chat.create(
            "Set the kitchen light to 40 percent.",
            model=model,
            tools=[LIGHT],
            tool_choice="required",
            temperature=0.0,
            max_tokens=1024,
        )
        for call in answer.tool_calls:
            print(f"SUCCEEDED {_call_line(call)}", flush=True)
        for failed in answer.failed_tool_calls:
            problem = f"{failed.tool_name}: {failed.failure.message}"
            print(f"FAILED {problem}", flush=True)
        print(flush=True)
        if answer.tool_calls_executable:
            return
    except RequestError as error:
        problem = error.message
    if required:
        raise RunError(f"the tool call failed: {problem}")
    _say(
        f"this server or model cannot call tools ({problem}). vLLM must be started with --enable-auto-tool-choice and the"
    )
    _say("--tool-call-parser of its model. Everything else works.")


def _call_line(call: ToolCall) -> str:
    return f"{call.tool_name}({call.arguments})"


def _show_ways(target: str, model: str, vllm: VllmServer | None) -> None:
    """Print commands to try next."""
    question = "Why is the sky blue?"
    request = {"chat": {"model": model, "messages": [{"user": {"content": [{"text": question}]}}]}}
    own = "" if target == f"{HOST}:{DEFAULT_PORT}" else f" --target {target}"
    bin_directory = os.path.relpath(Path(sys.executable).parent)
    _say("try it, from another terminal:")
    print(
        f"""
  {bin_directory}/deltawire chat{own} "{question}"
  {bin_directory}/deltawire models list{own}
  {bin_directory}/buf curl --protocol grpc --http2-prior-knowledge --data {shlex.quote(json.dumps(request))} \\
      http://{target}/deltawire.v1.ChatCompletion/StreamChatCompletion
""",
        flush=True,
    )
    if vllm is not None:
        body = {"model": model, "max_tokens": 50, "messages": [{"role": "user", "content": question}]}
        _say("the same question to vLLM itself:")
        print(
            f"""
  curl {vllm.base_url}/v1/chat/completions -H 'Content-Type: application/json' \\
      -d {shlex.quote(json.dumps(body))}
""",
            flush=True,
        )


def _serve(gateway: GatewayProcess, vllm: VllmServer | None) -> None:
    """Wait for a signal, which ends it normally.

    Raises:
        RunError: The gateway or vLLM exited unexpectedly.
    """
    try:
        _say("serving until Ctrl-C")  # inside `try`: a reader of this line may send a signal at once
        while True:
            if not gateway.running:
                raise RunError(f"the gateway exited unexpectedly; the end of its log:\n{gateway.last_words()}")
            if vllm is not None and not vllm.running:
                raise RunError(f"vLLM exited unexpectedly; its log is {vllm.log}")
            time.sleep(0.25)
    except ToldToStopError:
        print(flush=True)


def _say(line: str) -> None:
    print(f"run: {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
