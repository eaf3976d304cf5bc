"""`make dist`: the same bit for bit, whoever runs it, where and when; and what is in it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from deltawire import __version__
from deltawire_server.fake_vllm import Chunks, FakeVllm, Script
from tests.deploy.engine import DIST, DOCKER, ROOT, run
from tests.polyglot import calls, programs
from tests.polyglot.documented import commands

pytestmark = [pytest.mark.deploy, pytest.mark.xdist_group("dist")]

WHEEL = f"deltawire-{__version__}-py3-none-any.whl"
SBOM = f"deltawire-{__version__}.cdx.json"
NPM = f"deltawire-{__version__}-npm.tgz"
PROTOS = f"deltawire-{__version__}-protos.tar.gz"


def cloned(clone: Path, *, umask: int = 0o022, modified: int = 1_000_000_000) -> None:
    """Make a new clone of the last commit, whose files are older than what builds them."""
    run("git", "clone", "--quiet", ROOT, clone, umask=umask)
    for path in clone.rglob("*"):
        os.utime(path, (modified, modified))


def build(clone: Path, *, umask: int, modified: int, **variables: str) -> dict[str, bytes]:
    """What `make dist` makes in a new clone of the last commit, with this umask, time of files, and environment."""
    cloned(clone, umask=umask, modified=modified)
    run("make", "--no-print-directory", "dist", f"DIST={DIST}", cwd=clone, umask=umask, env=os.environ | variables)
    run("sha256sum", "--strict", "--check", "SHA256SUMS", cwd=clone / "dist")
    return {path.name: path.read_bytes() for path in (clone / "dist").iterdir()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the clones are."""
    return tmp_path_factory.mktemp("dist")


@pytest.fixture(scope="module")
def built(folder: Path) -> dict[str, bytes]:
    """The distribution."""
    return build(folder / "one", umask=0o022, modified=1_000_000_000, TZ="UTC", LC_ALL="C.UTF-8")


def test_two_builds_are_the_same(built: dict[str, bytes], folder: Path) -> None:
    """In folders of different names, of files with different times and modes, in different time zones."""
    again = build(folder / "another/folder", umask=0o077, modified=1_300_000_000, TZ="Asia/Tokyo", LC_ALL="C")
    assert [name for name in built if built[name] != again.get(name)] == []
    assert {*again} == {*built} == {WHEEL, SBOM, NPM, PROTOS, f"deltawire-{__version__}.tar.gz", "SHA256SUMS"}


def test_the_wheel_is_complete(built: dict[str, bytes], folder: Path) -> None:
    """Types, descriptors and the license, and no tests; tests/test_packages.py compares the contents."""
    assert built
    with zipfile.ZipFile(folder / "one/dist" / WHEEL) as wheel:
        names = wheel.namelist()
    expected = {"deltawire/py.typed", "deltawire_server/py.typed", "deltawire/v1/descriptors.binpb"}
    assert expected | {f"deltawire-{__version__}.dist-info/licenses/LICENSE"} <= {*names}
    assert not [name for name in names if "test" in name]


def test_the_wheel_has_the_protos(built: dict[str, bytes]) -> None:
    """Where the commands of their page say, after an installation from the wheel alone."""
    assert built
    environment = {"PATH": f"{DIST}/gateway/bin:{os.environ['PATH']}"}
    asked = [command for command in commands("Stubs") if command.startswith("python -c ")]
    protos, descriptors = (Path(run("bash", "-euc", each, cwd="/", env=environment).strip()) for each in asked)
    assert (protos / "deltawire/v1/tool.proto").read_bytes() == (ROOT / "protos/deltawire/v1/tool.proto").read_bytes()
    assert descriptors.read_bytes() == (ROOT / "client/deltawire/v1/descriptors.binpb").read_bytes()
    assert descriptors.is_relative_to(DIST)


