"""Ctrl-C while an answer comes, without a process of its own: what it does to the stream, and when it is not soft."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, Any, cast

import pytest

from deltawire import CallCancelledError, UnavailableError
from deltawire._cli import follow
from deltawire._cli.interrupt import SoftInterrupt
from deltawire._failure import Failure
from tests.client.scripted import WAIT, Gateway, choice, completed, finished, numbered, started, text
from tests.client.test_client import STATUS

if TYPE_CHECKING:
    from deltawire import ChatStream
    from tests.client.cli.support import Run


class Stream:
    """Notes how it is ended."""

    def __init__(self, error: Exception | None = None) -> None:
        self.ends: list[str] = []
        self.over = threading.Event()
        self._error = error

    def cancel_softly(self) -> None:
        """End it softly, or fail."""
        self.ends.append("softly")
        if self._error is not None:
            raise self._error
        self.over.set()

    def cancel(self) -> None:
        """End it at once."""
        self.ends.append("at once")
        self.over.set()


@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (None, ["softly"]),
        (UnavailableError(Failure(STATUS.UNAVAILABLE, "it is away")), ["softly", "at once"]),
        (RuntimeError("there is no id"), ["softly", "at once"]),
    ],
)
def test_the_first_one(error: Exception | None, ends: list[str]) -> None:
    """Softly if that can be done, else at once; afterwards Ctrl-C is what it was."""
    stream = Stream(error)
    before = signal.getsignal(signal.SIGINT)
    with SoftInterrupt(cast("ChatStream", stream)) as interrupt:
        assert not interrupt.pressed
        signal.raise_signal(signal.SIGINT)
        assert stream.over.wait(10)
        assert interrupt.pressed
    assert stream.ends == ends
    assert signal.getsignal(signal.SIGINT) is before is signal.default_int_handler


def test_the_second_one() -> None:
    """It does not wait; the first one is not repeated."""
    stream = Stream()
    with SoftInterrupt(cast("ChatStream", stream)):
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert stream.over.wait(10)
    assert stream.ends == ["softly"]


class Pressed(SoftInterrupt):
    """A Ctrl-C as soon as the answer is waited for, which `way` then ends."""

    way = "cancel"

    def __enter__(self) -> Any:  # noqa: ANN401 -- whatever the other one gives
        """Press it."""
        self.pressed = True
        if self.way == "cancel":
            self._stream.cancel()
        return self


def test_an_answer_that_was_ended_at_once(gateway: Gateway, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Status 130, with what came; here nothing."""
    monkeypatch.setattr(follow, "SoftInterrupt", Pressed)
    gateway.will(WAIT)
    assert run("chat", "--model", "llama", "hi") == (130, "", "interrupted\n")


def test_an_answer_that_was_ended_softly(gateway: Gateway, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Status 130 as well, with the end and what it cost."""
    monkeypatch.setattr(follow, "SoftInterrupt", Pressed)
    monkeypatch.setattr(Pressed, "way", "softly")
    end = completed(choice(said="Hel", reason="CANCELLED"))
    gateway.will(*numbered(started(), text("Hel"), finished(reason="CANCELLED"), end))
    status, out, err = run("chat", "--model", "llama", "hi")
    assert (status, out) == (130, "Hel\n")
    assert err == "note: the answer ended with CANCELLED\nnote: it had 5 tokens\ninterrupted\n"


def test_a_cancel_that_nobody_pressed(gateway: Gateway, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an error like others."""

    def cancelled(_: object) -> None:
        raise CallCancelledError(Failure(STATUS.CANCELLED, "a proxy did it"))

    monkeypatch.setattr(follow, "print_answer", cancelled)
    gateway.will(WAIT)
    assert run("chat", "--model", "llama", "hi") == (1, "", "error: CANCELLED: a proxy did it\n")
