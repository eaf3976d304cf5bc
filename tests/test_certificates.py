"""Which file of a listener's certificates is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from deltawire_server.certificates import ServerCertificates

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Certificates


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ("tls.crt", "has no certificate in PEM"),
        ("tls.key", "has no unencrypted private key in PEM"),
        ("ca.crt", "has no certificate in PEM"),
    ],
)
@pytest.mark.parametrize("content", ["", "garbage", "-----BEGIN CERTIFICATE-----\nMII\n-----END CERTIFICATE-----\n"])
def test_an_error_names_the_file(
    certificates: Certificates, tmp_path: Path, wrong: str, problem: str, content: str
) -> None:
    """And what it should contain."""
    files = {name: tmp_path / name for name in ("tls.crt", "tls.key", "ca.crt")}
    for file, path in zip(
        files.values(), (certificates.server, certificates.server_key, certificates.authority), strict=True
    ):
        file.write_bytes(path.read_bytes())
    files[wrong].write_text(content)
    with pytest.raises(OSError, match=problem) as caught:
        ServerCertificates(*files.values())
    assert str(files[wrong]) in str(caught.value)
