"""Names as messages show them: messages travel in the trailers, whose limit leaves one about a thousand characters."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_NAME_LENGTH = 256
"""Characters in an id or alias: twice the longest names on the public hubs, and error messages stay readable."""
MAX_NAMES_SHOWN = 20
MAX_NAMES_LENGTH = 600
"""Names, and characters of them, in a message."""


def cut(name: str) -> str:
    """A name that may be a caller's nonsense, no longer than a name may be."""
    return name if len(name) <= MAX_NAME_LENGTH else f"{name[:MAX_NAME_LENGTH]}…"


def quoted(name: str) -> str:
    """The same in quotes."""
    return repr(cut(name))


def some(names: Iterable[str]) -> str:
    """At most twenty names, and how many more there are; empty if there are none."""
    names = list(names)
    shown: list[str] = []
    for name in names[:MAX_NAMES_SHOWN]:
        if shown and sum(map(len, shown)) + len(name) > MAX_NAMES_LENGTH:
            break
        shown.append(cut(name))
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return ", ".join(shown) + more
