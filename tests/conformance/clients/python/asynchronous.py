"""The asynchronous client: `python -m tests.conformance.clients.python.asynchronous`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from deltawire import AsyncClient, DeltawireError, WatchBookmark
from tests.conformance.clients.python import answered, arguments, cases, failed, report, timeout, watched

if TYPE_CHECKING:
    from deltawire import AsyncChatStream, Model
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
    async with _open(client, case) as stream:
        if case.stream.HasField("cancel_after_events"):
            count = 0
            async for _ in stream:
                count += 1
                if count == case.stream.cancel_after_events:
                    stream.cancel()
        return answered(await stream.final())


def _open(client: AsyncClient, case: ClientCase) -> AsyncChatStream:
    request = case.stream.request
    if request.HasField("chat"):
        return client.chat.stream(request.chat, timeout=timeout(case), **arguments(request.options))  # type: ignore[arg-type]
    after = request.resume.last_sequence if request.resume.HasField("last_sequence") else None
    return client.chat.resume(request.resume.completion_id, after, timeout=timeout(case))


async def _watch(client: AsyncClient, case: ClientCase) -> ClientResult:
    models: dict[str, Model] = {}
    bookmarks = case.watch.bookmarks
    async with client.models.watch(case.watch.request.revision, timeout=timeout(case)) as watch:
        async for event in watch:
            if isinstance(event, WatchBookmark):
                bookmarks -= 1
                if not bookmarks:
                    break
            elif event.change == "REMOVED":
                models.pop(event.model.id, None)
            else:
                models[event.model.id] = event.model
    return watched(models.values())


if __name__ == "__main__":
    main()
