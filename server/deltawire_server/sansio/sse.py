"""Server-sent events: bytes cut anywhere in, the `data` of each event out.

Follows the WHATWG specification of event streams: lines end in LF, CRLF or CR; a blank line ends an event; several
`data` lines are joined by LF; a line that begins with a colon is a comment; an event that the end of the stream cuts off
is dropped. Other fields (`event`, `id`, `retry`) carry nothing for a chat stream and are passed over.

Each byte is copied a bounded number of times: a line in many pieces is kept in a list and joined once, when its end
comes. So the work is linear however the bytes are cut.
"""

from __future__ import annotations

MAX_EVENT_BYTES = 16 * 1024 * 1024
"""A chunk with twenty alternatives for each of a few hundred tokens is under a megabyte; above this it is no vLLM."""

_BOM = b"\xef\xbb\xbf"


class EventTooLargeError(ValueError):
    """An event is larger than the decoder may hold.

    Attributes:
        payloads: The events that the same bytes completed before it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.payloads: list[bytes] = []


class SSEDecoder:
    """Splits an event stream into the payloads of its events.

    Args:
        max_event_bytes: The largest event, all its data lines together, and the line that is being read.
    """

    def __init__(self, *, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_event_bytes = max_event_bytes
        self._line: list[bytes] = []  # the pieces of the line that has not ended yet
        self._line_size = 0
        self._data: list[bytes] = []  # the data lines of the event that has not ended yet
        self._data_size = 0
        self._after_cr = False  # whether the last byte was a CR, so that an LF now belongs to it
        self._at_start = True

    def receive(self, data: bytes) -> list[bytes]:
        """Take the next bytes.

        Args:
            data: Any piece of the stream, also an empty one.

        Returns:
            The payloads of the events that these bytes complete, in order.

        Raises:
            EventTooLargeError: An event exceeds the limit; the stream cannot be read on.
        """
        if self._after_cr or b"\r" in data:
            data = self._unify_line_ends(data)
        payloads: list[bytes] = []
        try:
            self._receive_lines(data.split(b"\n"), payloads)
        except EventTooLargeError as error:
            error.payloads = payloads
            raise
        return payloads

    def _receive_lines(self, lines: list[bytes], payloads: list[bytes]) -> None:
        """Take lines, the last of which has not ended yet."""
        rest = lines.pop()
        if lines:
            if self._line:
                self._line.append(lines[0])
                lines[0] = b"".join(self._line)
                self._line.clear()
                self._line_size = 0
            if self._at_start:
                self._check_size(len(lines[0]))
                lines[0] = lines[0].removeprefix(_BOM)
                self._at_start = False
            for line in lines:
                if line:
                    self._check_size(len(line))
                    self._receive_field(line)
                elif self._data:
                    payloads.append(self._data[0] if len(self._data) == 1 else b"\n".join(self._data))
                    self._data.clear()
                    self._data_size = 0
        if rest:
            self._line.append(rest)
            self._line_size += len(rest)
            self._check_size(self._line_size)

    def _receive_field(self, line: bytes) -> None:
        if line.startswith(b"data:"):
            value = line[6:] if line[5:6] == b" " else line[5:]
        elif line == b"data":
            value = b""
        else:
            return
        self._data.append(value)
        self._data_size += len(line)

    def _check_size(self, line_size: int) -> None:
        if self._data_size + line_size > self._max_event_bytes:
            raise EventTooLargeError(f"an event is larger than {self._max_event_bytes} bytes")

    def _unify_line_ends(self, data: bytes) -> bytes:
        if self._after_cr and data.startswith(b"\n"):
            data = data[1:]
        self._after_cr = data.endswith(b"\r")
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
