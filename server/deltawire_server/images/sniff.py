"""Detects the media type of an image from its first bytes.

It uses a few magic numbers and no image library, because decoding untrusted images is a security risk and the engine decodes them
anyway. The name and the declared type of a file are ignored.
"""

from __future__ import annotations

import re

_KINDS = {
    "image/png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "image/jpeg": re.compile(rb"\xff\xd8\xff"),
    "image/gif": re.compile(rb"GIF8[79]a"),
    "image/webp": re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
    # A text may begin with "BM" too, so this also checks the size of the second header, which has seven values.
    "image/bmp": re.compile(rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", re.DOTALL),
}
"""The first bytes of a file by media type."""

KINDS = "PNG, JPEG, GIF, WebP or BMP"
"""The formats that `media_type_of` detects, for messages."""


def media_type_of(data: bytes) -> str | None:
    """The media type of an image, such as "image/png"; `None` for an unknown format."""
    return next((media_type for media_type, beginning in _KINDS.items() if beginning.match(data)), None)
