"""The example client in JavaScript: grpc-js, with the proto files as its only knowledge of the API."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from typing import TYPE_CHECKING, Any

import pytest
from grpc import aio

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1.chat_completion_pb2_grpc import ChatCompletionServicer, add_ChatCompletionServicer_to_server
from deltawire_server.fake_vllm import Chunks, FakeVllm, Script
from tests.polyglot.calls import MODEL, ask, chat_request, fold, openai_tools, read_json
from tests.polyglot.programs import LIMIT, Outcome, node_chat, run, started
from tests.support.recordings import TRANSCRIPTS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.polyglot


async def chat(target: str, *flags: str, home: Path) -> Outcome:
    """Run the example client to its end."""
    return await run(*node_chat(), "--target", target, *flags, "hi", home=home)


def tools_file(recording: str, folder: Path) -> tuple[str, str]:
    """The flags that offer a recording's tools."""
    path = folder / "tools.json"
    path.write_text(json.dumps(openai_tools(recording)), encoding="utf-8")
    return "--tool", str(path)


@pytest.mark.parametrize(
    "recording",
    ["tool-text-before", "tool-two", "tool-noarg", "tool-malformed", "tool-truncated", "r-qwen3-tool", "text-unicode"],
)
async def test_the_events_are_the_python_clients(vllm: FakeVllm, target: str, tmp_path: Path, recording: str) -> None:
    """Text, reasoning, whole and failed tool calls: the same events in the same order, from the same request."""
    vllm.play(*[Script.recording(TRANSCRIPTS / f"{recording}.sse")] * 2)
    python = await ask(target, chat_request(recording))
    node = await chat(target, "--json", *tools_file(recording, tmp_path), home=tmp_path)
    assert node.status == 0, node.err
    assert fold(read_json(node.out)) == python.answer
    assert vllm.chats[0].body == vllm.chats[1].body


async def test_it_prints_text_and_tool_calls(vllm: FakeVllm, target: str, tmp_path: Path) -> None:
    """What a person sees: the text, the call with its verbatim arguments, and that it may be executed."""
    vllm.play(Script.recording(TRANSCRIPTS / "tool-text-before.sse"))
    outcome = await chat(target, *tools_file("tool-text-before", tmp_path), home=tmp_path)
    assert outcome.status == 0, outcome.err
    vllm.play(Script.recording(TRANSCRIPTS / "tool-text-before.sse"))
    python = await ask(target, chat_request("tool-text-before"))
    (text,) = [event["textDelta"]["text"] for event in python.answer if "textDelta" in event]
    (call,) = [event["toolCallDelta"]["toolCall"] for event in python.answer if "toolCallDelta" in event]
    assert outcome.out.startswith(text)
    assert f"tool call {call['toolName']}({call['arguments']}) {call['callId']}" in outcome.out
    assert outcome.out.endswith("[STOP_REASON_END_OF_MESSAGE, tool calls may be executed]\n")


async def test_a_failed_call_is_shown_as_failed(vllm: FakeVllm, target: str, tmp_path: Path) -> None:
    """Arguments that are no JSON: never as a call that could be run."""
    vllm.play(Script.recording(TRANSCRIPTS / "tool-malformed.sse"))
    outcome = await chat(target, *tools_file("tool-malformed", tmp_path), home=tmp_path)
    assert outcome.status == 0, outcome.err
    assert "failed: TOOL_CALL_FAILURE_REASON_MALFORMED_JSON" in outcome.out
    assert "may be executed" not in outcome.out


async def test_an_error_has_its_status_and_reason(target: str, tmp_path: Path) -> None:
    """The status, the trailer `deltawire-reason` and the message come through."""
    outcome = await chat(target, "--model", "nobody", home=tmp_path)
    assert outcome.status == 1
    assert outcome.out == ""
    assert outcome.err.startswith("NOT_FOUND (MODEL_NOT_FOUND): ")
    assert MODEL in outcome.err


async def test_a_fault_in_the_middle_comes_after_what_was_said(vllm: FakeVllm, target: str, tmp_path: Path) -> None:
    """The text, then `Completed` with the error, then the status with the same reason."""
    chunk = Chunks()
    script = Script.chunks([chunk.role(), chunk.text("half an"), chunk.text(" ans")], after=3, end="cut")
    vllm.play(script, script)
    outcome = await chat(target, home=tmp_path)
    assert outcome.status == 1
    assert outcome.out.startswith("half an ans")
    assert outcome.err.startswith("ABORTED (UPSTREAM_INCOMPLETE): ")
    events = read_json((await chat(target, "--json", home=tmp_path)).out)
    assert events[-1].completed.error.code == 10


async def test_a_cancel_reaches_the_engine(vllm: FakeVllm, target: str, tmp_path: Path) -> None:
    """Ctrl-C in the middle of an endless answer: the gateway hangs up on vLLM, and nothing runs on."""
    vllm.play(Script.generated(tokens=1_000_000, tokens_per_second=50))
    command = (*node_chat(), "--target", target, "tell me everything")
    async with started(*command, home=tmp_path) as process, asyncio.timeout(LIMIT):
        assert process.stdout is not None
        assert await process.stdout.read(1)
        assert vllm.running == 1
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 130
        (request,) = vllm.chats
        await request.closed_early.wait()
    assert vllm.running == 0


class _Breaks(ChatCompletionServicer):
    """A gateway seen through a proxy that loses the end of streams."""

    async def CreateChatCompletion(  # noqa: N802 -- the RPC's name
        self,
        _request: chat_pb.CreateChatCompletionRequest,
        _context: Any,  # noqa: ANN401
    ) -> chat_pb.CreateChatCompletionResponse:
        raise NotImplementedError

    async def StreamChatCompletion(  # noqa: N802 -- the RPC's name
        self,
        _request: chat_pb.StreamChatCompletionRequest,
        _context: Any,  # noqa: ANN401
    ) -> AsyncIterator[chat_pb.StreamChatCompletionResponse]:
        yield chat_pb.StreamChatCompletionResponse(started=chat_pb.Started(completion_id="cmpl-0"))
        yield chat_pb.StreamChatCompletionResponse(
            sequence=1, choice_index=0, text_delta=chat_pb.TextDelta(text="Yes, if you")
        )


async def test_a_stream_without_completed_is_refused(tmp_path: Path) -> None:
    """A stream that just stops, with status OK, is not taken for an answer."""
    server = aio.server(options=[("grpc.so_reuseport", 0)])
    add_ChatCompletionServicer_to_server(_Breaks(), server)  # type: ignore[abstract]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(server.stop, None)
        outcome = await chat(f"127.0.0.1:{port}", "--model", "any", home=tmp_path)
    assert outcome.status == 1
    assert "Yes, if you" in outcome.out
    assert "without Completed" in outcome.err


async def test_a_wrong_command_line_is_explained(tmp_path: Path) -> None:
    """Status 2 and the usage, before anything is sent."""
    outcome = await run(*node_chat(), home=tmp_path)
    assert outcome.status == 2
    assert "usage: node chat.js" in outcome.err
