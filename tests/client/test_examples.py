"""The examples, and the Python in the README, run unchanged."""

from __future__ import annotations

import contextlib
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import pytest

from deltawire import ChatMessage, Model, PermissionDeniedError, ToolCall, tool, user
from deltawire.v1.chat_completion_pb2 import CreateChatCompletionResponse, ResumePoint
from deltawire.v1.model_registry_pb2 import (
    RegisterModelRequest,
    RegisterModelResponse,
    UnregisterModelRequest,
    UnregisterModelResponse,
    UpdateModelResponse,
)
from tests.client.scripted import (
    Event,
    Fail,
    Gateway,
    bookmark,
    call_failed,
    calling,
    changed,
    choice,
    completed,
    finished,
    model,
    numbered,
    saying,
    started,
    text,
)

CLIENT = Path(__file__).parents[2] / "client"
CALL = ToolCall(call_id="call_1", tool_name="get_weather", arguments='{"city":"Oslo"}')
LLAMA = model("llama", aliases=["l"], etag="r1")
# Nothing else ends a watch.
END = Fail(grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
NO_MODEL = Fail(grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", "there is none", {"model": "llama", "request_id": "r1"})

Play: TypeAlias = Callable[[str], tuple[int, str, str]]


@pytest.fixture
def play(gateway: Gateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Play:
    """Run an example: its exit status, and what it printed."""

    def play(name: str) -> tuple[int, str, str]:
        monkeypatch.setenv("DELTAWIRE_TARGET", gateway.target)
        monkeypatch.setattr(sys, "argv", [name, "llama", "Is it raining?"])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(CLIENT / "examples/python" / name), run_name="__main__")
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return play


@pytest.mark.parametrize("name", ["chat.py", "tools.py"])
def test_usage(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without arguments they say what they take."""
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(CLIENT / "examples/python" / name), run_name="__main__")
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"usage: python {name} MODEL PROMPT\n"


def test_chat(gateway: Gateway, play: Play) -> None:
    """The text as it comes, then what it cost."""
    gateway.will(*saying("Hel", "lo"))
    assert play("chat.py") == (0, "Hello\n", "STOP_REASON_END_OF_TURN, 5 tokens\n")


def test_chat_that_fails(gateway: Gateway, play: Play) -> None:
    """Before the first event, and after it."""
    gateway.will(NO_MODEL)
    status, _, err = play("chat.py")
    assert (status, err) == (1, "\nMODEL_NOT_FOUND: there is none (request r1)\n")
    gateway.will(*saying("Hel", "lo")[:2])
    status, out, err = play("chat.py")
    assert (status, out) == (1, "Hel")
    assert "send the prompt again" in err


def test_tools(gateway: Gateway, play: Play) -> None:
    """Asked, executed, asked again with the results."""
    gateway.will(*calling(CALL))
    gateway.will(*saying("It rains."))
    status, out, err = play("tools.py")
    assert (status, out) == (0, "It rains.\n")
    assert err.startswith('get_weather({"city":"Oslo"}) -> ')
    messages = gateway.last.request.chat.messages
    assert messages[0] == user("Is it raining?")
    assert messages[1].assistant.tool_calls[0] == CALL
    assert messages[2] == tool(CALL, '{"city": "Oslo", "weather": "rain"}')


def test_tools_that_cannot_be_executed(gateway: Gateway, play: Play) -> None:
    """A cut call is shown and not executed."""
    broken = call_failed("get_weather", '{"ci')
    end = completed(choice(said="hm", reason="OUT_OF_TOKENS", failed_tool_calls=[broken.tool_call_delta]))
    gateway.will(*numbered(started(), text("hm"), broken, finished(reason="OUT_OF_TOKENS"), end))
    status, out, err = play("tools.py")
    assert (status, out) == (0, "hm\n")
    assert err.startswith("not executed: get_weather: ")


def test_tools_without_an_end(gateway: Gateway, play: Play) -> None:
    """A model that never stops calling is stopped."""
    for _ in range(5):
        gateway.will(*calling(CALL))
    status, _, err = play("tools.py")
    assert status == 1
    assert err.endswith("the model still called tools in the last round\n")


def whole(events: Sequence[Event]) -> CreateChatCompletionResponse:
    """What a call with one answer gives, from the stream that says the same."""
    return CreateChatCompletionResponse(started=events[0].started, completed=events[-1].completed)


README: dict[str, tuple[list[list[Any]], str]] = {
    "Chat": ([saying("Ray", "leigh.")], "Rayleigh.5 STOP_REASON_END_OF_TURN "),
    "What can be asked": ([[whole(saying("yes"))]], "yes\n"),
    "Ending an answer, and going on with one": (
        [saying("Once ", "upon")[:2], saying("Once ", "upon")[2:]],
        "Once upon",
    ),
    "With asyncio": ([saying("Ray", "leigh.")], "Rayleigh.STOP_REASON_END_OF_TURN\n"),
    "A conversation": ([[whole(saying("Rayleigh."))], [whole(saying("Longer way."))]], "Longer way.\n"),
    "Tools": ([[whole(calling(CALL))], [whole(saying("It rains."))]], "It rains.\n"),
    "Functions as tools": ([[whole(calling(CALL))], [whole(saying("It rains."))]], "It rains.\n2 rounds, 10 tokens\n"),
    "Errors": ([[NO_MODEL]], "no such model: llama\n"),
    "Connecting": ([], ""),
    "Models and providers": (
        [
            [RegisterModelResponse(model=model("assistant", etag="r1"))],
            [UpdateModelResponse(model=model("assistant", aliases=["helper"]))],
            [UnregisterModelResponse()],
        ],
        "also called helper\n",
    ),
    "Watching models": (
        [
            [
                changed("ADDED", LLAMA),
                changed("ADDED", model("m")),
                bookmark("1"),
                changed("REMOVED", LLAMA, "2"),
                bookmark("3"),
                END,
            ]
        ],
        "as of revision 1 there are llama m\nas of revision 3 there are m\n",
    ),
}


def sections() -> dict[str, str]:
    """The Python under each heading of the README."""
    prose = (CLIENT / "README.md").read_text(encoding="utf-8")
    parts = (part.partition("\n") for part in prose.split("\n## ")[1:])
    code = {title: re.findall(r"```python\n(.*?)```", body, re.DOTALL) for title, _, body in parts}
    return {title: "\n".join(blocks) for title, blocks in code.items() if blocks}


def test_every_block_is_run() -> None:
    """None is left out below."""
    assert sections().keys() == README.keys()


@pytest.mark.parametrize("title", README)
def test_the_readme(
    title: str,
    gateway: Gateway,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """It prints what it says it prints, but for the address."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cat.png").write_bytes(b"\x89PNG")
    scripts, expected = README[title]
    for script in scripts:
        gateway.will(*script)
    code = sections()[title].replace("127.0.0.1:50051", gateway.target)
    with pytest.raises(PermissionDeniedError) if title == "Watching models" else contextlib.nullcontext():
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})  # noqa: S102 -- our own text
    assert capsys.readouterr().out.startswith(expected)
    if title == "What can be asked":
        assert gateway.calls[0].request.chat.messages[0].user.content[1].image.data == b"\x89PNG"
    if title == "Tools":
        assert gateway.last.request.chat.messages[-1] == tool(CALL, "rain in Oslo")
    if title == "Ending an answer, and going on with one":
        assert gateway.last.request.resume == ResumePoint(completion_id="cmpl-1", last_sequence=1)
    if title == "Functions as tools":
        assert gateway.last.request.chat.messages[-1] == tool(CALL, "rain in Oslo, 7 °C")
    if title == "A conversation":
        said: ChatMessage = gateway.last.request.chat.messages[2]
        assert said.assistant.text == "Rayleigh."
    if title == "Models and providers":
        registered, updated, unregistered = (call.request for call in gateway.calls)
        assert registered == RegisterModelRequest(model_id="assistant", provider_model_id="smollm2")
        assert updated.model == Model(id="assistant", aliases=["helper"], etag="r1")
        assert unregistered == UnregisterModelRequest(model_id="assistant")
