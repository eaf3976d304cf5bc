"""The command as a process: its signals, its pipes, its exit status."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

import deltawire
from tests.client.scripted import WAIT, Gateway, bookmark, saying


def test_it_runs_as_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m deltawire` is the same program."""
    monkeypatch.setattr(sys, "argv", ["deltawire", "--version"])
    with pytest.raises(SystemExit):
        runpy.run_module("deltawire", run_name="__main__")
    assert capsys.readouterr().out == f"deltawire {deltawire.__version__}\n"


def start(
    gateway: Gateway, *arguments: str | bytes, stdout: int | IO[bytes] = subprocess.PIPE
) -> subprocess.Popen[bytes]:
    """Start the command as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "deltawire", *arguments],
        env=os.environ | {"DELTAWIRE_TARGET": gateway.target},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        # Under nohup and the like it is ignored, and a child would ignore it too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_ctrl_c(gateway: Gateway) -> None:
    """The call is cancelled, what came is kept, the status is 130."""
    gateway.will(*saying("Hel", "lo")[:2], WAIT)
    with start(gateway, "chat", "--model", "llama", "hi") as process:
        assert process.stdout is not None
        assert process.stdout.read(3) == b"Hel"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert (out, err) == (b"\n", b"interrupted\n")
    assert gateway.last.ended.wait(10)


def test_ctrl_c_while_watching(gateway: Gateway) -> None:
    """It is how a watch ends: the call is cancelled, and the status is 130."""
    gateway.will(bookmark("1"), WAIT)
    with start(gateway, "models", "watch", "--json") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b'{"revision": "1", "bookmark": true}\n'
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (130, b"", b"interrupted\n")
    assert gateway.last.ended.wait(10)


def test_a_reader_that_has_gone(gateway: Gateway) -> None:
    """As with `| head -1`: the call is cancelled, and nothing is said about it."""
    gateway.will(*saying("Hel", *["lo\n"] * 5000))
    with start(gateway, "chat", "--model", "llama", "--json", "hi") as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b'{"started"')
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_output_that_fails(gateway: Gateway) -> None:
    """A full disk is an error in one line."""
    gateway.will(*saying("Hel", "lo"))
    with (
        Path("/dev/full").open("wb") as full,
        start(gateway, "chat", "--model", "llama", "hi", stdout=full) as process,
    ):
        _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (1, b"error: input or output failed: No space left on device\n")


def test_an_argument_that_is_no_text(gateway: Gateway) -> None:
    """Bytes that are not UTF-8 are wrong usage."""
    with start(gateway, "chat", "--model", "llama", b"h\xff") as process:
        _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (2, b"error: the prompt is not UTF-8 text\n")
