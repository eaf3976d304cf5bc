"""From the values that callers give to those that the API's messages hold: words, numbers, seconds, mappings.

Every function takes what is easy to write, passes on what is the API's own already, and makes None of None: not given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, TypeAlias, TypeVar, cast

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message as ProtoMessage

from deltawire.v1.chat_completion_pb2 import (
    TOOL_CALL_STREAMING_ASSEMBLED,
    TOOL_CALL_STREAMING_INCREMENTAL,
    Logprobs,
    Reasoning,
    ReasoningEffort,
    ResponseFormat,
    ToolCallPolicy,
)
from deltawire.v1.tool_pb2 import ToolChoice

M = TypeVar("M", bound=ProtoMessage)

# A length of time: seconds, or Python's own.
Seconds: TypeAlias = float | timedelta
# A JSON object as a mapping, or as JSON text, which is passed on to the letter.
JsonObject: TypeAlias = Mapping[str, Any] | str

# Seconds to go on for by itself with a stream that somebody else began.
RESUME_FOR = 60.0

_EFFORT = "REASONING_EFFORT_"
_MODES = {
    "auto": ToolChoice.MODE_AUTO,
    "required": ToolChoice.MODE_REQUIRED,
    "none": ToolChoice.MODE_NONE,
}
_FORMATS = {
    "text": ResponseFormat(text=ResponseFormat.Text()),
    "json_object": ResponseFormat(json_object=ResponseFormat.JsonObject()),
}


def laid_over(base: M | None, kind: type[M], given: Mapping[str, Any]) -> M | None:
    """A message with single fields laid over it.

    Args:
        base: What they are laid over; it is not changed. None is an empty one.
        kind: The kind of message.
        given: Values by the names of their fields. They replace, lists too.

    None comes back if there is neither a base nor a value.
    """
    if not given:
        return base
    made = kind()
    if base is not None:
        made.CopyFrom(base)
        for name in given:
            # Lists would be appended to; what is given here replaces.
            made.ClearField(cast("Any", name))
    made.MergeFrom(kind(**given))
    return made


def duration(name: str, value: Seconds | None) -> Duration | None:
    """A length of time.

    Raises:
        ValueError: It is no number, or too long to be said; the message begins with the name.
    """
    if value is None:
        return None
    made = Duration()
    try:
        made.FromTimedelta(value if isinstance(value, timedelta) else timedelta(seconds=value))
    except (ValueError, OverflowError) as error:
        message = f"{name} is no length of time that can be sent: {value}"
        raise ValueError(message) from error
    return made


def json_text(value: JsonObject | None) -> str:
    """JSON text of an object; text is kept to the letter, and None is ""."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def tool_choice(value: str | ToolChoice | None) -> ToolChoice | None:
    """A tool choice, from a word or a tool's name."""
    if value is None or isinstance(value, ToolChoice):
        return value
    mode = _MODES.get(value)
    return ToolChoice(tool_name=value) if mode is None else ToolChoice(mode=mode)


def response_format(value: ResponseFormat | str | None) -> ResponseFormat | None:
    """A response format, from its name if it needs no more than that.

    Raises:
        ValueError: There is no such name.
    """
    if value is None or isinstance(value, ResponseFormat):
        return value
    if value not in _FORMATS:
        message = f"response_format {value!r} is neither a ResponseFormat nor one of {', '.join(_FORMATS)}"
        raise ValueError(message)
    return _FORMATS[value]


def logprobs(value: bool | int | Logprobs | None) -> Logprobs | None:
    """What to ask for, from yes, no or a number of alternatives."""
    if value is None or isinstance(value, Logprobs):
        return value
    if isinstance(value, bool):
        return Logprobs() if value else None
    return Logprobs(top_k=value)


def reasoning(value: Reasoning | str | None, token_budget: int | None, include: bool | None) -> Reasoning | None:
    """How much to think, from a word for the effort, with the rest laid over it.

    Raises:
        ValueError: There is no such word.
    """
    if isinstance(value, str):
        if value not in EFFORTS:
            message = f"reasoning {value!r} is neither a Reasoning nor one of {', '.join(EFFORTS)}"
            raise ValueError(message)
        value = Reasoning(effort=ReasoningEffort.Value(_EFFORT + value.upper()))
    given = {"token_budget": token_budget, "include": include}
    return laid_over(value, Reasoning, {name: each for name, each in given.items() if each is not None})


def tool_call_policy(incremental: bool | None, validate_schema: bool | None) -> ToolCallPolicy | None:
    """How tool calls are told and judged."""
    policy: dict[str, Any] = {}
    if incremental is not None:
        policy["streaming"] = TOOL_CALL_STREAMING_INCREMENTAL if incremental else TOOL_CALL_STREAMING_ASSEMBLED
    if validate_schema is not None:
        policy["validate_schema"] = validate_schema
    return laid_over(None, ToolCallPolicy, policy)


# The words for how hard to think, by rising effort.
EFFORTS = tuple(name.removeprefix(_EFFORT).lower() for name in ReasoningEffort.keys()[1:])
