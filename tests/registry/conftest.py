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
    """Opens a registry on the test's database, or with other providers, another URL or another time limit for locks."""

    def __call__(
        self, *providers: FakeProvider, url: str | None = None, busy_seconds: float | None = None
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
    """Opens a registry; listings are not cached, so that a test sees its changes at once."""
    default_url = url

    @asynccontextmanager
    async def opener(
        *providers: FakeProvider, url: str | None = None, busy_seconds: float | None = None
    ) -> AsyncIterator[ModelRegistry]:
        url = url or default_url
        # On a busy machine, connecting to a server alone can take longer.
        busy_seconds = busy_seconds or (0.2 if url.startswith("sqlite") else 5.0)
        store = Store(url, busy_seconds=busy_seconds)
        registry = ModelRegistry(store, Providers(providers or (alpha, beta), listing_seconds=0.0))
        try:
            await registry.open()
            yield registry
        finally:
            await registry.close()

    return opener


@pytest.fixture
async def registry(open_registry: Opener) -> AsyncIterator[ModelRegistry]:
    """Open, over alpha and beta."""
    async with open_registry() as registry:
        yield registry
