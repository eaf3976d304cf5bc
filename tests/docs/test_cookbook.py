"""Every program of the cookbook runs against a real gateway and the fake vLLM, and prints what the page shows."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from deltawire_server.fake_vllm import FakeVllm
from tests.docs.markdown import Block, blocks
from tests.docs.programs import ADDRESS, CALLS, CHUNK, MODEL, SAYS, runnable, script
from tests.support.gateway import WAIT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from deltawire_server.fake_vllm import Script
    from tests.conftest import StartGateway

PAGE = Path(__file__).parents[2] / "client/docs/cookbook.md"
BLOCKS = blocks(PAGE)
PROGRAMS = [block for block in BLOCKS if block.language == "python"]
[ACCESS] = [block.text for block in BLOCKS if block.language == "ini"]


def answers(block: Block) -> list[Script]:
    """What the model says to the block's questions, in order."""
    # Never set: the rest comes only if a cancel does not end the answer.
    story = script(CHUNK.text("It rains"), asyncio.Event())
    if "tools=[" in block.text:
        return [CALLS, SAYS]
    if "response_format=" in block.text:
        return [script(CHUNK.text('{"city": "Oslo", '), CHUNK.text('"rain": true}'))]
    if "long story" in block.text:
        return [story] * block.text.count("long story") + [SAYS]
    return [SAYS]


@pytest.fixture
async def vllm() -> AsyncIterator[FakeVllm]:
    """A look-alike of the vLLM of `make run`."""
    async with FakeVllm(models=[MODEL]) as vllm:
        yield vllm


@pytest.mark.parametrize("block", PROGRAMS, ids=lambda block: f"line-{block.line}")
async def test_a_program_prints_what_the_page_shows(block: Block, vllm: FakeVllm, start_gateway: StartGateway) -> None:
    """All of it, in order; programs with a key, at a gateway with the page's access list."""
    assert ADDRESS in block.text
    assert f'model="{MODEL}"' in block.text
    assert block.output is not None
    vllm.play(*answers(block))
    async with start_gateway(access={"keys": ACCESS} if "token=" in block.text else None) as gateway:
        program = await asyncio.create_subprocess_exec(
            sys.executable, "-c", runnable(block, gateway.address), stdout=PIPE, stderr=PIPE
        )
        try:
            out, err = await asyncio.wait_for(program.communicate(), WAIT)
        finally:
            if program.returncode is None:
                program.kill()
                await program.wait()
    assert (out.decode(), err.decode(), program.returncode) == (block.output, "", 0)
    # A page that shows that the model speaks must have asked it.
    assert vllm.chats
