"""The blocking client: `python -m tests.conformance.clients.python.blocking`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltawire import Client, DeltawireError, WatchBookmark
from tests.conformance.clients.python import answered, arguments, cases, failed, report, timeout, watched

if TYPE_CHECKING:
    from deltawire import ChatStream, Model
    from tests.conformance.conformance_pb2 import ClientCase, ClientResult


def main() -> None:
    """Make the call of each case."""
    for case in cases():
        with Client(case.target, token=case.access_key or None) as client:
            try:
                result = stream(client, case) if case.HasField("stream") else _watch(client, case)
            except DeltawireError as error:
                result = failed(error)
        report(case.name, result)


def stream(client: Client, case: ClientCase) -> ClientResult:
    """Stream a completion to its end, or to its cancel."""
    with _open(client, case) as events:
        if case.stream.HasField("cancel_after_events"):
            for count, _ in enumerate(events, 1):
                if count == case.stream.cancel_after_events:
                    events.cancel()
        return answered(events.final())


def _open(client: Client, case: ClientCase) -> ChatStream:
    request = case.stream.request
    if request.HasField("chat"):
        return client.chat.stream(request.chat, timeout=timeout(case), **arguments(request.options))  # type: ignore[arg-type]
    after = request.resume.last_sequence if request.resume.HasField("last_sequence") else None
    return client.chat.resume(request.resume.completion_id, after, timeout=timeout(case))


def _watch(client: Client, case: ClientCase) -> ClientResult:
    models: dict[str, Model] = {}
    bookmarks = case.watch.bookmarks
    with client.models.watch(case.watch.request.revision, timeout=timeout(case)) as watch:
        for event in watch:
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
