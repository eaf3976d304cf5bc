"""Measures the size and the depth of a JSON text before it is parsed."""

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
        depth: Nesting depth of objects and arrays.
        containers: Number of objects and arrays.
        values: Number of all values, including containers; one too many for each empty container.
    """

    depth: int
    containers: int
    values: int


def shape(text: str, most: int) -> Shape | None:
    """Measure a JSON text.

    Parsing creates objects of up to 60 times the size of the text and takes 150 ns for each. This function creates none and takes
    about 1 ns per character. For a text that is not JSON, the result is arbitrary.

    Args:
        text: The text.
        most: Limit for the number of values.

    Returns:
        The shape; `None` if there are more values.
    """
    if "\\" in text:
        # Backslash pairs first, so that at most one backslash, which escapes the next character, is left of each run.
        text = text.replace("\\\\", "").replace('\\"', "")
    # Each value has at most two strings: its key and itself.
    text, strings = _STRING.subn("", text, count=2 * most + 1)
    containers = text.count("[") + text.count("{")
    values = 1 + containers + text.count(",")
    if strings > 2 * most or values > most:
        return None
    depth = max(accumulate(map(_STEP.__getitem__, _OTHER.sub("", text))), default=0)
    return Shape(depth, containers, values)
