"""The command `deltawire`: chat with a model, and see and name the models there are.

Standard output is the answer and nothing else: text, or with --json one message per line. Everything about the answer
goes to standard error: a model's reasoning (only if that is a terminal), notes and errors. Exit status: 0 the answer came
whole, whatever its stop reason; 1 the call failed; 2 wrong usage; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from google.protobuf.json_format import MessageToDict, MessageToJson, Parse, ParseError

from deltawire._channel import DEFAULT_TARGET, VLLM_TOKEN, CallOptions, ConnectOptions, tls_credentials
from deltawire._client import Client
from deltawire._errors import CallError, DeltawireError, ProtocolError
from deltawire._messages import system, tool, tool_from_openai, user
from deltawire._requests import chat_request
from deltawire._version import __version__
from deltawire.v1.chat_completion_pb2 import ChatRequest, StopReason
from deltawire.v1.model_registry_pb2 import HealthStatus, Model, ModelSource, ModelType
from deltawire.v1.tool_pb2 import Tool, ToolCall, ToolCallDelta, ToolCallFailureReason

if TYPE_CHECKING:
    from google.protobuf.message import Message as ProtoMessage

    from deltawire._client import ChatStream
    from deltawire._completion import Answer, Choice
    from deltawire.v1.chat_completion_pb2 import StreamChatCompletionResponse

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
# What a model writes must not steer a terminal: control characters other than tab and newline are shown as pictures.
_PICTURES = {code: 0x2400 + code for code in range(0x20) if code not in {0x09, 0x0A}} | {0x7F: 0x2421}
_PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)

# Ends that need no word: the model said what it had to say.
_PLAIN_ENDS = frozenset(
    {StopReason.STOP_REASON_END_OF_TURN, StopReason.STOP_REASON_END_OF_MESSAGE, StopReason.STOP_REASON_STOP_SEQUENCE}
)

_SAMPLING = (
    ("temperature", float, "randomness; 0 is greedy"),
    ("top_p", float, "consider the likeliest tokens up to this probability mass"),
    ("top_k", int, "consider this many of the likeliest tokens"),
    ("min_p", float, "leave out tokens less likely than this share of the likeliest"),
    ("frequency_penalty", float, "-2 to 2; above 0 discourages repeating often"),
    ("presence_penalty", float, "-2 to 2; above 0 discourages repeating at all"),
    ("repetition_penalty", float, "above 1 discourages tokens of prompt and answer"),
    ("seed", int, "make sampling repeatable"),
    ("max_tokens", int, "the most tokens to generate"),
    ("min_tokens", int, "the fewest tokens to generate"),
)

_CHAT_EXAMPLES = """\
examples:
  deltawire chat "Why is the sky blue?"
  git diff | deltawire chat --system "Write a commit message for this diff."
  deltawire chat --tool weather.json --tool-choice required "Is it raining in Oslo?"
  deltawire chat --json "hi" | jq -r '.textDelta.text // empty'
  echo '{"model": "llama", "messages": [{"user": {"content": [{"text": "hi"}]}}]}' | deltawire chat --request -
  deltawire chat                                  a conversation; Ctrl-D ends it

Without PROMPT, standard input is the prompt, unless it is a terminal. A model's reasoning is shown dimmed, on standard
error, if that is a terminal. Exit status: 0 whole answer, 1 failed call, 2 wrong usage, 130 Ctrl-C.
"""

_EXAMPLES = """\
examples:
  deltawire chat "Why is the sky blue?"
  deltawire models list
  deltawire health

environment:
  DELTAWIRE_TARGET   where the gateway is (default 127.0.0.1:50051)
  DELTAWIRE_TOKEN    the key for it
