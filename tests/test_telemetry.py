"""Logs: their forms, their levels, and the secrets that they do not hold."""

from __future__ import annotations

import io
import json
import logging
import threading
from typing import TYPE_CHECKING

import pytest
import structlog

from deltawire_server.telemetry import MAX_WAITING, configure_logging, get_logger, in_background

if TYPE_CHECKING:
    from collections.abc import Iterator


LARGE = 64 * 1024
LARGE_LINES = MAX_WAITING // LARGE
"""Lines of this size that fit into the limit: the last one may exceed it, and each has a little more than its text."""


class Terminal(io.StringIO):
    """Claims to be one."""

    def isatty(self) -> bool:
        """Yes."""
        return True


class Blocked(io.StringIO):
    """Takes nothing until it may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = threading.Event()
        self.may_go_on = threading.Event()

    def write(self, text: str) -> int:
        """Wait, then write."""
        self.reached.set()
        self.may_go_on.wait(10)
        return super().write(text)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Leaves logging as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.parametrize("form", ["json", "auto"])
def test_json(form: str) -> None:
    """One object per line; auto is JSON unless on a terminal. Our own lines and other libraries' are alike."""
    stream = io.StringIO()
    configure_logging("info", form, stream=stream)
    get_logger("ours").info("happened", value=5)
    logging.getLogger("theirs").warning("said %s", "so")
    ours, theirs = map(json.loads, stream.getvalue().splitlines())
    assert ours.pop("timestamp").endswith("Z")
    assert ours == {"event": "happened", "value": 5, "level": "info", "logger": "ours"}
    assert (theirs["event"], theirs["level"], theirs["logger"]) == ("said so", "warning", "theirs")


@pytest.mark.parametrize(("stream", "form"), [(Terminal(), "auto"), (io.StringIO(), "text")])
def test_text(stream: io.StringIO, form: str) -> None:
    """For people: coloured on a terminal only."""
    configure_logging("info", form, stream=stream)
    get_logger("ours").info("happened", value=5)
    assert "happened" in stream.getvalue()
    assert ("\x1b[" in stream.getvalue()) == stream.isatty()


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_traceback_is_logged(form: str) -> None:
    """In either form."""
    stream = io.StringIO()
    configure_logging("info", form, stream=stream)
    get_logger("ours").error("failed", exc_info=ValueError("the cause"))
    get_logger("ours").error("failed otherwise", exc_info=None)
    assert "ValueError: the cause" in stream.getvalue()
    assert "NoneType" not in stream.getvalue()


def test_levels() -> None:
    """Below the level nothing is logged, and httpx's line per request only if it warns."""
    stream = io.StringIO()
    configure_logging("warning", "json", stream=stream)
    get_logger("ours").info("no")
    get_logger("ours").warning("yes")
    configure_logging("info", "json", stream=stream)
    logging.getLogger("httpx").info("no")
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["yes"]


@pytest.mark.parametrize("key", ["token", "api_token", "Authorization", "x_api_key", "db_password", "client_secret"])
def test_what_sounds_secret_is_masked(key: str) -> None:
    """Whatever logs it; counts of tokens are none."""
    stream = io.StringIO()
    configure_logging("info", "json", stream=stream)
    get_logger("ours").info("x", **{key: "hush", "prompt_tokens": 3, "completion_tokens": 4})
    entry = json.loads(stream.getvalue())
    assert (entry[key], entry["prompt_tokens"], entry["completion_tokens"]) == ("***", 3, 4)


def test_standard_error_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    """Standard output is for results."""
    configure_logging("info", "json")
    get_logger("ours").info("happened")
    captured = capsys.readouterr()
    assert "happened" in captured.err
    assert not captured.out


def test_lines_are_written_in_the_background() -> None:
    """A reader that stops does not stop the gateway: lines beyond the limit are dropped and counted, the others are written."""
    stream = Blocked()
    configure_logging("info", "json", stream=stream)
    logger = get_logger("ours")
    with in_background():
        logger.info("first")
        stream.reached.wait(10)
        for number in range(LARGE_LINES + 5):
            logger.info("more", number=number, text="x" * LARGE)
        assert stream.getvalue() == ""
        stream.may_go_on.set()
    entries = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [entry["event"] for entry in entries[:1]] == ["first"]
    assert [entry["number"] for entry in entries if entry["event"] == "more"] == [*range(LARGE_LINES)]
    assert [entry["lines"] for entry in entries if entry["level"] == "warning"] == [5]


def test_a_closed_stream_loses_lines_only() -> None:
    """The process goes on."""
    stream = io.StringIO()
    configure_logging("info", "json", stream=stream)
    stream.close()
    get_logger("ours").info("lost")


def test_half_a_character() -> None:
    """As in the name of a file that is not UTF-8."""
    stream = io.StringIO()
    configure_logging("info", "json", stream=stream)
    get_logger("ours").info("x", name="\ud800", kind=object)
    assert json.loads(stream.getvalue())["name"] == "\ud800"
