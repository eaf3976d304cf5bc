"""What the tests of other languages share: a vLLM that plays recordings, a gateway in front of it, and compiled stubs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from deltawire_server.fake_vllm import FakeVllm
from tests.polyglot import calls, stubs

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from tests.polyglot.stubs import Builds


@pytest.fixture
async def vllm() -> AsyncIterator[FakeVllm]:
    """A fake vLLM with scripted answers."""
    async with FakeVllm() as vllm:
        yield vllm


@pytest.fixture
async def target(vllm: FakeVllm, tmp_path: Path) -> AsyncIterator[str]:
    """The address of a gateway in front of it."""
    async with calls.gateway(vllm, tmp_path) as (_, address):
        yield address


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builds]:
    """The stubs of every language, compiled side by side."""
    with stubs.building(tmp_path_factory.mktemp("stubs")) as builds:
        yield builds


@pytest.fixture(scope="session", autouse=True)
def _begin_builds_early(request: pytest.FixtureRequest) -> None:
    """Begin, with the first test, the builds that tests of this run ask for by `language`: other tests mostly wait."""
    calls = [item.callspec for item in request.session.items if hasattr(item, "callspec")]
    languages = {call.params["language"] for call in calls if "language" in call.params}
    if languages:
        builds: Builds = request.getfixturevalue("builds")
        builds.begin(languages)
