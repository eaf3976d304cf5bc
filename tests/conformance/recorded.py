"""The generated cases: what a gateway really sends for the recordings of a real vLLM, and a failure with each reason.

    python -m tests.conformance.recorded            writes cases/recordings.jsonl and cases/reasons.jsonl; read the diff
    python -m tests.conformance.recorded --check    says which cases would change in more than how deltas are merged

One case a line. Times are left out, and the id of each completion is its case's.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from google.protobuf import json_format

from deltawire import tool_from_openai
from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire_server.errors import Code, Reason
from deltawire_server.fake_vllm import FakeVllm, Script
from tests.conformance.case_pb2 import Case, ServerCall, Step
from tests.conformance.cases import FOLDER
from tests.conformance.conformance_pb2 import Answer, ClientCase, ClientResult, Failure
from tests.conformance.fold import fold
from tests.support import recordings
from tests.support.gateway import ask, read, running, settings_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.support.gateway import Failure as Failed
    from tests.support.gateway import Running
    from tests.support.recordings import Recording

RECORDINGS = FOLDER / "recordings.jsonl"
REASONS = FOLDER / "reasons.jsonl"

_ATTEMPTS = 4
_DELAY_MS = 20
# These are about the caller's own retries of one completion; the groups "retry" and "resume" have them.
_ELSEWHERE = frozenset({Reason.WRONG_REPLICA})


def request_of(recording: Recording) -> chat_pb.StreamChatCompletionRequest:
    """What a caller asks of the gateway to get a recording."""
    asked = recording.request
    chat = ask(completion_id=recording.name)
    if tools := asked.get("tools"):
        chat.tools.extend(map(tool_from_openai, tools))
        chat.tool_call_policy.streaming = chat_pb.TOOL_CALL_STREAMING_INCREMENTAL
    if asked.get("n"):
        chat.choice_count = asked["n"]
    if asked.get("logprobs"):
        chat.logprobs.top_k = asked.get("top_logprobs") or 0
    chat.sampling.stop.extend(recording.asked["stop"])
    options = chat_pb.StreamOptions(usage_updates=True)
    options.max_coalesce_delay.SetInParent()
    return chat_pb.StreamChatCompletionRequest(chat=chat, options=options)


async def record(recording: Recording, vllm: FakeVllm, gateway: Running) -> Case:
    """A case that plays what the gateway sends for a recording."""
    vllm.play(Script.recording(recordings.TRANSCRIPTS / f"{recording.name}.sse"))
    request = request_of(recording)
    events, failed = await read(gateway.stream(request.chat, options=request.options))
    for event in events:
        if event.HasField("started"):
            event.started.ClearField("create_time")
        elif event.HasField("completed"):
            event.completed.ClearField("timings")
    steps = [Step(event=event) for event in events]
    if failed is not None:
        steps.append(Step(status=_status(failed)))
    return Case(
        name=f"recordings/{recording.name}",
        promise="The client has the answer that the gateway gives for this recording of vLLM.",
        call=ClientCase(stream=ClientCase.Stream(request=request)),
        calls=[ServerCall(request=True, steps=steps)],
        expected=[_expected(fold(events), failed)],
    )


def _status(failed: Failed) -> Step.Status:
    status = Step.Status(code=failed.code.value[0], message=failed.message, reason=failed.reason, fields=failed.fields)
    if failed.retry_seconds is not None:
        status.retry_delay.FromMilliseconds(round(failed.retry_seconds * 1000))
    return status


def _expected(answer: Answer, failed: Failed | None) -> ClientResult:
    if failed is None:
        return ClientResult(answer=answer)
    failure = Failure(code=failed.code.value[0], reason=failed.reason, fields=failed.fields, partial=answer)
    if failed.retry_seconds is not None:
        failure.retry_delay.FromMilliseconds(round(failed.retry_seconds * 1000))
    return ClientResult(failure=failure)


async def record_all() -> list[Case]:
    """The cases of all recordings, without those of which a caller would retry the call for seconds."""
    with tempfile.TemporaryDirectory() as folder:
        async with FakeVllm() as vllm, running(settings_of(vllm.base_url, Path(folder))) as gateway:
            made = [await record(recordings.load(name), vllm, gateway) for name in recordings.names()]
    return [case for case in made if case.expected[0].failure.code != Code.UNAVAILABLE]


def refusals() -> list[Case]:
    """A case for each reason."""
    return [_refusal(reason) for reason in Reason if reason not in _ELSEWHERE]


def _refusal(reason: Reason) -> Case:
    """A case in which a call is refused with a reason; with UNAVAILABLE, each of its attempts."""
    status = Step.Status(code=reason.code.value, message=f"refused: {reason.name}", reason=reason.name)
    failure = Failure(code=reason.code.value, reason=reason.name)
    attempts = 1
    if reason.code is Code.UNAVAILABLE:
        attempts = _ATTEMPTS
        status.retry_delay.FromMilliseconds(_DELAY_MS)
        failure.retry_delay.FromMilliseconds(_DELAY_MS)
    return Case(
        name=f"reasons/{reason.name}",
        promise="A failure before the first event is reported with its code and its reason.",
        calls=[ServerCall(request=True, steps=[Step(status=status)])] * attempts,
        expected=[ClientResult(failure=failure)],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the cases, or check those that are written. Returns 1 if a check found a difference, else 0."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance.recorded", description="The generated cases")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a case would change")
    check: bool = parser.parse_args(arguments).check
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    made = asyncio.run(record_all())
    if not check:
        _write(RECORDINGS, made)
        _write(REASONS, refusals())
        return 0
    changed = [*stale(RECORDINGS, made), *stale(REASONS, refusals())]
    for name in changed:
        print(f"stale: {name}")
    return 1 if changed else 0


def _write(path: Path, cases: Sequence[Case]) -> None:
    lines = [json_format.MessageToJson(case, indent=None, ensure_ascii=False) for case in cases]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def stale(path: Path, cases: Sequence[Case]) -> list[str]:
    """The names of the cases of which another result is expected than is written, or which only one side has."""
    written = {case.name: case for case in (json_format.Parse(line, Case()) for line in path.read_text().splitlines())}
    made = {case.name: case for case in cases}
    return sorted(
        name
        for name in written.keys() | made.keys()
        if name not in written or name not in made or list(written[name].expected) != list(made[name].expected)
    )


if __name__ == "__main__":
    sys.exit(main())
