"""Ways to cut bytes: whatever reads a stream must give the same however its bytes arrive."""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

SEED = 20


def whole(data: bytes) -> list[bytes]:
    """Everything at once."""
    return [data]


def byte_by_byte(data: bytes) -> list[bytes]:
    """Every byte alone."""
    return [data[position : position + 1] for position in range(len(data))]


def at(data: bytes, positions: Iterable[int]) -> list[bytes]:
    """Cut at these positions; those outside of the data are passed over."""
    cuts = [0, *sorted({position for position in positions if 0 < position < len(data)}), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(cuts)]


def at_random(data: bytes, *, ways: int = 20, seed: int = SEED) -> Iterator[list[bytes]]:
    """Cut at random positions, the same ones in every run; the first ways cut seldom, the last ones often."""
    generator = random.Random(seed)  # noqa: S311 (a seeded generator is what makes the test repeatable)
    for way in range(ways):
        yield at(data, generator.choices(range(len(data) + 1), k=1 + way * way))


def at_every_boundary(data: bytes) -> Iterator[list[bytes]]:
    """Cut in two, at every position there is."""
    for position in range(1, len(data)):
        yield [data[:position], data[position:]]


def around_event_ends(data: bytes, *, reach: int = 3) -> Iterator[list[bytes]]:
    """Cut near the end of every event: at each distance up to `reach` in turn, then at all these distances at once."""
    ends = [position + 2 for position in range(len(data)) if data.startswith(b"\n\n", position)]
    for distance in range(-reach, reach + 1):
        yield at(data, (end + distance for end in ends))
    yield at(data, (end + distance for end in ends for distance in range(-reach, reach + 1)))
