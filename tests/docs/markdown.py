"""The code blocks, links and headings of a Markdown file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced code block.

    Attributes:
        language: The word after the fence; empty if there is none.
        text: What is between the fences, with its last newline.
        line: The number of its first line in the file, from 1.
        output: The next block, if it is `text` and only blank lines are between the two: the expected output.
    """

    language: str
    text: str
    line: int
    output: str | None


def blocks(page: Path) -> list[Block]:
    """The code blocks of a page, in order."""
    prose = page.read_text(encoding="utf-8")
    fences = list(_FENCE.finditer(prose))
    found = []
    for index, fence in enumerate(fences):
        output = None
        if index + 1 < len(fences):
            following = fences[index + 1]
            if following[1] == "text" and not prose[fence.end() : following.start()].strip():
                output = following[2]
        line = prose.count("\n", 0, fence.start(2)) + 1
        found.append(Block(fence[1], fence[2], line, output))
    return found


def matches(output: str, shown: str) -> bool:
    """Whether an output contains the shown lines in order; `…` in them matches any text without a newline."""
    pattern = re.escape(shown.strip()).replace("…", "[^\n]*")
    return re.search(rf"^{pattern}$", output, re.MULTILINE) is not None


def links(page: Path) -> list[str]:
    """The targets of a page's links to files of the repository: a relative path, an anchor, or both."""
    prose = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in target]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    prose = _FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