def test_the_list_of_parts_is_that_of_the_image(built: dict[str, bytes]) -> None:
    """The gateway and each of its libraries, in the version of the image, and what needs it."""
    bom: dict[str, Any] = json.loads(built[SBOM])
    root = bom["metadata"]["component"]
    assert (root["name"], root["version"]) == ("deltawire", __version__)
    parts = {_normal(part["name"]): part["version"] for part in bom["components"]}
    lock = (DOCKER / "requirements.txt").read_text("utf-8")
    locked = dict(re.findall(r"^(?!.* == 'win32')([a-z0-9-]+)==(\S+)", lock, re.MULTILINE))
    assert parts == locked
    needed = {name for each in bom["dependencies"] for name in each.get("dependsOn", ())}
    assert needed == {part["bom-ref"] for part in bom["components"]}


async def test_the_npm_package_streams_an_answer(built: dict[str, bytes], folder: Path) -> None:
    """Installed from its file in a folder with nothing else, for a program outside of the package, and for its example."""
    project = folder / "project"
    project.mkdir()
    (project / NPM).write_bytes(built[NPM])
    run("npm", "install", "--no-audit", "--no-fund", f"./{NPM}", cwd=project)
    package = project / "node_modules/deltawire"
    assert json.loads((package / "package.json").read_bytes())["version"] == __version__
    assert (package / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    program = """
        import { connect, user } from "deltawire/node";
        const client = connect(process.argv[2]);
        const stream = client.chat.stream({ messages: [user("hi")] });
        for await (const text of stream.text) process.stdout.write(text);
        console.log(` ${(await stream.final()).usage.completionTokens}`);
        client.close();
    """
    (project / "program.mjs").write_text(program, encoding="utf-8")
    chunk = Chunks()
    answer = Script.chunks([chunk.role(), chunk.text("it is"), chunk.text(" salt"), chunk.finish(), chunk.usage(7, 3)])
    async with FakeVllm() as vllm, calls.gateway(vllm, project) as (_, target):
        vllm.play(answer, answer)
        own = await programs.run("node", str(project / "program.mjs"), target, home=project)
        assert own == programs.Outcome(0, "it is salt 3\n", "")
        example = ("node", str(package / "examples/chat.js"), "--target", target, "hi")
        shown = await programs.run(*example, home=project)
        assert (shown.status, shown.out.splitlines()[0], shown.err) == (0, "it is salt", "")


def test_the_archive_of_the_protos_is_complete(built: dict[str, bytes], folder: Path) -> None:
    """Its license is beside it, and the commands of its page generate stubs from it alone."""
    assert built
    with tarfile.open(folder / "one/dist" / PROTOS) as archive:
        archive.extractall(folder / "protos", filter="data")
    (bundle,) = (folder / "protos").iterdir()
    assert bundle.name == PROTOS.removesuffix(".tar.gz")
    assert (bundle / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    environment = {"PATH": f"{DIST}/tools/bin:{os.environ['PATH']}", "HOME": str(folder)}
    for command in [*commands("C#"), *commands("Ruby")]:
        if "grpc_ruby_plugin" not in command:  # that is not installed where distributions are tested
            run("bash", "-euc", command, cwd=bundle, env=environment)
    assert list((bundle / "gen").rglob("ChatCompletion.cs"))
    assert list((bundle / "gen").rglob("error_details_pb.rb"))


def test_a_failed_build_says_why(folder: Path) -> None:
    """The message of the program that failed."""
    clone = folder / "broken"
    cloned(clone)
    project = clone / "pyproject.toml"
    project.write_text(project.read_text("utf-8").replace("_version.py", "no_version.py"), "utf-8")
    run(
        "git",
        "-c",
        "user.name=a",
        "-c",
        "user.email=a@example.com",
        "commit",
        "--quiet",
        "--all",
        "--message",
        "b",
        cwd=clone,
    )
    command = ["make", "--no-print-directory", "dist", f"DIST={DIST}"]
    failed = subprocess.run(command, cwd=clone, capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert "no_version.py" in failed.stderr
    assert not (clone / "dist/SHA256SUMS").exists()


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
