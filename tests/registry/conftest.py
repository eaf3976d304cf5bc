"""A registry over a database file and two providers in memory."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol, cast

import pytest

from deltawire_server.registry.registry import ModelRegistry
from deltawire_server.registry.store import Store
from deltawire_server.upstream.providers import Providers
from tests.support.fake_provider import FakeProvider

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from tests.support.postgres import PostgresServer


class Opener(Protocol):
    """Opens a registry on the test's database, over other providers or another URL if given."""

    def __call__(
        self, *providers: FakeProvider, url: str | None = None
    ) -> AbstractAsyncContextManager[ModelRegistry]: ...


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """A file that does not exist yet, in a folder that does not either."""
    return f"sqlite:///{tmp_path}/state/registry.db"


@pytest.fixture
def url(sqlite_url: str) -> str:
    """The test's database, empty."""
    return sqlite_url


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest) -> str:
    """An empty database of each kind: a module whose tests hold for both makes this its `url`."""
    # Asked for here, so that nothing of the other kind is started.
    if request.param == "sqlite":
        return cast("str", request.getfixturevalue("sqlite_url"))
    return cast("PostgresServer", request.getfixturevalue("postgres")).create_database()


@pytest.fixture
def alpha() -> FakeProvider:
    """Serves llama, and a name with slashes that another provider serves as well."""
    return FakeProvider("alpha", ["llama", "org/common"])


@pytest.fixture
def beta() -> FakeProvider:
    """Serves mistral, and a name with slashes that another provider serves as well."""
    return FakeProvider("beta", ["mistral", "org/common"])


@pytest.fixture
def open_registry(url: str, alpha: FakeProvider, beta: FakeProvider) -> Opener:
    """Opens a registry; listings are not kept, so that a test sees at once what it changes."""

    @asynccontextmanager
    async def opened(*providers: FakeProvider, url: str = url) -> AsyncIterator[ModelRegistry]:
        # A server's connection alone can take a moment, on a busy machine.
        busy_seconds = 0.2 if url.startswith("sqlite") else 5.0
        registry = ModelRegistry(
            Store(url, busy_seconds=busy_seconds), Providers(providers or (alpha, beta), listing_seconds=0.0)
        )
        try:
            await registry.open()
            yield registry
        finally:
            await registry.close()

    def opener(*providers: FakeProvider, url: str | None = None) -> AbstractAsyncContextManager[ModelRegistry]:
        return opened(*providers) if url is None else opened(*providers, url=url)

    return opener


@pytest.fixture
async def registry(open_registry: Opener) -> AsyncIterator[ModelRegistry]:
    """Open, over alpha and beta."""
    async with open_registry() as registry:
        yield registry
