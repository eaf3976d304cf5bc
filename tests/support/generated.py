"""Parts of documents that a command writes, between two comments that say which."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def part(document: Path, name: str, command: str) -> str:
    """What a part of a document says now.

    Args:
        document: A file in Markdown.
        name: Of the part.
        command: What writes it.
    """
    _, text, _ = _split(document, name, command)
    return text


def write_part(document: Path, name: str, command: str, text: str) -> None:
    """Replace a part of a document; as for `part`."""
    before, _, after = _split(document, name, command)
    document.write_text(f"{before}{text}{after}")


def _split(document: Path, name: str, command: str) -> tuple[str, str, str]:
    begin, end = f"<!-- {name}: written by {command} -->\n", f"<!-- end of {name} -->"
    before, found, rest = document.read_text().partition(begin)
    text, also_found, after = rest.partition(end)
    if not (found and also_found):
        raise ValueError(f"{document} has no part {name}")
    return before + begin, text, end + after
