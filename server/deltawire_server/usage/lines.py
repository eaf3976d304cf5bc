"""The form of a usage record: two lines of JSON for each completion."""

from __future__ import annotations

from datetime import datetime  # noqa: TC003 -- msgspec evaluates the annotations.
from typing import Literal

import msgspec


class Line(msgspec.Struct, frozen=True, gc=False, kw_only=True, omit_defaults=True):
    """One line. The line of an end repeats the line of the beginning, so that it can be used alone.

    Attributes:
        event: "begun": the request is about to be sent to the engine. "ended": the completion has ended.
        time: The time of the event, in UTC.
        run: Identifies the completion among all: the process, as at the end of generated ids, and a number in it.
        completion_id: The id, which a caller may use again.
        request_id: The request id of the call.
        caller: The caller's name in the access list, or in its certificate; empty if callers are not identified.
        model: The model's id in the registry.
        alias: The name in the request, if it is not the id.
        provider: The provider's id.
        seconds: The duration of the completion.
        prompt_tokens: Absent if the engine did not report it.
        completion_tokens: Generated tokens, over all choices.
        cached_prompt_tokens: Absent if the engine did not report it.
        reasoning_tokens: Absent if the engine did not report it.
        provenance: The name of the usage's `Provenance`.
        stop_reasons: The name of the `StopReason` of each choice, by ascending index.
        error: Why it failed: the name of a `Reason`, or "canceled"; empty if it did not fail.
    """

    event: Literal["begun", "ended"]
    time: datetime
    run: str
    completion_id: str
    request_id: str = ""
    caller: str = ""
    model: str = ""
    alias: str = ""
    provider: str = ""
    seconds: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_prompt_tokens: int | None = None
    reasoning_tokens: int | None = None
    provenance: str = ""
    stop_reasons: tuple[str, ...] = ()
    error: str = ""
