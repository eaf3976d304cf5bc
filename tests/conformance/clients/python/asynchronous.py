"""The asynchronous client: `python -m tests.conformance.clients.python.asynchronous`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from deltawire import AsyncClient, DeltawireError
from tests.conformance.clients.python import Watched, answered, cases, failed, opened, report, timeout

if TYPE_CHECKING:
    from tests.conformance.conformance_pb2 import ClientCase, ClientResult


def main() -> None:
    """Make the call of each case."""
    with asyncio.Runner() as runner:
        for case in cases():
            report(case.name, runner.run(_run(case)))


async def _run(case: ClientCase) -> ClientResult:
    async with AsyncClient(case.target, token=case.access_key or None) as client:
        try:
            return await (_stream(client, case) if case.HasField("stream") else _watch(client, case))
        except DeltawireError as error:
            return failed(error)


async def _stream(client: AsyncClient, case: ClientCase) -> ClientResult:
    async with opened(client, case) as stream:
        if case.stream.HasField("cancel_after_events"):
            count = 0
            async for _ in stream:
                count += 1
                if count == case.stream.cancel_after_events:
                    stream.cancel()
        return answered(await stream.final())


async def _watch(client: AsyncClient, case: ClientCase) -> ClientResult:
    watched = Watched(case)
    async with client.models.watch(case.watch.request.revision, timeout=timeout(case)) as watch:
        async for event in watch:
            if watched.take(event):
                break
    return watched.result()


if __name__ == "__main__":
    main()