"""


class UsageError(Exception):
    """What was asked for cannot be done as asked; the message is for whoever typed it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Those after the program's name. None takes the process's own.

    Raises:
        SystemExit: As argparse does: 0 after --help and --version, 2 for wrong usage.

    The exit status comes back; hand it to `sys.exit`.
    """
    options = _parser().parse_args(arguments)
    run: Callable[[Client, argparse.Namespace], int] = options.run
    try:
        with _client(options) as client:
            status = run(client, options)
            # Here, where a reader that has gone can still be dealt with, and not at exit.
            sys.stdout.flush()
            return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    except DeltawireError as error:
        _print_error(error)
        return FAILED
    except BrokenPipeError:
        # Whoever read the answer has had enough. What is still in the buffer must not fail once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


# --- The command line ------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    """Every command and option there is."""
    parser = argparse.ArgumentParser(
        prog="deltawire",
        description="Chat with models behind a deltawire gateway.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"deltawire {__version__}")
    common = _common_options()
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_chat(commands, common)

    models = commands.add_parser("models", help="list, look up, register and unregister models")
    actions = models.add_subparsers(title="commands", metavar="COMMAND", required=True)
    listing = actions.add_parser("list", help="all models", parents=[common])
    listing.set_defaults(run=_models_list)
    get = actions.add_parser("get", help="one model", parents=[common])
    get.add_argument("model", metavar="MODEL", help="an id or alias")
    get.set_defaults(run=_models_get)
    _add_register(actions, common)
    unregister = actions.add_parser("unregister", help="forget a registered model", parents=[common])
    unregister.add_argument("model", metavar="MODEL", help="an id or alias")
    unregister.set_defaults(run=_models_unregister)

    providers = commands.add_parser("providers", help="list the servers of models", parents=[common])
    providers.set_defaults(run=_providers)
    health = commands.add_parser(
        "health", help="ask how providers are", parents=[common], description="Exit status 1 if any of them is down."
    )
    health.add_argument("provider", metavar="PROVIDER", nargs="?", help="its id; without it, all of them")
    health.set_defaults(run=_health)
    return parser


def _common_options() -> argparse.ArgumentParser:
    """What every command takes."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print messages as protobuf JSON, one per line")
    group = common.add_argument_group("connection")
    target = os.environ.get("DELTAWIRE_TARGET") or DEFAULT_TARGET
    group.add_argument(
        "--target", default=target, help="where the gateway is (default $DELTAWIRE_TARGET, else %(default)s)"
    )
    group.add_argument("--timeout", type=float, metavar="SECONDS", help="give up after this long")
    group.add_argument("--tls", action="store_true", help="use TLS")
    group.add_argument("--ca-file", metavar="FILE", help="whom to trust, as PEM; implies --tls")
    group.add_argument("--cert-file", metavar="FILE", help="your own certificate, as PEM; implies --tls")
    group.add_argument("--key-file", metavar="FILE", help="its key, as PEM")
    group.add_argument(
        "--token", help="your key for the gateway (default $DELTAWIRE_TOKEN, which others cannot see in ps)"
    )
    group.add_argument("--insecure", action="store_true", help="let tokens go over plaintext to other machines")
    group.add_argument("--vllm-token", metavar="TOKEN", help="your own token for vLLM")
    group.add_argument("--request-id", metavar="ID", help="what the gateway's log shall know the call by")
    return common


def _add_chat(commands: Any, common: argparse.ArgumentParser) -> None:  # noqa: ANN401 -- argparse hides the type
    """The command `chat`."""
    chat = commands.add_parser(
        "chat",
        help="chat with a model",
        parents=[common],
        epilog=_CHAT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    chat.add_argument("prompt", metavar="PROMPT", nargs="?", help='what to say; "-" reads standard input')
    chat.add_argument("--model", help="id or alias (default: the only one there is)")
    chat.add_argument("--system", metavar="TEXT", help="instructions for the model")
    chat.add_argument(
        "--request",
        metavar="FILE",
        help='a ChatRequest as protobuf JSON, "-" for standard input; the other options are laid over it',
    )
    tools = chat.add_argument_group("tools")
    tools.add_argument(
        "--tool",
        metavar="FILE",
        action="append",
        default=[],
        help="OpenAI tool objects as JSON, one or a list; repeatable",
    )
    tools.add_argument("--tool-choice", metavar="CHOICE", help="auto, required, none, or a tool's name")
    sampling = chat.add_argument_group("sampling", "What is not given is left to the model's own defaults.")
    for name, kind, text in _SAMPLING:
        metavar = "N" if kind is int else "X"
        sampling.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)
    sampling.add_argument("--stop", metavar="TEXT", action="append", help="a text that ends the answer; repeatable")
    chat.set_defaults(run=_chat)


