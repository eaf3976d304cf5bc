"""Messages as JSON lines, and what is said of errors."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import grpc
import pytest
from google.protobuf.json_format import Parse

from deltawire.v1.chat_completion_pb2 import Completed, StreamChatCompletionResponse
from tests.client.scripted import Event, Fail, Gateway, choice, completed, finished, numbered, saying, started, text

if TYPE_CHECKING:
    from tests.client.cli.support import Run

STATUS = grpc.StatusCode


def test_json(gateway: Gateway, run: Run) -> None:
    """Every event on a line of its own, which reads back as the event; names and enums as protobuf JSON has them."""
    gateway.will(*saying("Hé", "lo"))
    status, out, err = run("chat", "--model", "llama", "--json", "hi")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert [Parse(line, StreamChatCompletionResponse()) for line in lines] == saying("Hé", "lo")
    assert json.loads(lines[1]) == {"sequence": "1", "choiceIndex": 0, "textDelta": {"text": "Hé"}}
    assert json.loads(lines[-1])["completed"]["choices"][0]["stopReason"] == "STOP_REASON_END_OF_TURN"


def test_a_failed_call(gateway: Gateway, run: Run) -> None:
    """Status 1; name, reason, message, every violation on a line, when to try again, and the request id."""
    fail = Fail(
        STATUS.INVALID_ARGUMENT,
        "INVALID_REQUEST",
        "two fields",
        violations=[("chat.messages", "is empty"), ("chat.model", "is empty")],
        retry_after=1.5,
    )
    gateway.will(fail)
    status, out, err = run("chat", "--model", "llama", "--request-id", "mine", "hi")
    assert (status, out) == (1, "")
    assert err.splitlines() == [
        "error: INVALID_ARGUMENT (INVALID_REQUEST): two fields",
        "  chat.messages: is empty",
        "  chat.model: is empty",
        "  try again in 1.5 s",
        "  request id: mine",
    ]


@pytest.mark.parametrize(
    ("message", "detail"),
    [("chat.model: is empty", []), ("is empty", ["  field: chat.model"]), ("no", ["  chat.model: is empty"])],
    ids=["whole", "description", "other"],
)
def test_one_violation(gateway: Gateway, run: Run, message: str, detail: list[str]) -> None:
    """What the message says already is not said twice."""
    gateway.will(Fail(STATUS.INVALID_ARGUMENT, "INVALID_REQUEST", message, violations=[("chat.model", "is empty")]))
    _, _, err = run("chat", "--model", "llama", "--request-id", "mine", "hi")
    assert err.splitlines() == [
        f"error: INVALID_ARGUMENT (INVALID_REQUEST): {message}",
        *detail,
        "  request id: mine",
    ]


def test_violations_in_the_message(gateway: Gateway, run: Run) -> None:
    """The gateway lists them there; only one that is missing there has a line."""
    violations = [("a", "is empty"), ("b", "is negative"), ("c", "is unknown")]
    gateway.will(Fail(STATUS.INVALID_ARGUMENT, "INVALID_REQUEST", "a: is empty; b: is negative", violations=violations))
    _, _, err = run("chat", "--request-id", "mine", "hi")
    assert err.splitlines() == [
        "error: INVALID_ARGUMENT (INVALID_REQUEST): a: is empty; b: is negative",
        "  c: is unknown",
        "  request id: mine",
    ]


def faulted() -> list[Event]:
    """A stream that a fault ended, as far as the gateway could tell."""
    error = Completed.Error(code=10, reason=15, message="it broke off")  # type: ignore[arg-type]
    end = completed(choice(said="Hel", reason="UPSTREAM_INCOMPLETE"), error=error)
    return numbered(started(), text("Hel"), finished(reason="UPSTREAM_INCOMPLETE"), end)


@pytest.mark.parametrize("end", [[], [Fail(STATUS.ABORTED, "UPSTREAM_INCOMPLETE", "it broke off")]])
def test_a_fault_keeps_what_came(gateway: Gateway, run: Run, end: list[Fail]) -> None:
    """The text stays on a line of its own; the status is 1 even if a proxy lost the call's own."""
    gateway.will(*faulted(), *end)
    status, out, err = run("chat", "--model", "llama", "hi")
    assert (status, out) == (1, "Hel\n")
    assert err.startswith("error: ABORTED (UPSTREAM_INCOMPLETE): it broke off\n")


def test_a_fault_in_json(gateway: Gateway, run: Run) -> None:
    """`completed` with its error is printed like every event."""
    gateway.will(*faulted(), Fail(STATUS.ABORTED, "UPSTREAM_INCOMPLETE"))
    status, out, err = run("chat", "--model", "llama", "--json", "hi")
    assert status == 1
    assert json.loads(out.splitlines()[-1])["completed"]["error"] == {
        "code": 10,
        "reason": "ERROR_REASON_UPSTREAM_INCOMPLETE",
        "message": "it broke off",
    }
    assert err.startswith("error: ABORTED")


def test_a_stream_that_breaks_the_rules(gateway: Gateway, run: Run) -> None:
    """It is an error with its request id."""
    gateway.will(*saying("a")[1:])
    status, _, err = run("chat", "--model", "llama", "--request-id", "mine", "hi")
    assert status == 1
    assert "event 0 was expected and 1 came" in err
    assert "request id: mine" in err
