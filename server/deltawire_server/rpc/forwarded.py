"""What a trusted proxy asserts about its caller, parsed from the values of headers. Anything malformed is an error, never ignored.

`x-forwarded-client-cert` is Envoy's: elements, separated by commas, of key=value pairs, separated by semicolons. A proxy appends
its element to those that it received, so only the last one is its own.
"""

from __future__ import annotations

import re
from ipaddress import ip_address

from deltawire_server.access import Identity, NameKind

MAX_CERTIFICATE_HEADER = 16 * 1024
"""Characters of the header, which take at most a few milliseconds. gRPC accepts no longer headers by default."""

MAX_NAMES = 128
"""Names in one element: more than certificate authorities sign."""

# The quantifiers are possessive: no input makes them try again. In quotes, a backslash and the next character belong together.
_PAIR = re.compile(r'[ \t]*+([A-Za-z]++)=(?:"((?:[^"\\]|\\.)*+)"|([^",;]*+))([,;]|\Z)')
_ATTRIBUTE = re.compile(r"([A-Za-z0-9.]++)=((?:[^\\,+]|\\.)*+)([,+]|\Z)")
_ESCAPED = re.compile(rb"\\([0-9A-Fa-f]{2}|.)")
_KINDS = {"uri": NameKind.URI, "dns": NameKind.DNS}


def certificate_names(text: str) -> list[Identity]:
    """The names in the last element of an `x-forwarded-client-cert` header, URIs first.

    As in a certificate, the common name of `Subject` counts only if there is no URI and no DNS name.

    Args:
        text: The value of the header.

    Returns:
        At most `MAX_NAMES`; pass them to `Access.authorize`.

    Raises:
        ValueError: The header is malformed, an element has too many names, or the last one has none. The message says which, as the
            end of a sentence that begins with the header's name.
    """
    if len(text) > MAX_CERTIFICATE_HEADER:
        raise ValueError(f"is longer than {MAX_CERTIFICATE_HEADER} characters")
    names: list[Identity] = []
    subject = ""
    at, separator = 0, ";"
    while separator:
        pair = _PAIR.match(text, at)
        if pair is None:
            raise ValueError("is malformed")
        key, quoted, plain, following = pair.groups()
        if separator == ",":
            names, subject = [], ""
        value = plain if quoted is None else quoted
        kind = _KINDS.get(key.lower())
        if kind is not None and value:
            names.append(Identity(kind, value if quoted is None else _unescaped(value)))
            if len(names) > MAX_NAMES:
                raise ValueError(f"has more than {MAX_NAMES} names")
        elif key.lower() == "subject":
            subject = value
        at, separator = pair.end(), following
    if not names:
        names = _common_name(subject)
    if not names:
        raise ValueError("has no URI, DNS name or common name: configure the proxy to forward those of the certificate")
    return sorted(names, key=lambda name: name.kind is not NameKind.URI)


def last_address(text: str) -> str:
    """The last address of an `x-forwarded-for` header in the form of gRPC's `peer()`, without a port; empty if it is none.

    Some proxies write a port: `192.0.2.7:4711`, `[2001:db8::7]:443`.
    """
    last = text.rpartition(",")[2].strip()
    if last.startswith("["):
        last = last[1:].partition("]")[0]
    elif last.count(":") == 1:
        last = last.partition(":")[0]
    try:
        address = ip_address(last)
    except ValueError:
        return ""
    return f"ipv{address.version}:{address}"


def _common_name(subject: str) -> list[Identity]:
    """The common name in a distinguished name in the form of RFC 2253; empty if there is none, or if there are several."""
    name = ""
    at, separator = 0, ","
    while separator:
        attribute = _ATTRIBUTE.match(subject, at)
        if attribute is None:
            return []
        kind, value, separator = attribute.groups()
        if kind.upper() == "CN":
            if name:
                return []
            name = value
        at = attribute.end()
    return [Identity(NameKind.COMMON_NAME, _unescaped(name))] if name else []


def _unescaped(text: str) -> str:
    def character(escaped: re.Match[bytes]) -> bytes:
        code = escaped[1]
        return bytes.fromhex(code.decode()) if len(code) > 1 else code

    return _ESCAPED.sub(character, text.encode()).decode(errors="backslashreplace")
