"""Repairs text with surrogates: joins pairs across chunks, and replaces lone surrogates by U+FFFD.

JSON escapes a character above U+FFFF as a surrogate pair. A proxy that counts text in UTF-16 units may split the pair, so that
one chunk ends with a high surrogate and the next one begins with a low one. A lone surrogate is not valid in a protobuf string.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Hashable

REPLACEMENT = "\ufffd"
BROKEN = "broken character"
"""The name of this anomaly."""

_SURROGATE = re.compile("[\ud800-\udfff]")


def mend(text: str, anomalies: Counter[str]) -> str:
    """Join the surrogate pairs of a whole text and replace lone surrogates.

    Args:
        text: Any text.
        anomalies: Counts the lone surrogates.

    Returns:
        Text that can be encoded as UTF-8; the same object if it has no surrogates.
    """
    if _SURROGATE.search(text) is None:
        return text
    text, broken = _SURROGATE.subn(REPLACEMENT, _join_pairs(text))
    if broken:
        anomalies[BROKEN] += broken
    return text


class Halves:
    """Repairs texts that arrive in pieces: keeps a high surrogate at the end of a piece for the next piece of the text.

    Args:
        anomalies: Counts the surrogates that are replaced.
    """

    def __init__(self, anomalies: Counter[str]) -> None:
        self._anomalies = anomalies
        self.pending: dict[Hashable, str] = {}
        """The kept high surrogates by text. While it is empty, a piece without surrogates needs no repair."""

    def receive(self, key: Hashable, piece: str) -> str:
        """Take the next piece of the text with this key.

        Returns:
            The repaired piece, with the surrogate kept before it and without one that is kept now.
        """
        piece = self.pending.pop(key, "") + piece
        if _SURROGATE.search(piece) is None:
            return piece
        piece = _join_pairs(piece)
        if "\ud800" <= piece[-1] <= "\udbff":
            self.pending[key] = piece[-1]
            piece = piece[:-1]
        return mend(piece, self._anomalies)

    def finish(self, key: Hashable) -> str:
        """End the text with this key.

        Returns:
            U+FFFD if a surrogate is still kept, else an empty text.
        """
        return mend(self.pending.pop(key, ""), self._anomalies)


def _join_pairs(text: str) -> str:
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
