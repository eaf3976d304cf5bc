"""A caller of its own process who asks for the gateway's health every 20 ms, and remembers how long the worst answer took.

    python -m tests.hostile.probe ADDRESS

After "ready" has been printed, each line read from standard input prints the seconds of the worst check since the line before.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import sys
import time

from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

INTERVAL_SECONDS = 0.020


class Probe:
    """The checks.

    Args:
        address: Of the gateway.
    """

    def __init__(self, address: str) -> None:
        self._channel = aio.insecure_channel(address)
        self._stub = health_pb2_grpc.HealthStub(self._channel)
        self._waiting: dict[asyncio.Task[None], float] = {}
        self._worst = 0.0

    async def run(self) -> None:
        """Check for ever. A check that is late does not delay the next one."""
        while True:
            task = asyncio.create_task(self._check())
            self._waiting[task] = time.perf_counter()
            task.add_done_callback(self._done)
            await asyncio.sleep(INTERVAL_SECONDS)

    def worst(self) -> float:
        """Seconds of the worst check since the last time; one that is still under way counts, too."""
        now = time.perf_counter()
        worst = max([self._worst, *(now - begin for begin in self._waiting.values())])
        self._worst = 0.0
        return worst

    async def _check(self) -> None:
        await self._stub.Check(health_pb2.HealthCheckRequest())

    def _done(self, task: asyncio.Task[None]) -> None:
        seconds = time.perf_counter() - self._waiting.pop(task)
        # A check that fails is as if it never ended.
        self._worst = max(self._worst, seconds if task.exception() is None else math.inf)


async def _main(address: str) -> None:
    # The harness may be busy, too; what is measured is the gateway.
    with contextlib.suppress(PermissionError):
        os.nice(-10)
    probe = Probe(address)
    # Kept in a name: the loop itself would let go of the task.
    checks = asyncio.create_task(probe.run())
    await asyncio.sleep(0.5)
    probe.worst()
    print("ready", flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        if checks.done():
            checks.result()
        print(f"{probe.worst():.6f}", flush=True)
    # Without waiting for running checks: the gateway may have exited.
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1]))
