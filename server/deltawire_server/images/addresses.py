"""Which IP addresses are on the public internet, and which names never resolve to one.

This module has its own tables instead of Python's `is_global`, which differs between patch releases of Python, treats some tunnels
to private networks as public, and does not cover the metadata services of clouds.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

IPAddress = IPv4Address | IPv6Address

_NOT_PUBLIC_V4 = {
    IPv4Network("0.0.0.0/8"): "this network; 0.0.0.0 reaches this machine",
    IPv4Network("10.0.0.0/8"): "private",
    IPv4Network("100.64.0.0/10"): "shared between a carrier's customers; Alibaba Cloud's metadata is 100.100.100.200",
    IPv4Network("127.0.0.0/8"): "loopback",
    IPv4Network("161.26.0.0/16"): "IBM Cloud's services for its machines; looks public",
    IPv4Network("166.8.0.0/14"): "IBM Cloud's services for its machines; looks public",
    IPv4Network("168.63.129.16/32"): "Azure's services for each of its machines, keys among them; looks public",
    IPv4Network("169.254.0.0/16"): "link-local; most clouds' metadata is 169.254.169.254",
    IPv4Network("172.16.0.0/12"): "private",
    IPv4Network("192.0.0.0/24"): "protocol assignments; Oracle Cloud's metadata is 192.0.0.192",
    IPv4Network("192.0.2.0/24"): "documentation",
    IPv4Network("192.88.99.0/24"): "relays of 6to4",
    IPv4Network("192.168.0.0/16"): "private",
    IPv4Network("198.18.0.0/15"): "benchmarking",
    IPv4Network("198.51.100.0/24"): "documentation",
    IPv4Network("203.0.113.0/24"): "documentation",
    IPv4Network("224.0.0.0/4"): "multicast",
    IPv4Network("240.0.0.0/4"): "reserved, broadcast",
}
"""The refused IPv4 networks, with the reason."""

_PUBLIC_V6 = IPv6Network("2000::/3")
"""The global unicast addresses. Outside of it are loopback, unspecified, IPv4-mapped and IPv4-compatible, private (fc00::/7, with
fd00:ec2::254 of AWS), link-local, multicast and reserved addresses."""

_NOT_PUBLIC_V6 = {
    IPv6Network("2001::/23"): "protocol assignments: Teredo, which hides an IPv4 address, benchmarking, ORCHID",
    IPv6Network("2001:db8::/32"): "documentation",
    IPv6Network("2002::/16"): "6to4, which hides an IPv4 address",
    IPv6Network("3fff::/20"): "documentation",
}
"""The refused networks within it, with the reason."""

_NAT64 = IPv6Network("64:ff9b::/96")
"""The prefix of NAT64, with an IPv4 address in the last 32 bits. The other prefix, 64:ff9b:1::/48, is for private use with a
network-specific format; it is outside of 2000::/3 and refused."""

_NOT_PUBLIC_NAMES = {
    "localhost": "this machine",
    "local": "multicast DNS, and Kubernetes' cluster.local",
    "internal": "for private use; Google Cloud's metadata.google.internal",
    "home.arpa": "home networks",
    "localdomain": "what many systems call their own network",
}
"""Names that are never public, with all their subdomains, and the reason."""


def is_public(ip: IPAddress) -> bool:
    """Whether an address is on the public internet."""
    if isinstance(ip, IPv6Address):
        if ip in _NAT64:
            return is_public(IPv4Address(ip.packed[-4:]))
        return ip in _PUBLIC_V6 and not any(ip in network for network in _NOT_PUBLIC_V6)
    return not any(ip in network for network in _NOT_PUBLIC_V4)


def may_be_public(name: str) -> bool:
    """Whether a host name may resolve to a public address: it has a dot, and not the suffix of a private network.

    Args:
        name: The name in lower case, without a trailing dot.
    """
    return "." in name and not any(f".{name}".endswith(f".{private}") for private in _NOT_PUBLIC_NAMES)
