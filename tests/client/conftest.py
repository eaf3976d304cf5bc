"""What the client's tests share: a scripted gateway, and both clients against it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from deltawire import AsyncClient, Client
from tests.client.scripted import Gateway, serve

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    """A gateway that says what it is told to."""
    with serve() as gateway:
        yield gateway


@pytest.fixture
def client(gateway: Gateway) -> Iterator[Client]:
    """A blocking client of that gateway."""
    with Client(gateway.target) as client:
        yield client


@pytest.fixture
async def async_client(gateway: Gateway) -> AsyncIterator[AsyncClient]:
    """An asynchronous client of that gateway."""
    async with AsyncClient(gateway.target) as client:
        yield client
