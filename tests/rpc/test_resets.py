"""Calls that are canceled at once, in the log."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from deltawire_server.rpc import resets
from deltawire_server.rpc.resets import OTHERS, Resets
from tests.support.raw_http2 import message, raw_client

if TYPE_CHECKING:
    import pytest

    from tests.conftest import StartGateway
    from tests.support.gateway import Lines

CREATE = "/deltawire.v1.ChatCompletion/CreateChatCompletion"
CALLS = 300


async def test_streams_that_are_reset_at_once(start_gateway: StartGateway, lines: Lines) -> None:
    """One line for the first, and one for all the others of its second."""
    async with start_gateway() as gateway, raw_client(gateway.address) as client:
        for _ in range(CALLS):
            stream = client.call(CREATE, body=message(b"x", 1000))
            client.connection.reset_stream(stream)
            client.flush()
            await asyncio.sleep(0)
        line = await lines.find("calls canceled within a second of their start")
        calls = [each for each in lines.entries if each["event"] == "call"]
    assert line["calls"] > 1
    assert len(calls) <= 10


async def test_connections_are_counted_apart_up_to_a_bound(monkeypatch: pytest.MonkeyPatch, lines: Lines) -> None:
    """Then they share a line."""
    monkeypatch.setattr(resets, "MAX_PEERS", 2)
    monkeypatch.setattr(resets, "QUICK_SECONDS", 0.01)
    counts = Resets()
    assert [counts.first(peer) for peer in ("a", "b", "a", "c", "d", "e")] == [True, True, False, True, False, False]
    assert (await lines.find("calls canceled within a second of their start", peer=OTHERS))["calls"] == 2
    assert (await lines.find("calls canceled within a second of their start", peer="a"))["calls"] == 1
    assert counts.first("a")