def _add_register(actions: Any, common: argparse.ArgumentParser) -> None:  # noqa: ANN401 -- argparse hides the type
    """The command `models register`."""
    register = actions.add_parser("register", help="give a served model a name of your own", parents=[common])
    register.add_argument("model", metavar="ID", help="the id to call it by")
    register.add_argument("--provider", default="", help="who serves it (default: the only one there is)")
    register.add_argument("--provider-model", metavar="NAME", default="", help="its name there (default: ID)")
    register.add_argument("--type", choices=("llm", "embedding", "rerank"), default="llm", help="what it is for")
    register.add_argument("--alias", action="append", default=[], help="a further name; repeatable")
    register.add_argument("--metadata", metavar="KEY=VALUE", action="append", default=[], help="a note; repeatable")
    register.set_defaults(run=_models_register)


def _client(options: argparse.Namespace) -> Client:
    """The client that the options describe."""
    connect: ConnectOptions = {
        "token": options.token or os.environ.get("DELTAWIRE_TOKEN"),
        "insecure": options.insecure,
        "timeout": options.timeout,
        "metadata": [(VLLM_TOKEN, options.vllm_token)] if options.vllm_token else [],
    }
    try:
        if options.tls or options.ca_file or options.cert_file or options.key_file:
            connect["credentials"] = tls_credentials(
                ca_file=options.ca_file, cert_file=options.cert_file, key_file=options.key_file
            )
        return Client(options.target, **connect)
    except OSError as error:
        _refuse_file(error.filename, error)
    except ValueError as error:
        raise UsageError(str(error).replace("insecure=True", "--insecure")) from error


def _call_options(options: argparse.Namespace) -> CallOptions:
    """How calls are made."""
    return {"request_id": options.request_id}


# --- chat ------------------------------------------------------------------------------------------------------------


def _chat(client: Client, options: argparse.Namespace) -> int:
    """One answer, or a conversation if there is no prompt and somebody to ask for one."""
    if options.prompt == "-" and options.request == "-":
        message = "standard input cannot be both the prompt and the request"
        raise UsageError(message)
    request = _request_of(options)
    prompt = _prompt_of(options)
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


