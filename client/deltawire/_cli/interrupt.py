"""Ctrl-C while an answer comes: the first ends it softly, the second at once."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, Self

from deltawire._errors import DeltawireError

if TYPE_CHECKING:
    from types import FrameType, TracebackType

    from deltawire._client import ChatStream


class SoftInterrupt:
    """Lets Ctrl-C end an answer softly, so that its end and its usage still come; a second one is KeyboardInterrupt.

    Use it in a `with` block around reading; `pressed` says afterwards that the end was asked for. Where Ctrl-C does
    something else already, or nothing, it stays so.
    """

    def __init__(self, stream: ChatStream) -> None:
        self.pressed = False
        self._stream = stream
        self._installed = False

    def __enter__(self) -> Self:
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._press)
            self._installed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _press(self, _: int, __: FrameType | None) -> None:
        """Take a Ctrl-C. The reader is in the middle of a call, which an exception would leave unusable."""
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True
        threading.Thread(target=self._end, daemon=True).start()

    def _end(self) -> None:
        """End the answer: softly if that can be done, else at once."""
        try:
            self._stream.cancel_softly()
        except (DeltawireError, RuntimeError):
            self._stream.cancel()
