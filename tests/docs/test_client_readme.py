"""The Python code of client/README.md runs against a real gateway and the fake vLLM."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from deltawire import AsyncClient
from deltawire_server.fake_vllm import FakeVllm
from tests.docs.markdown import Block, blocks
from tests.docs.programs import ADDRESS, CALLS, MODEL, SAYS, run, runnable
from tests.support.gateway import WAIT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.gateway import Running

BLOCKS = [block for block in blocks(Path(__file__).parents[2] / "client/README.md") if block.language == "python"]
# A PNG with one transparent pixel.
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360606060000000050001a5f64540"
    "0000000049454e44ae426082"
)


@pytest.fixture
async def vllm() -> AsyncIterator[FakeVllm]:
    """A look-alike of the vLLM of `make run`."""
    async with FakeVllm(models=[MODEL]) as vllm:
        yield vllm


@pytest.fixture
async def address(served: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A gateway as after `make run`: nothing is registered. The file that the README sends is in the current folder."""
    async with AsyncClient(served.address, timeout=WAIT) as client:
        await client.models.refresh()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cat.png").write_bytes(PIXEL)
    return served.address


def calls_tools(block: Block) -> bool:
    """Whether its model is expected to call a tool."""
    return "tools=[" in block.text


def never_ends(block: Block) -> bool:
    """Whether it runs until it is interrupted."""
    return ".watch()" in block.text


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if not never_ends(block)], ids=lambda block: f"line-{block.line}"
)
async def test_a_block_runs(block: Block, address: str, vllm: FakeVllm) -> None:
    """A block raises nothing. If it sends a chat request, vLLM receives it, and the block prints the answer."""
    vllm.play(CALLS if calls_tools(block) else SAYS, SAYS)
    printed = await asyncio.to_thread(run, block, address)
    asked = f'model="{MODEL}"' in block.text
    assert ("It rains" in printed) == asked
    assert bool(vllm.chats) == asked
    if calls_tools(block):
        messages = vllm.chats[-1].body["messages"]
        assert "rain in Oslo" in messages[-1]["content"]


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if never_ends(block)], ids=lambda block: f"line-{block.line}"
)
async def test_a_watch_runs_until_it_is_interrupted(block: Block, address: str) -> None:
    """A watch prints the current models and continues."""

    def watch() -> str:
        with subprocess.Popen(
            [sys.executable, "-u", "-c", runnable(block, address)], stdout=subprocess.PIPE
        ) as process:
            try:
                assert process.stdout is not None
                return process.stdout.readline().decode()
            finally:
                process.kill()

    assert MODEL in await asyncio.to_thread(watch)


def test_every_block_uses_the_address_and_the_model() -> None:
    """One address and one model name, so that a reader can run one block after another."""
    for block in BLOCKS:
        assert ADDRESS in block.text
        if "model=" in block.text:
            assert f'model="{MODEL}"' in block.text or 'model="no-such-model"' in block.text
