"""The proto files by themselves: what any language's plain protoc must be able to read."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from tests.polyglot import stubs
from tests.polyglot.documented import commands
from tests.polyglot.programs import PROTOS, ROOT, Outcome, run, tool

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


@pytest.mark.parametrize(
    ("version", "plain", "flagged", "php"),
    [
        ("3.11.4", False, False, False),
        ("3.12.0", False, True, False),
        ("3.13.0", False, True, True),
        ("3.14.0", False, True, True),
        ("3.15.0", True, True, True),
    ],
)
async def test_old_versions_of_protoc(tmp_path: Path, version: str, plain: bool, flagged: bool, php: bool) -> None:
    """What the page says of each: whether it needs the flag, and what it generates with it; with the plugins of today too."""
    protoc = ROOT / ".cache" / "protoc" / version / "protoc" / "data" / "bin" / "protoc"
    if not protoc.exists():
        pytest.fail("the old versions of protoc are not installed: `make polyglot` does it")
    make, generate = commands("Old versions of protoc")
    flag = " --experimental_allow_proto3_optional"
    assert generate.count(flag) == 1
    plugins = [
        "--go_out=gen/old --go-grpc_out=gen/old",
        *(
            f"--grpc_out=gen/old --plugin=protoc-gen-grpc={tool(f'grpc_{name}_plugin')}"
            for name in ("cpp", "java", "ruby")
        ),
    ]
    stubs.workspace(tmp_path)

    async def runs(command: str) -> bool:
        shutil.rmtree(tmp_path / "gen", ignore_errors=True)
        line = f"{make}; {command.replace('protoc ', f'{protoc} ', 1)}"
        done = await run("bash", "-euc", line, home=tmp_path, folder=tmp_path)
        assert any((tmp_path / "gen" / "old").iterdir()) == (done.status == 0), done
        return done.status == 0

    assert await runs(generate.replace(flag, "")) is plain
    assert await runs(generate) is flagged
    assert await runs(f"protoc{flag} -I protos --php_out=gen/old protos/deltawire/v1/*.proto") is php
    for plugin in plugins:
        assert await runs(f"protoc{flag} -I protos {plugin} protos/deltawire/v1/*.proto") is flagged


async def breaking(folder: Path) -> Outcome:
    """Compare the protos in the folder with the baseline beside them, as `make breaking` does."""
    return await run(tool("buf"), "breaking", "--against", "baseline.binpb", home=folder.parent, folder=folder)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("string call_id = 1;", "string call_name = 1;", '"call_id" to "call_name"'),
        ("string call_id = 1;", "int32 call_id = 1;", 'from "string" to "int32"'),
        ("ERROR_REASON_MODEL_NOT_FOUND = 3;", "ERROR_REASON_NO_MODEL = 3;", '"ERROR_REASON_NO_MODEL"'),
    ],
)
async def test_a_change_that_breaks_clients_is_found(tmp_path: Path, old: str, new: str, said: str) -> None:
    """A renamed field, one of another type, a renamed value."""
    folder = tmp_path / "protos"
    shutil.copytree(PROTOS, folder)
    for path in folder.rglob("*.proto"):
        path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    found = await breaking(folder)
    assert found.status == 100, found
    assert said in found.out


async def test_an_added_field_breaks_nothing(tmp_path: Path) -> None:
    """Under a number that is free."""
    folder = tmp_path / "protos"
    shutil.copytree(PROTOS, folder)
    path = folder / "deltawire" / "v1" / "tool.proto"
    text = path.read_text(encoding="utf-8")
    assert "message ToolCall {" in text
    path.write_text(
        text.replace("message ToolCall {", "message ToolCall {\n  string note = 1000;", 1), encoding="utf-8"
    )
    found = await breaking(folder)
    assert found.status == 0, found.out
