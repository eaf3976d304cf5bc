"""The descriptor set that the package ships: complete by itself, and with what the details of errors need."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool

from tests.polyglot.calls import MODEL
from tests.polyglot.programs import PROTOS, run, tool
from tests.polyglot.stubs import DESCRIPTORS

if TYPE_CHECKING:
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
