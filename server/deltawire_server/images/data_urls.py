"""Decodes `data:` URLs (RFC 2397)."""

from __future__ import annotations

import binascii
import re

from deltawire_server.pacing import give_way

_TOKEN = r"[A-Za-z0-9!#$&^_.+*'`|~-]+"  # noqa: S105 (a word of MIME's grammar)
# Only the syntax of the declared type is checked; the bytes determine the type.
_HEAD = re.compile(rf"data:(?:{_TOKEN}/{_TOKEN})?(?:;{_TOKEN}=(?:{_TOKEN}|%22[^,;]*%22))*(;base64)?", re.IGNORECASE)
_LONGEST_HEAD = 1024
_PRINTABLE = bytes(range(0x21, 0x7F))
_SHOWN = 40


PIECE_BYTES = 1024 * 1024
"""Characters that are decoded in one step: about 5 ms."""


class DataUrlError(ValueError):
    """A text is not a valid `data:` URL, or its data is too large; the message has the problem."""


def is_data_url(text: str) -> bool:
    """Whether a text begins with `data:`, in upper or lower case."""
    return text[:5].lower() == "data:"


async def data_of(text: str, max_bytes: int) -> bytes:
    """Decode a `data:` URL. Other tasks get a turn after each `PIECE_BYTES`.

    Args:
        text: data:image/png;base64,… or with percent-encoding instead of base64; may have parameters before base64.
        max_bytes: Limit for the decoded data; a longer text is not decoded.

    Raises:
        DataUrlError: The text violates RFC 2397, its base64 has another alphabet or no padding, or it is too long.
    """
    comma = text.find(",", 0, _LONGEST_HEAD)
    head = _HEAD.fullmatch(text, 0, max(comma, 0))
    if head is None:
        raise DataUrlError(f"must be like data:image/png;base64,… and not like {text[:_SHOWN]!r}")
    if not text.isascii():
        raise DataUrlError("must be ASCII after the comma")
    is_base64 = head[1] is not None
    size = len(text) - comma - 1 - 2 * text.count("%", comma)
    if (size // 4 * 3 - 2 if is_base64 else size) > max_bytes:  # the padding may replace two bytes
        raise too_large(max_bytes)
    decoded: list[bytes] = []
    rest = b""
    at = comma + 1
    while at < len(text):
        end = _end_of_piece(text, at)
        piece = rest + _unescaped(text[at:end])
        at = end
        if is_base64:
            rest = piece[len(piece) // 4 * 4 :] if at < len(text) else b""
            piece = _from_base64(piece.removesuffix(rest))
            if len(decoded) and len(decoded[-1]) % 3:
                raise DataUrlError("is not base64 after the comma: more follows its padding")
        decoded.append(piece)
        await give_way()
    if sum(map(len, decoded)) > max_bytes:
        raise too_large(max_bytes)
    return b"".join(decoded)


def too_large(max_bytes: int) -> DataUrlError:
    """The error for more than `max_bytes` of data."""
    return DataUrlError(f"holds more than {max_bytes} bytes, the most of an image")


def _end_of_piece(text: str, start: int) -> int:
    """The end of a piece, which is not within an escape such as %2B."""
    end = start + PIECE_BYTES
    if end >= len(text):
        return len(text)
    escape = text.find("%", end - 2, end)
    return end if escape < 0 else escape


def _unescaped(text: str) -> bytes:
    data = text.encode()
    if data.translate(None, _PRINTABLE):
        raise DataUrlError("must hold printable ASCII after the comma")
    # As quoted-printable, with = for %: its decoder creates no object for each escape, in contrast to urllib's.
    unescaped = binascii.a2b_qp(data.replace(b"=", b"=3D").replace(b"%", b"="))
    if len(unescaped) != len(data) - 2 * data.count(b"%"):
        raise DataUrlError("must hold two hexadecimal digits after each % after the comma")
    return unescaped


def _from_base64(data: bytes) -> bytes:
    try:
        return binascii.a2b_base64(data, strict_mode=True)
    except binascii.Error as error:
        raise DataUrlError(f"is not base64 after the comma: {error}") from None
