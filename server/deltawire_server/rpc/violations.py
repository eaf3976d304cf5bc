"""Collects all violations of a request for one error."""

from __future__ import annotations

from deltawire_server.errors import Violation, invalid_request
from deltawire_server.rpc.status import MAX_MESSAGE, shorten

MAX_VIOLATIONS = 64
"""Several times as many as fit into a status. Validation stops there, because a request may have a million violations."""

MAX_FIELD = 256
"""Bytes of a field's path, parts of which come from the request."""


class Violations:
    """The violations of a request: `add` each, then call `raise_any`."""

    def __init__(self) -> None:
        self._violations: list[Violation] = []

    def add(self, field: str, description: str) -> None:
        """Add a violation. Long texts, which may quote the request, are cut.

        Args:
            field: Path of the field.
            description: What is wrong, and what to do.

        Raises:
            CallerError: INVALID_REQUEST: there are `MAX_VIOLATIONS`.
        """
        self._violations.append(Violation(shorten(field, MAX_FIELD), shorten(description, MAX_MESSAGE)))
        if len(self._violations) >= MAX_VIOLATIONS:
            self.raise_any()

    def raise_any(self) -> None:
        """Refuse the request if there are violations.

        Raises:
            CallerError: INVALID_REQUEST, with all violations.
        """
        if self._violations:
            raise invalid_request(self._violations)
