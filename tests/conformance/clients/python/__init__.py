"""The Python client's two programs, and what they share: the framing, and results in the form of the protocol."""

from __future__ import annotations

import struct
import sys
from typing import TYPE_CHECKING, Any, overload

from deltawire import CallError, StreamInterrupted, WatchBookmark
from deltawire.v1.chat_completion_pb2 import Completed
from tests.conformance.conformance_pb2 import Answer, ClientCase, ClientResult, Failure

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import deltawire
    from deltawire import AsyncChatStream, AsyncClient, ChatStream, Choice, Client, DeltawireError, Model, ModelChange

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


@overload
def opened(client: Client, case: ClientCase) -> ChatStream: ...
@overload
def opened(client: AsyncClient, case: ClientCase) -> AsyncChatStream: ...
def opened(client: Client | AsyncClient, case: ClientCase) -> ChatStream | AsyncChatStream:
    """The stream that a case asks for."""
    request = case.stream.request
    if request.HasField("chat"):
        options: dict[str, Any] = {
            field.name: value if isinstance(value, bool) else value.ToTimedelta()
            for field, value in request.options.ListFields()
        }
        return client.chat.stream(request.chat, timeout=timeout(case), **options)
    after = request.resume.last_sequence if request.resume.HasField("last_sequence") else None
    return client.chat.resume(request.resume.completion_id, after, timeout=timeout(case))


class Watched:
    """What a watch has brought."""

    def __init__(self, case: ClientCase) -> None:
        self._bookmarks = case.watch.bookmarks
        self._models: dict[str, Model] = {}

    def take(self, event: ModelChange | WatchBookmark) -> bool:
        """Take an event. Whether the case asks for no more."""
        if isinstance(event, WatchBookmark):
            self._bookmarks -= 1
        elif event.change == "REMOVED":
            self._models.pop(event.model.id, None)
        else:
            self._models[event.model.id] = event.model
        return self._bookmarks == 0

    def result(self) -> ClientResult:
        """The result of the watch."""
        return watched(self._models.values())


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
