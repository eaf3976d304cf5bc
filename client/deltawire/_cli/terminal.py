"""What others wrote, harmless to a terminal: a model's text in pieces, and what is said of it on one line."""

from __future__ import annotations

import sys
from typing import TextIO

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
# A model's text must not control a terminal: control characters other than tab and newline are shown as their symbols.
_PICTURES = {code: 0x2400 + code for code in range(0x20) if code not in {0x09, 0x0A}} | {0x7F: 0x2421}
_PICTURES |= dict.fromkeys(
    [
        *range(0x80, 0xA0),  # C1 control characters
        *(0x2028, 0x2029),  # line and paragraph separators
        # Characters that change the order in which text is shown.
        *(0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x2070)),
        # Characters of no width, which hide text or split words. Emoji of several characters are shown in parts.
        *(0x00AD, 0x034F, 0x180E, *range(0x200B, 0x200E), *range(0x2060, 0x2066), 0xFEFF),
        *range(0xE0000, 0xE0080),  # tags
    ],
    0xFFFD,
)
# On one line, whatever would end it or move within it is a space.
_ON_A_LINE = _PICTURES | dict.fromkeys([0x09, 0x0A, 0x2028, 0x2029], 0x20)


def one_line(text: str) -> str:
    """Text from elsewhere as it can be shown on one line: an error's message, a name, a note."""
    return text.translate(_ON_A_LINE).rstrip()


class Printer:
    """Prints pieces of text so that a line of another kind always begins a line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._clean = stream.isatty()
        self._at_line_start = True

    def piece(self, text: str) -> None:
        """Print a piece, at once."""
        if text:
            # Noted first: Ctrl-C can come right after the text is out.
            self._at_line_start = text.endswith("\n")
            self._stream.write(text.translate(_PICTURES) if self._clean else text)
            self._stream.flush()

    def line(self, text: str) -> None:
        """Print a line of its own."""
        self.end()
        self.piece(f"{text}\n")

    def end(self) -> None:
        """End the line that is open, if one is."""
        if not self._at_line_start:
            self.piece("\n")


class Aside:
    """Prints what is not the answer, dimmed, on standard error, if that is a terminal; otherwise nothing.

    That is reasoning, and tool calls while they are written.
    """

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()
        self._open = False

    def piece(self, text: str) -> None:
        """Print a piece, at once."""
        if self._shown:
            text = text.translate(_PICTURES)
            print(text if self._open else DIM + text, end="", file=sys.stderr, flush=True)
            self._open = True

    def end(self) -> None:
        """Make the terminal as it was."""
        if self._open:
            print(PLAIN, file=sys.stderr, flush=True)
            self._open = False
