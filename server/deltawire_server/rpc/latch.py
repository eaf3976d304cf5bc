"""How a call ends: open until it is decided, decided once."""

from __future__ import annotations

from deltawire_server.errors import internal_error


class Latch:
    """The end of one call. Every way out of a call passes it, and OK has to be earned.

    A call succeeds by its response, or by the fault-free last message of its stream; without either it is an internal error, never
    OK. Once the end is decided, no message can be written.
    """

    def __init__(self) -> None:
        self._open = True
        self._succeeded = False

    @property
    def succeeded(self) -> bool:
        """Whether the call ends OK."""
        return self._succeeded

    def check_open(self) -> None:
        """Raise if the end is decided: whatever is to be written now comes after it, which is a defect."""
        if not self._open:
            raise RuntimeError("a message came after the end of its call")

    def succeed(self) -> None:
        """The call ends OK: its response is made, or the last message of its stream, without a fault, was written."""
        self.check_open()
        self._open, self._succeeded = False, True

    def fail(self) -> None:
        """The call ends with a failure. One that has succeeded stays so."""
        self._open = False

    def check_succeeded(self) -> None:
        """Check that there is a reason for OK.

        Raises:
            GatewayError: INTERNAL: nothing was recorded.
        """
        if not self._succeeded:
            raise internal_error("a call ended without a success or a failure")
