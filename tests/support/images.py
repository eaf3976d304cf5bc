"""Images as small as their formats allow, and what is none."""

from __future__ import annotations

import struct
import zlib


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int = 1, height: int = 1, color: tuple[int, int, int] = (255, 0, 0)) -> bytes:
    """A PNG of one color; `color` is red, green, blue from 0 to 255."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = (b"\0" + bytes(color) * width) * height
    pixels = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + pixels + _chunk(b"IEND", b"")


PNG = png()
JPEG = b"\xff\xd8\xff\xe0\0\x10JFIF\0"
GIF = b"GIF89a\x01\0\x01\0\0\0\0;"
WEBP = b"RIFF\x1a\0\0\0WEBPVP8L"
BMP = b"BM\x1e\0\0\0\0\0\0\0\x1a\0\0\0\x0c\0\0\0\x01\0\x01\0\x01\0\x18\0\0\0\xff\0"

IMAGES = {"image/png": PNG, "image/jpeg": JPEG, "image/gif": GIF, "image/webp": WEBP, "image/bmp": BMP}
"""One of each kind, by media type; only the PNG is a whole file."""

NO_IMAGES = {
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://127.0.0.1/"/></svg>',
    "xml": b'<?xml version="1.0"?><!DOCTYPE svg><svg/>',
    "html": b"<!DOCTYPE html><html>",
    "pdf": b"%PDF-1.7",
    "tiff": b"II*\0\x08\0\0\0",
    "heic": b"\0\0\0\x18ftypheic",
    "a text that begins with BM": b"BMW and other makers of cars",
    "a RIFF that is sound": b"RIFF\x1a\0\0\0WAVEfmt ",
    "a PNG after a space": b" " + PNG,
    "the first half of a PNG's magic number": PNG[:4],
}
"""What is no image that is taken."""
