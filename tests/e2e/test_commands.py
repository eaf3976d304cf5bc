"""The commands: `deltawire` against the running gateway, and `make run` up to its end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from tests.e2e.support import CALL_SECONDS, DELTAWIRE, MODEL, RUN, SEA, alive, descendants, run, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.support.gateway_process import GatewayProcess
    from tests.support.vllm_cpu import VllmServer

pytestmark = pytest.mark.e2e


def of(vllm: VllmServer) -> dict[str, str]:
    """Environment variables for this vLLM, without settings of a gateway."""
    return {"VLLM_URL": vllm.base_url, "VLLM_API_TOKEN": vllm.api_key, "DELTAWIRE_REGISTRY_DATABASE_URL": ""}


def free_port() -> int:
    """A free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@asynccontextmanager
async def command(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """`deltawire` with these arguments; killed at the end of the block."""
    process = await asyncio.create_subprocess_exec(DELTAWIRE, *arguments, stdout=asyncio.subprocess.PIPE)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_chat_prints_the_answer(gateway: GatewayProcess) -> None:
    """Only the text is on standard output; the only model need not be named."""
    status, out, errors = await run(
        DELTAWIRE, "chat", "--target", gateway.address, "--temperature", "0", "--max-tokens", "60", SEA
    )
    assert status == 0, errors
    assert out.startswith("The sea")
    assert not errors


async def test_chat_as_json_prints_every_event(gateway: GatewayProcess) -> None:
    """`--json` prints one event per line; the prompt is read from standard input."""
    status, out, errors = await run(
        DELTAWIRE, "chat", "--target", gateway.address, "--json", "--max-tokens", "4", given=SEA
    )
    assert status == 0, errors
    events = [json.loads(line) for line in out.splitlines()]
    assert "started" in events[0]
    assert events[-1]["completed"]["usage"]["provenance"] == "USAGE_PROVENANCE_EXACT"


async def test_chat_with_a_tool(gateway: GatewayProcess, tmp_path: Path) -> None:
    """A tool in OpenAI's form is read from a file; the call is printed with its arguments."""
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
    """`models list` prints the model, and `health` prints OK."""
    status, out, _ = await run(DELTAWIRE, "models", "list", "--target", gateway.address, "--json")
    assert status == 0
    assert json.loads(out)["id"] == "vllm/smollm2"
    status, out, _ = await run(DELTAWIRE, "health", "--target", gateway.address)
    assert status == 0
    assert "OK" in out


async def test_a_registered_model(gateway: GatewayProcess) -> None:
    """A model is registered, updated, filtered, used and unregistered; an old etag is refused; a watch prints each change."""

    async def models(*arguments: str) -> tuple[int, str, str]:
        return await run(DELTAWIRE, "models", *arguments, "--target", gateway.address)

    async with command("models", "watch", "--json", "--target", gateway.address) as watch:
        assert watch.stdout is not None
        while "bookmark" not in json.loads(await watch.stdout.readline()):
            pass
        status, out, errors = await models("register", "steady", "--provider-model", MODEL, "--alias", "firm", "--json")
        assert status == 0, errors
        before = json.loads(out)
        status, out, errors = await models("update", "firm", "--etag", before["etag"], "--alias", "even", "--json")
        assert status == 0, errors
        after = json.loads(out)
        assert (after["id"], after["aliases"]) == ("steady", ["even"])
        status, out, errors = await models("update", "steady", "--etag", before["etag"], "--no-aliases")
        assert (status, out) == (1, "")
        assert "ETAG_MISMATCH" in errors
        status, out, errors = await models("list", "--source", "registered", "--state", "serving", "--json")
        assert (status, json.loads(out)) == (0, after), errors
        status, out, errors = await models("refresh")
        assert (status, out.split()) == (0, ["PROVIDER", "MODELS", "vllm", "1"]), errors
        options = ["--target", gateway.address, "--model", "even", "--max-tokens", "2"]
        status, _, errors = await run(DELTAWIRE, "chat", *options, SEA)
        assert status == 0, errors
        status, out, errors = await models("unregister", "even", "--etag", after["etag"])
        assert (status, out) == (0, "even is no longer registered\n"), errors

        async with asyncio.timeout(CALL_SECONDS):
            changes = [json.loads(await watch.stdout.readline()) for _ in range(5)]
        watch.send_signal(signal.SIGINT)
        assert await watch.wait() == 130
    assert [(each["change"], each["model"]["id"], each["model"].get("etag")) for each in changes] == [
        ("CHANGE_ADDED", "steady", before["etag"]),
        ("CHANGE_REMOVED", "vllm/smollm2", None),  # a registered model replaces its target in listings
        ("CHANGE_MODIFIED", "steady", after["etag"]),
        ("CHANGE_REMOVED", "steady", after["etag"]),
        ("CHANGE_ADDED", "vllm/smollm2", None),
    ]


async def test_a_failed_call_exits_with_one(gateway: GatewayProcess) -> None:
    """A failed call prints its reason on standard error."""
    status, out, errors = await run(DELTAWIRE, "chat", "--target", gateway.address, "--model", "gpt-5", "hi")
    assert status == 1
    assert not out
    assert "MODEL_NOT_FOUND" in errors or "no model" in errors.lower()


async def test_run_once_shows_an_answer_and_a_call(vllm: VllmServer) -> None:
    """With `--once`, `make run` prints an answer and a tool call of an existing vLLM, and exits."""
    status, out, errors = await run(*RUN, "--once", "--port", "0", variables=of(vllm))
    assert status == 0, errors
    assert "The sea" in out
    assert 'SUCCEEDED set_light({"room": ' in out
    assert "deltawire chat --target" in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_run_serves_until_a_signal(vllm: VllmServer, number: signal.Signals) -> None:
    """A signal ends the gateway too, with status 0."""
    port = free_port()
    async with serving("--port", str(port), variables=of(vllm)) as process:
        status, out, _ = await run(DELTAWIRE, "health", "--target", f"127.0.0.1:{port}")
        assert (status, "OK" in out) == (0, True)
        started = descendants(process.pid)
        assert len(started) == 1
        process.send_signal(number)
        assert await process.wait() == 0
    assert not alive(started)


async def test_run_fails_if_its_gateway_exits(vllm: VllmServer) -> None:
    """`make run` exits with status 1 and the reason."""
    async with serving("--port", "0", variables=of(vllm)) as process:
        [gateway] = descendants(process.pid)
        os.kill(gateway, signal.SIGKILL)
        _, errors = await process.communicate()
    assert process.returncode == 1
    assert b"the gateway exited unexpectedly" in errors


async def test_run_with_a_wrong_key(vllm: VllmServer) -> None:
    """With a wrong key, `make run` fails and names VLLM_API_TOKEN."""
    status, _, errors = await run(*RUN, "--once", "--port", "0", variables={**of(vllm), "VLLM_API_TOKEN": "wrong"})
    assert status == 1
    assert "VLLM_API_TOKEN" in errors


async def test_run_with_a_port_in_use(vllm: VllmServer) -> None:
    """`make run` fails before it starts anything if its port is in use."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, _, errors = await run(*RUN, "--once", "--port", str(port), variables=of(vllm))
    assert status == 1
    assert f"cannot listen on 127.0.0.1:{port}" in errors
