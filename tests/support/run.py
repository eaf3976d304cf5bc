"""`make run`: starts a model and a gateway in front of it, shows one answer and one tool call, and serves.

    python -m tests.support.run [--once] [--port N]

VLLM_URL names the vLLM (and VLLM_API_TOKEN its key). Without it, `tests.support.vllm_cpu` sets up and starts a small one on
127.0.0.1:8000, or on a free port if that one is in use; it needs no key, because only this machine reaches it. The gateway is
the command `deltawire-server`, in its own process. Its registry is in a temporary directory, so that models that are
registered for a trial never reach the registry of a real gateway; DELTAWIRE_REGISTRY_DATABASE_URL names another one. The logs
of the gateway and of the small vLLM are kept, and their paths are printed.

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
from typing import TYPE_CHECKING, NoReturn

from deltawire import Client, DeltawireError, RequestError, ToolCall, tool_definition
from deltawire.v1.model_registry_pb2 import Model, ModelType
from tests.support.gateway_process import GatewayProcess, GatewayProcessError
from tests.support.vllm_cpu import ServerError, SetupError, VllmServer, set_up

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

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


class SignalReceivedError(BaseException):
    """A signal arrived. This is not a failure, so it is not an Exception, as with KeyboardInterrupt."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


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
    except SignalReceivedError as received:
        return 128 + received.number
    except (RunError, GatewayProcessError, SetupError, ServerError, DeltawireError) as error:
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
    raise SignalReceivedError(number)


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
    gateway = GatewayProcess(flags, variables, _new_log())
    stack.callback(_say, f"stopped; the gateway's log is kept in {gateway.log}")
    stack.enter_context(gateway)
    stack.callback(_say, "stopping")
    _say(f"gateway: serving on {gateway.address}; its log is {gateway.log}")

    with Client(gateway.address, timeout=CALL_SECONDS) as client:
        model = _model(client)
        _say(f"model: {model.id}")
        _show_answer(gateway.address, model.id)
        _show_call(client, model.id, required=vllm is not None)
    _show_commands(gateway.address, model.provider_model_id, vllm)
    if not options.once:
        _serve(gateway, vllm)


def _new_log() -> Path:
    """A new file, outside the temporary directory, so that the log can be read after the end."""
    descriptor, path = tempfile.mkstemp(prefix="deltawire-gateway-", suffix=".log")
    os.close(descriptor)
    return Path(path)


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


def _show_commands(target: str, model: str, vllm: VllmServer | None) -> None:
    """Print commands to try next."""
    question = "Why is the sky blue?"
    request = {"chat": {"model": model, "messages": [{"user": {"text": question}}]}}
    own = "" if target == f"{HOST}:{DEFAULT_PORT}" else f" --target {target}"
    bin_directory = os.path.relpath(Path(sys.executable).parent)
    _say("try it, from another terminal:")
    print(
        f"""
  {bin_directory}/deltawire chat{own} "{question}"
  {bin_directory}/deltawire models list{own}
  {bin_directory}/buf curl --http2-prior-knowledge --protocol grpc -d {shlex.quote(json.dumps(request))} \\
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
                raise RunError(f"the gateway exited unexpectedly; {gateway.log_end()}")
            if vllm is not None and not vllm.running:
                raise RunError(f"vLLM exited unexpectedly; its log is {vllm.log}")
            time.sleep(0.25)
    except SignalReceivedError:
        print(flush=True)


def _say(line: str) -> None:
    print(f"run: {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
