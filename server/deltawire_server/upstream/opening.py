"""Reads the opening of an answer: its bytes up to the first event, which shows whether the engine accepted the request.

vLLM sends status 200 before it validates the request. Until the first event, the call can be retried at another replica.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from deltawire_server.errors import ProviderError, Reason
from deltawire_server.sansio import sse
from deltawire_server.sansio.chunks import ErrorBody, MalformedChunkError, Marker
from deltawire_server.sansio.decode import decode_chunk
from deltawire_server.upstream.failures import (
    MAX_EXCERPT_BYTES,
    RETRY_SECONDS,
    UpstreamError,
    excerpt,
    read_error,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from deltawire_server.errors import DeltawireError

MAX_OPENING_BYTES = 1024 * 1024
"""Limit for an opening. A longer one counts as begun; the reader of the answer applies its own limits."""


async def read_opening(
    receive: Callable[[], Awaitable[bytes | None]],
    provider_id: str,
    failure_of: Callable[[UpstreamError], DeltawireError],
) -> list[bytes]:
    """Read an event stream until the first chunk with a choice.

    Args:
        receive: Returns the next bytes of the body; `None` at its end or if the connection is lost.
        provider_id: The provider's id.
        failure_of: Maps an error event to the exception to raise.

    Returns:
        The bytes that were read, in pieces; the answer continues with the next result of `receive`.

    Raises:
        DeltawireError: The result of `failure_of`, for an error event.
        ProviderError: UPSTREAM_UNAVAILABLE: the body ended. UPSTREAM_MALFORMED: it is not the event stream of a chat.
    """
    decoder = sse.SSEDecoder()
    opening: list[bytes] = []
    size = 0
    while (piece := await receive()) is not None:
        opening.append(piece)
        size += len(piece)
        try:
            if any(_begins(payload, failure_of) for payload in decoder.receive(piece)) or size > MAX_OPENING_BYTES:
                return opening
        except ValueError as error:  # `sansio` raises it for malformed bytes
            message = f"provider {provider_id!r}: {error}"
            raise ProviderError(Reason.UPSTREAM_MALFORMED, message, metadata={"provider": provider_id}) from error
    message = f"provider {provider_id!r} closed the connection before it answered"
    with contextlib.suppress(ValueError):  # the last event may lack its blank line; a truncated one is ignored
        if any(_begins(payload, failure_of) for payload in decoder.receive(b"\n\n")):
            return opening
    received = excerpt(b"".join(opening)[: 4 * MAX_EXCERPT_BYTES].decode(errors="replace"))
    message += f"; it had sent: {received}" if received else ""
    raise ProviderError(
        Reason.UPSTREAM_UNAVAILABLE, message, metadata={"provider": provider_id}, retry_after=RETRY_SECONDS
    )


def _begins(payload: bytes, failure_of: Callable[[UpstreamError], DeltawireError]) -> bool:
    """Whether an event is a chunk with a choice."""
    event = decode_chunk(payload)
    if isinstance(event, ErrorBody):
        raise failure_of(read_error(payload))
    if event is Marker.DONE:
        raise MalformedChunkError("the stream ended without a choice")
    return event is not Marker.NOTHING and bool(event.choices)
