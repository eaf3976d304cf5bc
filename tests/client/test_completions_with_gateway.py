"""Retained streams, soft ends, look-ups and token counts with the gateway itself, over connections that break."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from deltawire import (
    AsyncClient,
    Client,
    CompletionAlreadyExistsError,
    CompletionGoneError,
    CompletionNotFoundError,
    DrainingError,
    StopReason,
)
from deltawire.v1.chat_completion_pb2 import (
    COMPLETION_STATE_COMPLETED,
    COMPLETION_STATE_RUNNING,
    USAGE_PROVENANCE_EXACT,
)
from deltawire_server.fake_vllm import Chunks, Script
from tests.support.cutting import CuttingProxy
from tests.support.gateway import WAIT, running, settings_of, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from deltawire_server.fake_vllm import FakeVllm
    from tests.support.gateway import Running

CHUNKS = Chunks("fake")
WORDS = [f"{number} " for number in range(8)]
TEXT = "".join(WORDS)


@pytest.fixture
async def wire(served: Running) -> AsyncIterator[CuttingProxy]:
    """The way to a gateway."""
    async with CuttingProxy(served.address) as wire:
        yield wire


@pytest.fixture
async def client(wire: CuttingProxy) -> AsyncIterator[AsyncClient]:
    """A client over that way."""
    async with AsyncClient(wire.address, timeout=WAIT) as client:
        yield client


def in_steps(*gates: asyncio.Event) -> Script:
    """An answer of eight words; from the first on, each comes once its gate is open."""
    pieces = [each for word, gate in zip(WORDS, gates, strict=True) for each in (gate, CHUNKS.text(word))]
    return Script.chunks([CHUNKS.role(), *pieces, CHUNKS.finish(), CHUNKS.usage(3, 8)])


def gates(opened: bool = False) -> list[asyncio.Event]:
    """One for each word."""
    made = [asyncio.Event() for _ in WORDS]
    if opened:
        for gate in made:
            gate.set()
    return made


async def test_cut_at_every_word(client: AsyncClient, wire: CuttingProxy, vllm: FakeVllm) -> None:
    """Each word is told once, in order, and generated once."""
    steps = gates()
    vllm.play(in_steps(*steps))
    said, sequences = [], []
    async with client.chat.stream("count", model="fake", retention=60) as stream:
        steps[0].set()
        async for event in stream:
            sequences.append(event.sequence)
            if event.WhichOneof("event") == "text_delta":
                said.append(event.text_delta.text)
                if len(said) < len(steps):
                    wire.cut()
                    steps[len(said)].set()
        answer = await stream.final()
    assert said == WORDS
    assert sequences == list(range(len(sequences)))
    assert (answer.text, stream.resumed) == (TEXT, len(WORDS) - 1)
    assert answer.usage.provenance == USAGE_PROVENANCE_EXACT
    assert len(vllm.chats) == 1


async def test_cut_before_the_beginning(client: AsyncClient, wire: CuttingProxy, vllm: FakeVllm) -> None:
    """The completion is found by the id that the client made up, whether gRPC or the client retries, and generated once."""
    first = asyncio.Event()
    vllm.play(Script.chunks([first, CHUNKS.role(), CHUNKS.text("hi"), CHUNKS.finish()]))
    async with client.chat.stream("hi", model="fake", retention=60) as stream:
        reader = asyncio.create_task(stream.final())
        await vllm.received()
        wire.cut()
        await until(lambda: wire.connections == 2)
        first.set()
        answer = await reader
    assert answer.text == "hi"
    assert answer.completion_id == stream.completion_id
    assert len(vllm.chats) == 1


async def test_the_blocking_client(wire: CuttingProxy, vllm: FakeVllm) -> None:
    """The same, from a thread."""
    steps = gates()
    loop = asyncio.get_running_loop()
    vllm.play(in_steps(*steps))

    def ask() -> tuple[list[str], int]:
        said = []
        with (
            Client(wire.address, timeout=WAIT) as client,
            client.chat.stream("count", model="fake", retention=60) as stream,
        ):
            loop.call_soon_threadsafe(steps[0].set)
            for piece in stream.text:
                said.append(piece)
                loop.call_soon_threadsafe(wire.cut)
                if len(said) < len(steps):
                    loop.call_soon_threadsafe(steps[len(said)].set)
            return said, stream.resumed

    said, resumed = await asyncio.to_thread(ask)
    assert said == WORDS
    assert resumed >= len(WORDS) - 1
    assert len(vllm.chats) == 1


async def test_a_soft_cancel(client: AsyncClient, vllm: FakeVllm) -> None:
    """The normal end, with what came; vLLM is told, and the result of a retained one can be had."""
    steps = gates()
    vllm.play(in_steps(*steps))
    async with client.chat.stream("count", model="fake", retention=60) as stream:
        steps[0].set()
        assert await anext(stream.text) == WORDS[0]
        assert (await client.chat.get(stream.completion_id)).state == COMPLETION_STATE_RUNNING
        assert (await stream.cancel_softly()).state == COMPLETION_STATE_RUNNING
        answer = await stream.final()
        assert (await stream.cancel_softly()).state == COMPLETION_STATE_COMPLETED
    assert (answer.text, answer.stop_reason) == (WORDS[0], StopReason.STOP_REASON_CANCELLED)
    found = await client.chat.get(stream.completion_id)
    assert (found.state, found.completed.choices) == (COMPLETION_STATE_COMPLETED, answer.completed.choices)
    assert found.last_sequence == stream.last_sequence


@pytest.mark.parametrize("retention", [None, 60])
async def test_a_soft_cancel_before_the_beginning(client: AsyncClient, vllm: FakeVllm, retention: float | None) -> None:
    """With an id of one's own; the end is a normal one all the same."""
    vllm.play(Script.chunks([asyncio.Event(), CHUNKS.role()]))
    asked = client.chat.stream("hi", model="fake", completion_id="mine", retention=retention)
    async with asked as stream:
        reader = asyncio.create_task(stream.final())
        await vllm.received()
        await stream.cancel_softly()
        answer = await reader
    assert (answer.text, answer.stop_reason) == ("", StopReason.STOP_REASON_CANCELLED)
    assert answer.completion_id == "mine"


