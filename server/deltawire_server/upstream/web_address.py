"""Parses and normalizes the URLs of images, strictly.

Server-side request forgery often uses URLs that two parsers read differently. So whatever parsers disagree on (backslashes, white
space, credentials, number formats, look-alike letters) is refused or normalized here. After that, only the validated parts are
used.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from urllib.parse import quote, urljoin

import idna

MAX_URL_LENGTH = 8000
"""Limit in characters: the length that RFC 9110 recommends every HTTP server to support."""

_MAX_HOST_LENGTH = 253  # of a name in the DNS
_HIGHEST_PORT = 65535
_PORTS = {"http": 80, "https": 443}

_URL = re.compile(r"(https?)://([^/?#]*)([^#]*)(?:#.*)?", re.IGNORECASE)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]+)(?::([0-9]{1,5}))?")
_NAME = re.compile(r"(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")  # a last label with which resolvers treat the name as an IPv4 address
_UNTOUCHED = "%/?:@!$&'()*+,;=-._~[]"  # allowed in a path or query; other characters are escaped


class UrlError(ValueError):
    """A text is not a valid URL; the message has the problem."""


@dataclass(frozen=True, slots=True)
class WebAddress:
    """A normalized URL.

    Attributes:
        scheme: "http" or "https".
        host: A name in ASCII and lower case without a trailing dot, or an IP address in canonical form without brackets.
        port: The port, which may be the scheme's default.
        target: Path and query in ASCII; begins with a slash.
        ip: The host, if it is an IP address.
    """

    scheme: str
    host: str
    port: int
    target: str
    ip: IPv4Address | IPv6Address | None = None

    @property
    def on_usual_port(self) -> bool:
        """Whether the port is the scheme's default."""
        return self.port == _PORTS[self.scheme]

    def __str__(self) -> str:
        """The URL without a fragment."""
        host = f"[{self.host}]" if isinstance(self.ip, IPv6Address) else self.host
        port = "" if self.on_usual_port else f":{self.port}"
        return f"{self.scheme}://{host}{port}{self.target}"


def web_address(text: str) -> WebAddress:
    """Parse a URL.

    Args:
        text: An http or https URL with a host and without credentials. Names may be in any script; a fragment is dropped.

    Raises:
        UrlError: The URL is invalid or ambiguous.
    """
    _check_length(text)
    _check_characters(text)
    match = _URL.fullmatch(text)
    if match is None:
        raise UrlError("must begin with https://, http:// or data:")
    scheme, authority, target = match[1].lower(), match[2], match[3]
    if "@" in authority:
        raise UrlError("must not carry credentials before the host")
    parts = _AUTHORITY.fullmatch(authority)
    if parts is None:
        raise UrlError("must name a host, and after it at most :port")
    port = int(parts[2]) if parts[2] else _PORTS[scheme]
    if not 1 <= port <= _HIGHEST_PORT:
        raise UrlError(f"must have a port from 1 to {_HIGHEST_PORT}, or none")
    host, ip = _host(parts[1])
    if not target.startswith("/"):
        target = f"/{target}"
    address = WebAddress(scheme, host, port, quote(target, safe=_UNTOUCHED), ip)
    _check_length(str(address))  # escapes make it longer
    return address


def joined(base: WebAddress, reference: str) -> WebAddress:
    """Resolve the target of a redirect.

    Args:
        base: The URL that redirects.
        reference: An absolute URL, or one relative to `base`.

    Raises:
        UrlError: The target is invalid or ambiguous.
    """
    _check_characters(reference)
    if _SCHEME.match(reference):
        # Not with `urljoin`, which treats a URL with the same scheme and without a host as relative.
        return web_address(reference)
    try:
        whole = urljoin(str(base), reference)
    except ValueError:  # for an invalid IPv6 address
        raise UrlError("must be a valid URL") from None
    return web_address(whole)


def _check_length(text: str) -> None:
    if len(text) > MAX_URL_LENGTH:
        raise UrlError(f"must not be longer than {MAX_URL_LENGTH} characters; send the image as data")


def _check_characters(text: str) -> None:
    """Refuse characters that some parsers drop or interpret differently."""
    if any(character.isspace() or not character.isprintable() or character == "\\" for character in text):
        raise UrlError("must not hold white space, control characters or backslashes")


def _host(text: str) -> tuple[str, IPv4Address | IPv6Address | None]:
    try:
        if text.startswith("["):
            ipv6 = IPv6Address(text[1:-1])
            return _text_of(ipv6), ipv6
        name = _name(text)
        if _NUMBER.fullmatch(name.rpartition(".")[2]):
            ipv4 = IPv4Address(name)
            return str(ipv4), ipv4
    except AddressValueError:
        raise UrlError("must write an IP address as four decimal numbers with dots, or as IPv6 in brackets") from None
    return name, None


def _text_of(ip: IPv6Address) -> str:
    """One form on each Python: from 3.13 on, the library writes a mapped IPv4 address with dots."""
    if ip.ipv4_mapped is None:
        return str(ip)
    high, low = divmod(int(ip.ipv4_mapped), 1 << 16)
    return f"::ffff:{high:x}:{low:x}"


def _name(text: str) -> str:
    """A host name in DNS form. Full-width and enclosed letters become the plain letters that resolvers map them to."""
    name = text
    if not text.isascii():
        try:
            # Limit the length first, because the library's work grows faster than the length.
            name = idna.encode(text[: _MAX_HOST_LENGTH + 2], uts46=True).decode()
        except UnicodeError:
            raise UrlError("must name a host that can be in the DNS") from None
    name = name.lower().removesuffix(".")
    if len(name) > _MAX_HOST_LENGTH or not _NAME.fullmatch(name):
        raise UrlError("must name a host that can be in the DNS")
    return name
