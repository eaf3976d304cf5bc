"""`make dist`: the same bit for bit, whoever runs it, where and when; and what is in it."""

from __future__ import annotations

import json
import os
import re
import zipfile
from typing import TYPE_CHECKING, Any

import pytest

from deltawire import __version__
from tests.deploy.engine import DIST, DOCKER, ROOT, run

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.deploy, pytest.mark.xdist_group("dist")]

WHEEL = f"deltawire-{__version__}-py3-none-any.whl"
SBOM = f"deltawire-{__version__}.cdx.json"


def build(clone: Path, *, umask: int, modified: int, **variables: str) -> dict[str, bytes]:
    """What `make dist` makes in a new clone of the last commit, with this umask, time of files, and environment."""
    run("git", "clone", "--quiet", ROOT, clone, umask=umask)
    for path in clone.rglob("*"):
        os.utime(path, (modified, modified))
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
    assert {*again} == {*built} == {WHEEL, SBOM, f"deltawire-{__version__}.tar.gz", "SHA256SUMS"}


def test_the_wheel_is_complete(built: dict[str, bytes], folder: Path) -> None:
    """Types, descriptors and the license, and no tests; tests/test_packages.py compares the contents."""
    assert built
    with zipfile.ZipFile(folder / "one/dist" / WHEEL) as wheel:
        names = wheel.namelist()
    expected = {"deltawire/py.typed", "deltawire_server/py.typed", "deltawire/v1/descriptors.binpb"}
    assert expected | {f"deltawire-{__version__}.dist-info/licenses/LICENSE"} <= {*names}
    assert not [name for name in names if "test" in name]


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


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
