"""Web addresses of images, read so strictly that nobody after us can read them differently.

A request to a server that it was not judged for mostly begins with two parsers that disagree. So whatever they disagree
on (backslashes, white space, credentials, spellings of numbers, look-alike letters) is refused or brought into one form
here, and from then on only that form is used: the parts go to the connection as they were judged.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from urllib.parse import quote, urljoin

import idna

MAX_URL_LENGTH = 8000
"""Characters: what HTTP servers can be relied on to take, says RFC 9110."""

_MAX_HOST_LENGTH = 253  # of a name in the DNS
_HIGHEST_PORT = 65535
_PORTS = {"http": 80, "https": 443}

_URL = re.compile(r"(https?)://([^/?#]*)([^#]*)(?:#.*)?", re.IGNORECASE)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]+)(?::([0-9]{1,5}))?")
_NAME = re.compile(r"(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")  # a last label that makes resolvers take the name for an IPv4 address
_UNTOUCHED = "%/?:@!$&'()*+,;=-._~[]"  # what may stand in a path or query; the rest is escaped


class UrlError(ValueError):
    """A text is no web address; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class WebAddress:
    """A web address in the one form that is used.

    Attributes:
        scheme: "http" or "https".
        host: A name in ASCII and lower case without a dot at its end, or an IP address in its usual form without brackets.
        port: Also if it is the scheme's own.
        target: Path and query; begins with a slash, and is ASCII.
        ip: The host, if it is an IP address.
    """

    scheme: str
    host: str
    port: int
    target: str
    ip: IPv4Address | IPv6Address | None = None

    @property
    def on_usual_port(self) -> bool:
        """Whether the port is the scheme's own."""
        return self.port == _PORTS[self.scheme]

    def __str__(self) -> str:
        """The whole address, without a fragment."""
        host = f"[{self.host}]" if isinstance(self.ip, IPv6Address) else self.host
        port = "" if self.on_usual_port else f":{self.port}"
        return f"{self.scheme}://{host}{port}{self.target}"


def web_address(text: str) -> WebAddress:
    """Read an address.

    Args:
        text: http or https, with a host, without credentials. Names in any script; a fragment is left out.

    Raises:
        UrlError: It is none, or one that programs do not agree on.
    """
    _see_length(text)
    _see_characters(text)
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
    _see_length(str(address))  # escapes make it longer
    return address


def joined(base: WebAddress, reference: str) -> WebAddress:
    """Where a redirect leads.

    Args:
        base: Whence it leads.
        reference: A whole address, or one that leaves out what it has in common with `base`.

    Raises:
        UrlError: To no web address, or to one that programs do not agree on.
    """
    _see_characters(reference)
    if _SCHEME.match(reference):
        # Not for `urljoin`, which takes an address of the same scheme for one that leaves it out, and its host with it.
        return web_address(reference)
    try:
        whole = urljoin(str(base), reference)
    except ValueError:  # of an IPv6 address
        raise UrlError("must be a web address") from None
    return web_address(whole)


def _see_length(text: str) -> None:
    if len(text) > MAX_URL_LENGTH:
        raise UrlError(f"must not be longer than {MAX_URL_LENGTH} characters; send the image as data")


def _see_characters(text: str) -> None:
    """Refuse what some programs drop or take for something else, before anything else reads the text."""
    if any(character.isspace() or not character.isprintable() or character == "\\" for character in text):
        raise UrlError("must not hold white space, control characters or backslashes")


def _host(text: str) -> tuple[str, IPv4Address | IPv6Address | None]:
    try:
        if text.startswith("["):
            ipv6 = IPv6Address(text[1:-1])
            return str(ipv6), ipv6
        name = _name(text)
        if _NUMBER.fullmatch(name.rpartition(".")[2]):
            ipv4 = IPv4Address(name)
            return str(ipv4), ipv4
    except AddressValueError:
        raise UrlError("must write an IP address as four decimal numbers with dots, or as IPv6 in brackets") from None
    return name, None


def _name(text: str) -> str:
    """A host's name as the DNS has it: full-width and enclosed letters become the plain ones that resolvers take them for."""
    name = text
    if not text.isascii():
        try:
            # First its length, since the library's work grows faster than that.
            name = idna.encode(text[: _MAX_HOST_LENGTH + 2], uts46=True).decode()
        except UnicodeError:
            raise UrlError("must name a host that can be in the DNS") from None
    name = name.lower().removesuffix(".")
    if len(name) > _MAX_HOST_LENGTH or not _NAME.fullmatch(name):
        raise UrlError("must name a host that can be in the DNS")
    return name
