"""Who the caller of a call is and where it comes from: its key, its certificate, and what a trusted proxy asserts."""

from __future__ import annotations

from ipaddress import ip_network
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

from deltawire_server.access import (
    CERTIFICATE_HEADER,
    KEY_HEADER,
    AssertedName,
    Identity,
    NameKind,
    sent_key,
    unauthenticated,
)
from deltawire_server.rpc.forwarded import certificate_names, last_address

if TYPE_CHECKING:
    from collections.abc import Sequence

    from grpc import aio

    from deltawire_server.access import Access, Trust

    _Context = aio.ServicerContext[Any, Any]

AUTHORIZATION = "authorization"
FORWARDED_FOR = "x-forwarded-for"


class Origin(NamedTuple):
    """Where a call comes from.

    Attributes:
        peer: The connection, as returned by gRPC's `peer()`; or the address, without a port, that a trusted proxy asserts.
        via: The connection of that proxy, if it asserts an address.
        assertion: From `Trust`: empty, unless the connection is that of a trusted proxy.
    """

    peer: str
    via: str = ""
    assertion: str = ""

    @property
    def host(self) -> str:
        """The host of `peer`, without a port: an IPv4 address, or the 64 bits of an IPv6 address that are one host's network."""
        host = self.peer if self.via else self.peer.rpartition(":")[0]
        if not host.startswith("ipv6:"):
            return host
        return f"ipv6:{ip_network((unquote(host[5:]).strip('[]').partition('%')[0], 64), strict=False)}"


class Credentials(NamedTuple):
    """What a caller authenticates itself by, for `Access.authorize`.

    Attributes:
        key: The key.
        names: The names; empty with a key.
        assertion: From `Trust`, if a trusted proxy asserts the names.
    """

    key: str | None
    names: Sequence[Identity | AssertedName] = ()
    assertion: str = ""


def origin(context: _Context, trust: Trust) -> Origin:
    """Where a call comes from. The headers of a connection that is not trusted are not considered."""
    peer = context.peer()
    if not trust.proxies:
        return Origin(peer)
    assertion = trust.assertion(_certificate(context), unix=peer.startswith("unix:"))
    asserted = last_address((_values(context, FORWARDED_FOR) or [""])[-1]) if assertion else ""
    return Origin(asserted, peer, assertion) if asserted else Origin(peer, assertion=assertion)


def credentials(context: _Context, access: Access, assertion: str) -> Credentials:
    """What the caller of a call authenticates itself by.

    Args:
        context: The call.
        access: A gateway on which every caller may do everything ignores keys: the headers may be for a proxy.
        assertion: That of the call's `Origin`.

    Raises:
        GatewayError: UNAUTHENTICATED: a key is not sent as it must be, or what a trusted proxy asserts cannot be used. The caller
            does not get the proxy's own identity then.
    """
    key = None if access.open else sent_key(_values(context, KEY_HEADER), _values(context, AUTHORIZATION))
    if key is not None:
        return Credentials(key)
    header = access.trust.header
    given = _values(context, header) if assertion else []
    if not given:
        return Credentials(None, _certificate(context))
    try:
        if len(given) > 1:
            raise ValueError("is sent several times")
        names = certificate_names(given[0]) if header == CERTIFICATE_HEADER else [_asserted(given[0])]
    except ValueError as error:
        raise unauthenticated(f"the proxy does not name this caller: its header {header} {error}") from None
    return Credentials(None, names, assertion)


def _asserted(value: str) -> AssertedName:
    try:
        return AssertedName(value)
    except ValueError as error:
        raise ValueError(f"cannot be used: {error}") from None


def _certificate(context: _Context) -> list[Identity]:
    """The names in the verified client certificate, URIs first; empty without a certificate.

    The common name counts only if there is no alternative name of any kind, as in RFC 6125 and grpc: a certificate authority that
    verifies the alternative names may let the client choose the common name.
    """
    authenticated = context.auth_context()
    properties = {NameKind.URI: "peer_uri", NameKind.DNS: "peer_dns"}
    if not authenticated.get("x509_subject_alternative_name"):
        properties = {NameKind.COMMON_NAME: "x509_common_name"}
    return [
        Identity(kind, name.decode(errors="backslashreplace"))
        for kind, key in properties.items()
        for name in authenticated.get(key, ())
    ]


def _values(context: _Context, header: str) -> list[str]:
    """The values of all headers of a name, which is not that of a binary one."""
    return [str(value) for name, value in context.invocation_metadata() or () if name == header]
