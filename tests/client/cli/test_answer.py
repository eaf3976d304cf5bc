"""An answer as it is printed."""

from __future__ import annotations

from deltawire import ChatRequest, ToolCall, user
from tests.client.cli.support import CALL, Run, asked
from tests.client.scripted import (
    Gateway,
    call_failed,
    called,
    calling,
    choice,
    completed,
    finished,
    numbered,
    saying,
    started,
    text,
)


def test_text(gateway: Gateway, run: Run) -> None:
    """The text, a newline after it, nothing else."""
    gateway.will(*saying("Hel", "lo"))
    assert run("chat", "--model", "llama", "hi") == (0, "Hello\n", "")
    assert asked(gateway) == ChatRequest(model="llama", messages=[user("hi")])


def test_text_that_ends_its_line(gateway: Gateway, run: Run) -> None:
    """No empty line is added."""
    gateway.will(*saying("Hello\n"))
    assert run("chat", "--model", "llama", "hi")[1] == "Hello\n"


def test_tool_calls(gateway: Gateway, run: Run) -> None:
    """One readable line each, on a line of its own."""
    gateway.will(*calling(CALL, said="Let me look."))
    status, out, _ = run("chat", "--model", "llama", "hi")
    assert (status, out) == (0, 'Let me look.\ntool call: get_weather({"city": "Köln"})\n')


def test_tool_calls_that_failed(gateway: Gateway, run: Run) -> None:
    """With what the model wrote, on one line too; and why the answer ended."""
    nameless = call_failed("", "{}", 1)
    events = numbered(
        started(), call_failed("f", '{"a":\n 1'), nameless, finished(reason="OUT_OF_TOKENS"),
        completed(choice(reason="OUT_OF_TOKENS")),
    )  # fmt: skip
    gateway.will(*events)
    status, out, err = run("chat", "--model", "llama", "hi")
    assert status == 0
    assert out.splitlines() == [
        'tool call failed: f({"a": 1): TRUNCATED: the answer was cut',
        "tool call failed: (no name)({}): TRUNCATED: the answer was cut",
    ]
    assert err == "note: the answer ended with OUT_OF_TOKENS\n"


def test_arguments_that_are_no_json_are_still_one_line(gateway: Gateway, run: Run) -> None:
    """Whatever a later gateway may send."""
    gateway.will(*calling(ToolCall(call_id="c", tool_name="f", arguments="not\njson")))
    assert run("chat", "--model", "llama", "hi")[1] == "tool call: f(not json)\n"


def test_several_choices(gateway: Gateway, run: Run) -> None:
    """The first as it comes, the others after it, whole."""
    broken = call_failed("g", "{", 0, 1)
    other = choice(1, "B", "OUT_OF_TOKENS", calls=[CALL], failed_tool_calls=[broken.tool_call_delta])
    gateway.will(
        *numbered(
            started(), text("a"), text("B", 1), called(CALL, 0, 1), broken, text("b"), finished(0),
            finished(1, "OUT_OF_TOKENS"), completed(choice(0, "ab"), other),
        )
    )  # fmt: skip
    status, out, err = run("chat", "--model", "llama", "hi")
    assert status == 0
    assert out.splitlines() == [
        "ab",
        "--- choice 1",
        "B",
        'tool call: get_weather({"city": "Köln"})',
        "tool call failed: g({): TRUNCATED: the answer was cut",
    ]
    assert err == "note: choice 1 ended with OUT_OF_TOKENS\n"
