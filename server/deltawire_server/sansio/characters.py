"""Text that is not Unicode: halves of characters are joined over chunks, and what stays broken becomes U+FFFD.

JSON writes a character above U+FFFF as two escapes, the halves of a surrogate pair. A relay that counts text in UTF-16 units
may cut between them, so that one chunk ends in a high half and the next one begins with a low half. Neither half alone can go
into a message of the API.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Hashable

REPLACEMENT = "\ufffd"
BROKEN = "broken character"
"""What an anomaly of this kind is called."""

_SURROGATE = re.compile("[\ud800-\udfff]")


def mend(text: str, anomalies: Counter[str]) -> str:
    """Join the surrogate pairs of a whole text and replace lone halves.

    Args:
        text: Any text.
        anomalies: Counts the lone halves.

    Returns:
        Text that can be encoded as UTF-8; the same object if nothing is wrong with it.
    """
    if _SURROGATE.search(text) is None:
        return text
    text, broken = _SURROGATE.subn(REPLACEMENT, _join_pairs(text))
    if broken:
        anomalies[BROKEN] += broken
    return text


class Halves:
    """Mends texts that come in pieces: a high half at the end of a piece waits for the next piece of the same text.

    Args:
        anomalies: Counts the halves that are replaced.
    """

    def __init__(self, anomalies: Counter[str]) -> None:
        self._anomalies = anomalies
        self.pending: dict[Hashable, str] = {}
        """The halves that wait, by text. While it is empty, a piece without surrogates needs no mending."""

    def receive(self, key: Hashable, piece: str) -> str:
        """Take the next piece of the text that `key` names.

        Returns:
            The piece, mended; with the half that came before it, and without the one that now waits.
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
        """Say that the text has ended.

        Returns:
            U+FFFD if a half still waits, else nothing.
        """
        return mend(self.pending.pop(key, ""), self._anomalies)


def _join_pairs(text: str) -> str:
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
