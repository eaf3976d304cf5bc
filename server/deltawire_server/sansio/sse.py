"""Decodes server-sent events: from bytes in arbitrary pieces to the `data` of each event.

Follows the WHATWG specification of event streams: lines end in LF, CRLF or CR; a blank line ends an event; several
`data` lines are joined by LF; a line that begins with a colon is a comment. Other fields (`event`, `id`, `retry`) are not used
in a chat stream and are ignored. Unlike the specification, `finish` returns an event whose blank line is missing: some
servers close the connection without it, and only a decoder of the payload can check whether the event is complete.

The work is linear in the number of bytes, however they are split: the pieces of an event are kept in a list and joined once,
when its blank line is received.
"""

from __future__ import annotations

MAX_EVENT_BYTES = 16 * 1024 * 1024
"""A chunk with twenty alternatives for each of a few hundred tokens is below 1 MB, so no vLLM sends larger events."""

_BOM = b"\xef\xbb\xbf"


class EventTooLargeError(ValueError):
    """An event exceeds the size limit.

    Attributes:
        payloads: The payloads of the events before it that the same bytes completed.
    """

    def __init__(self, limit: int, payloads: list[bytes]) -> None:
        super().__init__(f"an event is larger than {limit} bytes")
        self.payloads = payloads


class SSEDecoder:
    """Splits an event stream into the payloads of its events.

    Args:
        max_event_bytes: Size limit of an event: all its lines and the line ends between them.
    """

    def __init__(self, *, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_event_bytes = max_event_bytes
        self._pieces: list[bytes] = []  # of the incomplete event; they have no blank line between them
        self._size = 0
        self._after_lf = False  # whether the last piece ends with LF, so that another LF is a blank line
        self._after_cr = False  # whether the last byte was CR, so that a following LF belongs to it
        self._head: bytes | None = b""  # a possible prefix of a byte order mark; `None` after the check

    def receive(self, data: bytes) -> list[bytes]:
        """Take the next bytes.

        Args:
            data: Any piece of the stream; may be empty.

        Returns:
            The payloads of the events that these bytes complete, in order.

        Raises:
            EventTooLargeError: An event exceeds the limit; the rest of the stream cannot be read.
        """
        if self._head is not None:
            data = self._without_mark(self._head + data)
        if not data:
            return []
        if self._after_cr or b"\r" in data:
            data = self._unify_line_ends(data)
        if b"\n\n" not in data and not (self._after_lf and data.startswith(b"\n")):
            self._keep(data, [])
            return []
        if self._pieces:
            self._pieces.append(data)
            data = b"".join(self._pieces)
            self._pieces.clear()
            self._size = 0
        lines = data.split(b"\n")
        if len(lines) % 2 and not any(lines[1::2]):
            # Every event is one line, as in vLLM's streams. Splitting at one byte is several times faster than at two.
            events, rest = lines[:-1:2], lines[-1]
        else:
            events = data.split(b"\n\n")
            rest = events.pop()
        payloads = self._payloads(events)
        self._after_lf = False
        self._keep(rest, payloads)
        return payloads

    def finish(self) -> list[bytes]:
        """End the stream.

        Returns:
            The payload of the last event if its blank line is missing; it may be truncated.
        """
        event = b"".join(self._pieces).removesuffix(b"\n")
        self._pieces.clear()
        return _payload(event)

    def _payloads(self, events: list[bytes]) -> list[bytes]:
        payloads: list[bytes] = []
        limit = self._max_event_bytes
        for event in events:
            if len(event) > limit:
                raise EventTooLargeError(limit, payloads)
            if event.startswith(b"data: ") and b"\n" not in event:
                payloads.append(event[6:])
            else:
                payloads.extend(_payload(event))
        return payloads

    def _keep(self, piece: bytes, payloads: list[bytes]) -> None:
        """Keep a piece of the incomplete event; `payloads` are those of the complete events, for the exception."""
        if not piece:
            return
        self._pieces.append(piece)
        self._size += len(piece)
        self._after_lf = piece.endswith(b"\n")
        # A last LF may belong to the blank line after the event, so it does not count.
        if self._size - self._after_lf > self._max_event_bytes:
            raise EventTooLargeError(self._max_event_bytes, payloads)

    def _without_mark(self, head: bytes) -> bytes:
        """The first bytes without a byte order mark; empty while they may still be the prefix of one."""
        if len(head) < len(_BOM) and _BOM.startswith(head):
            self._head = head
            return b""
        self._head = None
        return head.removeprefix(_BOM)

    def _unify_line_ends(self, data: bytes) -> bytes:
        if self._after_cr and data.startswith(b"\n"):
            data = data[1:]
        self._after_cr = data.endswith(b"\r")
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _payload(event: bytes) -> list[bytes]:
    """The data of an event with any number of lines, in a list; an empty list without data."""
    values = [
        line[6:] if line.startswith(b"data: ") else line[5:]
        for line in event.split(b"\n")
        if line.startswith(b"data:") or line == b"data"
    ]
    return [b"\n".join(values)] if values else []
