"""What a chat asks: options, files and standard input in, a ChatRequest out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from google.protobuf.json_format import Parse, ParseError

from deltawire._cli.files import name_of, read_text
from deltawire._cli.status import UsageError
from deltawire._messages import system, tool_from_openai
from deltawire._requests import SamplingOptions, chat_request
from deltawire.v1.chat_completion_pb2 import ChatRequest

if TYPE_CHECKING:
    import argparse

    from deltawire.v1.tool_pb2 import Tool


def request_of(options: argparse.Namespace) -> ChatRequest:
    """The request that file and options describe, without the prompt."""
    request = ChatRequest()
    if options.request is not None:
        text = read_text(options.request)
        try:
            Parse(text, request)
        except (ParseError, RecursionError) as error:
            message = f"{name_of(options.request)}: not a ChatRequest: {error}"
            raise UsageError(message) from error
    # Each of these has the name of its option.
    sampling = {name: value for name, value in vars(options).items() if name in SamplingOptions.__annotations__}
    try:
        over = chat_request(
            [],
            model=options.model,
            tools=[each for path in options.tool for each in _tools(path)],
            tool_choice=options.tool_choice,
            **sampling,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    request.MergeFrom(over)
    if options.system is not None:
        request.messages.insert(0, system(options.system))
    return request


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
    """The tools in a file of OpenAI tool objects."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        message = f"{name_of(path)}: not JSON: {error}"
        raise UsageError(message) from error
    for index, each in enumerate(value if isinstance(value, list) else [value]):
        where = f"{name_of(path)}: tool {index + 1}" if isinstance(value, list) else name_of(path)
        if not isinstance(each, Mapping):
            message = f"{where}: not an object"
            raise UsageError(message)
        try:
            yield tool_from_openai(each)
        except (ValueError, RecursionError) as error:
            message = f"{where}: {error}"
            raise UsageError(message) from error
