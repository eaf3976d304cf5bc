"""The body of an answer, pushed: each piece goes from the socket to the completion in one motion.

    socket ─▶ Connection.buffer_updated ─▶ Exchange.feed ─▶ AnswerBody ─▶ Completion ─▶ CompletionReader ─▶ EventBuffer

No task waits for the pieces. Waking one for each token, through three layers of iterators, takes as long as decoding it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltawire_server import pacing
from deltawire_server.errors import Reason
from deltawire_server.sansio.events import Fault
from deltawire_server.upstream.transport.errors import ProtocolViolationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from deltawire_server.upstream.transport.exchange import Exchange

MAX_PIECE = 16 * 1024
"""Bytes of an answer's body that are processed in one step: up to 8 ms if they are short events."""


class AnswerBody:
    """The body of one answer; see `upstream.base.Body`. Pieces of `MAX_PIECE` take turns with other long work.

    Args:
        opening: The part of the body that was read before.
        exchange: The response with the rest of it.
    """

    def __init__(self, opening: bytes, exchange: Exchange) -> None:
        self._data = opening
        self._exchange = exchange
        self._receive: Callable[[bytes], None] | None = None
        self._end: Callable[[Fault | None], None] | None = None
        self._paused = False
        self._in_line = False

    def follow(self, receive: Callable[[bytes], None], end: Callable[[Fault | None], None]) -> None:
        """See `upstream.base.Body.follow`."""
        self._receive, self._end = receive, end
        self._exchange.on_change = self._advance
        self._advance()

    def pause(self) -> None:
        """See `upstream.base.Body.pause`."""
        self._paused = True

    def resume(self) -> None:
        """See `upstream.base.Body.resume`."""
        self._paused = False
        self._advance()

    def close(self) -> None:
        """Push nothing from now on."""
        self._receive = self._end = self._exchange.on_change = None
        self._data = b""

    def _advance(self) -> None:
        while self._receive is not None and not self._paused and not self._in_line:
            if not self._data:
                self._data = self._exchange.take()
            if not self._data:
                if self._exchange.done:
                    self._finish()
                return
            if len(self._data) >= MAX_PIECE:
                self._in_line = True
                pacing.call_in_turn(self._take_turn)
                return
            piece, self._data = self._data, b""
            self._receive(piece)

    def _take_turn(self) -> None:
        self._in_line = False
        if self._receive is not None and not self._paused:
            piece, self._data = self._data[:MAX_PIECE], self._data[MAX_PIECE:]
            self._receive(piece)
        self._advance()

    def _finish(self) -> None:
        """Report the end. A lost connection is no fault: the events show what is missing."""
        error, end = self._exchange.error, self._end
        self.close()
        if end is not None:
            violated = isinstance(error, ProtocolViolationError)
            end(Fault(Reason.UPSTREAM_MALFORMED, str(error)) if violated else None)
