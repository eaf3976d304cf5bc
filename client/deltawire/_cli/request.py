"""What a chat asks: options, files and standard input in, a ChatRequest out."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from google.protobuf.json_format import Parse, ParseError

from deltawire._cli.files import name_of, read_text, refuse_file
from deltawire._cli.status import UsageError
from deltawire._fields import FieldValueError
from deltawire._messages import (
    choice,
    grammar,
    image,
    is_image_url,
    json_schema,
    regex,
    structural_tag,
    system,
    tool_from_openai,
    user,
)
from deltawire._requests import CHAT_OPTIONS, STREAMING_OPTIONS, StreamingOptions, chat_request
from deltawire.v1.chat_completion_pb2 import ChatRequest

if TYPE_CHECKING:
    import argparse

    from deltawire.v1.chat_completion_pb2 import ResponseFormat
    from deltawire.v1.message_pb2 import ChatMessage, ContentPart
    from deltawire.v1.tool_pb2 import Tool

# What options are called that have another name than the client's argument: those that can be repeated stand for one each.
_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "allowed_tool": "allowed_tools",
        "reasoning_effort": "reasoning",
        "reasoning_budget": "reasoning_token_budget",
        "choices": "choice_count",
        "stop_token_id": "stop_token_ids",
        "bad_word": "bad_words",
        "template_kwargs": "chat_template_kwargs",
        "coalesce": "max_coalesce_delay",
        "heartbeat": "heartbeat_interval",
    }
)
# Those whose value is made from what was given.
_MADE = frozenset({"tool", "tool_calls", "logit_bias", "response_format"})

# What protobuf says of a number or a text where an object must be.
_NOT_ITERABLE = re.compile(r"'\w+' object is not iterable")
# What to write instead of a message in the form of OpenAI's API.
_SHAPE = '; instead of {"role": "user", "content": "hi"} write {"user": {"text": "hi"}}'


def request_of(options: argparse.Namespace) -> ChatRequest:
    """The request that file and options describe, without the prompt."""
    request = ChatRequest()
    if options.request is not None:
        text = read_text(options.request)
        # protobuf takes [] for an empty message, and iterates over what is not an object.
        if not text.lstrip().startswith("{"):
            message = f"{name_of(options.request)}: not a JSON object"
            raise UsageError(message)
        try:
            Parse(text, request)
        except (ParseError, RecursionError) as error:
            hint = _SHAPE if 'no field named "role"' in str(error) else ""
            problem = _NOT_ITERABLE.sub("it must be an object", str(error))
            message = f"{name_of(options.request)}: not a ChatRequest: {problem}{hint}"
            raise UsageError(message) from error
    try:
        over = chat_request([], **_given(options, CHAT_OPTIONS), **_made(options))
    except FieldValueError as error:
        message = f"{_option(error.field)}: {error.problem}"
        raise UsageError(message) from error
    request.MergeFrom(over)
    if options.system is not None:
        request.messages.insert(0, system(options.system))
    return request


def streaming_of(options: argparse.Namespace) -> StreamingOptions:
    """The options of the stream."""
    return cast("StreamingOptions", _given(options, STREAMING_OPTIONS))


def turn_of(options: argparse.Namespace) -> ChatMessage | None:
    """What to say, with the images beside it; None if a request file says it, or if it is to be asked for."""
    prompt, images = prompt_of(options), images_of(options)
    if prompt is not None:
        return user([prompt, *images])
    return user(images) if images and options.request is not None else None


def images_of(options: argparse.Namespace) -> list[ContentPart]:
    """The images that were named."""
    return [_image(source) for source in options.image]


def _image(source: str) -> ContentPart:
    """An image from a file or at a URL."""
    if not source:
        message = "--image is empty: give a file or a URL"
        raise UsageError(message)
    try:
        return image(source if is_image_url(source) else Path(source))
    except OSError as error:
        refuse_file(source, error)


def _given(options: argparse.Namespace, names: frozenset[str]) -> dict[str, Any]:
    """Those options that are arguments of these names, by these names."""
    named = {_NAMES.get(name, name): value for name, value in vars(options).items() if name not in _MADE}
    return {name: value for name, value in named.items() if name in names}


def _option(argument: str) -> str:
    """The option that gives an argument of the client."""
    name = next((option for option, stands_for in _NAMES.items() if stands_for == argument), argument)
    return f"--{name.replace('_', '-')}"


def _made(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments whose value is made from what was given."""
    return {
        "tools": [each for path in options.tool for each in _tools(path)],
        "incremental_tool_calls": None if options.tool_calls is None else options.tool_calls == "incremental",
        "logit_bias": None if options.logit_bias is None else dict(options.logit_bias),
        "response_format": _response_format(options),
    }


def _response_format(options: argparse.Namespace) -> ResponseFormat | str | None:
    """The one form of the answer that was asked for, if any."""
    if options.json_schema is not None:
        return json_schema(read_text(options.json_schema))
    if options.grammar is not None:
        return grammar(read_text(options.grammar))
    if options.structural_tag is not None:
        return structural_tag(read_text(options.structural_tag))
    if options.regex is not None:
        return regex(options.regex)
    if options.choice is not None:
        return choice(options.choice)
    form: str | None = options.response_format
    return form


def prompt_of(options: argparse.Namespace) -> str | None:
    """What to say; None if a request file says it, or if it is to be asked for."""
    if options.prompt == "-" or (options.prompt is None and options.request is None and not sys.stdin.isatty()):
        text = read_text("-")
        if not text.strip():
            message = "there is no prompt: standard input is empty"
            raise UsageError(message)
        return text
    prompt: str | None = options.prompt
    return prompt


def _tools(path: str) -> Iterator[Tool]:
    """The tools in a file: one OpenAI tool object, a list of them, or an object whose "tools" is such a list."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        message = f"{name_of(path)}: not JSON: {error}"
        raise UsageError(message) from error
    if isinstance(value, Mapping) and isinstance(value.get("tools"), list):
        value = value["tools"]
    for index, each in enumerate(value if isinstance(value, list) else [value]):
        where = f"{name_of(path)}: tool {index + 1}" if isinstance(value, list) else name_of(path)
        if not isinstance(each, Mapping):
            message = f"{where}: not a JSON object"
            raise UsageError(message)
        try:
            yield tool_from_openai(each)
        except (ValueError, RecursionError) as error:
            message = f"{where}: {error}"
            raise UsageError(message) from error
