"""Everything that is wrong with a request, in one error."""

from __future__ import annotations

from deltawire_server.errors import Violation, invalid_request
from deltawire_server.rpc.status import MAX_MESSAGE, shorten

MAX_VIOLATIONS = 64
"""Several times what a status has room for. Validation stops there: a request can be wrong in a million places."""

MAX_FIELD = 256
"""Bytes of a field's path, some of which comes from the request."""


class Violations:
    """The rules that a request breaks: `add` each, then `raise_any`."""

    def __init__(self) -> None:
        self._violations: list[Violation] = []

    def add(self, field: str, description: str) -> None:
        """Add a violation; long texts, which may quote the request, are cut.

        Args:
            field: Path of the field.
            description: What is wrong with it, and the remedy.

        Raises:
            CallerError: INVALID_REQUEST: there are `MAX_VIOLATIONS`.
        """
        self._violations.append(Violation(shorten(field, MAX_FIELD), shorten(description, MAX_MESSAGE)))
        if len(self._violations) >= MAX_VIOLATIONS:
            self.raise_any()

    def raise_any(self) -> None:
        """Refuse the request if it breaks any rule.

        Raises:
            CallerError: INVALID_REQUEST, with all violations.
        """
        if self._violations:
            raise invalid_request(self._violations)
