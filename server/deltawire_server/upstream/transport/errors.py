"""The exceptions of the transport. The messages are about the server and do not have its address.

httpx.TransportError
├── ConnectFailedError        no connection: nothing was sent
├── ConnectionLostError       the connection ended before the response was complete
├── ProtocolViolationError    the server sent what HTTP, or the request, does not allow
└── httpx.PoolTimeout, ReadTimeout, LocalProtocolError    a timeout of the gateway, or a request that cannot be sent

The first has whether a setting must change; callers distinguish the others by whether the response had begun.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl

import httpx


class ConnectFailedError(httpx.ConnectError):
    """There is no connection, and no part of the request was sent.

    Attributes:
        misconfigured: Whether a setting, a certificate or a name must change before a retry can succeed.
    """

    def __init__(self, message: str, *, misconfigured: bool = False) -> None:
        super().__init__(message)
        self.misconfigured = misconfigured


class ConnectionLostError(httpx.ReadError):
    """The connection ended before the response was complete. The server may have received the request.

    Attributes:
        begun: Whether the headers of the response were received.
    """

    def __init__(self, message: str, *, begun: bool = False) -> None:
        super().__init__(message)
        self.begun = begun


class ProtocolViolationError(httpx.RemoteProtocolError):
    """The server sent what HTTP, or the request, does not allow. A retry does not help."""


_OS_ERRORS = {
    errno.ECONNREFUSED: "nothing listens at its address: the connection is refused",
    errno.ECONNRESET: "it closed the connection while it was being opened",
    errno.EHOSTUNREACH: "there is no route to its address",
    errno.ENETUNREACH: "there is no route to its address",
    errno.ETIMEDOUT: "its address does not respond",
}

_NO_SUCH_NAME = frozenset({socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)})

_CERTIFICATES = {
    9: "its certificate is not valid yet",
    10: "its certificate has expired",
    18: "its certificate is self-signed",
    19: "its certificate is signed by an authority that is not trusted here",
    20: "its certificate is signed by an authority that is not trusted here",
    21: "its certificate is signed by an authority that is not trusted here",
    62: "its certificate is for another host",
    64: "its certificate is for another IP address",
}
"""Messages by OpenSSL's X509_V_ERR code."""

_TLS = {
    "WRONG_VERSION_NUMBER": "it does not speak TLS at this port: use http, or another port",
    "RECORD_LAYER_FAILURE": "it does not speak TLS at this port: use http, or another port",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it requires a client certificate",
}
"""Messages by OpenSSL's reason; later versions report the second one instead of the first."""


def connect_failure(error: Exception) -> ConnectFailedError:
    """Map an exception of the name lookup, the connection or the TLS handshake to an error.

    Args:
        error: A `UnicodeError` or an `OSError`, which includes those of `socket` and `ssl`.
    """
    match error:
        case ssl.SSLCertVerificationError():
            message = _CERTIFICATES.get(error.verify_code, f"its certificate is invalid: {error.verify_message}")
            return ConnectFailedError(message, misconfigured=True)
        case ssl.SSLError():
            words = (error.reason or "no reason given").replace("_", " ").lower()
            message = _TLS.get(error.reason or "", f"the TLS handshake failed: {words}")
            return ConnectFailedError(message, misconfigured=True)
        case UnicodeError():
            return ConnectFailedError("its host name is invalid", misconfigured=True)
        case socket.gaierror():
            if error.errno in _NO_SUCH_NAME:
                return ConnectFailedError("its host name does not resolve", misconfigured=True)
            return ConnectFailedError("its host name cannot be looked up now")
        case OSError(errno=int(number)):
            return ConnectFailedError(_OS_ERRORS.get(number, f"connecting failed: {os.strerror(number).lower()}"))
    return ConnectFailedError("it closed the connection during the TLS handshake")
