"""How large and how deep a JSON text is, before it is parsed."""

from __future__ import annotations

import re
from itertools import accumulate
from typing import NamedTuple

_STRING = re.compile(r'"[^"]*"?')
_OTHER = re.compile(r"[^\[\]{}]+")
_STEP = {"[": 1, "{": 1, "]": -1, "}": -1}


class Shape(NamedTuple):
    """The shape of a text.

    Attributes:
        depth: How many objects and arrays are nested in one another.
        containers: Objects and arrays.
        values: All values, those included; one too many for each empty one.
    """

    depth: int
    containers: int
    values: int


def shape(text: str, most: int) -> Shape | None:
    """Measure a JSON text.

    Parsing makes objects of up to 60 times the text's size and takes 150 ns for each; this makes none, so what is refused by
    it costs about 1 ns for each character. Text that is not JSON has some shape, too.

    Args:
        text: The text.
        most: How many values may be in it.

    Returns:
        `None` if there are more values.
    """
    if "\\" in text:
        # Backslashes first: what is left of a run of them is one that escapes, or nothing.
        text = text.replace("\\\\", "").replace('\\"', "")
    # Each value has at most two strings, a key and itself.
    text, strings = _STRING.subn("", text, count=2 * most + 1)
    containers = text.count("[") + text.count("{")
    values = 1 + containers + text.count(",")
    if strings > 2 * most or values > most:
        return None
    depth = max(accumulate(map(_STEP.__getitem__, _OTHER.sub("", text))), default=0)
    return Shape(depth, containers, values)
