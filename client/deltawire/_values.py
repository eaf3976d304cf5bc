"""From the values that callers pass to those that the API's messages hold: words, numbers, seconds, mappings.

Every function also accepts the API's own value, which it returns unchanged, and None, which means not given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import timedelta
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar, cast

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message as ProtoMessage

from deltawire._fields import made
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
# A JSON object as a mapping, or as JSON text, which is sent verbatim.
JsonObject: TypeAlias = Mapping[str, Any] | str

# For how many seconds a stream that another program began is resumed automatically.
RESUME_FOR = 60.0

_SAME: Mapping[str, str] = MappingProxyType({})
_EFFORT = "REASONING_EFFORT_"
_MODES = {
    "auto": ToolChoice.MODE_AUTO,
    "required": ToolChoice.MODE_REQUIRED,
    "none": ToolChoice.MODE_NONE,
}
# What the single arguments for reasoning are called, by the fields of `Reasoning`.
_REASONING = MappingProxyType({"token_budget": "reasoning_token_budget", "include": "include_reasoning"})
_FORMATS = {
    "text": ResponseFormat(text=ResponseFormat.Text()),
    "json_object": ResponseFormat(json_object=ResponseFormat.JsonObject()),
}


def laid_over(
    argument: str, base: M | None, kind: type[M], given: Mapping[str, Any], names: Mapping[str, str] = _SAME
) -> M | None:
    """A copy of a message with some fields replaced; None if there is neither a base nor a value.

    Args:
        argument: The caller's name of the base.
        base: The message; it is not changed. None is an empty one.
        kind: The kind of message.
        given: Values by the names of their fields. They replace, lists too; None is the same as not given.
        names: The caller's names of fields, where they differ.

    Raises:
        TypeError: The base or a value is of another type.
        FieldValueError: A field cannot hold its value.
    """
    if base is not None and not isinstance(base, kind):
        message = f"{argument}: a {kind.DESCRIPTOR.name} is needed, not {type(base).__name__}"
        raise TypeError(message)
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return base
    over, result = made(kind, given, names), kind()
    if base is not None:
        result.CopyFrom(base)
        for name in given:
            # Lists would be appended to; what is given here replaces.
            result.ClearField(cast("Any", name))
    result.MergeFrom(over)
    return result


def duration(name: str, value: Seconds | None) -> Duration | None:
    """A length of time.

    Raises:
        ValueError: It is NaN, or out of the range of a Duration.
        TypeError: It is not a number.

    Either message begins with the name.
    """
    if value is None:
        return None
    length = Duration()
    try:
        length.FromTimedelta(value if isinstance(value, timedelta) else timedelta(seconds=value))
    except (ValueError, OverflowError) as error:
        message = f"{name} is not a length of time that can be sent: {value}"
        raise ValueError(message) from error
    except TypeError as error:
        message = f"{name}: a number of seconds or a timedelta is needed, not {type(value).__name__}"
        raise TypeError(message) from error
    return length


def json_text(name: str, value: JsonObject | None) -> str:
    """JSON text of an object; text is returned verbatim, and None is "".

    Raises:
        TypeError: It is neither, or contains a value that JSON cannot represent; the message begins with the name.
        ValueError: It contains itself; likewise.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, Mapping):
        message = f"{name}: a mapping or JSON text is needed, not {type(value).__name__}"
        raise TypeError(message)
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError as error:
        message = f"{name}: {error}"
        raise TypeError(message) from error
    except (ValueError, RecursionError) as error:
        message = f"{name}: {error}"
        raise ValueError(message) from error


def tool_choice(value: str | ToolChoice | None) -> ToolChoice | None:
    """A tool choice, from a word or a tool's name."""
    if value is None or isinstance(value, ToolChoice):
        return value
    if value in _MODES:
        return ToolChoice(mode=_MODES[value])
    return made(ToolChoice, {"tool_name": value}, {"tool_name": "tool_choice"})


def response_format(value: ResponseFormat | str | None) -> ResponseFormat | None:
    """A response format, from its name if it needs no more than that.

    Raises:
        ValueError: There is no such name.
        TypeError: It is neither.
    """
    if value is None or isinstance(value, ResponseFormat):
        return value
    if not isinstance(value, str):
        message = f"response_format: a ResponseFormat or text is needed, not {type(value).__name__}"
        raise TypeError(message)
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
    return made(Logprobs, {"top_k": value}, {"top_k": "logprobs"})


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
    return laid_over("reasoning", value, Reasoning, given, _REASONING)


def tool_call_policy(incremental: bool | None, validate_schema: bool | None) -> ToolCallPolicy | None:
    """How tool calls are streamed and validated."""
    streaming = None
    if incremental is not None:
        streaming = TOOL_CALL_STREAMING_INCREMENTAL if incremental else TOOL_CALL_STREAMING_ASSEMBLED
    policy = {"streaming": streaming, "validate_schema": validate_schema}
    return laid_over("tool_call_policy", None, ToolCallPolicy, policy)


# The words for how hard to think, by rising effort.
EFFORTS = tuple(name.removeprefix(_EFFORT).lower() for name in ReasoningEffort.keys()[1:])
