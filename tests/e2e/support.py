"""Shared by the tests on a real vLLM: forced answers, requests, and the state of the engine itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
import urllib.request
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltawire import CompletionNotFoundError, ResponseFormat, tool_definition

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping

    from deltawire import AsyncClient, StreamChatCompletionResponse
    from deltawire.v1.chat_completion_pb2 import GetChatCompletionResponse
    from deltawire.v1.tool_pb2 import ToolCallDelta
    from tests.support.vllm_cpu import VllmServer

MODEL = "smollm2"
CALL_SECONDS = 300.0
"""The timeout of one call, far above the duration of any (40 s for the first with log-probabilities)."""

SEA = "Write one short sentence about the sea."

# Strict: the engine makes the arguments follow the schema, even with a model this small.
LIGHT_SCHEMA = {
    "type": "object",
    "properties": {
        "room": {"type": "string", "enum": ["kitchen", "bedroom", "hall"]},
        "percent": {"type": "integer", "minimum": 0, "maximum": 100},
    },
    "required": ["room", "percent"],
    "additionalProperties": False,
}
LIGHT = tool_definition("set_light", "Set how bright a room is", input_schema=LIGHT_SCHEMA, strict=True)

# Not strict: the grammar of a strict tool would replace the one that forces an answer.
WEATHER = tool_definition(
    "get_weather",
    "Current weather for a city",
    input_schema={"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
)

DELTAWIRE = str(Path(sys.executable).with_name("deltawire"))
"""The client's command."""

ROOT = Path(__file__).parents[2]
RUN = (sys.executable, "-m", "tests.support.run")

LORA_RANK = 8
"""The rank of the adapter of `write_adapter`, and the smallest value of vLLM's `--max-lora-rank`."""

_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def forced(text: str) -> ResponseFormat:
    """A response format that forces the model to generate this text."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return ResponseFormat(grammar=f'root ::= "{escaped}"')


def call_text(arguments: str, name: str = "get_weather") -> str:
    """A tool call in the format of the server's parser (hermes), with verbatim arguments."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def kinds(events: Iterable[StreamChatCompletionResponse]) -> list[str]:
    """The kinds of the events; adjacent events of the same kind count once."""
    named = [event.WhichOneof("event") or "" for event in events]
    return [kind for place, kind in enumerate(named) if place == 0 or named[place - 1] != kind]


def delta_text(events: Iterable[StreamChatCompletionResponse]) -> str:
    """The concatenated text deltas of a stream with one choice."""
    return "".join(event.text_delta.text for event in events)


def call_deltas(events: Iterable[StreamChatCompletionResponse]) -> list[ToolCallDelta]:
    """The tool call deltas, in order."""
    return [event.tool_call_delta for event in events if event.HasField("tool_call_delta")]


@contextmanager
def suspended(vllm: VllmServer) -> Iterator[None]:
    """Suspend the engine: it keeps its connections and requests, and processes nothing."""
    vllm.kill_group(signal.SIGSTOP)
    try:
        yield
    finally:
        vllm.kill_group(signal.SIGCONT)


def write_adapter(folder: Path, model: Path) -> None:
    """Write a LoRA adapter for a Llama model that changes nothing: all its weights are zero."""
    shape = json.loads((model / "config.json").read_text())
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    tensors: dict[str, dict[str, object]] = {}
    place = 0
    for layer in range(layers):
        for matrix, sizes in {"A": (LORA_RANK, hidden), "B": (hidden, LORA_RANK)}.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{matrix}.weight"
            end = place + 2 * LORA_RANK * hidden
            tensors[name] = {"dtype": "BF16", "shape": sizes, "data_offsets": (place, end)}
            place = end
    # The format of safetensors: how long the header is, the header, the numbers.
    header = json.dumps(tensors).encode()
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(place))
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": LORA_RANK, "lora_alpha": LORA_RANK, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj"]}))


