"""What the tests of other languages share: a vLLM that plays recordings, and one gateway in front of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from deltawire_server.fake_vllm import FakeVllm
from tests.polyglot import calls

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture
async def vllm() -> AsyncIterator[FakeVllm]:
    """A vLLM that plays what it is told to."""
    async with FakeVllm() as vllm:
        yield vllm


@pytest.fixture
async def target(vllm: FakeVllm, tmp_path: Path) -> AsyncIterator[str]:
    """The address of a gateway in front of it."""
    async with calls.gateway(vllm, tmp_path) as (_, address):
        yield address
