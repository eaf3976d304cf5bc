"""The outcome of a call, which is set once."""

from __future__ import annotations

from deltawire_server.errors import internal_error


class Latch:
    """The outcome of one call.

    A call succeeds with its response, or with the last message of its stream if that has no error. Without either, the call fails
    with an internal error, never OK. Once the outcome is set, no message can be written.
    """

    def __init__(self) -> None:
        self._open = True
        self._succeeded = False

    @property
    def succeeded(self) -> bool:
        """Whether the call ends with OK."""
        return self._succeeded

    def check_open(self) -> None:
        """Raise if the outcome is set: to write a message after it is a defect."""
        if not self._open:
            raise RuntimeError("a message was written after the end of its call")

    def succeed(self) -> None:
        """Set the outcome to OK: the response is complete, or the last message of the stream was written without an error."""
        self.check_open()
        self._open, self._succeeded = False, True

    def fail(self) -> None:
        """Set the outcome to failure, unless the call has succeeded."""
        self._open = False

    def check_succeeded(self) -> None:
        """Check that the outcome is OK.

        Raises:
            GatewayError: INTERNAL: no success was recorded.
        """
        if not self._succeeded:
            raise internal_error("a call ended without a success or a failure")
