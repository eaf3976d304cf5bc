"""`data:` URLs, which hold what they stand for."""

from __future__ import annotations

import binascii
import re

from deltawire_server.pacing import give_way

_TOKEN = r"[A-Za-z0-9!#$&^_.+*'`|~-]+"  # noqa: S105 (a word of MIME's grammar)
# Declared types are looked at for their form only: the bytes say what it is.
_HEAD = re.compile(rf"data:(?:{_TOKEN}/{_TOKEN})?(?:;{_TOKEN}=(?:{_TOKEN}|%22[^,;]*%22))*(;base64)?", re.IGNORECASE)
_LONGEST_HEAD = 1024
_PRINTABLE = bytes(range(0x21, 0x7F))
_SHOWN = 40


PIECE_BYTES = 1024 * 1024
"""Of what is decoded in one go: about 5 ms."""


class DataUrlError(ValueError):
    """A text is no `data:` URL, or holds too much; the message says what is wrong with it."""


def is_data_url(text: str) -> bool:
    """Whether a text means to be one: it begins with `data:`, in any case."""
    return text[:5].lower() == "data:"


async def data_of(text: str, max_bytes: int) -> bytes:
    """Decode what a `data:` URL holds. Other calls get their turn after each `PIECE_BYTES`.

    Args:
        text: data:image/png;base64,… or with percent signs instead of base64; parameters may stand before base64.
        max_bytes: Most that it may hold: of a longer one nothing is decoded.

    Raises:
        DataUrlError: It is invalid by RFC 2397, or its base64 has another alphabet or no padding; or it is too long.
    """
    comma = text.find(",", 0, _LONGEST_HEAD)
    head = _HEAD.fullmatch(text, 0, max(comma, 0))
    if head is None:
        raise DataUrlError(f"must be like data:image/png;base64,… and not like {text[:_SHOWN]!r}")
    if not text.isascii():
        raise DataUrlError("must be ASCII after the comma")
    is_base64 = head[1] is not None
    size = len(text) - comma - 1 - 2 * text.count("%", comma)
    if (size // 4 * 3 - 2 if is_base64 else size) > max_bytes:  # as the padding may stand for two
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
    """The violation about more than `max_bytes`."""
    return DataUrlError(f"holds more than {max_bytes} bytes, the most of an image")


def _end_of_piece(text: str, start: int) -> int:
    """Where a piece ends that does not end within an escape such as %2B."""
    end = start + PIECE_BYTES
    if end >= len(text):
        return len(text)
    escape = text.find("%", end - 2, end)
    return end if escape < 0 else escape


def _unescaped(text: str) -> bytes:
    data = text.encode()
    if data.translate(None, _PRINTABLE):
        raise DataUrlError("must hold printable ASCII after the comma")
    # Quoted-printable writes = for %, and its decoder needs no object for each escape, as urllib's does.
    unescaped = binascii.a2b_qp(data.replace(b"=", b"=3D").replace(b"%", b"="))
    if len(unescaped) != len(data) - 2 * data.count(b"%"):
        raise DataUrlError("must hold two hexadecimal digits after each % after the comma")
    return unescaped


def _from_base64(data: bytes) -> bytes:
    try:
        return binascii.a2b_base64(data, strict_mode=True)
    except binascii.Error as error:
        raise DataUrlError(f"is not base64 after the comma: {error}") from None
