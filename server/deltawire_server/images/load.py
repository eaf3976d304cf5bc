"""All images of a request: from addresses to bytes, or every address that is refused at once."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from deltawire_server.errors import CallerError, Reason, Violation, invalid_request
from deltawire_server.images.addresses import is_public
from deltawire_server.images.connect import RefusedError, UnavailableError
from deltawire_server.images.fetch import Budget, Fetcher
from deltawire_server.images.policy import Policy
from deltawire_server.images.urls import web_address
from deltawire_server.upstream.request import ImageData, ImageUrl

if TYPE_CHECKING:
    import ssl
    from collections.abc import Sequence

    from deltawire_server.images.connect import LookUp, Permits
    from deltawire_server.images.urls import WebAddress
    from deltawire_server.upstream.request import ChatRequest

FETCHES_OF_A_REQUEST = 4
"""At once: enough to wait for several servers at the same time, too few to be used for flooding one."""

MAX_FETCHES = 32
"""At once, of all requests: each holds an image in memory, which makes half a gibibyte at the default limit; more wait."""

_NOT_HERE = "may not be an address at this gateway: send the image as data, or have the operator set images.urls"


class Images:
    """Puts images in the place of their addresses, as far as the operator allows it.

    Args:
        policy: What is allowed; by default no address.
        permits: Says which IP addresses may be connected to. For tests, which have no others than this machine's.
        look_up: Says where names lead, in the place of the operating system. For tests.
        tls: For https: a context that verifies, in the place of the system's authorities. For tests.
        user_agent: How servers are told who asks.
    """

    def __init__(
        self,
        policy: Policy | None = None,
        *,
        permits: Permits = is_public,
        look_up: LookUp | None = None,
        tls: ssl.SSLContext | bool = True,
        user_agent: str = "deltawire",
    ) -> None:
        self._policy = policy or Policy()
        self._fetcher = Fetcher(self._policy, permits, look_up, tls, user_agent)
        self._turns = asyncio.Semaphore(MAX_FETCHES)

    async def load(self, request: ChatRequest) -> ChatRequest:
        """The request with every image in it, at the place of its address; the request itself if it has no addresses.

        Cancelling ends what is under way. Addresses are left as they are if the engine is to fetch them.

        Raises:
            CallerError: INVALID_REQUEST if addresses are not allowed, with each field; IMAGE_UNAVAILABLE for the first image
                that could not be fetched.
        """
        wanted = [part for message in request.messages for part in message.content if isinstance(part, ImageUrl)]
        if not wanted or self._policy.urls == "pass":
            return request
        if self._policy.urls == "refuse":
            raise invalid_request([Violation(image.field, _NOT_HERE) for image in wanted])
        found = iter(await self._fetch_all(wanted))
        messages = [
            replace(
                message,
                content=tuple(next(found) if isinstance(part, ImageUrl) else part for part in message.content),
            )
            for message in request.messages
        ]
        return replace(request, messages=tuple(messages))

    async def close(self) -> None:
        """Close its connections; calls under way fail."""
        await self._fetcher.close()

    async def _fetch_all(self, wanted: Sequence[ImageUrl]) -> list[ImageData]:
        addresses = [web_address(image.url) for image in wanted]
        violations = [
            Violation(image.field, description)
            for image, address in zip(wanted, addresses, strict=True)
            if (description := self._fetcher.violation(address)) is not None
        ]
        if violations:
            raise invalid_request(violations)
        budget = Budget(self._policy.max_fetched_bytes)
        turns = asyncio.Semaphore(FETCHES_OF_A_REQUEST)
        try:
            async with asyncio.TaskGroup() as group:
                fetches = [
                    group.create_task(self._fetch(image, address, budget, turns))
                    for image, address in zip(wanted, addresses, strict=True)
                ]
        except BaseExceptionGroup as failures:
            # The first; the others were ended because of it.
            raise failures.exceptions[0] from None
        return [fetch.result() for fetch in fetches]

    async def _fetch(self, image: ImageUrl, address: WebAddress, budget: Budget, turns: asyncio.Semaphore) -> ImageData:
        async with turns, self._turns:
            try:
                return await self._fetcher.fetch(address, budget)
            except RefusedError as error:
                raise invalid_request([Violation(image.field, str(error))]) from None
            except UnavailableError as error:
                raise CallerError(
                    Reason.IMAGE_UNAVAILABLE,
                    f"{image.field}: the image at {address.host} {error}",
                    metadata={"field": image.field, "host": address.host},
                ) from error
