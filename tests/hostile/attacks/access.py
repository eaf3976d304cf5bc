"""What callers are, may and send beside their requests: keys that are revoked, and headers."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from typing import TYPE_CHECKING

from deltawire.v1 import chat_completion_pb2 as chat_pb
from tests.faults import script
from tests.faults.upstream import Gate, Plan, Send
from tests.hostile.attack import Attack, Prepared
from tests.hostile.attacks.building import STREAM
from tests.hostile.target import KEY, MODEL
from tests.support.gateway import ask

if TYPE_CHECKING:
    from tests.hostile.target import Target

OTHER_KEY = "another-key-that-is-revoked"
STREAMS = 200
REQUEST = chat_pb.StreamChatCompletionRequest(chat=ask(model=MODEL)).SerializeToString()


async def _reload(target: Target, *lines: str) -> None:
    """Have the gateway take over these access lines."""
    loads = target.log.read_text().count("access loaded")
    target.log.with_name("access.keys").write_text("".join(f"{line}\n" for line in (f"tests all {KEY}", *lines)))
    os.kill(target.pid, signal.SIGHUP)
    while target.log.read_text().count("access loaded") == loads:  # noqa: ASYNC110 (another process)
        await asyncio.sleep(0.02)


def _revoked() -> Prepared:
    """Streams under way whose key is revoked, all at once."""
    events = b"".join(map(script.framed, script.events_of([script.ROLE, *script.TEXT])))

    async def run(target: Target) -> Counter[str]:
        await _reload(target, f"other call {OTHER_KEY}")
        plans = [Plan([Send(script.HEAD), Send(events), Gate()]) for _ in range(STREAMS)]
        calls = [asyncio.ensure_future(target.call(STREAM, REQUEST, key=OTHER_KEY, plan=plan)) for plan in plans]
        for plan in plans:
            await plan.at_gate.wait()
        await _reload(target)
        outcomes = Counter(await asyncio.gather(*calls))
        for plan in plans:
            plan.gate.set()
        return outcomes

    return Prepared(run, len(REQUEST) * STREAMS, STREAMS)


def _traced() -> Prepared:
    """Calls with as much trace context as gRPC lets through, a part of which is invalid."""
    metadata = {
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "tracestate": ",".join(f"k{number}={'v' * 200}" for number in range(32)),
        "x-vllm-api-token": "t" * 1000,
    }

    async def run(target: Target) -> Counter[str]:
        return Counter([await target.call(STREAM, REQUEST, metadata=metadata)])

    return Prepared(run, len(REQUEST) + sum(map(len, metadata.values())))


ACCESS = (
    Attack(f"{STREAMS} streams under way whose key is revoked", "access", _revoked, frozenset({"ABORTED"})),
    Attack("7 KiB of trace context", "access", _traced, frozenset({"FAILED_PRECONDITION", "NOT_FOUND"})),
)
