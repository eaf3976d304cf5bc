"""Formats names for error messages, which are sent in trailers and are limited to about a thousand characters."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_NAME_LENGTH = 256
"""Limit for the characters of an id or alias: twice the longest names on the public hubs."""
MAX_NAMES_SHOWN = 20
MAX_NAMES_LENGTH = 600
"""Limits for the names, and for their characters, in a message."""


def cut(name: str) -> str:
    """A name, which may be any text of a caller, truncated to the maximum length of a name."""
    return name if len(name) <= MAX_NAME_LENGTH else f"{name[:MAX_NAME_LENGTH]}…"


def quoted(name: str) -> str:
    """A truncated name in quotes."""
    return repr(cut(name))


def some(names: Iterable[str]) -> str:
    """At most `MAX_NAMES_SHOWN` names, and the number of the others; empty if there are none."""
    names = list(names)
    shown: list[str] = []
    for name in names[:MAX_NAMES_SHOWN]:
        if shown and sum(map(len, shown)) + len(name) > MAX_NAMES_LENGTH:
            break
        shown.append(cut(name))
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return ", ".join(shown) + more
