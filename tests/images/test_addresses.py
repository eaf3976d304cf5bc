"""Which addresses are public: every disguise of one that is not."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltawire_server.images.addresses import is_public, may_be_public

PUBLIC = {
    "Google's DNS": "8.8.8.8",
    "the first of 1": "1.0.0.0",
    "before 10": "9.255.255.255",
    "after 10": "11.0.0.0",
    "before the shared": "100.63.255.255",
    "after the shared": "100.128.0.0",
    "before 172.16": "172.15.255.255",
    "after 172.31": "172.32.0.0",
    "after 192.168": "192.169.0.0",
    "beside Azure's": "168.63.129.17",
    "the last": "223.255.255.255",
    "IPv6": "2606:4700:4700::1111",
    "NAT64 of a public one": "64:ff9b::8.8.8.8",
}

NOT_PUBLIC = {
    "this network": "0.0.0.0",
    "this network, its last": "0.255.255.255",
    "private 10": "10.0.0.1",
    "private 172.16": "172.16.0.1",
    "private 172.31": "172.31.255.255",
    "private 192.168": "192.168.1.1",
    "loopback": "127.0.0.1",
    "loopback, another": "127.255.255.254",
    "link-local": "169.254.0.1",
    "metadata of AWS, Azure, Google Cloud and most others": "169.254.169.254",
    "metadata of AWS's containers": "169.254.170.2",
    "metadata of Alibaba Cloud": "100.100.100.200",
    "metadata of Oracle Cloud": "192.0.0.192",
    "metadata of Azure that looks public": "168.63.129.16",
    "services of IBM Cloud that look public": "161.26.0.10",
    "more services of IBM Cloud": "166.9.1.1",
    "shared": "100.64.0.1",
    "shared, its last": "100.127.255.255",
    "protocol assignments": "192.0.0.8",
    "documentation 1": "192.0.2.1",
    "documentation 2": "198.51.100.1",
    "documentation 3": "203.0.113.1",
    "6to4 relay": "192.88.99.1",
    "benchmarking": "198.18.0.1",
    "benchmarking, its last": "198.19.255.255",
    "multicast": "224.0.0.1",
    "multicast, its last": "239.255.255.255",
    "reserved": "240.0.0.1",
    "broadcast": "255.255.255.255",
    "IPv6 unspecified": "::",
    "IPv6 loopback": "::1",
    "IPv4-mapped loopback": "::ffff:127.0.0.1",
    "IPv4-mapped metadata": "::ffff:169.254.169.254",
    "IPv4-mapped of a public one": "::ffff:8.8.8.8",
    "IPv4-compatible loopback": "::127.0.0.1",
    "IPv4-translated": "::ffff:0:127.0.0.1",
    "NAT64 of loopback": "64:ff9b::127.0.0.1",
    "NAT64 of metadata": "64:ff9b::a9fe:a9fe",
    "NAT64 of a private one": "64:ff9b::10.0.0.1",
    "NAT64 of Azure's": "64:ff9b::168.63.129.16",
    "local NAT64": "64:ff9b:1::127.0.0.1",
    "local NAT64 of a public one": "64:ff9b:1::8.8.8.8",
    "beside NAT64": "64:ff9b::1:8.8.8.8",
    "6to4 of loopback": "2002:7f00:1::",
    "6to4 of a public one": "2002:808:808::1",
    "Teredo": "2001:0:4136:e378:8000:63bf:80ff:fffe",
    "ORCHID": "2001:20::1",
    "IPv6 benchmarking": "2001:2::1",
    "IPv6 documentation": "2001:db8::1",
    "IPv6 documentation, new": "3fff::1",
    "discard": "100::1",
    "segment routing": "5f00::1",
    "private IPv6": "fc00::1",
    "metadata of AWS by IPv6": "fd00:ec2::254",
    "metadata of Google Cloud by IPv6": "fd20:ce::254",
    "IPv6 link-local": "fe80::1",
    "IPv6 link-local metadata": "fe80::a9fe:a9fe",
    "IPv6 site-local": "fec0::1",
    "IPv6 multicast": "ff02::1",
    "reserved IPv6": "4000::1",
}

SPECIAL = [
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24"),
    *("192.0.2.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4"),
    *("240.0.0.0/4", "::/8", "100::/64", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8", "2001::/32", "2002::/16"),
    *("2001:2::/48", "2001:db8::/32", "3fff::/20", "64:ff9b:1::/48", "::ffff:0:0/96"),
]


@pytest.mark.parametrize("name", PUBLIC)
def test_public(name: str) -> None:
    """Also those beside what is not."""
    assert is_public(ip_address(PUBLIC[name]))


@pytest.mark.parametrize("name", NOT_PUBLIC)
def test_not_public(name: str) -> None:
    """Whatever hides it."""
    assert not is_public(ip_address(NOT_PUBLIC[name]))


@pytest.mark.parametrize("text", SPECIAL)
@given(st.data())
def test_no_address_of_a_special_network_is_public(text: str, data: st.DataObject) -> None:
    """The networks of IANA's special-purpose registries that are not globally reachable, anywhere in them."""
    network = ip_network(text)
    place = data.draw(st.integers(0, network.num_addresses - 1))
    ip = network[place]
    assert ip in IPv6Network("64:ff9b::/96") or not is_public(ip)


@given(st.ip_addresses())
def test_python_knows_no_private_address_that_is_taken_for_public(ip: IPv4Address) -> None:
    """A second opinion, where it has one; but Python takes all of NAT64 for what it is worth."""
    if is_public(ip) and ip not in IPv6Network("64:ff9b::/96"):
        assert ip.is_global


@given(st.integers(0, 2**32 - 1))
def test_nat64_is_judged_by_what_it_hides(number: int) -> None:
    """The address behind it decides."""
    hidden = IPv4Network("0.0.0.0/0")[number]
    assert is_public(IPv6Network("64:ff9b::/96")[number]) == is_public(hidden)


@pytest.mark.parametrize(
    ("name", "may_be"),
    [
        ("images.example.com", True),
        ("mylocalhost.com", True),
        ("internal.example.com", True),
        ("localhost", False),
        ("a.localhost", False),
        ("localhost.localdomain", False),
        ("printer.local", False),
        ("vllm.default.svc.cluster.local", False),
        ("metadata.google.internal", False),
        ("ip-10-0-0-1.ec2.internal", False),
        ("router.home.arpa", False),
        ("metadata", False),
        ("internal", False),
    ],
)
def test_names(name: str, may_be: bool) -> None:
    """Names of private networks, and those that only a search list can complete, need no looking up."""
    assert may_be_public(name) is may_be
