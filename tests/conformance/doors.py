"""The doors of a server: its own gRPC by `buf curl`, and, through the shipped Envoy, gRPC-Web by `buf curl` and JSON by curl.

    python -m tests.conformance.doors DOOR        a client program, as those in clients/

These tools make one call and print what comes, so a door is checked by cases of one call: what a client does by itself is none of
theirs. Their answers are folded here.
"""

from __future__ import annotations

import base64
import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from google.protobuf import any_pb2, json_format
from google.rpc import error_details_pb2, status_pb2

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1.error_reason_pb2 import ErrorReason
from tests.conformance.cases import group
from tests.conformance.clients.python import cases, report
from tests.conformance.conformance_pb2 import ClientResult, Failure
from tests.conformance.fold import fold
from tests.polyglot.programs import tool
from tests.polyglot.proxy import ORIGIN, envoy, web_configuration
from tests.polyglot.stubs import DESCRIPTORS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

    from tests.conformance.case_pb2 import Case
    from tests.conformance.conformance_pb2 import ClientCase

GRPC: Final = "buf"
WEB: Final = "grpc-web"
JSON: Final = "json"
DOORS: Final = (GRPC, WEB, JSON)

_METHOD: Final = "deltawire.v1.ChatCompletion/StreamChatCompletion"
_GROUPS: Final = frozenset({"fault", "interrupted", "reasons", "recordings", "refused", "text", "tools", "unknown"})
_LIMIT: Final = 20.0
_UNAVAILABLE: Final = 14
_UNKNOWN: Final = 2


def command(door: str) -> list[str]:
    """The command of a door's client program."""
    return [sys.executable, "-m", "tests.conformance.doors", door]


def fits(case: Case, door: str) -> bool:
    """Whether a door can be checked by a case.

    That is one call, which Envoy would not retry, and whose reason is in its details. HTTP/1.1, and so the JSON door, also
    loses a status after the first event.
    """
    if group(case.name) not in _GROUPS or len(case.calls) != 1:
        return False
    failures = [result.failure for result in case.expected]
    trailer = any(step.status.without_details for step in case.calls[0].steps)
    lost = door == JSON and any(failure.interrupted and failure.code for failure in failures)
    return not (trailer or lost or any(failure.code == _UNAVAILABLE for failure in failures))


@contextlib.asynccontextmanager
async def opened(door: str, target: str) -> AsyncIterator[str]:
    """The address at which a door of the server at `target` is; an Envoy runs meanwhile if it needs one."""
    if door == GRPC:
        yield target
        return
    with tempfile.TemporaryDirectory() as folder:
        async with envoy(Path(folder), target, web=web_configuration(ORIGIN)) as proxy:
            yield proxy.web


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the call of each case through a door."""
    (door,) = sys.argv[1:] if arguments is None else arguments
    call = _with_curl if door == JSON else _with_buf
    with tempfile.TemporaryDirectory() as folder:
        for case in cases():
            report(case.name, call(case, door, Path(folder)))


def _run(program: str, *flags: str, case: ClientCase, folder: Path) -> subprocess.CompletedProcess[str]:
    file = folder / "request.json"
    file.write_text(json_format.MessageToJson(case.stream.request), encoding="utf-8")
    return subprocess.run(
        [tool(program), *flags, "--data", f"@{file}", f"http://{case.target}/{_METHOD}"],
        env={"HOME": str(folder), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=_LIMIT,
        check=False,
    )


def _with_buf(case: ClientCase, door: str, folder: Path) -> ClientResult:
    protocol = ("--protocol", "grpcweb") if door == WEB else ("--protocol", "grpc", "--http2-prior-knowledge")
    done = _run("buf", "curl", "--schema", str(DESCRIPTORS), *protocol, case=case, folder=folder)
    events = _events(_objects(done.stdout))
    if not done.returncode:
        return _result(events, None)
    # buf ends with eight times the code.
    status = status_pb2.Status(code=done.returncode // 8)
    with contextlib.suppress(json.JSONDecodeError):
        for detail in json.loads(done.stderr).get("details", ()):
            value = base64.b64decode(detail["value"] + "==")
            status.details.append(any_pb2.Any(type_url=f"type.googleapis.com/{detail['type']}", value=value))
    return _result(events, status)


def _with_curl(case: ClientCase, door: str, folder: Path) -> ClientResult:
    assert door == JSON
    kind = ("--header", "content-type: application/json")
    done = _run("curl", "--silent", "--write-out", "\n%{http_code}", *kind, case=case, folder=folder)
    body, _, code = done.stdout.rpartition("\n")
    if code != "200":
        return _result([], json_format.Parse(body, status_pb2.Status()))
    blocks = body.split("\n\n")[:-1]
    return _result(_events(json.loads(block.removeprefix("data: ")) for block in blocks), None)


def _objects(text: str) -> list[dict[str, Any]]:
    """JSON objects, one after another; what was cut off at the end is left out."""
    decoder, objects = json.JSONDecoder(), []
    text = text.strip()
    with contextlib.suppress(json.JSONDecodeError):
        while text:
            value, end = decoder.raw_decode(text)
            objects.append(value)
            text = text[end:].lstrip()
    return objects


def _events(given: Iterable[dict[str, Any]]) -> list[chat_pb.StreamChatCompletionResponse]:
    return [json_format.ParseDict(each, chat_pb.StreamChatCompletionResponse()) for each in given]


def _result(events: list[chat_pb.StreamChatCompletionResponse], status: status_pb2.Status | None) -> ClientResult:
    """What a caller at the door knows: `completed` decides, then the status."""
    answer = fold(events)
    completed = events[-1].completed if events and events[-1].HasField("completed") else None
    if completed is not None and not completed.HasField("error"):
        return ClientResult(answer=answer)
    if completed is not None:
        reason = ErrorReason.Name(completed.error.reason).removeprefix("ERROR_REASON_")
        return ClientResult(failure=Failure(code=completed.error.code, reason=reason, partial=answer))
    failure = Failure(code=_UNKNOWN, interrupted=status is None or bool(events), partial=answer)
    if status is not None:
        failure.code = status.code
        _add_details(failure, status)
    return ClientResult(failure=failure)


def _add_details(failure: Failure, status: status_pb2.Status) -> None:
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    for detail in status.details:
        if detail.Unpack(info):
            failure.reason = info.reason
        elif detail.Unpack(bad):
            failure.fields.extend(violation.field for violation in bad.field_violations)
        elif detail.Unpack(retry):
            failure.retry_delay.CopyFrom(retry.retry_delay)


if __name__ == "__main__":
    main()
