"""What the tests of the clients in other languages share: their pages lead to the same answers, from the same gateways."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from deltawire_server.fake_vllm import Chunks, FakeVllm, Script
from tests.polyglot.calls import gateway
from tests.polyglot.documented import commands
from tests.polyglot.programs import ROOT, Outcome
from tests.polyglot.proxy import envoy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

HEADING = "From nothing to an answer"
"""The section of each page with the commands that end in an answer and a tool call."""

SHIPPED_TARGET = "127.0.0.1:50051"
"""The gateway's address in the pages."""

CHUNK = Chunks()
ENDLESS = Script.generated(tokens=1_000_000, tokens_per_second=50)
BROKEN = Script.chunks([CHUNK.role(), CHUNK.text("half an"), CHUNK.text(" ans")], after=3, end="cut")


def says(*events: dict[str, object], reason: str = "stop") -> Script:
    """An answer of these chunks."""
    return Script.chunks([CHUNK.role(), *events, CHUNK.finish(reason), CHUNK.usage(7, 3)])


SALT = says(CHUNK.text("It is the"), CHUNK.text(" salt."))
CALLS = says(CHUNK.call("get_weather"), CHUNK.arguments('{"city": "Oslo"}'), reason="tool_calls")

PRINTED = [
    Outcome(0, "It is the salt.\n[STOP_REASON_END_OF_TURN, 3 tokens]\n", ""),
    Outcome(
        0,
        '\ntool call: get_weather({"city": "Oslo"})\n'
        "[STOP_REASON_END_OF_MESSAGE, 3 tokens, tool calls may be executed]\n",
        "",
    ),
]
"""What the last two commands of a page print for `SALT` and `CALLS`."""


def steps(page: Path) -> list[str]:
    """The commands of a client's page: at most eight, of which the first installs packages that CI installs too."""
    found = commands(HEADING, page)
    assert len(found) <= 8
    listed = (ROOT / "tests" / "polyglot" / "debian-packages.txt").read_text(encoding="utf-8").split()
    assert found[0].startswith("apt-get install -y --no-install-recommends ")
    assert set(found[0].split()[4:]) <= set(listed)
    return found


@contextlib.asynccontextmanager
async def two_gateways(vllm: FakeVllm, folder: Path) -> AsyncIterator[str]:
    """The address of the shipped Envoy in front of two gateways."""
    async with (
        gateway(vllm, folder) as (_, first),
        gateway(vllm, folder) as (_, second),
        envoy(folder, first, second) as proxy,
    ):
        yield proxy.target
