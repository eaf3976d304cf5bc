"""What only a terminal is shown, and what it is spared."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from tests.client.cli.support import Run, Terminal
from tests.client.scripted import Gateway, choice, completed, finished, numbered, reasoning, saying, started, text

if TYPE_CHECKING:
    import pytest


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
    said = "a\x1b]52;c;eA==\x07\x9b\tb\n"
    gateway.will(*saying(said))
    assert run("chat", "--model", "llama", "hi")[1] == said
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    gateway.will(*saying(said))
    run("chat", "--model", "llama", "hi")
    assert terminal.getvalue() == "a␛]52;c;eA==␇\ufffd\tb\n"
