"""Maps a failure of the transport to a reason and a message."""

from __future__ import annotations

import httpx

from deltawire_server.errors import Reason
from deltawire_server.upstream.transport.errors import ConnectFailedError, ProtocolViolationError


def reason_of(error: Exception) -> tuple[Reason, str]:
    """The reason and the message for a request that failed before its answer began.

    PROVIDER_MISCONFIGURED if a setting, a certificate or a name must change; UPSTREAM_MALFORMED if the server violated HTTP;
    else UPSTREAM_UNAVAILABLE.

    Args:
        error: The exception of the transport or the HTTP client.
    """
    match error:
        case ProtocolViolationError():
            return Reason.UPSTREAM_MALFORMED, str(error)
        case ConnectFailedError(misconfigured=True):
            return Reason.PROVIDER_MISCONFIGURED, str(error)
        case httpx.InvalidURL():
            return Reason.PROVIDER_MISCONFIGURED, "its address is invalid"
    return Reason.UPSTREAM_UNAVAILABLE, str(error)
