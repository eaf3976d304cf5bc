"""Limits for gRPC reflection, whose library reads any number of requests of any size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltawire_server.access import HOW
from deltawire_server.errors import CallerError, GatewayError, Reason
from deltawire_server.rpc.reception import arrived
from deltawire_server.upstream.failures import RETRY_SECONDS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from grpc import aio

    _Context = aio.ServicerContext[Any, Any]
    _Answer = Callable[[AsyncIterator[object], _Context], AsyncIterator[object]]

SERVICES = "/grpc.reflection."
"""Prefix of the methods of all versions."""

MAX_CALLS = 64
"""Reflection calls at once: tools make them one at a time."""

MAX_REQUEST_BYTES = 4096
"""Bytes of a request, which contains the name of a file or a symbol."""


class Reflection:
    """Passes reflection calls on to the library.

    A principal may send any number of requests in a call. Any other caller may send one, which must arrive together with its call:
    waiting for a request means receiving it, whatever its size.

    Args:
        is_principal: Whether the caller of a call is a principal.
    """

    def __init__(self, is_principal: Callable[[_Context], bool]) -> None:
        self._is_principal = is_principal
        self._calls = 0

    async def answer(
        self,
        library: _Answer,
        parse: Callable[[bytes], object],
        messages: AsyncIterator[bytes],
        context: _Context,
    ) -> None:
        """Write the library's answers to a call's requests.

        Args:
            library: The library's method.
            parse: Parses a request.
            messages: The call's requests.
            context: The call.

        Raises:
            CallerError: INVALID_REQUEST: a request is too large or cannot be parsed.
            GatewayError: TOO_MANY_STREAMS: there are too many calls. UNAUTHENTICATED: the caller is not a principal, and its
                request did not arrive together with its call.
        """
        if self._calls >= MAX_CALLS:
            raise GatewayError(
                Reason.TOO_MANY_STREAMS,
                f"this gateway already serves {MAX_CALLS} reflection calls, which is its limit: retry later",
                metadata={"limit": str(MAX_CALLS)},
                retry_after=RETRY_SECONDS,
            )
        self._calls += 1
        try:
            if not self._is_principal(context):
                messages = _only(await _arrived(context))
            async for response in library(_parsed(messages, parse), context):
                await context.write(response)
        finally:
            self._calls -= 1


async def _arrived(context: _Context) -> bytes:
    data = await arrived(context)
    if data is None:
        raise GatewayError(
            Reason.UNAUTHENTICATED,
            f"without an access key, a reflection request must be small and arrive together with its call: {HOW}",
        )
    return data


async def _only(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def _parsed(messages: AsyncIterator[bytes], parse: Callable[[bytes], object]) -> AsyncIterator[object]:
    async for data in messages:
        if len(data) > MAX_REQUEST_BYTES:
            raise CallerError(
                Reason.INVALID_REQUEST,
                f"the reflection request has {len(data)} bytes; at most {MAX_REQUEST_BYTES} are allowed",
            )
        yield parse(data)
