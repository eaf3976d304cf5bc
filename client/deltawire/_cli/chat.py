"""`deltawire chat`: one answer, or a conversation; and how many tokens it would be asked with."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

from deltawire._cli.answer import call_line
from deltawire._cli.connection import call_options, connect, first_call
from deltawire._cli.follow import follow
from deltawire._cli.output import print_error, print_json, say
from deltawire._cli.request import images_of, request_of, streaming_of, turn_of
from deltawire._cli.status import OK, UsageError
from deltawire._cli.terminal import one_line
from deltawire._errors import DeltawireError
from deltawire._messages import tool, user

if TYPE_CHECKING:
    import argparse

    from deltawire._answer import Answer
    from deltawire._client import Client
    from deltawire.v1.chat_completion_pb2 import ChatRequest


def run_chat(client: Client, options: argparse.Namespace) -> int:
    """One answer, or a conversation if there is no prompt and standard input is a terminal."""
    request, talk = _asked(options)
    if talk and request.completion_id:
        message = "a conversation has many completions: leave out --completion-id, or give a prompt"
        raise UsageError(message)
    connect(client, options)
    if talk:
        _converse(client, request, options)
    else:
        _answer(client, request, options)
    return OK


def count_tokens(client: Client, options: argparse.Namespace) -> int:
    """How many tokens the prompt has, and nothing else on standard output."""
    request, talk = _asked(options)
    if talk:
        message = "there is no prompt"
        raise UsageError(message)
    counted = client.chat.count_tokens(request, **first_call(client, options))
    if options.json:
        print_json(counted)
        return OK
    print(counted.prompt_tokens)
    if counted.HasField("max_context_tokens"):
        say(f"note: {counted.model} takes {counted.max_context_tokens}, with the answer")
    return OK


def _asked(options: argparse.Namespace) -> tuple[ChatRequest, bool]:
    """The request, and whether what to say has still to be asked for."""
    if options.prompt == "-" and options.request == "-":
        message = "standard input cannot be both the prompt and the request"
        raise UsageError(message)
    request = request_of(options)
    turn = turn_of(options)
    if turn is not None:
        request.messages.append(turn)
    return request, turn is None and options.request is None


def _answer(client: Client, request: ChatRequest, options: argparse.Namespace) -> Answer:
    """Ask, and print the answer while it comes."""
    return follow(client.chat.stream(request, **streaming_of(options), **call_options(options)), options)


def _converse(client: Client, request: ChatRequest, options: argparse.Namespace) -> None:
    """Ask for one prompt after the other. Ctrl-C ends an answer and keeps what came; at the prompt, everything."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 -- gives input() editing and history
    say(f"{request.model or 'the only chat model'}; Ctrl-C stops an answer, Ctrl-D ends")
    images = images_of(options)
    while True:
        try:
            prompt = _ask("> ")
        except EOFError:
            print(file=sys.stderr)
            return
        if prompt.strip():
            _take_turn(client, request, user([prompt, *images] if images else prompt), options)
            images = []


def _ask(question: str) -> str:
    """A line that the user types; asks again if it is not valid text."""
    while True:
        try:
            line = input(question)
            line.encode()
        except UnicodeError:
            print("error: the line is not UTF-8 text", file=sys.stderr)
        else:
            return line


def _take_turn(client: Client, request: ChatRequest, turn: Any, options: argparse.Namespace) -> None:  # noqa: ANN401
    """One turn of a conversation, with as many answers as its tool calls need. A failed turn leaves no trace."""
    before = len(request.messages)
    request.messages.append(turn)
    while True:
        try:
            answer = _answer(client, request, options)
        except KeyboardInterrupt:
            print("\nnote: the answer was stopped", file=sys.stderr)
            del request.messages[before:]
            return
        except DeltawireError as error:
            print_error(error)
            del request.messages[before:]
            return
        request.messages.append(answer.message)
        if not answer.tool_calls:
            return
        try:
            results = [tool(call, _ask(f"result of {one_line(call_line(call))}> ")) for call in answer.tool_calls]
        except EOFError:
            print("\nnote: no result, so the turn is dropped", file=sys.stderr)
            del request.messages[before:]
            return
        request.messages.extend(results)
