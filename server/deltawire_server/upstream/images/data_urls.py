"""`data:` URLs, which hold what they stand for."""

from __future__ import annotations

import base64
import binascii
import re
from urllib.parse import unquote_to_bytes

_TOKEN = r"[A-Za-z0-9!#$&^_.+*'`|~-]+"  # noqa: S105 (a word of MIME's grammar)
# Declared types are looked at for their form only: the bytes say what it is.
_HEAD = re.compile(rf"data:(?:{_TOKEN}/{_TOKEN})?(?:;{_TOKEN}=(?:{_TOKEN}|%22[^,;]*%22))*(;base64)?", re.IGNORECASE)
_LONGEST_HEAD = 1024
_ESCAPED = re.compile(rb"(?:[!-$&-~]|%[0-9A-Fa-f]{2})*")
_SHOWN = 40


class DataUrlError(ValueError):
    """A text is no `data:` URL, or holds too much; the message says what is wrong with it."""


def is_data_url(text: str) -> bool:
    """Whether a text means to be one: it begins with `data:`, in any case."""
    return text[:5].lower() == "data:"


def data_of(text: str, max_bytes: int) -> bytes:
    """What a `data:` URL holds.

    Args:
        text: data:image/png;base64,… or with percent signs instead of base64; parameters may stand before base64.
        max_bytes: Most that it may hold: a longer one is not decoded.

    Raises:
        DataUrlError: It is none, by RFC 2397 and with base64 of the usual alphabet and with its padding; or it is too long.
    """
    comma = text.find(",", 0, _LONGEST_HEAD)
    head = _HEAD.fullmatch(text, 0, max(comma, 0))
    if head is None:
        raise DataUrlError(f"must be like data:image/png;base64,… and not like {text[:_SHOWN]!r}")
    body = text[comma + 1 :]
    if not body.isascii():
        raise DataUrlError("must be ASCII after the comma")
    if head[1] is None:
        data = _unescaped(body)
    else:
        if "%" in body:
            body = _unescaped(body).decode("latin-1")
        if len(body) // 4 * 3 > max_bytes + 2:  # as the padding may stand for two
            raise too_large(max_bytes)
        try:
            data = base64.b64decode(body, validate=True)
        except (binascii.Error, ValueError) as error:
            raise DataUrlError(f"is not base64 after the comma: {error}") from None
    if len(data) > max_bytes:
        raise too_large(max_bytes)
    return data


def too_large(max_bytes: int) -> DataUrlError:
    """The complaint about more than `max_bytes`."""
    return DataUrlError(f"holds more than {max_bytes} bytes, the most of an image")


def _unescaped(body: str) -> bytes:
    if not _ESCAPED.fullmatch(body.encode()):
        raise DataUrlError("must hold printable ASCII after the comma, and two hexadecimal digits after each %")
    return unquote_to_bytes(body)
