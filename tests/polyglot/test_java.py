"""The Java client: its page as written, its example, and what it does with a real gateway."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import shutil
import subprocess
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc import aio

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire_server.fake_vllm import FakeVllm, Script
from tests.docs.markdown import blocks
from tests.polyglot import stubs
from tests.polyglot.calls import MODEL, ask, chat_request, gateway
from tests.polyglot.client_pages import BROKEN, CALLS, CHUNK, ENDLESS, SALT, SHIPPED_TARGET, says, steps, two_gateways
from tests.polyglot.programs import LIMIT, ROOT, Outcome, run, tool
from tests.polyglot.proxy import envoy
from tests.support.recordings import TRANSCRIPTS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.conftest import Certificates

pytestmark = pytest.mark.polyglot

PAGE = stubs.JAVA_CLIENT / "README.md"
ARGUMENTS = "@build/java/arguments"
CODE = {
    name: block.text for block in blocks(PAGE) for name in re.findall(r"^public class (\w+)", block.text, re.MULTILINE)
}
"""The code of the page by the name of its class."""


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the clone, after the page's commands up to the first call; also the page's code and the scenarios, compiled."""
    _install, build, *_ = steps(PAGE)
    tool("javac")
    folder = tmp_path_factory.mktemp("java")
    stubs.workspace(folder)
    shutil.copytree(stubs.JAVA_CLIENT, folder / "client" / "java")
    (folder / "client" / "examples").mkdir()
    shutil.copy(ROOT / "client" / "examples" / "weather.json", folder / "client" / "examples")
    shutil.copy(stubs.LANGUAGES / "java-client" / "Scenario.java", folder)
    for name, code in CODE.items():
        # The address is known only when it runs.
        assert code.count(f'"{SHIPPED_TARGET}"') == 1
        code_of_target = code.replace(f'"{SHIPPED_TARGET}"', 'System.getProperty("target")')
        (folder / f"{name}.java").write_text(code_of_target, encoding="utf-8")
    for command in (build, f"javac {ARGUMENTS} -Xlint:all -Werror -d build/java/classes *.java"):
        done = subprocess.run(
            ["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=stubs.TIMEOUT, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder


async def java(clone: Path, *arguments: str) -> Outcome:
    """Run a program to its end."""
    # The first compiler is enough for a program that runs this briefly, and starts it in half the time.
    return await run(tool("java"), "-XX:TieredStopAtLevel=1", ARGUMENTS, *arguments, home=clone, folder=clone)


async def scenario(clone: Path, *arguments: str) -> list[str]:
    """The lines that came of a scenario."""
    outcome = await java(clone, "Scenario", *arguments)
    assert outcome.status == 0, outcome.err
    return outcome.out.splitlines()


async def test_the_page_leads_to_an_answer_and_a_tool_call(vllm: FakeVllm, target: str, clone: Path) -> None:
    """Its last two commands, as written but for the address."""
    vllm.play(SALT, CALLS)
    lines = [step.replace(SHIPPED_TARGET, target) for step in steps(PAGE)[-2:]]
    outcomes = [await run("bash", "-c", line, home=clone, folder=clone) for line in lines]
    assert [(each.status, each.err) for each in outcomes] == [(0, "")] * 2
    assert outcomes[0].out == "It is the salt.\n[STOP_REASON_END_OF_TURN, 3 tokens]\n"
    call, end = outcomes[1].out.strip().splitlines()
    assert call.startswith('tool call get_weather({"city": "Oslo"}) ')
    assert end == "[STOP_REASON_END_OF_MESSAGE, tool calls may be executed, 3 tokens]"


async def test_the_code_of_the_page_runs(vllm: FakeVllm, target: str, clone: Path) -> None:
    """The loop over tool calls, the errors, and the watch."""
    vllm.play(CALLS, says(CHUNK.text("It rains.")))
    outcomes = [await java(clone, f"-Dtarget={target}", name) for name in CODE]
    assert [(each.status, each.err) for each in outcomes] == [(0, "")] * 3
    loop, errors, watch = [each.out for each in outcomes]
    assert loop == "It rains.STOP_REASON_END_OF_TURN\n"
    assert vllm.chats[1].body["messages"][-1]["content"] == "rain in Oslo"
    assert errors == "NOT_FOUND MODEL_NOT_FOUND no-such-model\n[] Optional.empty false\n"
    first, last = watch.splitlines()
    assert first == f"CHANGE_ADDED {MODEL}"
    assert last.endswith(f": [{MODEL}]")


async def test_an_answer_is_that_of_the_python_client(vllm: FakeVllm, target: str, tmp_path: Path, clone: Path) -> None:
    """Text of any script, directly and through Envoy."""
    vllm.play(*[Script.recording(TRANSCRIPTS / "text-unicode.sse")] * 3)
    python = (await ask(target, chat_request())).answer
    text = "".join(event["textDelta"]["text"] for event in python if "textDelta" in event)
    async with envoy(tmp_path, target) as proxy:
        for address in (target, proxy.target):
            outcome = await java(clone, "Chat", "--target", address, "hi")
            assert outcome.status == 0, outcome.err
            assert outcome.out.startswith(text + "\n[")


async def test_the_example_reports_failures(vllm: FakeVllm, target: str, clone: Path) -> None:
    """A failed call of a tool in the API's form, a fault in the middle of an answer, a refusal, and wrong command lines."""
    vllm.play(
        Script.recording(TRANSCRIPTS / "tool-malformed.sse"),
        BROKEN,
    )
    city = {"type": "object", "properties": {"city": {"type": "string"}}}
    tools = [{"name": "get_weather", "inputSchema": json.dumps(city)}, {"name": "get_time", "input_schema": city}]
    (clone / "tools.json").write_text(json.dumps(tools), encoding="utf-8")
    malformed = await java(clone, "Chat", "--target", target, "--tool", "tools.json", "hi")
    assert malformed.status == 0, malformed.err
    assert "failed: TOOL_CALL_FAILURE_REASON_MALFORMED_JSON" in malformed.out
    assert "may be executed" not in malformed.out
    sent = [each["function"] for each in vllm.chats[0].body["tools"]]
    assert [(each["name"], each["parameters"]) for each in sent] == [("get_weather", city), ("get_time", city)]
    broken = await java(clone, "Chat", "--target", target, "hi")
    assert (broken.status, broken.out) == (1, "half an ans\n")
    assert broken.err.startswith("ABORTED (UPSTREAM_INCOMPLETE): ")
    refused = await java(clone, "Chat", "--target", target, "--model", "no-such-model", "hi")
    assert (refused.status, refused.out) == (1, "")
    assert refused.err.startswith("NOT_FOUND (MODEL_NOT_FOUND): ")
    command = (tool("java"), ARGUMENTS, "Chat", "--target", "gateway.example:50051", "hi")
    keyed = await run("env", "DELTAWIRE_TOKEN=key", *command, home=clone, folder=clone)
    assert (keyed.status, keyed.err.count("\n")) == (2, 1)
    assert keyed.err.startswith("the key would go over plaintext to another machine")
    wrong = await java(clone, "Chat", "--target")
    assert wrong.status == 2
    assert "usage: java Chat" in wrong.err
    (clone / "tools.json").write_text('{"function": "get_weather"}', encoding="utf-8")
    wrong = await java(clone, "Chat", "--tool", "tools.json", "hi")
    assert wrong.status == 2
    assert wrong.err.startswith("--tool: these are no tools as JSON: ")


async def test_every_end_of_a_call_reaches_the_engine(vllm: FakeVllm, target: str, clone: Path) -> None:
    """Closing the stream, gRPC's context, interrupting the thread, and closing the client."""
    vllm.play(*[ENDLESS] * 4)
    canceled = "CANCELLED"
    assert await scenario(clone, "ends", target) == [canceled, canceled, canceled, "true", canceled]
    assert len(vllm.chats) == 4
    async with asyncio.timeout(LIMIT):
        for request in vllm.chats:
            await request.closed_early.wait()


async def test_two_gateways_behind_envoy(vllm: FakeVllm, tmp_path: Path, clone: Path) -> None:
    """Soft cancels reach the gateway that has the stream, and so does a client that knows only a chosen id."""
    async with two_gateways(vllm, tmp_path) as target:
        vllm.play(*[ENDLESS] * 13)
        assert await scenario(clone, "softly", target) == ["[STOP_REASON_CANCELLED]"]
        assert await scenario(clone, "another", target) == [
            "COMPLETION_STATE_RUNNING",
            "COMPLETION_STATE_RUNNING",
            "STOP_REASON_CANCELLED",
        ]


async def test_the_gateway_of_a_completion_is_remembered(clone: Path) -> None:
    """So that a call about it reaches that one at once, through a proxy that routes by its name."""
    named = []

    async def begin(_: bytes, context: aio.ServicerContext[bytes, bytes]) -> AsyncIterator[bytes]:
        await context.send_initial_metadata((("x-deltawire-gateway", "R0E="),))
        for event in (
            chat_pb.StreamChatCompletionResponse(started=chat_pb.Started(completion_id="cmpl-1")),
            chat_pb.StreamChatCompletionResponse(sequence=1, completed=chat_pb.Completed()),
        ):
            yield event.SerializeToString()

    async def get(_: bytes, context: aio.ServicerContext[bytes, bytes]) -> bytes:
        named.append(dict(context.invocation_metadata() or ())["x-deltawire-gateway"])
        return chat_pb.GetChatCompletionResponse(state=chat_pb.COMPLETION_STATE_COMPLETED).SerializeToString()

    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "StreamChatCompletion": grpc.unary_stream_rpc_method_handler(begin),
        "GetChatCompletion": grpc.unary_unary_rpc_method_handler(get),
    }
    server = aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("deltawire.v1.ChatCompletion", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        assert await scenario(clone, "remembers", f"127.0.0.1:{port}") == ["COMPLETION_STATE_COMPLETED"]
    finally:
        await server.stop(None)
    assert named == ["R0E="]


async def test_tls_and_a_key(vllm: FakeVllm, tmp_path: Path, clone: Path, certificates: Certificates) -> None:
    """The gateway's certificate is checked, and the key is sent in either header, but not over plaintext to another machine."""
    keys = tmp_path / "keys"
    keys.write_text(f"ci all sha256:{hashlib.sha256(b'secret').hexdigest()}\n", encoding="utf-8")
    tls = ("--tls-cert-file", str(certificates.server), "--tls-key-file", str(certificates.server_key))
    vllm.play(*[says(CHUNK.text("Yes."))] * 2)
    async with gateway(vllm, tmp_path, "--access-keys-file", str(keys), *tls) as (_, address):
        *printed, refused = await scenario(clone, "tls", address, str(certificates.authority), "secret")
    assert printed == ["Yes.", "Yes.", "UNAUTHENTICATED UNAUTHENTICATED", "UNAVAILABLE", "1"]
    assert refused.startswith("the key would go over plaintext")
