"""The proto files by themselves: what any language's plain protoc must be able to read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from tests.polyglot.programs import PROTOS, run, tool

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.polyglot


async def test_the_protos_need_nothing_beside_them(tmp_path: Path) -> None:
    """They compile with no other proto on the path, and import only each other and what every protoc brings."""
    image = tmp_path / "image.binpb"
    built = await run(tool("buf"), "build", str(PROTOS), "--output", str(image), home=tmp_path)
    assert built.status == 0, built.err
    ours = [file for file in FileDescriptorSet.FromString(image.read_bytes()).file if "deltawire" in file.package]
    assert {file.name for file in ours} == {str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto")}
    for file in ours:
        assert all(name.startswith(("deltawire/v1/", "google/protobuf/")) for name in file.dependency), file.name
        # Not editions, which Debian's protoc 3.21 cannot read.
        assert file.syntax == "proto3", file.name
