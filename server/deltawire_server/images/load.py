"""Replaces the image URLs of a request by the images, or reports all refused URLs together."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from deltawire_server.errors import CallerError, Reason, Violation, invalid_request
from deltawire_server.images.addresses import is_public
from deltawire_server.images.connect import RefusedError, UnavailableError
from deltawire_server.images.fetch import Budget, Fetcher
from deltawire_server.images.policy import Policy
from deltawire_server.limits import Share
from deltawire_server.metrics.table import IMAGES
from deltawire_server.upstream.request import ImageData, ImageUrl

if TYPE_CHECKING:
    import ssl
    from collections.abc import Sequence

    from deltawire_server.images.connect import LookUp, Permits
    from deltawire_server.upstream.request import ChatRequest

FETCHES_OF_A_REQUEST = 4
"""Concurrent fetches per request: enough to wait for several servers, too few for an attack on one."""

MAX_FETCHES = 32
"""Concurrent fetches of all requests; further ones wait. Each holds an image in memory, 512 MiB in all at the default limit."""

_NOT_HERE = "must not be a URL at this gateway: send the image as data, or ask the operator to set images.urls"


class Images:
    """Replaces image URLs by the images, if the operator allows it.

    Args:
        policy: The operator's policy; by default, URLs are refused.
        permits: Whether an IP address may be connected to. For tests, which use loopback addresses.
        look_up: Looks up names instead of the operating system's resolver. For tests.
        tls: For https: a context that verifies certificates, instead of the system's authorities. For tests.
        user_agent: The User-Agent header.
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
        # One for each caller with images that are being fetched, and its limit.
        self._shares: WeakValueDictionary[tuple[str, int], asyncio.Semaphore] = WeakValueDictionary()

    async def load(self, request: ChatRequest, share: Share | None = None) -> ChatRequest:
        """Replace every image URL of a request by the image.

        Returns the same request if it has no URLs, or if the policy leaves fetching to the engine. Cancellation ends all fetches.

        Args:
            request: The request.
            share: The caller, with its limit on concurrent fetches; by default without one.

        Raises:
            CallerError: INVALID_REQUEST with each URL that is not allowed; IMAGE_UNAVAILABLE for the first image that could not
                be fetched.
        """
        wanted = [part for message in request.messages for part in message.content if isinstance(part, ImageUrl)]
        if not wanted or self._policy.urls == "pass":
            return request
        if self._policy.urls == "refuse":
            raise invalid_request([Violation(image.field, _NOT_HERE) for image in wanted])
        found = iter(await self._fetch_all(wanted, share or Share()))
        messages = [
            replace(
                message,
                content=tuple(next(found) if isinstance(part, ImageUrl) else part for part in message.content),
            )
            for message in request.messages
        ]
        return replace(request, messages=tuple(messages))

    async def close(self) -> None:
        """Close all connections; calls in progress fail."""
        await self._fetcher.close()

    async def _fetch_all(self, wanted: Sequence[ImageUrl], share: Share) -> list[ImageData]:
        violations = [
            Violation(image.field, description)
            for image in wanted
            if (description := self._fetcher.violation(image.address)) is not None
        ]
        if violations:
            raise invalid_request(violations)
        budget = Budget(self._policy.max_fetched_bytes)
        turns = (asyncio.Semaphore(FETCHES_OF_A_REQUEST), self._turns_of(share))
        try:
            async with asyncio.TaskGroup() as group:
                fetches = [group.create_task(self._fetch(image, budget, *turns)) for image in wanted]
        except BaseExceptionGroup as failures:
            # The first one; it cancelled the others.
            raise failures.exceptions[0] from None
        return [fetch.result() for fetch in fetches]

    def _turns_of(self, share: Share) -> asyncio.Semaphore:
        limit = share.limits.image_fetches or MAX_FETCHES
        turns = self._shares.get((share.key, limit))
        if turns is None:
            turns = self._shares[share.key, limit] = asyncio.Semaphore(limit)
        return turns

    async def _fetch(
        self, image: ImageUrl, budget: Budget, of_request: asyncio.Semaphore, of_caller: asyncio.Semaphore
    ) -> ImageData:
        async with of_request, of_caller, self._turns:
            try:
                fetched = await self._fetcher.fetch(image.address, budget)
            except RefusedError as error:
                IMAGES.labels("refused").inc()
                raise invalid_request([Violation(image.field, str(error))]) from None
            except UnavailableError as error:
                IMAGES.labels("unavailable").inc()
                raise CallerError(
                    Reason.IMAGE_UNAVAILABLE,
                    f"{image.field}: the image at {image.address.host} {error}",
                    metadata={"field": image.field, "host": image.address.host},
                ) from error
            IMAGES.labels("ok").inc()
            return fetched
