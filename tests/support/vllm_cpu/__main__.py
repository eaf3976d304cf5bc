"""The commands: ``python -m tests.support.vllm_cpu setup|serve|path``."""

import argparse
import signal
import sys
import time
from types import FrameType

from .environment import SetupError, locate, set_up
from .server import ServerError, VllmServer


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 1 for a failure, 130 for Ctrl-C.

    Wrong usage raises ``SystemExit(2)``; SIGTERM while serving ``SystemExit(0)``, once all is stopped.
    """
    options = _parser().parse_args(arguments)
    try:
        if options.command == "path":
            print(locate().root)
        elif options.command == "setup":
            print(set_up().root)
        else:
            return _serve(options.port, options.api_key)
    except (SetupError, ServerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.vllm_cpu",
        description="A real vLLM on the CPU with the model SmolLM2-135M-Instruct, for demos and tests.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "setup",
        help="make the environment and print where it is",
        description="Make the environment in the user's cache, about 3 GB and three minutes the first time. "
        "TORCH_INDEX_URL names another index for the CPU build of torch.",
    )
    serve = commands.add_parser(
        "serve",
        help="set up if necessary, and serve until Ctrl-C or SIGTERM",
        description="Serve until Ctrl-C or SIGTERM. Once the server is warm, standard output gets two lines: "
        "VLLM_URL=... and VLLM_API_TOKEN=...; everything else goes to standard error.",
    )
    serve.add_argument("--port", type=int, default=0, metavar="N", help="on 127.0.0.1 (default: a free one)")
    serve.add_argument(
        "--api-key", metavar="K", help="key that requests must send; empty: none (default: a random one)"
    )
    commands.add_parser("path", help="print where the environment is or would be, and do nothing")
    return parser


def _serve(port: int, api_key: str | None) -> int:
    # Before anything starts, so that SIGTERM never leaves the server behind.
    signal.signal(signal.SIGTERM, _stop)
    environment = set_up()
    server = VllmServer(environment, port=port, api_key=api_key)
    print(f"vllm-cpu: starting, the log is {server.log}", file=sys.stderr, flush=True)
    try:
        server.start()
        print(f"vllm-cpu: healthy after {server.wait_healthy():.0f} s", file=sys.stderr, flush=True)
        print(f"vllm-cpu: warmed up in {server.warm_up():.0f} s", file=sys.stderr, flush=True)
        print(f"VLLM_URL={server.base_url}\nVLLM_API_TOKEN={server.api_key}", flush=True)
        while server.running:
            time.sleep(0.5)
        # Exit as soon as vLLM does, so that the parent process sees the failure at once.
        raise ServerError(f"vLLM exited unexpectedly; the log is {server.log}")
    finally:
        # A second Ctrl-C must not interrupt `stop`, which has its own time limits.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        server.stop()


def _stop(_number: int, _frame: FrameType | None) -> None:
    sys.exit(0)  # an exception, so that `finally` stops the server


if __name__ == "__main__":
    sys.exit(main())
