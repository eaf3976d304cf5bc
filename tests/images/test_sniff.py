"""What an image is, by its bytes."""

from __future__ import annotations

import pytest

from deltawire_server.images.sniff import media_type_of
from tests.support.images import IMAGES, NO_IMAGES


@pytest.mark.parametrize("media_type", IMAGES)
def test_each_kind_is_told(media_type: str) -> None:
    """By its magic number."""
    assert media_type_of(IMAGES[media_type]) == media_type


@pytest.mark.parametrize("name", NO_IMAGES)
def test_what_is_none(name: str) -> None:
    """Whatever it is, and whatever it resembles."""
    assert media_type_of(NO_IMAGES[name]) is None


def test_old_gifs_and_all_bitmaps() -> None:
    """GIF has two versions, BMP seven sizes of its second header."""
    assert media_type_of(b"GIF87a") == "image/gif"
    for size in (12, 40, 52, 56, 64, 108, 124):
        assert media_type_of(b"BM" + bytes(12) + size.to_bytes(4, "little")) == "image/bmp"
    assert media_type_of(b"BM" + bytes(12) + (41).to_bytes(4, "little")) is None


def test_nothing_is_no_image() -> None:
    """And nothing breaks on it."""
    assert media_type_of(b"") is None
