"""A client program that is wrong on purpose: `python -m tests.conformance.wrong_client FLAW`. The kit must notice each flaw."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from deltawire import CallError, Client, ModelChange
from tests.conformance.clients import python as protocol
from tests.conformance.clients.python import blocking
from tests.conformance.conformance_pb2 import Answer, ClientResult, Failure

if TYPE_CHECKING:
    from deltawire import Model
    from tests.conformance.conformance_pb2 import ClientCase

FLAWS = {
    "accepts-a-stream-without-completed": "interrupted/without-completed",
    "believes-the-status-of-a-proxy": "fault/status-replaced-by-a-proxy",
    "forgets-a-choice": "text/interleaved-choices",
    "does-not-resume": "resume/after-a-lost-connection",
    "does-not-send-the-key": "headers/access-key",
    "retries-what-had-begun": "retry/not-after-the-first-event",
    "keeps-removed-models": "watch/changes",
    "does-not-end-its-call": "cancel/after-started",
    "hangs": "text/one-choice",
    "ends": "text/one-choice",
    "prints": "text/one-choice",
}
"""Each flaw, and a case that shows it."""


def main() -> None:
    """Make the call of each case, wrongly."""
    flaw = sys.argv[1]
    for case in protocol.cases():
        if flaw == "hangs":
            time.sleep(3600)
        if flaw == "ends":
            sys.exit("out of order")
        if flaw == "prints":
            print("connecting to the server", flush=True)
        protocol.report(case.name, _run(flaw, case))


def _run(flaw: str, case: ClientCase) -> ClientResult:
    if flaw == "does-not-resume":
        case.stream.request.options.ClearField("retention")
    if flaw == "does-not-send-the-key":
        case.access_key = ""
    if case.HasField("watch"):
        return _watch(flaw, case)
    if flaw == "does-not-end-its-call":
        client = Client(case.target)
        stream = client.chat.stream(case.stream.request.chat)
        next(stream)
        # The call is left open, and the client with it.
        _OPEN.append((client, stream))
        return ClientResult(failure=Failure(code=1, partial=Answer(completion_id="c", model="m")))
    try:
        with Client(case.target, token=case.access_key or None) as client:
            result = blocking.stream(client, case)
    except CallError as error:
        return _failed(flaw, case, error)
    if flaw == "forgets-a-choice":
        del result.answer.choices[1:]
    return result


def _failed(flaw: str, case: ClientCase, error: CallError) -> ClientResult:
    result = protocol.failed(error)
    if flaw == "retries-what-had-begun":
        return _run("", case)
    if flaw == "accepts-a-stream-without-completed":
        return ClientResult(answer=result.failure.partial)
    if flaw == "believes-the-status-of-a-proxy":
        result.failure.code, result.failure.reason = 14, ""
    return result


_OPEN: list[object] = []


def _watch(flaw: str, case: ClientCase) -> ClientResult:
    models: dict[str, Model] = {}
    bookmarks = 0
    with Client(case.target) as client, client.models.watch() as watch:
        for event in watch:
            if isinstance(event, ModelChange):
                if event.change == "REMOVED" and flaw != "keeps-removed-models":
                    del models[event.model.id]
                    continue
                models[event.model.id] = event.model
            else:
                bookmarks += 1
                if bookmarks == case.watch.bookmarks:
                    break
    return protocol.watched(models.values())


if __name__ == "__main__":
    main()
