"""The example client in Java: generated stubs, with google.rpc from the descriptor set."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from deltawire_server.fake_vllm import Chunks, FakeVllm, Script
from tests.polyglot.calls import MODEL, ask, chat_request
from tests.polyglot.programs import Outcome, run, tool
from tests.polyglot.stubs import JARS
from tests.support.recordings import TRANSCRIPTS

if TYPE_CHECKING:
    from pathlib import Path

    from tests.polyglot.stubs import Builds

pytestmark = pytest.mark.polyglot


async def chat(builds: Builds, *arguments: str, home: Path) -> Outcome:
    """Run the example client to its end."""
    classes = builds.result("Java").folder / "classes"
    # The first compiler is enough for a program that runs this briefly, and starts it in half the time.
    return await run(tool("java"), "-XX:TieredStopAtLevel=1", "-cp", f"{classes}:{JARS}", "Chat", *arguments, home=home)


async def test_it_prints_text_tool_call_and_the_reason_of_an_error(
    vllm: FakeVllm, target: str, tmp_path: Path, builds: Builds
) -> None:
    """The answer as the Python client has it, then the failed call with all of its ErrorInfo."""
    vllm.play(*[Script.recording(TRANSCRIPTS / "tool-text-before.sse")] * 2)
    python = (await ask(target, chat_request("tool-text-before"))).answer
    (text,) = [event["textDelta"]["text"] for event in python if "textDelta" in event]
    (delta,) = [event["toolCallDelta"] for event in python if "toolCallDelta" in event]
    assert delta["parseStatus"] == "TOOL_CALL_PARSE_STATUS_SUCCEEDED"
    call = delta["toolCall"]
    java = await chat(builds, target, home=tmp_path)
    assert java.status == 0, java.err
    assert java.err == ""
    answer, failure = java.out.removesuffix("\n").rsplit("\n", 1)
    assert answer == (
        f"{text}\ntool call {call['toolName']}({call['arguments']}) {call['callId']}\n"
        "\n[STOP_REASON_END_OF_MESSAGE, tool calls may be executed]\n"
        f"completed: {python[-1]['completed']['usage']['completionTokens']} tokens"
    )
    found = re.fullmatch(
        r"NOT_FOUND \(MODEL_NOT_FOUND of deltawire\.dev, \{model=no-such-model, request_id=[\w-]+\}\): (.*)", failure
    )
    assert found, failure
    assert MODEL in found[1]
    # The model was left out, so the only one answered; the failed call did not get to it.
    assert len(vllm.chats) == 2
    sent = vllm.chats[1].body
    assert sent["messages"] == [{"role": "user", "content": "How warm is it in Oslo?"}]
    assert [each["function"]["name"] for each in sent["tools"]] == ["get_weather"]


async def test_a_failed_tool_call_is_shown_as_failed(
    vllm: FakeVllm, target: str, tmp_path: Path, builds: Builds
) -> None:
    """Arguments that are not JSON are never shown as a call that can be executed."""
    vllm.play(Script.recording(TRANSCRIPTS / "tool-malformed.sse"))
    java = await chat(builds, target, MODEL, home=tmp_path)
    assert "failed: TOOL_CALL_FAILURE_REASON_MALFORMED_JSON" in java.out
    assert "may be executed" not in java.out


async def test_a_fault_after_the_first_event_is_an_error(
    vllm: FakeVllm, target: str, tmp_path: Path, builds: Builds
) -> None:
    """The text that came is printed, then the status with its reason; the exit status is 1."""
    chunk = Chunks()
    vllm.play(Script.chunks([chunk.role(), chunk.text("half an"), chunk.text(" ans")], after=3, end="cut"))
    java = await chat(builds, target, MODEL, home=tmp_path)
    assert java.status == 1
    assert java.out.startswith("half an ans")
    assert java.err.startswith("ABORTED (UPSTREAM_INCOMPLETE of deltawire.dev, {")


async def test_a_wrong_command_line_is_explained(tmp_path: Path, builds: Builds) -> None:
    """Exit status 2 and the usage, before anything is sent."""
    java = await chat(builds, "one", "two", "three", home=tmp_path)
    assert java.status == 2
    assert "usage: java Chat" in java.err
