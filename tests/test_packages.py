"""The wheel and the source distribution: what is in them, and that the one can be built from the other."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.polyglot.documented import commands

ROOT = Path(__file__).parents[1]


def build(project: Path, kind: str, folder: Path) -> Path:
    """Build a wheel or an sdist with the installed hatchling; nothing is downloaded."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(folder)]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    archive = build(ROOT, "sdist", tmp_path_factory.mktemp("sdist"))
    unpacked = tmp_path_factory.mktemp("source")
    with tarfile.open(archive) as opened:
        opened.extractall(unpacked, filter="data")
    (project,) = unpacked.iterdir()
    return project


@pytest.fixture(scope="module")
def installed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that the source distribution gives, unpacked."""
    folder = tmp_path_factory.mktemp("installed")
    shutil.unpack_archive(build(source, "wheel", tmp_path_factory.mktemp("wheel")), folder, "zip")
    return folder


@pytest.fixture(scope="module")
def wheel(installed: Path) -> dict[str, bytes]:
    """What is in the wheel, by path."""
    files = [path for path in installed.rglob("*") if path.is_file()]
    return {str(path.relative_to(installed)): path.read_bytes() for path in files}


def test_the_source_distribution_has_no_recordings_and_all_the_rest(source: Path) -> None:
    """Five hundred files less; the tests themselves are there."""
    assert not (source / "tests" / "transcripts").exists()
    expected = """
        LICENSE Makefile README.md pyproject.toml client/README.md client/java/build.sh
        client/examples/node/package-lock.json protos/README.md protos/baseline.binpb protos/buf.gen.yaml
        protos/deltawire/v1/tool.proto server/deploy/envoy/envoy.yaml tests/conftest.py tests/polyglot/test_protos.py
    """
    assert [name for name in expected.split() if not (source / name).is_file()] == []
    assert not list(source.rglob("node_modules"))


def test_the_wheel_has_the_protos(wheel: dict[str, bytes]) -> None:
    """Below `deltawire/protos`, where the README says, byte for byte."""
    shipped = {name: content for name, content in wheel.items() if name.endswith(".proto")}
    protos = ROOT / "protos"
    assert shipped == {
        f"deltawire/protos/{path.relative_to(protos)}": path.read_bytes() for path in protos.rglob("*.proto")
    }


def test_the_wheel_has_the_descriptor_set_and_the_types(wheel: dict[str, bytes]) -> None:
    """Beside the stubs."""
    stubs = ROOT / "client" / "deltawire" / "v1"
    for name in ("descriptors.binpb", "chat_completion_pb2.pyi", "chat_completion_pb2_grpc.py"):
        assert wheel[f"deltawire/v1/{name}"] == (stubs / name).read_bytes()
    assert {"deltawire/py.typed", "deltawire_server/__main__.py"} <= set(wheel)


def test_the_wheel_has_nothing_else(wheel: dict[str, bytes]) -> None:
    """The two packages and what describes them; no tests."""
    assert {name.split("/")[0].split("-")[0] for name in wheel} == {"deltawire", "deltawire_server"}
    assert len({name.split("/")[0] for name in wheel}) == 3


def test_the_readme_says_where_they_are_installed(installed: Path) -> None:
    """Its commands print the folder of the protos and the path of the descriptor set."""
    printed = []
    for command in commands("Stubs"):
        if command.startswith("python -c "):
            arguments = [sys.executable, *shlex.split(command)[1:]]
            environment = os.environ | {"PYTHONPATH": str(installed), "PYTHONDONTWRITEBYTECODE": "1"}
            printed.append(Path(subprocess.check_output(arguments, env=environment, text=True).strip()))
    assert printed == [installed / "deltawire" / "protos", installed / "deltawire" / "v1" / "descriptors.binpb"]
    assert all(path.exists() for path in printed)
