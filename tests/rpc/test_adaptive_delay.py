"""Deltas that share messages while the gateway is busy, as a caller sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from google.protobuf.duration_pb2 import Duration

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire_server.completions.adaptive import AdaptiveDelay
from deltawire_server.fake_vllm import Chunks, FakeVllm, Script
from tests.support.gateway import kinds, read_well, text_of

if TYPE_CHECKING:
    from tests.conftest import StartGateway
    from tests.support.gateway import Lines

CHUNKS = Chunks()
TEXTS = [f"{number} " for number in range(20)]
LONG = 10.0


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is always busy."""

    def delayed(adaptive: AdaptiveDelay, longest: float) -> None:
        adaptive.seconds = adaptive._longest = longest

    monkeypatch.setattr(AdaptiveDelay, "__init__", delayed)
    monkeypatch.setattr(AdaptiveDelay, "adapt", lambda *_: None)


@pytest.mark.usefixtures("busy")
async def test_deltas_share_messages(start_gateway: StartGateway, vllm: FakeVllm, lines: Lines) -> None:
    """All but the first; no text is lost, the end does not wait, and the log line has their number."""
    pieces = [CHUNKS.text(text) for text in TEXTS]
    vllm.play(Script.chunks([CHUNKS.role(), *pieces, CHUNKS.finish(), CHUNKS.usage(1, 20)], chunk_delay=0.001))
    async with start_gateway(server={"max_adaptive_delay": LONG}) as gateway:
        events = await read_well(gateway.stream())
    assert kinds(events) == ["started", "text_delta", "text_delta", "choice_finished", "completed"]
    assert text_of(events) == "".join(TEXTS)
    assert (await lines.find("call"))["joined_deltas"] == len(TEXTS) - 2


@pytest.mark.usefixtures("busy")
async def test_a_caller_can_have_every_delta_at_once(start_gateway: StartGateway, vllm: FakeVllm) -> None:
    """With a delay of 0, whatever the load."""
    pieces = [CHUNKS.text(text) for text in TEXTS]
    vllm.play(Script.chunks([CHUNKS.role(), *pieces, CHUNKS.finish(), CHUNKS.usage(1, 20)], chunk_delay=0.005))
    async with start_gateway(server={"max_adaptive_delay": LONG}) as gateway:
        events = await read_well(gateway.stream(options=chat_pb.StreamOptions(max_coalesce_delay=Duration())))
    assert kinds(events).count("text_delta") > 2
    assert text_of(events) == "".join(TEXTS)
