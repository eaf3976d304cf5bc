"""`deltawire completions`, and completions by their ids: `deltawire cancel`, `deltawire get` and `deltawire resume`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from deltawire._cli.answer import print_choice
from deltawire._cli.connection import first_call
from deltawire._cli.follow import follow
from deltawire._cli.output import print_json, print_line, print_table, say, word
from deltawire._cli.status import OK
from deltawire._cli.terminal import Printer
from deltawire._completion import answer_of
from deltawire._errors import status_code
from deltawire._metadata import CallInfo
from deltawire.v1.chat_completion_pb2 import CompletionState, CreateChatCompletionResponse, StopReason, UsageProvenance
from deltawire.v1.error_reason_pb2 import ErrorReason

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from deltawire._client import Client
    from deltawire.v1.chat_completion_pb2 import CompletionSummary, GetChatCompletionResponse, Usage

# The states that each word of --state means.
_STATES: dict[str, tuple[str, ...]] = {
    "any": (),
    "running": ("running",),
    "ended": ("completed", "failed"),
    "completed": ("completed",),
    "failed": ("failed",),
}
STATES = tuple(_STATES)


def list_completions(client: Client, options: argparse.Namespace) -> int:
    """Those that the caller may see, newest first."""
    listing = client.chat.list(
        caller=options.caller,
        model=options.model,
        provider_id=options.provider,
        states=_STATES[options.state],
        **({} if options.since is None else {"create_time_from": options.since}),
        **first_call(client, options),
    )
    if options.json:
        for each in listing:
            print_json(each)
    else:
        rows = [
            (
                each.completion_id or "-",
                each.caller or "-",
                _state(each.state),
                _end(each),
                each.model or "-",
                _usage(each.usage),
                each.create_time.ToDatetime().isoformat(" ", "seconds"),
            )
            for each in listing
        ]
        print_table(("ID", "CALLER", "STATE", "END", "MODEL", "USAGE", "CREATED (UTC)"), rows)
    if listing.unreachable_workers:
        workers = ", ".join(map(str, listing.unreachable_workers))
        say(f"note: no answer from the gateway's workers {workers}: their completions are missing")
    return OK


def cancel_completion(client: Client, options: argparse.Namespace) -> int:
    """End one softly, and say what the cancel met."""
    met = client.chat.cancel(options.completion, caller=options.caller, **first_call(client, options))
    if options.json:
        print_json(met)
    else:
        running = met.state == CompletionState.COMPLETION_STATE_RUNNING
        what = "is cancelled" if running else f"had ended before: {_state(met.state)}"
        print_line(f"{options.completion} {what}; {_usage(met.usage)}")
    return OK


def get_completion(client: Client, options: argparse.Namespace) -> int:
    """How far one has come, and its result if that is retained."""
    found = client.chat.get(options.completion, caller=options.caller, **first_call(client, options))
    if options.json:
        print_json(found)
    else:
        for name, value in _facts(found):
            print_line(f"{name + ':':<11} {value}")
        if found.HasField("completed"):
            _print_result(found)
    return OK


def resume_completion(client: Client, options: argparse.Namespace) -> int:
    """Read a retained one, from its beginning or after a given event."""
    stream = client.chat.resume(
        options.completion, options.after, retention=options.retention, **first_call(client, options)
    )
    follow(stream, options)
    if options.after is not None and stream.last_sequence == options.after:
        where = f"deltawire get {options.completion}"
        say(f"note: nothing comes after {options.after}: the answer had ended there; {where} says how")
    return OK


def _print_result(found: GetChatCompletionResponse) -> None:
    """What the model said, each choice under a line of its own."""
    out = Printer(sys.stdout)
    whole = CreateChatCompletionResponse(started=found.started, completed=found.completed)
    for choice in answer_of(whole, CallInfo()).choices:
        out.line(f"--- choice {choice.index}")
        print_choice(choice, out)


def _facts(found: GetChatCompletionResponse) -> Iterator[tuple[str, str]]:
    """What is known of a completion, in the order in which it is asked about."""
    yield "id", found.completion_id
    yield "state", _state(found.state)
    if found.HasField("started"):
        yield "model", found.started.model
        yield "began", found.started.create_time.ToJsonString()
    if found.HasField("usage"):
        yield "usage", _usage(found.usage)
    for choice in found.completed.choices:
        yield "ended", f"choice {choice.index} with {word(StopReason, choice.stop_reason, 'STOP_REASON_')}"
    if found.HasField("error"):
        message = " ".join(found.error.message.split())
        # Of another caller's completion there is no message.
        yield "error", f"{_why(found.error.reason, found.error.code)}{message and f': {message}'}"
    if found.HasField("last_sequence"):
        yield "sequence", f"{found.last_sequence} is the last event"
    if found.HasField("expire_time"):
        yield "kept until", found.expire_time.ToJsonString()


def _end(completion: CompletionSummary) -> str:
    """How a completion ended: why it failed, or the different stop reasons of its choices."""
    if completion.state == CompletionState.COMPLETION_STATE_FAILED:
        return _why(completion.error_reason, completion.error_code)
    reasons = dict.fromkeys(word(StopReason, each, "STOP_REASON_") for each in completion.stop_reasons)
    return ", ".join(reasons) or "-"


def _why(reason: ErrorReason.ValueType, code: int) -> str:
    """Why a completion failed, in one word: the call's status if there is no reason, as for a canceled call."""
    if reason != ErrorReason.ERROR_REASON_UNSPECIFIED:
        return word(ErrorReason, reason, "ERROR_REASON_")
    return status_code(code).name


def _state(state: CompletionState.ValueType) -> str:
    """A state, as it is printed."""
    return word(CompletionState, state, "COMPLETION_STATE_").lower()


def _usage(usage: Usage) -> str:
    """What a completion has cost, as it is printed."""
    prompt = f"{usage.prompt_tokens} + " if usage.HasField("prompt_tokens") else ""
    trust = word(UsageProvenance, usage.provenance, "USAGE_PROVENANCE_").lower().replace("_", " ")
    return f"{prompt}{usage.completion_tokens} tokens ({trust})"
