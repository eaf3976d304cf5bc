"""What only a terminal is shown, and what it is spared."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import grpc

from deltawire import ToolCall
from deltawire._completion import elsewhere
from deltawire.v1.chat_completion_pb2 import GetChatCompletionResponse, Started
from deltawire.v1.model_registry_pb2 import GetModelResponse, ListModelsResponse
from tests.client.cli.support import Run, Terminal
from tests.client.scripted import (
    Fail,
    Gateway,
    calling,
    choice,
    completed,
    finished,
    model,
    notice,
    numbered,
    reasoning,
    saying,
    started,
    text,
)

if TYPE_CHECKING:
    import pytest

STATUS = grpc.StatusCode


def test_reasoning_is_for_terminals(gateway: Gateway, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dimmed, on standard error, and the terminal is as it was before the text begins; in a file it is not there."""
    events = numbered(
        started(), reasoning("h"), reasoning("m\x1b[31m"), text("hi"), finished(), completed(choice(said="hi"))
    )
    gateway.will(*events)
    assert run("chat", "--model", "llama", "hi") == (0, "hi\n", "")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    gateway.will(*events)
    assert run("chat", "--model", "llama", "hi")[1] == "hi\n"
    assert terminal.getvalue() == "\x1b[2mhm␛[31m\x1b[0m\n"


def test_reasoning_that_breaks_off(gateway: Gateway, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal is as it was, also then."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    gateway.will(*numbered(started(), reasoning("hm")))
    assert run("chat", "--model", "llama", "hi")[0] == 1
    assert terminal.getvalue().startswith("\x1b[2mhm\x1b[0m\nerror: UNKNOWN: the stream ended without its last event\n")


def test_a_model_does_not_steer_the_terminal(gateway: Gateway, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control characters are shown on a terminal, and kept in a file."""
    said = "a\x1b]52;c;eA==\x07\x9b\tb\u202ec\u2066\n"
    gateway.will(*saying(said))
    assert run("chat", "--model", "llama", "hi")[1] == said
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    gateway.will(*saying(said))
    run("chat", "--model", "llama", "hi")
    assert terminal.getvalue() == "a␛]52;c;eA==␇\ufffd\tb\ufffdc\ufffd\n"


def test_characters_that_cannot_be_seen(gateway: Gateway, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Separators of lines, characters of no width and tags are replaced on a terminal, and kept in a pipe."""
    hidden = "\u2028\u2029\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\u061c\u00ad\U000e0041"
    said = "-".join(f"a{each}" for each in hidden) + "\n"
    gateway.will(*saying(said))
    assert run("chat", "--model", "llama", "hi")[1] == said
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    gateway.will(*saying(said))
    run("chat", "--model", "llama", "hi")
    assert terminal.getvalue() == "-".join(["a\ufffd"] * len(hidden)) + "\n"


def test_json_has_no_control_characters(gateway: Gateway, run: Run) -> None:
    """All are escaped; protobuf leaves DEL."""
    gateway.will(*saying("a\x7f\x1b\u2028"))
    assert "a\\u007f\\u001b\\u2028" in run("chat", "--model", "llama", "--json", "hi")[1]


WILD = "X\x1b[31m\n\u202eY\u2028\x9bZ"
TAME = "X␛[31m \ufffdY \ufffdZ"


def test_errors_and_notes_do_not_steer_it_either(gateway: Gateway, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes from the gateway is on one line, its control characters shown, in a file too."""
    monkeypatch.setattr(elsewhere, "MAX_PAUSE", 0.0)
    ask = ("chat", "--model", "llama", "--request-id", "mine", "hi")
    gateway.will(Fail(STATUS.INVALID_ARGUMENT, "INVALID_REQUEST", WILD, violations=[(WILD, WILD), ("a", WILD + "b")]))
    assert run(*ask)[2].splitlines() == [
        f"error: INVALID_ARGUMENT (INVALID_REQUEST): {TAME}",
        f"  field: {TAME}",
        f"  a: {TAME}b",
        "  request id: mine",
    ]
    gateway.will(*numbered(started(), notice("X\x1b", WILD), finished(), completed(choice(said="hi"))))
    assert run(*ask)[2] == f"note: X␛ ({TAME})\n"
    gateway.will(*numbered(started(WILD)), Fail(STATUS.INTERNAL, trailers=(), message=WILD))
    for _ in range(1 + elsewhere.MAX_CONNECTIONS):
        gateway.will(Fail(STATUS.FAILED_PRECONDITION, "WRONG_REPLICA", WILD))
    err = run(*ask, "--retention", "60")[2]
    assert f"note: stream {TAME} broke off and goes on in 0.0 s: INTERNAL: {TAME}\n" in err
    assert f"note: for the rest: deltawire resume {TAME} --after 0\n" in err


def test_tables_and_facts_do_not_steer_it(gateway: Gateway, run: Run) -> None:
    """Each row and each fact stays on its line."""
    gateway.will(ListModelsResponse(models=[model("llama", aliases=[WILD])], unreachable_provider_ids=[WILD]))
    _, out, err = run("models", "list")
    assert (out.splitlines()[1].endswith(TAME), err.startswith(f"note: no answer from {TAME}: ")) == (True, True)
    gateway.will(GetModelResponse(model=model("llama", engine_root=WILD)))
    assert f"engine root: {TAME}\n" in run("models", "get", "llama")[1]
    gateway.will(GetChatCompletionResponse(completion_id="mine", started=Started(model=WILD)))
    assert f"model:      {TAME}\n" in run("get", "mine")[1]


def test_wrong_usage_does_not_steer_it(run: Run) -> None:
    """Arguments can come from elsewhere too."""
    assert run("chat", f"--max-tokens={WILD}", "hi")[2].count("\x1b") == 0
    assert run("models", "update", "llama", "--annotation", WILD)[2] == f"error: --annotation {TAME}: not KEY=VALUE\n"
    assert TAME in run("chat", "hi", WILD)[2]


def test_the_name_of_a_tool_does_not_steer_it(gateway: Gateway, run: Run) -> None:
    """Neither where its result is asked for."""
    gateway.will(*calling(ToolCall(call_id="c", tool_name=WILD, arguments="{}")))
    out = run("chat", "--model", "llama", stdin=["hi", EOFError(), EOFError()])[1]
    assert f"result of {TAME}({{}})> " in out
