"""`buf curl`, a client in Go that gets the API only by reflection."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf import json_format
from google.rpc.error_details_pb2 import ErrorInfo

from deltawire.v1 import chat_completion_pb2, model_registry_pb2
from deltawire.v1.chat_completion_pb2 import StreamChatCompletionRequest
from deltawire_server.fake_vllm import FakeVllm, Script
from tests.polyglot.calls import MODEL, ask, chat_request, fold, read_json
from tests.polyglot.programs import Outcome, run, tool
from tests.support.recordings import TRANSCRIPTS

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.polyglot

STREAM = "deltawire.v1.ChatCompletion/StreamChatCompletion"
REFLECTIONS = ("grpc-v1", "grpc-v1alpha")


async def curl(target: str, path: str, *flags: str, home: Path, data: dict[str, Any] | str | None = None) -> Outcome:
    """Run `buf curl` on a method, or on the server with flags that only list."""
    if data is not None:
        flags += ("--data", data if isinstance(data, str) else json.dumps(data))
    fixed = ("curl", "--http2-prior-knowledge", "--protocol", "grpc")
    return await run(tool("buf"), *fixed, *flags, f"http://{target}/{path}", home=home)


@pytest.mark.parametrize("reflection", REFLECTIONS)
async def test_reflection_lists_every_service_and_method(target: str, tmp_path: Path, reflection: str) -> None:
    """By both versions of reflection, and without naming what has no descriptor, which would make tools stumble."""
    files = (chat_completion_pb2.DESCRIPTOR, model_registry_pb2.DESCRIPTOR)
    ours = [service for file in files for service in file.services_by_name.values()]
    services = await curl(target, "", "--list-services", "--reflect-protocol", reflection, home=tmp_path)
    assert services.status == 0, services.err
    listed = set(services.out.split())
    assert listed >= {service.full_name for service in ours} | {"grpc.health.v1.Health"}
    methods = await curl(target, "", "--list-methods", "--reflect-protocol", reflection, home=tmp_path)
    assert methods.status == 0, methods.err
    expected = {f"{service.full_name}/{method.name}" for service in ours for method in service.methods}
    assert set(methods.out.split()) >= expected
    # Every service that is listed can also be described.
    assert {line.partition("/")[0] for line in methods.out.split()} == listed


@pytest.mark.parametrize("reflection", REFLECTIONS)
async def test_a_stream_with_a_tool_call_has_the_same_events(
    vllm: FakeVllm, target: str, tmp_path: Path, reflection: str
) -> None:
    """Text, then a tool call: every event, in order, as the Python client gets them."""
    recording = "tool-text-before"
    chat = chat_request(recording)
    vllm.play(*[Script.recording(TRANSCRIPTS / f"{recording}.sse")] * 2)
    python = await ask(target, chat)
    request = json_format.MessageToDict(StreamChatCompletionRequest(chat=chat))
    go = await curl(target, STREAM, "--reflect-protocol", reflection, home=tmp_path, data=request)
    assert go.status == 0, go.err
    assert fold(read_json(go.out)) == python.answer
    assert any("toolCallDelta" in event for event in python.answer)
    assert vllm.chats[0].body == vllm.chats[1].body


async def test_two_choices_with_two_calls_each_have_the_same_events(
    vllm: FakeVllm, target: str, tmp_path: Path
) -> None:
    """Interleaved choices stay apart, each with its index, the first one's 0 included."""
    recording = "tool-n2"
    chat = chat_request(recording, choice_count=2)
    vllm.play(*[Script.recording(TRANSCRIPTS / f"{recording}.sse")] * 2)
    python = await ask(target, chat)
    request = json_format.MessageToDict(StreamChatCompletionRequest(chat=chat))
    go = await curl(target, STREAM, home=tmp_path, data=request)
    assert go.status == 0, go.err
    assert fold(read_json(go.out)) == python.answer
    assert {event["choiceIndex"] for event in python.answer if "toolCallDelta" in event} == {0, 1}


async def test_an_unknown_model_is_not_found(target: str, tmp_path: Path) -> None:
    """The exit status is the gRPC code times eight, as buf has it; the error has the reason among its details."""
    request = {"chat": {"model": "unknown", "messages": [{"user": {"text": "hi"}}]}}
    outcome = await curl(target, STREAM, home=tmp_path, data=request)
    assert outcome.status == 5 * 8
    assert outcome.out == ""
    error = json.loads(outcome.err)
    assert error["code"] == "not_found"
    assert MODEL in error["message"]
    (info,) = [detail["value"] for detail in error["details"] if detail["type"] == "google.rpc.ErrorInfo"]
    # Without the padding that base64 would need.
    assert ErrorInfo.FromString(base64.b64decode(info + "==")).reason == "MODEL_NOT_FOUND"


async def test_an_unknown_field_is_refused(vllm: FakeVllm, target: str, tmp_path: Path) -> None:
    """Before anything is sent, as documented for callers in JSON, whose unknown fields Envoy ignores."""
    request = {"chat": {"messages": [{"user": {"text": "hi"}}], "temprature": 1}}
    outcome = await curl(target, STREAM, home=tmp_path, data=request)
    assert outcome.status != 0
    assert 'unknown field "temprature"' in outcome.err
    assert not vllm.chats


@pytest.mark.parametrize("service", ["", "deltawire.v1.ChatCompletion", "deltawire.v1.ModelRegistry"])
async def test_health_says_serving(target: str, tmp_path: Path, service: str) -> None:
    """For the process and for each service: what probes and proxies ask."""
    outcome = await curl(target, "grpc.health.v1.Health/Check", home=tmp_path, data={"service": service})
    assert outcome.status == 0, outcome.err
    assert json.loads(outcome.out) == {"status": "SERVING"}
