"""The certificates of listeners: which file is wrong, and when they expire."""

from __future__ import annotations

import ssl
import subprocess
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


def test_a_chain_expires_with_its_first_certificate(certificates: Certificates, tmp_path: Path) -> None:
    """Also if another one of it expires after 2049, for which X.509 has another form of time."""
    key, late, chain = tmp_path / "late.key", tmp_path / "late.pem", tmp_path / "chain.pem"
    new = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=late")
    subprocess.run(["openssl", *new, "-days", "20000", "-keyout", key, "-out", late], check=True, capture_output=True)
    chain.write_bytes(certificates.server.read_bytes() + late.read_bytes())
    both = ServerCertificates(chain, certificates.server_key, None)
    assert both.expiry == expiry(certificates.server)
    assert ServerCertificates(late, key, None).expiry == expiry(late) > expiry(certificates.server)
    chain.write_bytes(certificates.server.read_bytes())
    assert both.reload()
    chain.write_bytes(late.read_bytes())
    with pytest.raises(OSError, match="is not that of"):
        both.reload()
    assert both.expiry == expiry(certificates.server)


def expiry(file: Path) -> float:
    """When a certificate expires, as openssl reads it."""
    shown = subprocess.check_output(["openssl", "x509", "-in", file, "-noout", "-enddate"], text=True)
    return ssl.cert_time_to_seconds(shown.strip().removeprefix("notAfter="))
