"""What a failure of the transport means for a call: a reason, and one sentence for people."""

from __future__ import annotations

import httpx

from deltawire_server.errors import Reason
from deltawire_server.upstream.transport.errors import ConnectFailedError, ProtocolViolationError


def reason_of(error: Exception) -> tuple[Reason, str]:
    """The reason of a request that failed, as long as the answer has not begun, and one sentence about the server.

    PROVIDER_MISCONFIGURED if someone has to change a setting, a certificate or a name first; UPSTREAM_MALFORMED if the server
    sent what HTTP does not allow; else UPSTREAM_UNAVAILABLE.

    Args:
        error: What the transport or the HTTP client raised.
    """
    match error:
        case ProtocolViolationError():
            return Reason.UPSTREAM_MALFORMED, str(error)
        case ConnectFailedError(misconfigured=True):
            return Reason.PROVIDER_MISCONFIGURED, str(error)
        case httpx.InvalidURL():
            return Reason.PROVIDER_MISCONFIGURED, "its address is not a valid one"
    return Reason.UPSTREAM_UNAVAILABLE, str(error)
