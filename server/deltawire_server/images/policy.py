"""The operator's policy for image URLs: who fetches, from which hosts, with which limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deltawire_server.upstream.web_address import WebAddress

_MIB = 1024 * 1024
ANY_HOST = "*"


@dataclass(frozen=True, slots=True)
class Policy:
    """The operator's policy; the settings explain the defaults.

    Attributes:
        urls: "refuse" URLs, "fetch" them in the gateway, or "pass" them to the engine.
        allowed_hosts: The hosts to fetch from: names in lower case, "*.example.com" for all subdomains, IP addresses (IPv6 in
            brackets), "*" for any. Each may end with ":port"; without it, only the scheme's default port is allowed.
        schemes: "https", "http" or both.
        max_image_bytes: Limit for one image in bytes.
        max_fetched_bytes: Limit for all fetched images of a request together, in bytes.
        timeout: Time limit for one image in seconds, from the name lookup to the last byte.
        max_redirects: Limit for the redirects of one image.
    """

    urls: Literal["refuse", "fetch", "pass"] = "refuse"
    allowed_hosts: Sequence[str] = ()
    schemes: Sequence[str] = ("https",)
    max_image_bytes: int = 16 * _MIB
    max_fetched_bytes: int = 32 * _MIB
    timeout: float = 10.0
    max_redirects: int = 3

    def violation(self, address: WebAddress) -> str | None:
        """Why a URL must not be fetched, without a lookup of its host; `None` if it may."""
        if address.scheme not in self.schemes:
            return f"must begin with {' or '.join(f'{scheme}://' for scheme in self.schemes)}"
        if not any(_allows(rule, address) for rule in self.allowed_hosts):
            port = "" if address.on_usual_port else f":{address.port}"
            return (
                f"may not lead to {address.host}{port}: it is not among images.allowed_hosts in the gateway's settings;"
                " send the image as data"
            )
        return None


def _allows(rule: str, address: WebAddress) -> bool:
    host, colon, port = rule.rpartition(":")
    if not colon or rule.endswith("]"):
        host, port = rule, ""
    if not (address.port == int(port) if port else address.on_usual_port):
        return False
    if host.startswith("*."):
        return address.ip is None and address.host.endswith(host[1:])
    return host == ANY_HOST or host.strip("[]") == address.host
