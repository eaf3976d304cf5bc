"""The blocking client: `python -m tests.conformance.clients.python.blocking`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltawire import Client, DeltawireError
from tests.conformance.clients.python import Watched, answered, cases, failed, opened, report, timeout

if TYPE_CHECKING:
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
    with opened(client, case) as events:
        if case.stream.HasField("cancel_after_events"):
            for count, _ in enumerate(events, 1):
                if count == case.stream.cancel_after_events:
                    events.cancel()
        return answered(events.final())


def _watch(client: Client, case: ClientCase) -> ClientResult:
    watched = Watched(case)
    with client.models.watch(case.watch.request.revision, timeout=timeout(case)) as watch:
        for event in watch:
            if watched.take(event):
                break
    return watched.result()


if __name__ == "__main__":
    main()
