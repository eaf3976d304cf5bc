"""How much delay and memory one request, or the answer to it, may cost the gateway."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1024 * 1024


@dataclass(frozen=True)
class Bars:
    """The bars of one attack.

    Attributes:
        delay: Seconds that another caller's health check may take.
        growth: Bytes by which the process may grow for a while.
        kept: Bytes by which it may have grown afterwards.
    """

    delay: float
    growth: int
    kept: int


def bars(size: int, *, keyed: bool, calls: int = 1) -> Bars:
    """The bars for a caller with an access key or without one.

    Args:
        size: Bytes of the requests that are sent at once.
        keyed: Whether they have a key.
        calls: How many are sent at once.
    """
    if not keyed:
        return Bars(delay=0.020, growth=4 * MIB, kept=4 * MIB)
    # The allocators of Python and of the C library keep some of what was freed, and use it again. What is kept for good adds up
    # over the repetitions.
    one = Bars(delay=0.100, growth=max(64 * MIB, 3 * size), kept=24 * MIB)
    if calls == 1:
        return one
    return Bars(delay=0.200, growth=max(one.growth, calls * MIB // 2), kept=one.kept + calls * MIB // 4)