class Engine:
    """The HTTP API of vLLM, called directly."""

    def __init__(self, server: VllmServer) -> None:
        self._server = server

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """POST a JSON body to a path, and return the response."""
        request = self._request(path, {"model": MODEL, **body})
        with _opener.open(request, timeout=CALL_SECONDS) as response:
            answer: dict[str, Any] = json.load(response)
            return answer

    def adapter(self, action: str, **body: str) -> None:
        """Load or unload a LoRA adapter."""
        request = self._request(f"/v1/{action}_lora_adapter", body)
        with _opener.open(request, timeout=CALL_SECONDS) as response:
            response.read()

    def tokens(self, text: str) -> list[int]:
        """The token ids of a text."""
        ids: list[int] = self.ask("/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]
        return ids

    def prompt_tokens(self, text: str) -> int:
        """The number of prompt tokens of one user message."""
        count: int = self.ask("/tokenize", {"messages": [{"role": "user", "content": text}]})["count"]
        return count

    def _metric(self, name: str) -> int:
        with _opener.open(f"{self._server.base_url}/metrics", timeout=CALL_SECONDS) as response:
            for line in response.read().decode().splitlines():
                if line.startswith(f"{name}{{"):
                    return int(float(line.rpartition(" ")[2]))
        raise AssertionError(f"vLLM does not report {name}")

    def _request(self, path: str, body: Mapping[str, Any]) -> urllib.request.Request:
        return urllib.request.Request(  # noqa: S310 (the address is the server's own, always http:)
            f"{self._server.base_url}{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {self._server.api_key}"},
        )

    def running(self) -> int:
        """The number of running requests."""
        return self._metric("vllm:num_requests_running")

    def generated(self) -> int:
        """The number of tokens generated since its start."""
        return self._metric("vllm:generation_tokens_total")

    async def becomes_idle(self) -> None:
        """Wait until no request is running.

        Raises:
            AssertionError: Half a minute has passed. What the tests cancel would run for longer.
        """
        await eventually(lambda: self.running() == 0, "vLLM goes on generating")


async def eventually(condition: Callable[[], bool], problem: str, seconds: float = 30.0) -> None:
    """Wait for a condition that another process fulfills.

    Raises:
        AssertionError: It did not come about; the message is `problem`.
    """
    deadline = time.monotonic() + seconds
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < deadline, problem
        await asyncio.sleep(0.1)


async def looked_up(
    client: AsyncClient, completion_id: str, condition: Callable[[GetChatCompletionResponse], bool]
) -> GetChatCompletionResponse:
    """What the gateway says of a completion, once it says this; that it knows none of this id may change, too.

    Raises:
        TimeoutError: It has not come about.
    """
    async with asyncio.timeout(CALL_SECONDS):
        while True:
            with contextlib.suppress(CompletionNotFoundError):
                found = await client.chat.get(completion_id)
                if condition(found):
                    return found
            await asyncio.sleep(0.05)


async def run(*command: str, given: str = "", variables: Mapping[str, str] | None = None) -> tuple[int, str, str]:
    """Run a command to its end: exit status, standard output, standard error."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, **(variables or {})},
    )
    try:
        out, errors = await asyncio.wait_for(process.communicate(given.encode()), CALL_SECONDS)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, out.decode(), errors.decode()


@asynccontextmanager
async def serving(*options: str, variables: Mapping[str, str]) -> AsyncIterator[asyncio.subprocess.Process]:
    """`make run` with these options, once it serves; stopped at the end of the block."""
    process = await asyncio.create_subprocess_exec(
        *RUN,
        *options,
        cwd=ROOT,
        env={**os.environ, **variables},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(2 * CALL_SECONDS):
            async for line in process.stdout:
                if b"serving until" in line:
                    break
            else:
                _, errors = await process.communicate()
                raise AssertionError(f"it does not serve: {errors.decode()}")
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


def descendants(ancestor: int) -> dict[int, str]:
    """All descendants of a process, with their command lines."""
    parents = {pid: parent for pid, (parent, _) in _processes().items()}
    found: dict[int, str] = {}
    for pid in parents:
        above = pid
        while above in parents and above != ancestor:
            above = parents[above]
        if above == ancestor != pid:
            with contextlib.suppress(OSError):
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return found


def alive(pids: Iterable[int]) -> set[int]:
    """The processes that are running; zombies are not."""
    states = {pid: state for pid, (_, state) in _processes().items()}
    return {pid for pid in pids if states.get(pid, "Z") not in ("Z", "X")}


def _processes() -> dict[int, tuple[int, str]]:
    """The parent and state of every process."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended while we looked
            # "PID (NAME) STATE PPID ...", and the name may hold spaces and brackets
            state, parent = entry.read_text(errors="replace").rpartition(")")[2].split()[:2]
            found[int(entry.parent.name)] = (int(parent), state)
    return found
