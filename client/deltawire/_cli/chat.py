"""`deltawire chat`: one answer, or a conversation."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

from deltawire._cli.answer import call_line, print_answer
from deltawire._cli.connection import call_options
from deltawire._cli.output import note_unreachable, print_error, print_json
from deltawire._cli.request import prompt_of, request_of
from deltawire._cli.status import OK, FailedError, UsageError
from deltawire._errors import DeltawireError
from deltawire._messages import tool, user
from deltawire.v1.model_registry_pb2 import ModelSource, ModelType

if TYPE_CHECKING:
    import argparse

    from deltawire._client import Client
    from deltawire._completion import Answer
    from deltawire.v1.chat_completion_pb2 import ChatRequest


def run_chat(client: Client, options: argparse.Namespace) -> int:
    """One answer, or a conversation if there is no prompt and somebody to ask for one."""
    if options.prompt == "-" and options.request == "-":
        message = "standard input cannot be both the prompt and the request"
        raise UsageError(message)
    request = request_of(options)
    prompt = prompt_of(options)
    if prompt is not None:
        request.messages.append(user(prompt))
    talk = prompt is None and options.request is None
    if not request.model:
        request.model = _only_model(client, options)
    if talk:
        _converse(client, request, options)
    else:
        _answer(client, request, options)
    return OK


def _only_model(client: Client, options: argparse.Namespace) -> str:
    """The only LLM there is. A model and its registration are one model, called by its registered id."""
    listing = client.models.list(**call_options(options))
    chosen: dict[tuple[str, str], str] = {}
    for model in listing:
        key = (model.provider_id, model.provider_model_id)
        if model.type == ModelType.MODEL_TYPE_LLM and (
            key not in chosen or model.source == ModelSource.MODEL_SOURCE_REGISTERED
        ):
            chosen[key] = model.id
    unreachable = listing.unreachable_provider_ids
    if not chosen and unreachable:
        message = (
            f"there is no model to chat with, and these providers could not be listed: {', '.join(unreachable)};"
            " see `deltawire health` and the gateway's log"
        )
        raise FailedError(message)
    note_unreachable(unreachable)
    if len(chosen) == 1:
        return next(iter(chosen.values()))
    if not chosen:
        message = "there is no model to chat with"
        raise UsageError(message)
    message = f"there is more than one model; give --model, one of: {', '.join(sorted(chosen.values()))}"
    raise UsageError(message)


def _answer(client: Client, request: ChatRequest, options: argparse.Namespace) -> Answer:
    """Ask, and print the answer while it comes."""
    with client.chat.stream(request, **call_options(options)) as stream:
        if options.json:
            for event in stream:
                print_json(event)
        else:
            print_answer(stream)
        return stream.final()


def _converse(client: Client, request: ChatRequest, options: argparse.Namespace) -> None:
    """Ask for one prompt after the other. Ctrl-C ends an answer and keeps what came; at the prompt, everything."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 -- gives input() editing and history
    print(f"{request.model}; Ctrl-C stops an answer, Ctrl-D ends", file=sys.stderr)
    while True:
        try:
            prompt = _ask("> ")
        except EOFError:
            print(file=sys.stderr)
            return
        if prompt.strip():
            _take_turn(client, request, user(prompt), options)


def _ask(question: str) -> str:
    """A line that somebody types; asked for again if it is no text."""
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
            results = [tool(call, _ask(f"result of {call_line(call)}> ")) for call in answer.tool_calls]
        except EOFError:
            print("\nnote: no result, so the turn is dropped", file=sys.stderr)
            del request.messages[before:]
            return
        request.messages.extend(results)
