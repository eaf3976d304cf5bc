"""The blocking client in a thread whose event loop is running, as in a notebook's cell."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from deltawire import Client
from deltawire_server.fake_vllm import FakeVllm, Script
from tests.support.gateway import WAIT

if TYPE_CHECKING:
    from tests.support.gateway import Running

ANSWER = Script.generated(tokens=20)


async def cell(address: str) -> None:
    """What a notebook runs as a task of its loop: blocking calls of each kind, and then the loop goes on."""
    assert asyncio.get_running_loop().is_running()
    with Client(address, timeout=WAIT) as client:
        assert client.chat.create("hi").text
        with client.chat.stream("hi") as stream:
            assert "".join(stream.text) == stream.final().text != ""
        with client.chat.stream("hi") as stream:
            assert next(iter(stream.text))
        assert list(client.models.list())
        assert list(client.chat.list())
        answer = await asyncio.to_thread(client.chat.create, "hi")
        assert answer.text
    await asyncio.sleep(0)


async def test_calls_in_a_thread_with_a_running_loop(vllm: FakeVllm, served: Running) -> None:
    """No call needs a loop of its own, or the one that runs. The gateway has another thread and another loop."""
    vllm.play(*[ANSWER] * 4)
    await asyncio.wait_for(asyncio.to_thread(asyncio.run, cell(served.address)), WAIT)
    assert len(vllm.chats) == 4
