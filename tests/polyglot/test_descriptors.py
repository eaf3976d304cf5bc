"""The descriptor set that the package ships: complete by itself, and with what the details of errors need."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool

from deltawire_server.fake_vllm import FakeVllm, Script
from tests.polyglot.calls import MODEL
from tests.polyglot.programs import LIMIT, PROTOS, run, tool
from tests.polyglot.proxy import transcoder
from tests.polyglot.stubs import DESCRIPTORS
from tests.support.recordings import TRANSCRIPTS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.polyglot

SERVICE = "deltawire.v1.ChatCompletion"


def test_the_set_has_every_file_and_google_rpc() -> None:
    """Every file comes after what it imports, so any library can load the set in its order."""
    pool = DescriptorPool()
    names = []
    for file in FileDescriptorSet.FromString(DESCRIPTORS.read_bytes()).file:
        pool.AddSerializedFile(file.SerializeToString())
        names.append(file.name)
    assert {str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto")} <= set(names)
    for message in ("ErrorInfo", "BadRequest", "RetryInfo", "Status"):
        assert pool.FindMessageTypeByName(f"google.rpc.{message}").full_name == f"google.rpc.{message}"
    assert pool.FindServiceByName(SERVICE).methods_by_name["StreamChatCompletion"].server_streaming


async def test_buf_curl_can_use_it_instead_of_reflection(target: str, tmp_path: Path) -> None:
    """With `--schema`, for gateways whose reflection a proxy does not pass on."""
    flags = ("--http2-prior-knowledge", "--protocol", "grpc", "--schema", str(DESCRIPTORS))
    url = f"http://{target}/deltawire.v1.ModelRegistry/ListModels"
    listed = await run(tool("buf"), "curl", *flags, "--data", "{}", url, home=tmp_path)
    assert listed.status == 0, listed.err
    assert [model["id"] for model in json.loads(listed.out)["models"]] == [MODEL]


@pytest.fixture
async def rest(target: str, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an Envoy that turns JSON over HTTP/1.1 into gRPC, with the shipped configuration."""
    async with (
        transcoder(tmp_path, target) as proxy,
        httpx.AsyncClient(base_url=f"http://{proxy}", trust_env=False, timeout=LIMIT) as client,
    ):
        yield client


def chat(**fields: Any) -> dict[str, Any]:  # noqa: ANN401 -- what JSON can hold
    """A chat request as JSON."""
    return {"chat": {"messages": [{"user": {"text": "hi"}}], **fields}}


async def test_an_error_is_json_with_its_details(rest: httpx.AsyncClient) -> None:
    """An unknown model is 404, with the google.rpc.Status as JSON and the ErrorInfo in it."""
    answer = await rest.post(f"/{SERVICE}/CreateChatCompletion", json=chat(model="nobody"))
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()
    assert error["code"] == 5
    assert MODEL in error["message"]
    (info,) = [each for each in error["details"] if each["@type"] == "type.googleapis.com/google.rpc.ErrorInfo"]
    assert (info["reason"], info["domain"]) == ("MODEL_NOT_FOUND", "deltawire.dev")
    assert info["metadata"]["model"] == "nobody"


async def test_violations_of_fields_are_json_too(rest: httpx.AsyncClient) -> None:
    """A request without messages is 400, and google.rpc.BadRequest names the field."""
    answer = await rest.post(f"/{SERVICE}/CreateChatCompletion", json={"chat": {}})
    assert answer.status_code == 400
    bad = [each for each in answer.json()["details"] if each["@type"].endswith("/google.rpc.BadRequest")]
    assert "chat.messages" in [violation["field"] for each in bad for violation in each["fieldViolations"]]


async def test_a_stream_is_one_json_object_per_line(vllm: FakeVllm, rest: httpx.AsyncClient) -> None:
    """The events in order, `started` first and `completed` last."""
    vllm.play(Script.recording(TRANSCRIPTS / "tool-text-before.sse"))
    answer = await rest.post(f"/{SERVICE}/StreamChatCompletion", json=chat())
    assert answer.status_code == 200
    events = [json.loads(line) for line in answer.text.splitlines()]
    assert "started" in events[0]
    assert "completed" in events[-1]
    assert [int(event.get("sequence", 0)) for event in events] == list(range(len(events)))


async def test_an_unknown_path_is_not_sent_to_the_gateway(rest: httpx.AsyncClient) -> None:
    """404 from Envoy itself."""
    assert (await rest.post("/v1/chat/completions", json={})).status_code == 404
