"""What an image is, by its first bytes.

A handful of magic numbers and no library: decoding pictures that strangers send is what image libraries get their security
holes from, and the engine decodes them anyway. What a file is called, or declared to be, decides nothing.
"""

from __future__ import annotations

import re

_KINDS = {
    "image/png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "image/jpeg": re.compile(rb"\xff\xd8\xff"),
    "image/gif": re.compile(rb"GIF8[79]a"),
    "image/webp": re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
    # "BM" alone begins texts too: the size of the second header, of which there are seven, tells them apart.
    "image/bmp": re.compile(rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", re.DOTALL),
}
"""By media type, how its files begin."""

KINDS = "PNG, JPEG, GIF, WebP or BMP"
"""What `media_type_of` knows, for people."""


def media_type_of(data: bytes) -> str | None:
    """What an image's bytes say that it is, such as "image/png"; `None` if they are none that is known."""
    return next((media_type for media_type, beginning in _KINDS.items() if beginning.match(data)), None)
