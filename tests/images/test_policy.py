"""What the operator allows, as far as an address shows it."""

from __future__ import annotations

import pytest

from deltawire_server.images.policy import Policy
from deltawire_server.upstream.web_address import web_address

BOTH = ("https", "http")


@pytest.mark.parametrize(
    ("rule", "url", "allowed"),
    [
        ("a.example", "https://a.example/", True),
        ("a.example", "https://A.EXAMPLE./", True),
        ("a.example", "http://a.example/", True),
        ("a.example", "https://a.example:8443/", False),
        ("a.example", "http://a.example:443/", False),
        ("a.example", "https://b.a.example/", False),
        ("a.example", "https://a.example.evil.example/", False),
        ("a.example", "https://xa.example/", False),
        ("a.example:8443", "https://a.example:8443/", True),
        ("a.example:8443", "https://a.example/", False),
        ("a.example:443", "https://a.example/", True),
        ("*.a.example", "https://b.a.example/", True),
        ("*.a.example", "https://c.b.a.example/", True),
        ("*.a.example", "https://a.example/", False),
        ("*.a.example", "https://xa.example/", False),
        ("*.a.example", "https://a.example.evil.example/", False),
        ("*.a.example:8443", "https://b.a.example:8443/", True),
        ("*.a.example:8443", "https://b.a.example/", False),
        ("*", "https://b.example/", True),
        ("*", "https://8.8.8.8/", True),
        ("*", "https://b.example:22/", False),
        ("*:22", "https://b.example:22/", True),
        ("*.8.8", "https://8.8.8.8/", False),
        ("8.8.8.8", "https://8.8.8.8/", True),
        ("8.8.8.8", "https://8.8.8.9/", False),
        ("[2600::1]", "https://[2600:0::1]/", True),
        ("[2600::1]:8443", "https://[2600::1]:8443/", True),
        ("[2600::1]", "https://[2600::2]/", False),
        ("xn--bcher-kva.example", "https://bücher.example/", True),
    ],
)
def test_hosts(rule: str, url: str, allowed: bool) -> None:
    """A rule is for one host or all below it, and for one port or the schemes' own; the rest is named in the violation."""
    address = web_address(url)
    violation = Policy("fetch", [rule], BOTH).violation(address)
    if allowed:
        assert violation is None
    else:
        assert violation is not None
        assert address.host in violation
        assert "images.allowed_hosts" in violation
        assert (f":{address.port}:" in violation) is not address.on_usual_port


def test_schemes() -> None:
    """Only https is allowed by default; the scheme is reported before the host, which may be confidential."""
    assert Policy("fetch", ["*"]).violation(web_address("http://a.example/")) == "must begin with https://"
    assert Policy("fetch").violation(web_address("http://a.example/")) == "must begin with https://"
    assert Policy("fetch", ["*"], BOTH).violation(web_address("http://a.example/")) is None


def test_any_of_the_rules_will_do() -> None:
    """Without any, no host is allowed."""
    assert Policy("fetch", ["b.example", "a.example"]).violation(web_address("https://a.example/")) is None
    assert Policy("fetch").violation(web_address("https://a.example/")) is not None
