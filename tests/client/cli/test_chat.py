"""Chatting: without a model's name, and conversations."""

from __future__ import annotations

import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc

from deltawire import assistant, image, system, tool, user
from tests.client.cli.support import CALL, Run, Terminal, asked
from tests.client.scripted import WAIT, Fail, Gateway, calling, saying

if TYPE_CHECKING:
    import pytest

STATUS = grpc.StatusCode


def test_without_a_model(gateway: Gateway, run: Run) -> None:
    """The gateway finds the only chat model, and its answer says what there is to choose from."""
    gateway.will(*saying("hi"))
    assert run("chat", "hi")[0] == 0
    assert asked(gateway).model == ""
    gateway.will(Fail(STATUS.INVALID_ARGUMENT, "INVALID_REQUEST", message="chat.model: is required; there are: a, b"))
    status, _, err = run("chat", "hi")
    assert (status, "chat.model: is required; there are: a, b" in err) == (1, True)


def test_a_conversation(gateway: Gateway, run: Run) -> None:
    """Each turn knows those before it; empty lines are nothing; Ctrl-D ends it well."""
    gateway.will(*saying("one"))
    gateway.will(*saying("two"))
    status, out, err = run("chat", "--model", "llama", "--system", "be brief", stdin=["1?", "  ", "2?", EOFError()])
    assert (status, out) == (0, "> one\n> > two\n> ")
    assert err.startswith("llama; Ctrl-C stops an answer")
    turns = [system("be brief"), user("1?"), assistant("one"), user("2?")]
    assert list(asked(gateway).messages) == turns


def test_images_in_a_conversation(gateway: Gateway, run: Run) -> None:
    """They go with what is said first."""
    gateway.will(*saying("one"))
    gateway.will(*saying("two"))
    url = "https://example.com/cat.png"
    assert run("chat", "--model", "llama", "--image", url, stdin=["1?", "2?", EOFError()])[0] == 0
    assert list(asked(gateway).messages) == [user(["1?", image(url)]), assistant("one"), user("2?")]


def test_a_conversation_has_no_id(gateway: Gateway, run: Run) -> None:
    """Each of its completions would need another one."""
    status, _, err = run("chat", "--model", "llama", "--completion-id", "mine", stdin=[])
    assert (status, "leave out --completion-id" in err) == (2, True)
    assert gateway.calls == []


def test_ctrl_c_elsewhere(gateway: Gateway, run: Run) -> None:
    """Where the program that this is part of has another use for it, or this is not its main thread, it stays so."""
    seen = []
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        gateway.will(*saying("hi"), lambda: seen.append(signal.getsignal(signal.SIGINT)))
        assert run("chat", "--model", "llama", "hi")[0] == 0
        seen.append(signal.getsignal(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIG_IGN, signal.SIG_IGN]
    gateway.will(*saying("hi"), lambda: seen.append(signal.getsignal(signal.SIGINT)))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run, "chat", "--model", "llama", "hi").result(10)[0] == 0
    assert (seen[2], signal.getsignal(signal.SIGINT)) == (before, before)


def test_tool_calls_in_a_conversation(gateway: Gateway, run: Run) -> None:
    """The user types the results."""
    gateway.will(*calling(CALL))
    gateway.will(*saying("Rain."))
    status, out, _ = run("chat", "--model", "llama", stdin=["Köln?", "rain", EOFError()])
    assert status == 0
    assert 'result of get_weather({"city": "Köln"})> ' in out
    assert list(asked(gateway).messages) == [user("Köln?"), assistant(tool_calls=[CALL]), tool(CALL, "rain")]


def test_a_failed_turn_leaves_no_trace(gateway: Gateway, run: Run) -> None:
    """The error is shown, and the conversation goes on without the turn; so it does without a tool's result."""
    gateway.will(Fail(STATUS.INTERNAL, "INTERNAL"))
    gateway.will(*calling(CALL))
    gateway.will(*saying("hi"))
    status, _, err = run("chat", "--model", "llama", stdin=["1?", "2?", EOFError(), "3?", EOFError()])
    assert status == 0
    assert "error: INTERNAL (INTERNAL): it failed" in err
    assert "note: no result, so the turn is dropped" in err
    assert list(asked(gateway).messages) == [user("3?")]


def test_a_line_that_is_no_text(gateway: Gateway, run: Run) -> None:
    """It is said, and the conversation goes on; some terminals raise, others hand on lone surrogates."""
    gateway.will(*saying("hi"))
    broken = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    status, _, err = run("chat", "--model", "llama", stdin=["\udcff", broken, "1?", EOFError()])
    assert status == 0
    assert err.count("error: the line is not UTF-8 text\n") == 2
    assert list(asked(gateway).messages) == [user("1?")]


def test_ctrl_c_at_the_prompt(run: Run) -> None:
    """It ends everything."""
    status, _, err = run("chat", "--model", "llama", stdin=[KeyboardInterrupt()])
    assert status == 130
    assert err.endswith("interrupted\n")


def test_ctrl_c_in_an_answer(gateway: Gateway, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends that answer, keeps what came, and the conversation goes on."""

    class Stopped(Terminal):
        """Standard output whose reader presses Ctrl-C when the text comes."""

        def write(self, piece: str) -> int:
            """Write, and then be interrupted."""
            super().write(piece)
            if piece == "Hel":
                raise KeyboardInterrupt
            return len(piece)

    out = Stopped()
    monkeypatch.setattr(sys, "stdout", out)
    gateway.will(*saying("Hel", "lo")[:2], WAIT)
    gateway.will(*saying("yes"))
    status, _, err = run("chat", "--model", "llama", stdin=["1?", "2?", EOFError()])
    assert status == 0
    assert "note: the answer was stopped" in err
    assert "Hel" in out.getvalue()
    assert gateway.calls[0].ended.wait(10)
    assert list(asked(gateway).messages)[-1] == user("2?")
