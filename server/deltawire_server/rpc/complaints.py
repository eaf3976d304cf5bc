"""What is wrong with a request, told all at once, as far as anybody would read it."""

from __future__ import annotations

from deltawire_server.errors import Violation, invalid_request
from deltawire_server.rpc.status import MAX_MESSAGE, shorten

MAX_COMPLAINTS = 64
"""Several times what a status has room for. Reading stops there: a request can be wrong in a million places."""

MAX_FIELD = 256
"""Bytes of a field's path, some of which comes from the request."""


class Complaints:
    """Collects the rules that a request breaks: `complaints(field, description)` for each, then `settle` once.

    Raises:
        CallerError: INVALID_REQUEST, from whichever call finds that there are too many, and from `settle` if there are any.
    """

    def __init__(self) -> None:
        self._violations: list[Violation] = []

    def __call__(self, field: str, description: str) -> None:
        """Note that a field breaks a rule; what quotes the request is cut here."""
        self._violations.append(Violation(shorten(field, MAX_FIELD), shorten(description, MAX_MESSAGE)))
        if len(self._violations) >= MAX_COMPLAINTS:
            self.settle()

    def settle(self) -> None:
        """Refuse the request if anything was wrong with it."""
        if self._violations:
            raise invalid_request(self._violations)
