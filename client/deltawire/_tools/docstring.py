"""The first paragraph of a docstring, and the lines of its `Args:` section."""

from __future__ import annotations

import inspect
import re

_HEADING = re.compile(r"(?:Args|Arguments|Parameters):")
_PARAMETER = re.compile(r"(\w+)(?: *\([^)]*\))?:(?: +(.*))?")


def description_of(docstring: str | None) -> str:
    """The first paragraph as one line; "" if there is none."""
    first, _, _ = inspect.cleandoc(docstring or "").partition("\n\n")
    return " ".join(first.split())


def parameters_of(docstring: str | None) -> dict[str, str]:
    """The descriptions of parameters by name, from a section in Google's style; empty for other styles."""
    lines = inspect.cleandoc(docstring or "").splitlines()
    starts = [number for number, line in enumerate(lines) if _HEADING.fullmatch(line)]
    texts: dict[str, str] = {}
    name = ""
    margin = 0
    for line in lines[starts[0] + 1 :] if starts else ():
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        if text and indent == 0:
            break  # the next section
        margin = margin or indent
        found = _PARAMETER.fullmatch(text) if indent == margin else None
        if found:
            name = found[1]
            texts[name] = found[2] or ""
        elif name and text:
            texts[name] = f"{texts[name]} {text}".strip()
    return texts
