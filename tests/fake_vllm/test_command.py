"""The look-alike as a program."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from typing import TYPE_CHECKING

import pytest

from deltawire_server.fake_vllm.__main__ import main
from tests.fake_vllm.raw import ASK, TRANSCRIPTS, events, http

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

RECORDING = TRANSCRIPTS / "tool-two.sse"


@contextlib.asynccontextmanager
async def program(*arguments: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """Start it on a free port; gives the process and its base URL."""
    command = (sys.executable, "-m", "deltawire_server.fake_vllm", "--port", "0", *arguments)
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        line = (await process.stdout.readline()).decode()
        yield process, next(word for word in line.split() if word.startswith("http://"))
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_it_plays_a_recording_and_ends_on_a_signal(number: signal.Signals) -> None:
    """The line it prints names where it listens; a signal ends it with status 0."""
    async with program("--recording", str(RECORDING), "--model", "m", "--api-key", "k") as (process, url):
        async with http(url, authorization="Bearer k") as client:
            answer = await client.post("/v1/chat/completions", json=ASK | {"model": "m"})
        process.send_signal(number)
        assert await process.wait() == 0
    assert answer.content == RECORDING.read_bytes()


async def test_it_makes_up_a_call_and_breaks_it() -> None:
    """The flags of generated answers and of faults."""
    arguments = ("--tokens", "9", "--tool-call", "--tokens-per-second", "5000", "--after", "11", "--end", "no_done")
    async with program(*arguments) as (_, url), http(url) as client:
        answer = await client.post("/v1/chat/completions", json=ASK)
    assert len(events(answer.content + b"data: [DONE]\n\n")) == 11


async def test_it_serves_models_and_adapters() -> None:
    """As many as were named, in their order."""
    async with program("--model", "a", "--model", "b", "--adapter", "x") as (_, url), http(url) as client:
        cards = (await client.get("/v1/models")).json()["data"]
    assert [(card["id"], card["parent"]) for card in cards] == [("a", None), ("b", None), ("x", "a")]


async def test_it_knows_less() -> None:
    """The configured fields and endpoints are missing."""
    arguments = ("--without-field", "cache_salt", "--without-endpoint", "/tokenize", "--without-endpoint", "/version")
    async with program(*arguments) as (_, url), http(url) as client:
        document = (await client.get("/openapi.json")).json()
        statuses = [(await client.post("/tokenize", json=ASK)).status_code, (await client.get("/version")).status_code]
    assert "cache_salt" not in document["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert statuses == [404, 404]


def test_an_address_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    """One line says so; status 1."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["--port", str(taken.getsockname()[1])]) == 1
    assert "in use" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--tokens", "0"),
        ("--tokens", "1.5"),
        ("--tokens-per-second", "-1"),
        ("--after", "-2"),
        ("--first-delay", "nan"),
    ],
)
def test_numbers_out_of_range(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The message names the flag."""
    with pytest.raises(SystemExit) as caught:
        main([flag, value])
    assert caught.value.code == 2
    assert f"argument {flag}: '{value}' is not a " in capsys.readouterr().err


def test_a_recording_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    """One line says so; status 1."""
    assert main(["--recording", "/nowhere.sse"]) == 1
    assert "/nowhere.sse" in capsys.readouterr().err
