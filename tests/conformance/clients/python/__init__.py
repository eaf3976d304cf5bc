"""The Python client's two programs, and what they share: the framing, and results in the form of the protocol."""

from __future__ import annotations

import struct
import sys
from typing import TYPE_CHECKING

from deltawire import CallError, StreamInterrupted
from deltawire.v1.chat_completion_pb2 import Completed
from tests.conformance.conformance_pb2 import Answer, ClientCase, ClientResult, Failure

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import deltawire
    from deltawire import Choice, DeltawireError, Model
    from deltawire.v1.chat_completion_pb2 import StreamOptions

_UNKNOWN = 2


def cases() -> Iterator[ClientCase]:
    """The cases on standard input."""
    while header := sys.stdin.buffer.read(4):
        yield ClientCase.FromString(sys.stdin.buffer.read(struct.unpack(">I", header)[0]))


def report(name: str, result: ClientResult) -> None:
    """Write a result."""
    result.name = name
    data = result.SerializeToString()
    sys.stdout.buffer.write(struct.pack(">I", len(data)) + data)
    sys.stdout.buffer.flush()


def arguments(options: StreamOptions) -> dict[str, object]:
    """The options of a request as the client's arguments."""
    given: dict[str, object] = {}
    for field, value in options.ListFields():
        given[field.name] = value if isinstance(value, bool) else value.ToTimedelta()
    return given


def timeout(case: ClientCase) -> float | None:
    """The deadline of a case in seconds."""
    return case.timeout.ToTimedelta().total_seconds() if case.HasField("timeout") else None


def answered(answer: deltawire.Answer) -> ClientResult:
    """The result of a stream that ended well."""
    return ClientResult(answer=_answer(answer))


def failed(error: DeltawireError) -> ClientResult:
    """The result of a call that failed."""
    if not isinstance(error, CallError):
        return ClientResult(failure=Failure(code=_UNKNOWN))
    failure = Failure(
        code=error.code.value[0],
        reason=error.reason,
        interrupted=isinstance(error, StreamInterrupted),
        fields=[each.field for each in error.violations],
    )
    if error.retry_after is not None:
        failure.retry_delay.FromNanoseconds(round(error.retry_after * 1e9))
    if error.answer is not None:
        failure.partial.CopyFrom(_answer(error.answer))
    return ClientResult(failure=failure)


def watched(models: Iterable[Model]) -> ClientResult:
    """The result of a watch."""
    return ClientResult(models=sorted(models, key=lambda model: model.id))


def _answer(answer: deltawire.Answer) -> Answer:
    return Answer(
        completion_id=answer.completion_id,
        model=answer.model,
        choices=map(_choice, answer.choices),
        usage=answer.usage,
        notices=answer.notices,
    )


def _choice(choice: Choice) -> Completed.Choice:
    made = Completed.Choice(
        index=choice.index,
        message=choice.message.assistant,
        failed_tool_calls=choice.failed_tool_calls,
        stop_reason=choice.stop_reason,
        tool_calls_executable=choice.tool_calls_executable,
        engine_finish_reason=choice.engine_finish_reason,
        logprobs=choice.logprobs,
    )
    if choice.matched_stop is not None:
        made.matched_stop = choice.matched_stop
    if choice.matched_token_id is not None:
        made.matched_token_id = choice.matched_token_id
    return made
