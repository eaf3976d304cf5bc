"""Resolves the references of a schema."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from deltawire_server.schemas.errors import SchemaError
from deltawire_server.schemas.sentences import cut

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_LOOKUPS = 20_000
"""Limit for the number of different references times the number of bases (the root and each `$id`)."""

_REMEDY = (
    "only references to what is within the schema are followed; use a JSON Pointer (#/…), an anchor, or the $id itself, "
    "in lower case up to its path and without port, dots and percent-encoding"
)

_PLAIN = re.compile(r"(?:[a-z][a-z0-9+.-]*:(?://[a-z0-9.-]*)?)?[A-Za-z0-9_~/:.-]*")
"""A URI without equivalent spellings: no upper case before the path, no port, no percent-encoding."""

_DOTS = re.compile(r"(?:^|/)\.{1,2}(?:/|$)")
_PORT = re.compile(r"^[^/]*//[^/]*:")
_HIDDEN = re.compile(r"%(?:2f|7e|25)", re.IGNORECASE)
"""Percent-encoded `/`, `~` and `%`, whose meaning depends on how often they are decoded."""

_INDEX = re.compile(r"0|[1-9][0-9]{0,5}")


class References:
    """The possible targets of the references in a schema.

    A reference may be a JSON Pointer from the root or from the nearest `$id`, an anchor (an `$id` in draft-06 and draft-07, an
    `id` in draft-04), or a URI relative to the nearest `$id`. The result has the targets in all drafts, so it includes the one
    that the validator uses.

    Args:
        schema: The whole schema.

    Attributes:
        patterns: Number of regular expressions in the schema.
    """

    def __init__(self, schema: object) -> None:
        self.patterns = 0
        self._starts: list[object] = [schema]
        self._by_name: dict[str, list[object]] = {}
        self._by_anchor: dict[str, list[object]] = {}
        self._odd_id = ""
        self._found: dict[str, list[object]] = {}
        waiting = [schema]
        while waiting:
            node = waiting.pop()
            if isinstance(node, dict):
                self._read(node)
                waiting.extend(part for part in node.values() if isinstance(part, dict | list))
            elif isinstance(node, list):
                waiting.extend(part for part in node if isinstance(part, dict | list))

    def targets(self, reference: str) -> list[object]:
        """The possible targets of a reference, at least one.

        Raises:
            SchemaError: There is no target, or the form of the reference is not supported.
        """
        found = self._found.get(reference)
        if found is None:
            found = self._found[reference] = list(self._look_up(reference))
            if len(self._found) * len(self._starts) > MAX_LOOKUPS:
                raise SchemaError("has too many references and $id: use fewer of them, or pointers without $id")
            if not found:
                raise SchemaError(f"refers to {cut(reference)!r}, which does not exist: {_REMEDY}")
        return found

    def _read(self, node: dict[str, Any]) -> None:
        for keyword in ("$anchor", "$dynamicAnchor", "$id", "id"):
            if keyword in node and isinstance(name := node[keyword], str):
                address, _, anchor = ("", "", name) if "nchor" in keyword else name.partition("#")
                if anchor:
                    self._by_anchor.setdefault(anchor, []).append(node)
                if address:
                    self._starts.append(node)
                    self._by_name.setdefault(_last_step(address), []).append(node)
                    if not _is_plain(address):
                        self._odd_id = address
        if "pattern" in node and isinstance(node["pattern"], str):
            self.patterns += 1
        if "patternProperties" in node and isinstance(by_pattern := node["patternProperties"], dict):
            self.patterns += len(by_pattern)

    def _look_up(self, reference: str) -> Iterator[object]:
        address, _, fragment = reference.partition("#")
        starts = self._starts
        if address:
            if odd := self._odd_id if _is_plain(address) else address:
                raise SchemaError(f"has the address {cut(odd)!r}, which has other spellings: {_REMEDY}")
            starts = self._by_name.get(_last_step(address), [])
        if not fragment:
            yield from starts
        elif fragment.startswith("/"):
            steps = _steps(fragment)
            for start in starts:
                target = _at(start, steps)
                if target is not None:
                    yield target
        elif not address or starts:
            yield from self._by_anchor.get(fragment, [])


def _is_plain(address: str) -> bool:
    return bool(_PLAIN.fullmatch(address)) and not _DOTS.search(address) and not _PORT.search(address)


def _last_step(address: str) -> str:
    """The last path segment, which is the same for two plain URIs with the same target."""
    return address.rstrip("/").rpartition("/")[2]


def _steps(pointer: str) -> list[str]:
    if _HIDDEN.search(pointer):
        raise SchemaError(f"has the reference {cut('#' + pointer)!r}: write '/' as ~1 and '~' as ~0, and no '%25'")
    return [step.replace("~1", "/").replace("~0", "~") for step in unquote(pointer).split("/")[1:]]


def _at(value: object, steps: list[str]) -> object | None:
    for step in steps:
        if isinstance(value, dict):
            value = value.get(step)
        elif isinstance(value, list) and _INDEX.fullmatch(step) and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value
