"""The type of every secret that the gateway holds: tokens, keys, the values of headers, URLs that may hold a password."""

from __future__ import annotations


class Secret(str):
    """A text that shows its value only where it is used.

    It is a `str`, so that libraries take it. Its repr is a mask: that is what dataclasses, exceptions and debuggers print of
    what they hold. Formatting it, as a header needs, gives the value: never format one into a message.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        """A mask, whatever the value."""
        return "'***'"
