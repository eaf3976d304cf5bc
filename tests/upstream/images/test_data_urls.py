"""`data:` URLs: strictly read, and no larger than allowed."""

from __future__ import annotations

import base64

import pytest

from deltawire_server.upstream.images.data_urls import DataUrlError, data_of, is_data_url

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
    """Held to the byte, whatever the padding; base64 that is far above is not even decoded."""
    data = b"x" * size
    url = f"data:,{data.decode()}" if escaped else f"data:;base64,{base64.b64encode(data).decode()}"
    assert data_of(url, size) == data
    with pytest.raises(DataUrlError, match=f"more than {size - 1} bytes"):
        data_of(url, size - 1)
    with pytest.raises(DataUrlError, match="more than 100 bytes"):
        data_of("data:;base64," + "!" * 1000, 100)
