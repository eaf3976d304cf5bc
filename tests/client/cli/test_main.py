"""The command as a process: its signals, its pipes, its exit status."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

import grpc
import pytest

import deltawire
from deltawire._cli.files import MAX_CHARACTERS
from deltawire.v1.chat_completion_pb2 import CancelChatCompletionRequest, CancelChatCompletionResponse
from tests.client.scripted import (
    WAIT,
    Fail,
    Gateway,
    bookmark,
    choice,
    completed,
    finished,
    numbered,
    saying,
    started,
    text,
)


def test_it_runs_as_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m deltawire` is the same program."""
    monkeypatch.setattr(sys, "argv", ["deltawire", "--version"])
    with pytest.raises(SystemExit):
        runpy.run_module("deltawire", run_name="__main__")
    assert capsys.readouterr().out == f"deltawire {deltawire.__version__}\n"


# Under nohup and the like Ctrl-C is ignored, and a child would ignore it too. Not by `preexec_fn`, which forks this process, and
# gRPC's threads in it do not take that well: they log into the child's standard error.
_LAUNCH = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def start(
    gateway: Gateway, *arguments: str | bytes, stdout: int | IO[bytes] = subprocess.PIPE
) -> subprocess.Popen[bytes]:
    """Start the command as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", _LAUNCH, "-m", "deltawire", *arguments],
        env=os.environ | {"DELTAWIRE_TARGET": gateway.target},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize("json", [False, True])
def test_ctrl_c(gateway: Gateway, json: bool) -> None:
    """The answer is ended softly: its end and its usage still come, and the status is 130."""
    end = completed(choice(said="Hel", reason="CANCELLED"))
    events = numbered(started(), text("Hel"), finished(reason="CANCELLED"), end)
    gateway.will(*events[:2], WAIT, *events[2:])
    gateway.will(gateway.stop_waiting, CancelChatCompletionResponse())
    with start(gateway, "chat", "--model", "llama", "hi", *(["--json"] if json else [])) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b'{"started"') if json else process.stdout.read(3) == b"Hel"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
    assert process.returncode == 130
    said = b"" if json else b"note: the answer ended with CANCELLED\n"
    assert err == said + b"note: it had 5 tokens\ninterrupted\n"
    assert b'"completed"' in out if json else out == b"\n"
    assert gateway.last.request == CancelChatCompletionRequest(completion_id="cmpl-1")


def test_ctrl_c_that_cannot_be_soft(gateway: Gateway) -> None:
    """The call is cancelled, what came is kept."""
    gateway.will(*saying("Hel", "lo")[:2], WAIT)
    gateway.will(Fail(grpc.StatusCode.UNIMPLEMENTED, trailers=()))
    with start(gateway, "chat", "--model", "llama", "hi") as process:
        assert process.stdout is not None
        assert process.stdout.read(3) == b"Hel"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (130, b"\n", b"interrupted\n")
    assert gateway.calls[0].ended.wait(10)


def test_ctrl_c_twice(gateway: Gateway) -> None:
    """The second one does not wait for anything."""
    gateway.will(*saying("Hel", "lo")[:2], WAIT)
    cancelled = threading.Event()
    gateway.will(cancelled.set, WAIT)
    with start(gateway, "chat", "--model", "llama", "hi") as process:
        assert process.stdout is not None
        assert process.stdout.read(3) == b"Hel"
        process.send_signal(signal.SIGINT)
        assert cancelled.wait(10)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (130, b"\n", b"interrupted\n")
    assert gateway.calls[0].ended.wait(10)


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


def test_a_reader_that_closes_the_pipe(gateway: Gateway) -> None:
    """As with `| head -1`: the call is cancelled, and that is neither an error nor a failure."""
    gateway.will(*saying("Hel", *["lo\n"] * 5000))
    with start(gateway, "chat", "--model", "llama", "--json", "hi") as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b'{"started"')
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 0


def in_shell(gateway: Gateway, command: str) -> tuple[int, bytes, bytes]:
    """Run a line of shell, in which $deltawire is the command."""
    environment = os.environ | {"DELTAWIRE_TARGET": gateway.target, "deltawire": f"{sys.executable} -m deltawire"}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, check=False, timeout=30)
    return done.returncode, done.stdout, done.stderr


def test_help_into_a_reader_that_closes_the_pipe(gateway: Gateway) -> None:
    """`--help | head -1` too."""
    line = "$deltawire chat --help | head -1; exit ${PIPESTATUS[0]}"
    status, out, err = in_shell(gateway, line)
    assert (status, out.startswith(b"usage: deltawire chat"), err) == (0, True, b"")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_help_onto_a_full_disk(gateway: Gateway, unbuffered: str) -> None:
    """A lost output is a failure; a lost error message leaves the status of the error."""
    error = b"error: input or output failed: No space left on device\n"
    python = f"PYTHONUNBUFFERED={unbuffered} $deltawire"
    for option in ("--help", "--version"):
        assert in_shell(gateway, f"{python} {option} >/dev/full") == (1, b"", error)
    assert in_shell(gateway, f"{python} --bogus 2>/dev/full") == (2, b"", b"")


def test_closed_standard_files(gateway: Gateway) -> None:
    """They are like /dev/null: no input is an error in one line, and no output is none."""
    error = b"error: there is no prompt: standard input is empty\n"
    assert in_shell(gateway, "$deltawire chat <&-") == (2, b"", error)
    gateway.will(*saying("hi"))
    assert in_shell(gateway, "$deltawire chat hi >&-") == (0, b"", b"")
    gateway.will(*saying("hi"))
    assert in_shell(gateway, "$deltawire chat hi 2>&-") == (0, b"hi\n", b"")


def test_a_reader_that_closes_standard_error(gateway: Gateway) -> None:
    """A failure stays one: only the reader of standard output may have had enough."""
    for command, status in (("chat --bogus", 2), ("chat --tool nope hi", 2), ("models list --target 127.0.0.1:1", 1)):
        line = f"(sleep 0.2; exec $deltawire {command}) 2>&1 >/dev/null | true; exit ${{PIPESTATUS[0]}}"
        assert in_shell(gateway, line) == (status, b"", b"")


def test_a_file_without_an_end(gateway: Gateway) -> None:
    """It is not read into memory for ever."""
    status, out, err = in_shell(gateway, "ulimit -v 4000000; $deltawire chat --tool /dev/zero hi")
    assert (status, out) == (2, b"")
    assert err == f"error: /dev/zero: has more than {MAX_CHARACTERS} characters\n".encode()
    status, out, err = in_shell(gateway, "ulimit -v 4000000; $deltawire chat < /dev/zero")
    assert (status, out, err.startswith(b"error: standard input: has more than")) == (2, b"", True)


def test_nothing_but_the_error_is_written(gateway: Gateway) -> None:
    """GRPC's C core would log failed handshakes."""
    status, out, err = in_shell(gateway, "$deltawire providers --tls")
    assert (status, out, err.count(b"\n"), err.startswith(b"error: ")) == (1, b"", 1, True)


_PRESSED_AT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Press:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Press())
from deltawire._cli import main
sys.exit(main(["--version"]))
"""


@pytest.mark.parametrize(
    "module", ["deltawire._cli.run", "argparse", "grpc", "grpc._cython.cygrpc", "deltawire._client"]
)
def test_ctrl_c_during_imports(module: str) -> None:
    """No traceback, however early it is: status 130."""
    program = [sys.executable, "-c", _PRESSED_AT.format(module=module)]
    done = subprocess.run(program, capture_output=True, check=False, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"interrupted\n")


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
