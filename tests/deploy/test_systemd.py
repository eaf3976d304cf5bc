"""The unit: checked by systemd itself, and the gateway under the limits that it sets."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from mmap import PROT_EXEC, PROT_WRITE
from typing import TYPE_CHECKING, Any

import pytest

from deltawire_server.settings.model import MIB, ServerSettings
from tests.deploy.engine import ROOT, WAIT, run, serving

if TYPE_CHECKING:
    from pathlib import Path

    from deltawire_server.fake_vllm import FakeVllm
    from tests.deploy.engine import Engine

pytestmark = [pytest.mark.deploy, pytest.mark.xdist_group("image")]

FOLDER = ROOT / "server/deploy/systemd"
UNIT = FOLDER / "deltawire.service"
SYSUSERS = FOLDER / "deltawire.sysusers"
GIB = 1024 * MIB
THRESHOLD = 15
"""Tenths of systemd's points: what remains is the network, which a gateway needs."""


class _Unit(dict[str, list[str]]):
    """The values of each key of the section `[Service]`, in order."""

    def __init__(self) -> None:
        for line in UNIT.read_text("utf-8").partition("[Service]")[2].partition("[Install]")[0].splitlines():
            if line and not line.startswith("#"):
                key, _, value = line.partition("=")
                self.setdefault(key, []).append(value)

    @property
    def environment(self) -> dict[str, str]:
        """The variables that it sets."""
        return dict(value.split("=", 1) for value in self["Environment"])


@pytest.fixture(scope="module")
def unit() -> _Unit:
    """The shipped unit."""
    return _Unit()


def test_systemd_knows_every_word(tmp_path: Path) -> None:
    """With the gateway of this environment in place of the one that the unit starts."""
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text("utf-8").replace("/opt/deltawire", sys.prefix), encoding="utf-8")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", copy], capture_output=True, text=True, check=False, timeout=WAIT
    )
    # A key that it does not know is only a warning.
    assert (done.returncode, [line for line in done.stderr.splitlines() if UNIT.name in line]) == (0, [])


def test_systemd_finds_it_safe() -> None:
    """The exposure stays below the threshold."""
    run("systemd-analyze", "security", "--offline=yes", f"--threshold={THRESHOLD}", UNIT)


def test_the_user_is_made(unit: _Unit) -> None:
    """By the file beside the unit."""
    [line] = [line for line in SYSUSERS.read_text("utf-8").splitlines() if not line.startswith("#")]
    assert line.split()[:2] == ["u", unit["User"][0]]
    run("systemd-sysusers", "--dry-run", SYSUSERS)


def test_the_unit_waits_until_the_gateway_has_drained(unit: _Unit) -> None:
    """Systemd kills it only after all that it may take, the last spans' 2 seconds included."""
    server = ServerSettings()
    assert float(unit["TimeoutStopSec"][0]) >= server.drain_delay + server.drain_grace + 5


def test_the_memory_of_calls_is_half_of_the_limit(unit: _Unit) -> None:
    """As in a container, where the gateway finds this out itself."""
    limit = int(unit["MemoryMax"][0].removesuffix("G")) * GIB
    assert int(unit.environment["DELTAWIRE_SERVER_MAX_MEMORY_BYTES"]) == limit // 2


async def test_the_gateway_runs_under_the_filters(
    unit: _Unit, engine: Engine, image: dict[str, Any], vllm: FakeVllm, tmp_path: Path
) -> None:
    """Those for system calls, sockets, memory and /proc, in a container, because systemd is not process 1 here."""
    (tmp_path / "filters.json").write_text(json.dumps(_filters(unit)))
    arguments = ["--workers=2", "--database-url=sqlite:////var/lib/deltawire/registry.db"]
    flags = [f"--security-opt=seccomp={tmp_path}/filters.json", "--tmpfs=/tmp", "--tmpfs=/var/lib/deltawire:mode=1777"]
    flags += [f"--env={name}={value}" for name, value in unit.environment.items() if "MEMORY" in name]
    async with serving(engine, image, vllm.base_url, *arguments, flags=flags) as container:
        # The filters are in force.
        for call in (
            "os.chroot('/')",
            "socket.socket(socket.AF_NETLINK)",
            "mmap.mmap(-1, 1, prot=mmap.PROT_WRITE | mmap.PROT_EXEC)",
        ):
            with pytest.raises(AssertionError, match="Operation not permitted"):
                container.execute("python", "-c", f"import mmap, os, socket; {call}")


def _filters(unit: _Unit) -> dict[str, Any]:
    """The unit's filters as a container engine reads them."""
    allowed = set[str]()
    for words in unit["SystemCallFilter"]:
        for word in words.removeprefix("~").split():
            allowed = allowed - _calls(word) if words.startswith("~") else allowed | _calls(word)
    families = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10}

    def rule(name: str, argument: int, operation: str, value: int, other: int = 0) -> dict[str, Any]:
        matches = {"index": argument, "op": operation, "value": value, "valueTwo": other}
        return {"names": [name], "action": "SCMP_ACT_ALLOW", "args": [matches]}

    assert unit["MemoryDenyWriteExecute"] == ["yes"]
    rules = [
        {"names": sorted(allowed - {"socket", "mmap", "mprotect", "pkey_mprotect"}), "action": "SCMP_ACT_ALLOW"},
        *(rule("socket", 0, "SCMP_CMP_EQ", families[name]) for name in unit["RestrictAddressFamilies"][0].split()),
        # Memory may be writable or executable from the beginning, not both, and never becomes executable.
        *(rule("mmap", 2, "SCMP_CMP_MASKED_EQ", PROT_WRITE | PROT_EXEC, one) for one in (0, PROT_WRITE, PROT_EXEC)),
        rule("mprotect", 2, "SCMP_CMP_MASKED_EQ", PROT_EXEC),
    ]
    return {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": errno.EPERM, "syscalls": rules}


def _calls(name: str) -> set[str]:
    """The system calls of a name: of a set, which may have others, or itself."""
    if not name.startswith("@"):
        return {name}
    listed = run("systemd-analyze", "syscall-filter", name).splitlines()[1:]
    words = [line.strip() for line in listed if not line.strip().startswith("#")]
    return {call for word in words if word for call in _calls(word)}
