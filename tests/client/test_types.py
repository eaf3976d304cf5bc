"""A project that installs the wheel gets the client's types: mypy and pyright check the documents' programs with them, strictly."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docs.markdown import blocks
from tests.test_packages import build

Check = Callable[..., "subprocess.CompletedProcess[str]"]

ROOT = Path(__file__).parents[2]
WRONG = """
from deltawire import Answer, Client

with Client() as client:
    client.chat.create("hi", temprature=0)
    answer: Answer = client.chat.stream("hi")
"""
"""A misspelt argument, and a value of another type: what a package without types hides."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the programs, and beside them an environment that has the wheel and what the client needs, not the sources."""
    folder = tmp_path_factory.mktemp("project")
    venv.create(folder / "environment", symlinks=True)
    [packages] = (folder / "environment/lib").glob("python*/site-packages")
    shutil.unpack_archive(build(ROOT, "wheel", tmp_path_factory.mktemp("wheel")), packages, "zip")
    # A path in a .pth file is no folder of packages itself: the .pth file there, which leads to the sources, is not read.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    for page in ("client/README.md", "client/docs/cookbook.md"):
        for block in blocks(ROOT / page):
            if block.language == "python":
                (folder / f"{Path(page).stem.lower()}_{block.line}.py").write_text(block.text)
    return folder


def mypy(project: Path, *files: str) -> subprocess.CompletedProcess[str]:
    """Run mypy on files of the project."""
    command = ["mypy", "--strict", "--no-incremental", "--python-executable", "environment/bin/python", *files]
    return run(project, command)


def pyright(project: Path, *files: str) -> subprocess.CompletedProcess[str]:
    """Run pyright on files of the project."""
    (project / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    return run(project, ["basedpyright", "--pythonpath", "environment/bin/python", *files])


def run(project: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command of this environment in the project."""
    program = str(Path(sys.executable).with_name(command[0]))
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "MYPYPATH"}}
    return subprocess.run(
        [program, *command[1:]], cwd=project, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("check", [mypy, pyright])
def test_the_programs_of_the_documents_have_types(project: Path, check: Check) -> None:
    """No error in them, and each mistake in a wrong one is found: so the types come with the wheel, and are not all `Any`."""
    programs = sorted(path.name for path in project.glob("*_*.py"))
    assert len(programs) > 15
    (project / "wrong.py").write_text(WRONG)
    done = check(project, *programs, "wrong.py")
    errors = [line for line in done.stdout.splitlines() if " error: " in line]
    assert done.returncode == 1, done.stderr
    assert [error for error in errors if "wrong.py" not in error] == []
    assert any("temprature" in error for error in errors)
    assert any("ChatStream" in error for error in errors)
