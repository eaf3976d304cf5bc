"""The commands in protos/README.md and in other pages, for the tests to run."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING

from tests.polyglot.programs import PROTOS

if TYPE_CHECKING:
    from pathlib import Path

README = PROTOS / "README.md"


def commands(heading: str, page: Path = README) -> list[str]:
    """The shell commands of a section, in order, without the prompt. Subsections belong to it only if they have no heading."""
    text = page.read_text(encoding="utf-8")
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    assert found, f"{page} has no section {heading}"
    blocks = "".join(re.findall(r"^```console\n(.*?)^```$", found[1], flags=re.MULTILINE | re.DOTALL))
    return [
        command.replace("\\\n", " ").strip() for command in re.findall(r"^\$ ((?:.*\\\n)*.*)$", blocks, re.MULTILINE)
    ]


def npm_packages(heading: str) -> set[str]:
    """What the section installs from npm, as `name@version`."""
    installs = [shlex.split(command)[2:] for command in commands(heading) if command.startswith("npm install ")]
    return {package for packages in installs for package in packages}


def script(heading: str) -> str:
    """The section's commands, without those that install packages."""
    return "\n".join(command for command in commands(heading) if not command.startswith("npm install "))