def _request_of(options: argparse.Namespace) -> ChatRequest:
    """The request that file and options describe, without the prompt."""
    request = ChatRequest()
    if options.request is not None:
        text = _read(options.request)
        try:
            Parse(text, request)
        except ParseError as error:
            message = f"{_name(options.request)}: not a ChatRequest: {error}"
            raise UsageError(message) from error
    sampling = {name: getattr(options, name) for name, _, _ in _SAMPLING}
    try:
        over = chat_request(
            [],
            model=options.model,
            tools=[each for path in options.tool for each in _tools(path)],
            tool_choice=options.tool_choice,
            stop=options.stop,
            **sampling,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    request.MergeFrom(over)
    if options.system is not None:
        request.messages.insert(0, system(options.system))
    return request


def _prompt_of(options: argparse.Namespace) -> str | None:
    """What to say; None if a request file says it, or if it is to be asked for."""
    if options.prompt == "-" or (options.prompt is None and options.request is None and not sys.stdin.isatty()):
        text = _read("-")
        if not text.strip():
            message = "there is no prompt: standard input is empty"
            raise UsageError(message)
        return text
    prompt: str | None = options.prompt
    return prompt


def _only_model(client: Client, options: argparse.Namespace) -> str:
    """The only LLM there is. A model and its registration are one model, called by its registered id."""
    listing = client.models.list(**_call_options(options))
    chosen: dict[tuple[str, str], str] = {}
    for model in listing:
        key = (model.provider_id, model.provider_model_id)
        if model.type == ModelType.MODEL_TYPE_LLM and (
            key not in chosen or model.source == ModelSource.MODEL_SOURCE_REGISTERED
        ):
            chosen[key] = model.id
    _note_unreachable(listing.unreachable_provider_ids)
    if len(chosen) == 1:
        return next(iter(chosen.values()))
    if not chosen:
        message = "there is no model to chat with"
        raise UsageError(message)
    message = f"there is more than one model; give --model, one of: {', '.join(sorted(chosen.values()))}"
    raise UsageError(message)


def _answer(client: Client, request: ChatRequest, options: argparse.Namespace) -> Answer:
    """Ask, and print the answer while it comes."""
    with client.chat.stream(request, **_call_options(options)) as stream:
        if options.json:
            for event in stream:
                _print_json(event)
        else:
            _print_answer(stream)
        return stream.final()


def _converse(client: Client, request: ChatRequest, options: argparse.Namespace) -> None:
    """Ask for one prompt after the other. Ctrl-C ends an answer and keeps what came; at the prompt, everything."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 -- gives input() editing and history
    print(f"{request.model}; Ctrl-C stops an answer, Ctrl-D ends", file=sys.stderr)
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print(file=sys.stderr)
            return
        if prompt.strip():
            _take_turn(client, request, user(prompt), options)


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
            _print_error(error)
            del request.messages[before:]
            return
        request.messages.append(answer.message)
        if not answer.tool_calls:
            return
        try:
            results = [tool(call, input(f"result of {_call_line(call)}> ")) for call in answer.tool_calls]
        except EOFError:
            print("\nnote: no result, so the turn is dropped", file=sys.stderr)
            del request.messages[before:]
            return
        request.messages.extend(results)


class _Printer:
    """Prints pieces of text so that a line of another kind always begins a line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._clean = stream.isatty()
        self._at_line_start = True

    def piece(self, text: str) -> None:
        """Print a piece, at once."""
        if text:
            # Noted first: Ctrl-C can come right after the text is out.
            self._at_line_start = text.endswith("\n")
            self._stream.write(text.translate(_PICTURES) if self._clean else text)
            self._stream.flush()

    def line(self, text: str) -> None:
        """Print a line of its own."""
        self.end()
        self.piece(f"{text}\n")

    def end(self) -> None:
        """End the line that is open, if one is."""
        if not self._at_line_start:
            self.piece("\n")


class _Thinking:
    """Prints reasoning, dimmed, on standard error, if that is a terminal; otherwise nothing."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()
        self._open = False

    def piece(self, text: str) -> None:
        """Print a piece, at once."""
        if self._shown:
            text = text.translate(_PICTURES)
            print(text if self._open else DIM + text, end="", file=sys.stderr, flush=True)
            self._open = True

    def end(self) -> None:
        """Make the terminal as it was."""
        if self._open:
            print(PLAIN, file=sys.stderr, flush=True)
            self._open = False


def _print_answer(stream: ChatStream) -> None:
    """Print choice 0 as it comes, and the other choices after it."""
    out, thinking = _Printer(sys.stdout), _Thinking()
    try:
        for event in stream:
            if event.choice_index == 0:
                _print_event(event, out, thinking)
    finally:
        # Also after Ctrl-C or a fault: what came stays, on a line of its own.
        thinking.end()
        out.end()
    answer = stream.final()
    for choice in answer.choices:
        if choice.index != 0:
            _print_choice(choice, out)
        if choice.stop_reason not in _PLAIN_ENDS:
            which = f"choice {choice.index}" if len(answer.choices) > 1 else "the answer"
            print(f"note: {which} ended with {_word(StopReason, choice.stop_reason, 'STOP_REASON_')}", file=sys.stderr)


def _print_event(event: StreamChatCompletionResponse, out: _Printer, thinking: _Thinking) -> None:
    """Print what an event adds to the answer."""
    kind = event.WhichOneof("event")
    if kind == "reasoning_delta":
        thinking.piece(event.reasoning_delta.text)
        return
    thinking.end()
    if kind == "text_delta":
        out.piece(event.text_delta.text)
    elif kind == "tool_call_delta":
        out.line(_verdict_line(event.tool_call_delta))


def _print_choice(choice: Choice, out: _Printer) -> None:
    """Print a choice whole."""
    out.line(f"--- choice {choice.index}")
    out.piece(choice.text)
    for call in choice.tool_calls:
        out.line(f"tool call: {_call_line(call)}")
    for failed in choice.failed_tool_calls:
        out.line(_verdict_line(failed))
    out.end()


def _call_line(call: ToolCall) -> str:
    """A tool call on one line, for people: name(arguments)."""
    try:
        arguments = json.dumps(json.loads(call.arguments), ensure_ascii=False)
    except ValueError:
        arguments = " ".join(call.arguments.split())
    return f"{call.tool_name}({arguments})"


def _verdict_line(delta: ToolCallDelta) -> str:
    """A verdict on a tool call on one line, for people."""
    if delta.WhichOneof("outcome") == "tool_call":
        return f"tool call: {_call_line(delta.tool_call)}"
    failure = delta.failure
    reason = _word(ToolCallFailureReason, failure.reason, "TOOL_CALL_FAILURE_REASON_")
    raw = " ".join(failure.raw_arguments.split())
    return f"tool call failed: {delta.tool_name or '(no name)'}({raw}): {reason}: {' '.join(failure.message.split())}"


def _word(enum: Any, value: int, prefix: str) -> str:  # noqa: ANN401 -- any enum of the API
    """An enum value's name without its prefix; the number of one that this version does not know."""
    return str(enum.Name(value)).removeprefix(prefix) if value in enum.values() else str(value)


# --- models and providers --------------------------------------------------------------------------------------------


def _models_list(client: Client, options: argparse.Namespace) -> int:
    """All models."""
    listing = client.models.list(**_call_options(options))
    if options.json:
        for model in listing:
            _print_json(model)
    else:
        rows = [
            (
                model.id,
                _word(ModelType, model.type, "MODEL_TYPE_").lower(),
                _word(ModelSource, model.source, "MODEL_SOURCE_").lower(),
                model.provider_id,
                str(model.max_context_tokens) if model.HasField("max_context_tokens") else "-",
                ", ".join(model.aliases),
            )
            for model in listing
        ]
        _print_table(("ID", "TYPE", "SOURCE", "PROVIDER", "CONTEXT", "ALIASES"), rows)
    _note_unreachable(listing.unreachable_provider_ids)
    return OK


def _models_get(client: Client, options: argparse.Namespace) -> int:
    """One model."""
    _print_model(client.models.get(options.model, **_call_options(options)), options)
    return OK


def _models_register(client: Client, options: argparse.Namespace) -> int:
    """Register a model."""
    notes = {}
    for each in options.metadata:
        key, equals, value = each.partition("=")
        if not equals:
            message = f"--metadata {each}: not KEY=VALUE"
            raise UsageError(message)
        notes[key] = value
    model = client.models.register(
        options.model,
        provider_id=options.provider,
        provider_model_id=options.provider_model,
        model_type=options.type,
        aliases=options.alias,
        model_metadata=notes,
        **_call_options(options),
    )
    _print_model(model, options)
    return OK


def _models_unregister(client: Client, options: argparse.Namespace) -> int:
    """Unregister a model; without --json, say so."""
    client.models.unregister(options.model, **_call_options(options))
    print("{}" if options.json else f"{options.model} is no longer registered")
    return OK


def _providers(client: Client, options: argparse.Namespace) -> int:
    """All providers."""
    providers = client.providers.list(**_call_options(options))
    if options.json:
        for provider in providers:
            _print_json(provider)
    else:
        _print_table(("ID", "KIND", "URL"), [(each.id, each.kind, each.base_url) for each in providers])
    return OK


def _health(client: Client, options: argparse.Namespace) -> int:
    """How providers are; one that is down makes the exit status 1, for scripts."""
    call = _call_options(options)
    ids = [options.provider] if options.provider else [each.id for each in client.providers.list(**call)]
    answers = [(each, client.providers.health(each, **call)) for each in ids]
    if options.json:
        for provider_id, health in answers:
            print(json.dumps({"providerId": provider_id, **MessageToDict(health)}), flush=True)
    else:
        rows = [
            (each, _word(HealthStatus, health.status, "HEALTH_STATUS_"), health.message) for each, health in answers
        ]
        _print_table(("PROVIDER", "STATUS", "MESSAGE"), rows)
    return FAILED if any(health.status == HealthStatus.HEALTH_STATUS_ERROR for _, health in answers) else OK


def _print_model(model: Model, options: argparse.Namespace) -> None:
    """One model, a line for each thing that is known of it."""
    if options.json:
        _print_json(model)
        return
    facts = {
        "id": model.id,
        "provider": model.provider_id,
        "served as": model.provider_model_id,
        "type": _word(ModelType, model.type, "MODEL_TYPE_").lower(),
        "source": _word(ModelSource, model.source, "MODEL_SOURCE_").lower(),
        "aliases": ", ".join(model.aliases),
        "metadata": ", ".join(f"{key}={value}" for key, value in sorted(model.metadata.items())),
        "context": f"{model.max_context_tokens} tokens" if model.HasField("max_context_tokens") else "",
        "root": model.root,
        "parent": model.parent,
        "created": model.create_time.ToJsonString() if model.HasField("create_time") else "",
        "updated": model.update_time.ToJsonString() if model.HasField("update_time") else "",
    }
    for name, value in facts.items():
        if value:
            print(f"{name + ':':<11}{value}")


# --- Reading and printing --------------------------------------------------------------------------------------------


def _tools(path: str) -> Iterator[Tool]:
    """The tools in a file of OpenAI tool objects."""
    try:
        value = json.loads(_read(path))
    except ValueError as error:
        message = f"{_name(path)}: not JSON: {error}"
        raise UsageError(message) from error
    for index, each in enumerate(value if isinstance(value, list) else [value]):
        where = f"{_name(path)}: tool {index + 1}" if isinstance(value, list) else _name(path)
        if not isinstance(each, Mapping):
            message = f"{where}: not an object"
            raise UsageError(message)
        try:
            yield tool_from_openai(each)
        except ValueError as error:
            message = f"{where}: {error}"
            raise UsageError(message) from error


def _read(path: str) -> str:
    """A file's text; "-" is standard input."""
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        _refuse_file(path, error)


def _refuse_file(path: str, error: Exception) -> NoReturn:
    """Say which file cannot be read, and why."""
    why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
    message = f"{_name(path)}: {why}"
    raise UsageError(message) from error


def _name(path: str) -> str:
    """What to call a file in a message."""
    return "standard input" if path == "-" else path


def _print_json(message: ProtoMessage) -> None:
    """A message as one line of protobuf JSON, at once."""
    print(MessageToJson(message, indent=None), flush=True)


def _print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Rows under a head, columns aligned; the last column is not padded."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _note_unreachable(provider_ids: Sequence[str]) -> None:
    """Say that models may be missing."""
    if provider_ids:
        print(f"note: did not answer, so models may be missing: {', '.join(provider_ids)}", file=sys.stderr)


def _print_error(error: DeltawireError) -> None:
    """An error as it can be acted upon: what, which fields, and what to give whoever looks into it."""
    print(f"error: {error}", file=sys.stderr)
    if isinstance(error, CallError):
        for violation in error.violations:
            print(f"  {violation.field}: {violation.description}", file=sys.stderr)
        if error.retry_after is not None:
            print(f"  try again in {error.retry_after:g} s", file=sys.stderr)
    if isinstance(error, CallError | ProtocolError) and error.request_id:
        print(f"  request id: {error.request_id}", file=sys.stderr)
