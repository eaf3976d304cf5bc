"""The type of all secrets: tokens, keys, values of headers, and URLs that may contain a password."""

from __future__ import annotations


class Secret(str):
    """A string whose repr is a mask.

    It is a `str`, so that libraries accept it. Dataclasses, exceptions and debuggers print the repr. Formatting it returns the
    value, as headers need it: never format a secret into a message.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        """A mask, whatever the value."""
        return "'***'"
