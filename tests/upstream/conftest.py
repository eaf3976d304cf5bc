"""What several of these tests share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from deltawire_server.fake_vllm import FakeVllm

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def other() -> AsyncIterator[FakeVllm]:
    """A second vLLM look-alike."""
    async with FakeVllm() as other:
        yield other
