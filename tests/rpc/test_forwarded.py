"""What trusted proxies assert: Envoy's header of certificates, with hostile input too, and the addresses."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from deltawire_server.access import Identity, NameKind
from deltawire_server.rpc.forwarded import (
    MAX_CERTIFICATE_HEADER,
    MAX_NAMES,
    certificate_names,
    last_address,
)

HASH = "Hash=468ed33be74eee6556d90c0149c1309e9ba61d6425303443c0748a02dd8de688"


def shown(text: str) -> list[str]:
    """The names, as in access lines."""
    return [str(name).removeprefix("mtls:") for name in certificate_names(text)]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("URI=spiffe://mesh/a", ["uri:spiffe://mesh/a"]),
        (f"By=spiffe://mesh/envoy;{HASH};URI=spiffe://mesh/a", ["uri:spiffe://mesh/a"]),
        (f'{HASH};Subject="CN=a";URI=;DNS=a.mesh;DNS=b.mesh', ["dns:a.mesh", "dns:b.mesh"]),
        (f'{HASH};DNS=a.mesh;Subject="";URI=spiffe://mesh/a;URI=b:c', ["uri:spiffe://mesh/a", "uri:b:c", "dns:a.mesh"]),
        ("uri=spiffe://mesh/a", ["uri:spiffe://mesh/a"]),
        ("URI=spiffe://mesh/a?b=c", ["uri:spiffe://mesh/a?b=c"]),
        ('URI="spiffe://mesh/a,b;c=\\"d\\""', ['uri:spiffe://mesh/a,b;c="d"']),
        # The last element alone counts, whatever the client has sent.
        ("URI=spiffe://mesh/admin,URI=spiffe://mesh/a", ["uri:spiffe://mesh/a"]),
        (f"{HASH};URI=spiffe://mesh/admin, {HASH};DNS=a.mesh", ["dns:a.mesh"]),
        ('Subject="CN=admin",Subject="CN=a"', ["cn:a"]),
        # The certificate itself is encoded; nothing is read from it.
        ('Cert="-----BEGIN%20CERTIFICATE-----%0Ax";Chain="y";URI=a:b', ["uri:a:b"]),
        # Common names, in the form of RFC 2253, with the escapes that OpenSSL writes.
        ('Subject="CN=a,OU=CN\\=b,O=c"', ["cn:a"]),
        ('Subject="emailAddress=x@y,CN=a\\, b\\+c\\"d\\\\,C=e"', ['cn:a, b+c"d\\']),
        ('Subject="CN=M\\C3\\BCller"', ["cn:Müller"]),
        ('Subject="CN=a\\FF"', ["cn:a\\xff"]),
        ('Subject="OU=b+CN=a"', ["cn:a"]),
        ('Subject="cn=a";URI=', ["cn:a"]),
    ],
)
def test_the_names_of_a_certificate(text: str, names: list[str]) -> None:
    """Those of the last element: alternative names first, and the common name only without them."""
    assert shown(text) == names


@pytest.mark.parametrize(
    "text",
    [
        *("", ",", ";", "=", "URI", "URI=a:b,", "URI=a:b;", ",URI=a:b", "URI=a:b,,URI=c:d", "=a", "URI =a:b", "ü=a"),
        # A quote that the client opens does not end in the proxy's element.
        *('URI="a:b', 'URI="a:b\\"', 'By=",URI=a:b', 'Subject="x,Hash=1;Subject="CN=a";URI=a:b', 'URI=a"b', 'URI="a"b'),
        'Subject="x,Hash=1;Subject="";URI=a:b',
    ],
)
def test_a_header_that_is_malformed(text: str) -> None:
    """No part of it counts."""
    with pytest.raises(ValueError, match="is malformed"):
        certificate_names(text)


@pytest.mark.parametrize(
    "text",
    [
        *(HASH, "By=spiffe://mesh/envoy", "URI=", "URI=;DNS=;DNS=", "URI=a:b,URI=", f"URI=a:b,{HASH}"),
        *('Subject=""', 'Subject="O=a"', 'Subject="CN=a,CN=b"', 'Subject="CN=a+CN=a"', 'Subject="CN=a,CN="'),
        *('Subject="CN"', 'Subject="CN=a,"', 'Subject="/CN=a"', 'Subject="CN="', "email=a@b"),
    ],
)
def test_a_header_without_a_name(text: str) -> None:
    """It is an error, so that the caller does not get the proxy's name; an ambiguous common name is none."""
    with pytest.raises(ValueError, match="has no URI, DNS name or common name"):
        certificate_names(text)


