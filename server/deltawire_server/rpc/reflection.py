"""Bounds of gRPC's reflection, whose library reads requests of any size for as long as they come."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltawire_server.errors import CallerError, GatewayError, Reason
from deltawire_server.rpc.reception import arrived
from deltawire_server.upstream.failures import RETRY_SECONDS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from grpc import aio

    _Context = aio.ServicerContext[Any, Any]
    _Answer = Callable[[AsyncIterator[object], _Context], AsyncIterator[object]]

SERVICES = "/grpc.reflection."
"""How the methods of every version begin."""

MAX_CALLS = 64
"""Calls of reflection at once: people make them, with tools, one at a time."""

MAX_REQUEST_BYTES = 4096
"""Bytes of a request: it holds the name of a file or a symbol."""


class Reflection:
    """Lets calls of reflection through to the library.

    A caller that access knows may make any number of requests in a call. Any other caller may make one, which is not awaited,
    since to await it is to receive it whatever its size.

    Args:
        known: Whether access knows the caller of a call.
    """

    def __init__(self, known: Callable[[_Context], bool]) -> None:
        self._known = known
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
            library: Its method.
            parse: Parses a request.
            messages: The call's requests, as they come.
            context: The call.

        Raises:
            CallerError: INVALID_REQUEST: a request is too large, or is not one.
            GatewayError: TOO_MANY_STREAMS: there are too many calls already. UNAUTHENTICATED: the request of a caller that is
                not known did not come with its call.
        """
        if self._calls >= MAX_CALLS:
            raise GatewayError(
                Reason.TOO_MANY_STREAMS,
                f"this gateway answers {MAX_CALLS} calls of reflection at once and no more",
                metadata={"limit": str(MAX_CALLS)},
                retry_after=RETRY_SECONDS,
            )
        self._calls += 1
        try:
            if not self._known(context):
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
            "without an access key, a request of reflection must be small and come with its call: "
            "send a key as `authorization: Bearer …`",
        )
    return data


async def _only(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def _parsed(messages: AsyncIterator[bytes], parse: Callable[[bytes], object]) -> AsyncIterator[object]:
    async for data in messages:
        if len(data) > MAX_REQUEST_BYTES:
            raise CallerError(
                Reason.INVALID_REQUEST,
                f"a request of reflection has at most {MAX_REQUEST_BYTES} bytes, and this has {len(data)}",
            )
        yield parse(data)
