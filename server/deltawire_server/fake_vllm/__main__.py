"""The command line of the fake vLLM server."""

from __future__ import annotations

import argparse
import asyncio
import math
import resource
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from deltawire_server.fake_vllm.script import End, Knobs, Script
from deltawire_server.fake_vllm.server import FakeVllm

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

EXAMPLES = """\
examples:
  python -m deltawire_server.fake_vllm                                  a short answer to every request, port 8000
  python -m deltawire_server.fake_vllm --tokens 200 --tokens-per-second 40
  python -m deltawire_server.fake_vllm --recording tests/transcripts/tool-one.sse
  python -m deltawire_server.fake_vllm --after 5 --end reset            every stream breaks after five chunks
  python -m deltawire_server.fake_vllm --first-delay 60 --keep-alive 5  a long prefill
  python -m deltawire_server.fake_vllm --model base --adapter sql       a base model and a LoRA adapter of it
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C.

    Args:
        arguments: The command line; by default that of the process.

    Returns:
        The exit status: 0 after a signal, 1 if the address cannot be used.
    """
    options = _parser().parse_args(arguments)
    knobs = Knobs(
        headers_delay=options.headers_delay,
        first_delay=options.first_delay,
        chunk_delay=options.chunk_delay,
        chunks_per_write=options.chunks_per_write,
        keep_alive=options.keep_alive,
        after=options.after,
        end=options.end,
    )
    try:
        if options.recording is not None:
            script = Script.recording(options.recording, **knobs)
        else:
            script = Script.generated(
                tokens=options.tokens, tokens_per_second=options.tokens_per_second, tool_call=options.tool_call, **knobs
            )
        # A benchmark opens more connections than the usual limit of 1024 files.
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        models = options.model or ["fake"]
        fake = FakeVllm(
            script,
            models=models,
            adapters=options.adapter,
            api_key=options.api_key,
            host=options.host,
            port=options.port,
            without_fields=options.without_field,
            without_endpoints=options.without_endpoint,
        )
        asyncio.run(_serve(fake, [*models, *options.adapter]))
    except OSError as error:
        print(f"fake vLLM: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    return 0


async def _serve(fake: FakeVllm, models: Sequence[str]) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with fake:
        print(f"fake vLLM listening on {fake.base_url} serving {', '.join(models)}", flush=True)
        await stopped.wait()


def _at_least(least: int, kind: type[int | float] = float) -> Callable[[str], float]:
    """The type of a number with a lower bound."""

    def number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value < math.inf:
            message = f"{text!r} is not a {'whole ' if kind is int else ''}number of at least {least}"
            raise argparse.ArgumentTypeError(message)
        return value

    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deltawire_server.fake_vllm",
        description="A fake vLLM server: plays recordings or generated answers, with faults. No model, no accelerator.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    add(
        "--port",
        type=int,
        default=8000,
        help="0 for a free port, which the first line of output has (default %(default)s)",
    )
    add("--model", action="append", metavar="NAME", help="served name; repeat for aliases (default fake)")
    add(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME",
        help="LoRA adapter of the first model; repeat for more",
    )
    add("--api-key", metavar="KEY", help="API key required on /v1/*")
    add(
        "--without-field",
        action="append",
        default=[],
        metavar="NAME",
        help="field of a chat request to leave out of the OpenAPI document; repeat for more",
    )
    add(
        "--without-endpoint",
        action="append",
        default=[],
        metavar="PATH",
        help="endpoint that does not exist, such as /tokenize or /openapi.json; repeat for more",
    )
    answer = parser.add_argument_group("answer to every chat request")
    add = answer.add_argument
    add(
        "--recording",
        type=Path,
        metavar="FILE",
        help="play this .sse or .body file verbatim; by default, an answer is generated",
    )
    add(
        "--tokens",
        type=_at_least(1, int),
        default=24,
        metavar="N",
        help="length of a generated answer (default %(default)s)",
    )
    add(
        "--tokens-per-second",
        type=_at_least(0),
        default=0.0,
        metavar="R",
        help="pace of each stream (default: unlimited)",
    )
    add(
        "--tool-call", action="store_true", help="generate a tool call whose arguments have N pieces, for every request"
    )
    add(
        "--chunks-per-write",
        type=_at_least(1, int),
        default=32,
        metavar="N",
        help="without a pace: tokens written at once, each in its own HTTP chunk (default %(default)s); "
        "with a pace, each is written separately",
    )
    pace = parser.add_argument_group("delays and faults (times in seconds)")
    add = pace.add_argument
    add("--headers-delay", type=_at_least(0), default=0.0, metavar="S", help="wait before the status line")
    add(
        "--first-delay",
        type=_at_least(0),
        default=0.0,
        metavar="S",
        help="wait between the headers and the first chunk",
    )
    add("--chunk-delay", type=_at_least(0), default=0.0, metavar="S", help="time from chunk to chunk; for recordings")
    add("--keep-alive", type=_at_least(0), default=0.0, metavar="S", help="send comment lines while waiting")
    add("--after", type=_at_least(0, int), metavar="N", help="end after N chunks")
    add("--end", choices=get_args(End), default="clean", help="how streams end (default %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
