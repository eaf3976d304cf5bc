"""The commands that people type: `deltawire` against the running gateway, and `make run` up to its end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e.support import CALL_SECONDS, SEA

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.support.run import GatewayProcess
    from tests.support.vllm_cpu import VllmServer

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
DELTAWIRE = str(Path(sys.executable).with_name("deltawire"))
RUN = [sys.executable, "-m", "tests.support.run"]


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


def of(vllm: VllmServer) -> dict[str, str]:
    """The environment that names this vLLM, and no gateway's settings."""
    return {"VLLM_URL": vllm.base_url, "VLLM_API_TOKEN": vllm.api_key, "DELTAWIRE_REGISTRY_DATABASE_URL": ""}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def processes() -> set[str]:
    """The command lines of all processes that are gateways of this environment."""
    server = str(Path(sys.executable).with_name("deltawire-server"))
    found = set()
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if server in line:
            found.add(f"{entry.parent.name} {line}")
    return found


async def test_chat_prints_the_answer(gateway: GatewayProcess) -> None:
    """Text on standard output, nothing else; the one model there is need not be named."""
    status, out, errors = await run(
        DELTAWIRE, "chat", "--target", gateway.address, "--temperature", "0", "--max-tokens", "60", SEA
    )
    assert status == 0, errors
    assert out.startswith("The sea")
    assert not errors


async def test_chat_as_json_prints_every_event(gateway: GatewayProcess) -> None:
    """One a line, from the prompt on standard input."""
    status, out, errors = await run(
        DELTAWIRE, "chat", "--target", gateway.address, "--json", "--max-tokens", "4", given=SEA
    )
    assert status == 0, errors
    events = [json.loads(line) for line in out.splitlines()]
    assert "started" in events[0]
    assert events[-1]["completed"]["usage"]["provenance"] == "USAGE_PROVENANCE_EXACT"


async def test_chat_with_a_tool(gateway: GatewayProcess, tmp_path: Path) -> None:
    """A tool in OpenAI's shape, from a file; the call is printed with its arguments."""
    function = {
        "name": "set_percent",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"percent": {"type": "integer", "enum": [10, 20]}},
            "required": ["percent"],
            "additionalProperties": False,
        },
    }
    file = tmp_path / "tool.json"
    file.write_text(json.dumps({"type": "function", "function": function}))
    options = ["--tool", str(file), "--tool-choice", "required", "--temperature", "0", "--max-tokens", "200"]
    status, out, errors = await run(DELTAWIRE, "chat", "--target", gateway.address, *options, "Set 10 percent.")
    assert status == 0, errors
    assert 'set_percent({"percent": ' in out


async def test_models_and_health(gateway: GatewayProcess) -> None:
    """What the registry and the provider say."""
    status, out, _ = await run(DELTAWIRE, "models", "list", "--target", gateway.address, "--json")
    assert status == 0
    assert json.loads(out)["id"] == "vllm/smollm2"
    status, out, _ = await run(DELTAWIRE, "health", "--target", gateway.address)
    assert status == 0
    assert "OK" in out


async def test_a_failed_call_exits_with_one(gateway: GatewayProcess) -> None:
    """The reason is on standard error."""
    status, out, errors = await run(DELTAWIRE, "chat", "--target", gateway.address, "--model", "gpt-5", "hi")
    assert status == 1
    assert not out
    assert "MODEL_NOT_FOUND" in errors or "no model" in errors.lower()


async def test_run_once_shows_an_answer_and_a_call_and_leaves_nothing(vllm: VllmServer) -> None:
    """The whole of `make run` against a vLLM that is there, without the serving."""
    before = processes()
    status, out, errors = await run(*RUN, "--once", "--port", "0", variables=of(vllm))
    assert status == 0, errors
    assert "The sea" in out
    assert 'SUCCEEDED set_light({"room": ' in out
    assert "deltawire chat --target" in out
    assert processes() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_run_serves_until_it_is_told_to_stop(vllm: VllmServer, number: signal.Signals) -> None:
    """Then the gateway goes with it, and the status is 0: that is how it is meant to end."""
    before = processes()
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        *RUN, "--port", str(port), cwd=ROOT, env={**os.environ, **of(vllm)}, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(CALL_SECONDS):
            async for line in process.stdout:
                if b"serving until" in line:
                    break
            status, out, _ = await run(DELTAWIRE, "health", "--target", f"127.0.0.1:{port}")
            assert (status, "OK" in out) == (0, True)
            process.send_signal(number)
            await process.stdout.read()
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    assert processes() == before


async def test_run_ends_when_its_gateway_does(vllm: VllmServer) -> None:
    """With status 1 and the reason."""
    before = processes()
    process = await asyncio.create_subprocess_exec(
        *RUN,
        "--port",
        "0",
        cwd=ROOT,
        env={**os.environ, **of(vllm)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(CALL_SECONDS):
            async for line in process.stdout:
                if b"serving until" in line:
                    break
            [gateway] = processes() - before
            os.kill(int(gateway.split()[0]), signal.SIGKILL)
            _, errors = await process.communicate()
        assert process.returncode == 1
        assert b"the gateway ended by itself" in errors
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()


async def test_run_says_that_its_port_is_taken(vllm: VllmServer) -> None:
    """Before anything is started."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, _, errors = await run(*RUN, "--once", "--port", str(port), variables=of(vllm))
    assert status == 1
    assert f"cannot listen on 127.0.0.1:{port}" in errors