async def test_left_and_taken_up(client: AsyncClient, vllm: FakeVllm) -> None:
    """Leaving the block leaves the completion: another stream reads the rest, or all of it again."""
    steps = gates()
    vllm.play(in_steps(*steps))
    async with client.chat.stream("count", model="fake", retention=60, completion_id="mine") as stream:
        steps[0].set()
        assert await anext(stream.text) == WORDS[0]
    # The same request would read the same completion: gRPC repeats a call whose first attempt was lost.
    with pytest.raises(CompletionAlreadyExistsError):
        await client.chat.stream("another", model="fake", completion_id="mine", retention=60).final()
    for gate in steps:
        gate.set()
    async with client.chat.resume("mine", stream.last_sequence) as rest:
        assert "".join([piece async for piece in rest.text]) == TEXT.removeprefix(WORDS[0])
        assert (await rest.final()).text == TEXT
    assert (await client.chat.resume("mine").final()).text == TEXT


async def test_what_there_is_not(client: AsyncClient, vllm: FakeVllm) -> None:
    """No such id, and one that was never retained."""
    for asked in (client.chat.cancel("nobody"), client.chat.get("nobody"), client.chat.resume("nobody").final()):
        with pytest.raises(CompletionNotFoundError):
            await asked
    vllm.play(in_steps(*gates(opened=True)))
    answer = await client.chat.stream("count", model="fake").final()
    assert (await client.chat.get(answer.completion_id)).state == COMPLETION_STATE_COMPLETED
    with pytest.raises(CompletionGoneError):
        await client.chat.resume(answer.completion_id).final()


async def test_a_gateway_that_is_replaced(vllm: FakeVllm, tmp_path: Path) -> None:
    """What had begun is told so, with what came; what had not is asked again, at the new one."""
    address = f"unix:{tmp_path}/gateway"
    settings = settings_of(vllm.base_url, tmp_path, server={"listen": address, "drain_grace": 0})
    steps = gates()
    vllm.play(in_steps(*steps), Script.chunks([asyncio.Event(), CHUNKS.role()]))
    async with AsyncClient(address, timeout=WAIT) as client:
        async with running(settings):
            begun = client.chat.stream("count", model="fake", retention=60)
            steps[0].set()
            assert await anext(begun.text) == WORDS[0]
            waiting = asyncio.create_task(client.chat.stream("count", model="fake", retention=60).final())
            await vllm.received(2)
        vllm.play(in_steps(*gates(opened=True)))
        async with running(settings):
            assert (await waiting).text == TEXT
            with pytest.raises(DrainingError) as caught:
                await begun.final()
    assert caught.value.answer is not None
    assert caught.value.answer.text == WORDS[0]


async def test_counting_tokens(client: AsyncClient) -> None:
    """By the engine; more messages are more tokens."""
    few = await client.chat.count_tokens("hi", model="fake")
    many = await client.chat.count_tokens(["hi", "what is the weather like in Oslo today?"], model="fake")
    assert 0 < few.prompt_tokens < many.prompt_tokens
    assert few.model == "vllm/fake"


async def test_another_attempt_of_grpcs_finds_what_the_first_began(
    client: AsyncClient, wire: CuttingProxy, served: Running, vllm: FakeVllm
) -> None:
    """Also with an id of the caller's own: no clash, one completion, and the client has noticed nothing."""
    gate = asyncio.Event()
    vllm.play(Script.chunks([gate, CHUNKS.role(), CHUNKS.text("hi"), CHUNKS.finish()]))
    async with client.chat.stream("hi", model="fake", completion_id="mine", retention=60) as stream:
        reader = asyncio.create_task(stream.final())
        await vllm.received()
        wire.cut()
        await until(lambda: wire.connections == 2)
        gate.set()
        answer = await reader
    assert (answer.text, answer.completion_id, stream.resumed) == ("hi", "mine", 0)
    assert len(vllm.chats) == 1
    assert served.gateway._worker.active == 0


async def test_an_id_is_free_again_after_the_end(client: AsyncClient, vllm: FakeVllm) -> None:
    """As soon as the answer has come, also for another request."""
    for number in range(5):
        steps = gates()
        vllm.play(in_steps(*steps))
        async with client.chat.stream("count", model="fake", completion_id="twice") as stream:
            steps[0].set()
            assert await anext(stream.text) == WORDS[0]
            with pytest.raises(CompletionAlreadyExistsError):
                await client.chat.create("another", model="fake", completion_id="twice")
            await stream.cancel_softly()
            await stream.final()
        vllm.play(in_steps(*gates(opened=True)))
        assert (await client.chat.create(f"{number}", model="fake", completion_id="twice")).text == TEXT