def test_a_header_is_bounded() -> None:
    """In its length and in its names; both are more than real certificates need."""
    names = ";".join(["DNS=a.mesh"] * MAX_NAMES)
    assert len(certificate_names(names)) == MAX_NAMES
    with pytest.raises(ValueError, match=f"has more than {MAX_NAMES} names"):
        certificate_names(f"{names};DNS=b.mesh")
    longest = f"URI={'a' * (MAX_CERTIFICATE_HEADER - 4)}"
    assert len(certificate_names(longest)) == 1
    with pytest.raises(ValueError, match=f"is longer than {MAX_CERTIFICATE_HEADER} characters"):
        certificate_names(f"{longest}a")


HOSTILE = st.text(st.sampled_from(list('=,;"\\ \t\nabCNURIDSubject:/%\x00é')), max_size=60)


@given(HOSTILE)
@example('"' * 1000)
@example('Subject="' + "\\" * 1001)
@example("a=" + "\\" * 1000)
@example("CN=" * 1000)
def test_any_text_has_names_or_is_an_error(text: str) -> None:
    """And nothing else happens; no name is empty."""
    try:
        names = certificate_names(text)
    except ValueError:
        return
    assert names
    assert all(name.name for name in names)


@given(HOSTILE, st.text(st.sampled_from("abc.-"), min_size=1, max_size=20))
@example('By="', "a")
@example('Subject="x', "a")
@example("URI=spiffe://mesh/admin", "a")
@example('URI=a:b;Subject="CN=x', "a")
def test_what_a_client_sends_before_the_proxy_appends_does_not_count(sent: str, name: str) -> None:
    """Either the names are those that the proxy has verified, or the header is refused; no quote of the client's changes them."""
    appended = f'{sent},By=spiffe://mesh/envoy;{HASH};Subject="CN={name}";URI=spiffe://mesh/{name}'
    try:
        names = certificate_names(appended)
    except ValueError:
        return
    assert names == [Identity(NameKind.URI, f"spiffe://mesh/{name}")]


@given(st.text(min_size=1, max_size=40))
def test_no_common_name_becomes_another_field(name: str) -> None:
    """A client with any common name, as OpenSSL escapes it and Envoy quotes it, has that common name and no other name."""
    escaped = "".join(
        f"\\{each}" if each in ',+"\\<>;#' else each if " " <= each <= "~" else _hex(each) for each in name
    )
    (found,) = certificate_names(f'{HASH};Subject="O=x,CN={escaped},C=y";URI=')
    assert (found.kind, found.name) == (NameKind.COMMON_NAME, name)


def _hex(character: str) -> str:
    return "".join(f"\\{byte:02X}" for byte in character.encode())


@pytest.mark.parametrize(
    ("text", "peer"),
    [
        ("192.0.2.1", "ipv4:192.0.2.1"),
        ("10.0.0.1, 192.0.2.1", "ipv4:192.0.2.1"),
        ("10.0.0.1,2001:DB8::1 ", "ipv6:2001:db8::1"),
        ("192.0.2.1:80", "ipv4:192.0.2.1"),
        ("192.0.2.1, [2001:db8::1]:443", "ipv6:2001:db8::1"),
        ("[2001:db8::1]", "ipv6:2001:db8::1"),
        *((text, "") for text in ("", ",", "192.0.2.1,", "unknown", "unknown:80", "[x", "a\nb", "1")),
    ],
)
def test_the_last_address(text: str, peer: str) -> None:
    """The one that the proxy has appended; what is no address is none."""
    assert last_address(text) == peer
