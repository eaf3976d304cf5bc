"""Ctrl-C while a stream is read, without a process of its own: what it does to the stream, and when it is not soft."""

from __future__ import annotations

import signal
import threading
import time
from typing import TYPE_CHECKING, Any, cast

import pytest

from deltawire import CallCancelledError, UnavailableError
from deltawire._cli import follow, registry
from deltawire._cli.interrupt import Interrupt, end_softly
from deltawire._failure import Failure
from tests.client.scripted import WAIT, Fail, Gateway, choice, completed, finished, numbered, started, text
from tests.client.test_client import STATUS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deltawire import ChatStream
    from tests.client.cli.support import Run


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Ctrl-C is not ignored, as it is in what a shell runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Stream:
    """Notes how it is ended."""

    def __init__(self, error: Exception | None = None, *, is_only_sought: bool = False) -> None:
        self.ends: list[str] = []
        self._is_only_sought = is_only_sought
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
    ("stream", "ends"),
    [
        (Stream(), ["softly"]),
        (Stream(UnavailableError(Failure(STATUS.UNAVAILABLE, "it is away"))), ["softly", "at once"]),
        (Stream(RuntimeError("there is no id")), ["softly", "at once"]),
        (Stream(is_only_sought=True), ["at once"]),
    ],
)
def test_the_first_one(stream: Stream, ends: list[str]) -> None:
    """Softly if that can be done, else at once; afterwards Ctrl-C is what it was."""
    before = signal.getsignal(signal.SIGINT)
    with Interrupt(lambda: end_softly(cast("ChatStream", stream))) as interrupt:
        assert not interrupt.pressed
        signal.raise_signal(signal.SIGINT)
        assert stream.over.wait(10)
        assert interrupt.pressed
    assert stream.ends == ends
    assert signal.getsignal(signal.SIGINT) is before is signal.default_int_handler


def test_the_second_one() -> None:
    """It ends the call at once, and raises nothing where it is pressed: gRPC would not take that well. A third one does."""
    stream = Stream()
    with Interrupt(lambda: None, stream.cancel) as interrupt:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stream.over.wait(10)
        assert stream.ends == ["at once"]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert interrupt.pressed


class Pressed(Interrupt):
    """A Ctrl-C as soon as the answer is waited for, which `way` then ends."""

    way = "cancel"

    def __enter__(self) -> Any:  # noqa: ANN401 -- whatever the other one gives
        """Press it."""
        self.pressed = True
        if self.way == "cancel":
            self._ends[-1]()
        return self


class PressedLater(Interrupt):
    """A Ctrl-C half a second after the answer is waited for."""

    def __enter__(self) -> Any:  # noqa: ANN401 -- whatever the other one gives
        """Press it soon."""
        threading.Timer(0.5, self._press, (signal.SIGINT, None)).start()
        return self


def test_an_answer_that_was_ended_at_once(gateway: Gateway, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Status 130, with what came; here nothing."""
    monkeypatch.setattr(follow, "Interrupt", Pressed)
    gateway.will(WAIT)
    assert run("chat", "--model", "llama", "hi") == (130, "", "interrupted\n")


def test_a_retained_answer_that_was_ended_at_once(gateway: Gateway, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway goes on with it, so it is said how to read the rest."""
    monkeypatch.setattr(follow, "Interrupt", Pressed)
    gateway.will(WAIT)
    status, out, err = run("chat", "--model", "llama", "--retention", "60", "--completion-id", "mine", "hi")
    assert (status, out, err) == (130, "", "note: for the rest: deltawire resume mine\ninterrupted\n")


def test_a_search_that_was_ended(gateway: Gateway, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection has reached the process that has the completion: status 130, without waiting for the others."""
    monkeypatch.setattr(follow, "Interrupt", PressedLater)
    gateway.will(Fail(STATUS.FAILED_PRECONDITION, "WRONG_REPLICA", "another process has it"))
    gateway.will(WAIT)
    started = time.monotonic()
    note = "note: trying up to 8 new connections: FAILED_PRECONDITION (WRONG_REPLICA): another process has it"
    assert run("resume", "mine") == (130, "", f"{note}\ninterrupted\n")
    assert time.monotonic() - started < 5


def test_an_answer_that_fails_after_ctrl_c(gateway: Gateway, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error is printed; the status is 130 all the same."""
    monkeypatch.setattr(follow, "Interrupt", Pressed)
    monkeypatch.setattr(Pressed, "way", "softly")
    gateway.will(Fail(STATUS.INTERNAL, "INTERNAL", "it failed"))
    status, _, err = run("chat", "--request-id", "mine", "hi")
    assert (status, err) == (130, "error: INTERNAL (INTERNAL): it failed\n  request id: mine\ninterrupted\n")


def test_a_watch_that_is_cancelled(gateway: Gateway, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is how it ends: status 130, and no error."""
    monkeypatch.setattr(registry, "Interrupt", Pressed)
    gateway.will(WAIT)
    assert run("models", "watch", "--json") == (130, "", "interrupted\n")


def test_a_watch_that_nobody_pressed_to_cancel(gateway: Gateway, run: Run) -> None:
    """It is an error like others."""
    gateway.will(Fail(STATUS.CANCELLED, message="a proxy did it", trailers=()))
    status, out, err = run("models", "watch", "--json")
    assert (status, out) == (1, "")
    assert err.startswith("error: CANCELLED: a proxy did it")


def test_an_answer_that_was_ended_softly(gateway: Gateway, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Status 130 as well, with the end and what it cost."""
    monkeypatch.setattr(follow, "Interrupt", Pressed)
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
