"""Ctrl-C while a stream is read: it ends the call, and the command ends when reading does."""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import TYPE_CHECKING, Self

from deltawire._errors import DeltawireError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType, TracebackType

    from deltawire._client import ChatStream


class Interrupt:
    """Runs one of `ends` at each Ctrl-C, in another thread; when none is left, Ctrl-C raises KeyboardInterrupt.

    KeyboardInterrupt in the middle of gRPC's code can lose track of an operation. Then gRPC's thread waits for its end,
    and fails on standard error once the channel is closed.

    Args:
        ends: What each Ctrl-C does, the first one first.

    Use it in a `with` block around reading. `pressed` says afterwards whether there was a Ctrl-C: reading has ended with
    what came of it, and the caller raises KeyboardInterrupt. If SIGINT is ignored or has another handler, that remains.
    """

    def __init__(self, *ends: Callable[[], object]) -> None:
        self.pressed = False
        self._ends = list(ends)
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
        """Take a Ctrl-C."""
        self.pressed = True
        if not self._ends:
            raise KeyboardInterrupt
        threading.Thread(target=self._ends.pop(0), daemon=True).start()


def end_softly(stream: ChatStream) -> None:
    """End an answer: softly if its gateway process is connected and allows it, else at once."""
    with contextlib.suppress(DeltawireError, RuntimeError):
        if not stream._is_only_sought:
            stream.cancel_softly()
            return
    stream.cancel()
