"""`data:` URLs: strictly read, and no larger than allowed."""

from __future__ import annotations

import base64
import contextlib
import tracemalloc
from typing import TYPE_CHECKING

import pytest

from deltawire_server.images.data_urls import PIECE_BYTES, DataUrlError, is_data_url
from deltawire_server.images.data_urls import data_of as data_of_url
from tests.support.turns import at_once

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1 << 20
DATA = b"\x89PNG?>\xff\xfe"
BASE64 = base64.b64encode(DATA).decode()
ESCAPED = "".join(f"%{byte:02x}" for byte in DATA)

READ = {
    "base64": f"data:image/png;base64,{BASE64}",
    "upper case": f"DATA:IMAGE/PNG;BASE64,{BASE64}",
    "no media type": f"data:;base64,{BASE64}",
    "another media type": f"data:text/html;base64,{BASE64}",
    "parameters": f"data:image/svg+xml;charset=utf-8;name=%22a%20b%22;base64,{BASE64}",
    "escaped base64": f"data:image/png;base64,{BASE64.replace('/', '%2F').replace('+', '%2B').replace('=', '%3D')}",
    "escaped bytes": f"data:image/png,{ESCAPED}",
    "escaped bytes, nothing else": f"data:,{ESCAPED.upper()}",
}

NOT_READ = {
    "no comma": "data:image/png;base64",
    "no slash": f"data:image;base64,{BASE64}",
    "base64 before a parameter": f"data:image/png;base64;a=b,{BASE64}",
    "a space in the head": f"data:image/png; base64,{BASE64}",
    "a parameter without a value": f"data:image/png;charset;base64,{BASE64}",
    "a head without end": f"data:image/png;a={'b' * 2000};base64,{BASE64}",
    "a line end": f"data:image/png;base64,{BASE64[:4]}\n{BASE64[4:]}",
    "an escaped line end": f"data:image/png;base64,{BASE64[:4]}%0A{BASE64[4:]}",
    "the alphabet for file names": "data:image/png;base64,-_8=",
    "no padding": "data:image/png;base64,iVBORw",
    "something after the padding": f"data:image/png;base64,{BASE64[:-4]}AA==AAAA",
    "not ASCII": "data:image/png;base64,\uff49VBO",
    "not ASCII, escaped": "data:image/png,ä",
    "a percent sign alone": "data:image/png,%8",
    "no hexadecimal digits": "data:image/png;base64,%xx",
    "a control character": "data:image/png,\x00",
}


def data_of(url: str, max_bytes: int) -> bytes:
    """`data_of`, at once."""
    return at_once(data_of_url(url, max_bytes))[0]


@pytest.mark.parametrize("name", READ)
def test_forms(name: str) -> None:
    """Every form that RFC 2397 knows holds the same."""
    assert is_data_url(READ[name])
    assert data_of(READ[name], 100) == DATA


@pytest.mark.parametrize("name", NOT_READ)
def test_strict(name: str) -> None:
    """What browsers would guess at is refused, in a sentence that is not as long as the image."""
    assert is_data_url(NOT_READ[name])
    with pytest.raises(DataUrlError) as caught:
        data_of(NOT_READ[name], 100)
    assert len(str(caught.value)) < 200


def test_other_schemes() -> None:
    """Are none."""
    assert not is_data_url("https://data:443/")
    assert not is_data_url(" data:,")
    assert not is_data_url("")


@pytest.mark.parametrize("size", range(1, 7))
@pytest.mark.parametrize("escaped", [False, True])
def test_size(size: int, escaped: bool) -> None:
    """The limit is exact for every padding; base64 far above it is not decoded."""
    data = b"x" * size
    url = f"data:,{data.decode()}" if escaped else f"data:;base64,{base64.b64encode(data).decode()}"
    assert data_of(url, size) == data
    with pytest.raises(DataUrlError, match=f"more than {size - 1} bytes"):
        data_of(url, size - 1)
    with pytest.raises(DataUrlError, match="more than 100 bytes"):
        data_of("data:;base64," + "!" * 1000, 100)


LONG = bytes(range(256)) * (PIECE_BYTES // 170)
LONG_BASE64 = base64.b64encode(LONG).decode()


FORMS: dict[str, Callable[[bytes], str]] = {
    "base64": lambda data: f"data:;base64,{base64.b64encode(data).decode()}",
    "escaped base64": lambda data: f"data:;base64,{base64.b64encode(data).decode().replace('/', '%2F')}",
    "escaped": lambda data: f"data:,%{data.hex('%')}",
    "partly escaped": lambda data: (
        f"data:,%{data.hex('%').replace('%41', 'A').replace('%42', 'B').replace('%3d', '=')}"
    ),
}


@pytest.mark.parametrize("shift", range(4))
@pytest.mark.parametrize("form", FORMS)
def test_longer_than_a_piece(form: str, shift: int) -> None:
    """Wherever a piece ends: within an escape, or within four characters of base64."""
    data = LONG[shift:] + b"x" * shift
    url = FORMS[form](data)
    assert data_of(url, len(data)) == data


@pytest.mark.parametrize(
    "body",
    ["AA==" + LONG_BASE64, LONG_BASE64[: PIECE_BYTES - 4] + "AA==" + "AAAA", LONG_BASE64[: PIECE_BYTES - 4] + "AA=="],
    ids=["early", "after the first piece", "none"],
)
def test_padding_that_is_not_at_the_end(body: str) -> None:
    """Also where a piece ends with it."""
    if body.endswith("AA=="):
        data_of(f"data:;base64,{body}", len(LONG))
        return
    with pytest.raises(DataUrlError, match="is not base64"):
        data_of(f"data:;base64,{body}", 2 * len(LONG))


HOSTILE = {
    "base64": "data:image/png;base64," + "A" * (8 * MIB),
    "not base64": "data:image/png;base64," + "!" * (8 * MIB),
    "not base64 at its end": "data:image/png;base64," + "A" * (8 * MIB - 4) + "AAA!",
    "escapes": "data:image/png," + "%41" * (8 * MIB // 3),
    "escapes of base64": "data:image/png;base64," + "%41" * (8 * MIB // 3),
    "escapes of percent signs": "data:image/png," + "%25" * (8 * MIB // 3),
    "percent signs": "data:image/png," + "%" * (8 * MIB),
    "equals signs": "data:image/png," + "=" * (8 * MIB),
    "line ends": "data:image/png," + "\n" * (8 * MIB),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_memory_and_steps(name: str) -> None:
    """The peak is at most twice the URL and a few pieces, and there is a turn for others after each piece."""
    url = HOSTILE[name]
    turns = 0
    tracemalloc.start()
    try:
        with contextlib.suppress(DataUrlError):
            _, turns = at_once(data_of_url(url, 16 * MIB))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * len(url) + 6 * PIECE_BYTES
    assert turns in (0, 8, 9)


def test_what_is_too_long_is_not_decoded() -> None:
    """Its size is known from the number of escapes."""
    for url in ("data:," + "%41" * (3 * MIB), "data:;base64," + "%41" * (4 * MIB), "data:;base64," + "!" * (4 * MIB)):
        tracemalloc.start()
        try:
            with pytest.raises(DataUrlError, match=f"more than {2 * MIB} bytes"):
                data_of(url, 2 * MIB)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < MIB
