"""What the operator allows: who fetches, from where, how much and for how long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deltawire_server.images.urls import WebAddress

_MIB = 1024 * 1024
ANY_HOST = "*"


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator allows; the settings say why each default is what it is.

    Attributes:
        urls: "refuse" addresses, "fetch" them here, or "pass" them on for the engine to fetch.
        allowed_hosts: From where images may be fetched: names in lower case, "*.example.com" for all below one, IP addresses
            (IPv6 in brackets), "*" for any; each may end in ":port", else it is for the schemes' own.
        schemes: "https", "http" or both.
        max_image_bytes: Bytes of one image.
        max_fetched_bytes: Bytes of all images together that are fetched for one request.
        timeout: Seconds for one image, from looking up its host to its last byte.
        max_redirects: Of one image.
    """

    urls: Literal["refuse", "fetch", "pass"] = "refuse"
    allowed_hosts: Sequence[str] = ()
    schemes: Sequence[str] = ("https",)
    max_image_bytes: int = 16 * _MIB
    max_fetched_bytes: int = 32 * _MIB
    timeout: float = 10.0
    max_redirects: int = 3

    def violation(self, address: WebAddress) -> str | None:
        """Why nothing may be fetched from an address, as far as one can see without looking up its host; `None` if it may."""
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
