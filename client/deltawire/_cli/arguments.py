"""Every command and option there is, its help, and the function that runs it."""

from __future__ import annotations

import argparse
import os
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NoReturn

from deltawire._channel import AUTHORIZATION, DEFAULT_TARGET, OWN_HEADER
from deltawire._cli.chat import count_tokens, run_chat
from deltawire._cli.completions import (
    STATES,
    cancel_completion,
    get_completion,
    list_completions,
    resume_completion,
)
from deltawire._cli.registry import (
    check_health,
    get_model,
    list_models,
    list_providers,
    refresh_models,
    register_model,
    unregister_model,
    update_model,
    watch_models,
)
from deltawire._cli.request_arguments import add_request_options, add_stream_options, seconds
from deltawire._cli.status import USAGE, UsageError
from deltawire._cli.terminal import one_line
from deltawire._values import RESUME_FOR
from deltawire._version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from _typeshed import SupportsWrite

# A file may be called by bytes that are no text.
_FILES = frozenset(
    {"tool", "request", "image", "json_schema", "grammar", "structural_tag", "ca_file", "cert_file", "key_file"}
)

_TYPES = ("llm", "embedding", "rerank")
# No filter, in the API's own word.
_ANY = "unspecified"

_WATCH_DESCRIPTION = """\
Runs until Ctrl-C. If the connection is lost, a note is printed to standard error, and the missed changes follow when it is
restored. --json also prints the revisions from which another watch can continue.
"""

_CHAT_EXAMPLES = """\
examples:
  deltawire chat "Why is the sky blue?"
  git diff | deltawire chat --system "Write a commit message for this diff."
  deltawire chat --tool weather.json --tool-choice required "Is it raining in Oslo?"
  deltawire chat --image cat.png "What is this?"
  deltawire chat --json-schema person.json "Invent a person."
  deltawire chat --json "hi" | jq -r '.textDelta.text // empty'
  echo '{"messages": [{"user": {"text": "hi"}}]}' | deltawire chat --request -
  deltawire chat                                  a conversation; Ctrl-D ends it

Without PROMPT, standard input is the prompt, unless it is a terminal. A model's reasoning, and tool calls while they are
written, are shown dimmed, on standard error, if that is a terminal. Ctrl-C ends the answer softly, so that its end and its
usage still come; a second one ends it at once. Exit status: 0 whole answer, 1 failed call, 2 wrong usage, 130 Ctrl-C.
"""

_EXAMPLES = """\
examples:
  deltawire chat "Why is the sky blue?"
  deltawire models list
  deltawire health

environment:
  DELTAWIRE_TARGET         where the gateway is (default 127.0.0.1:50051)
  DELTAWIRE_TOKEN          the key for it
  DELTAWIRE_TOKEN_HEADER   the header of the key (default authorization)
"""


class _PrintCompletion(argparse.Action):
    """Prints a script for a shell, which completes commands, options, their values and names of files."""

    def __call__(self, parser: argparse.ArgumentParser, *given: Any) -> NoReturn:  # noqa: ANN401 -- argparse's own
        """Print it, and exit."""
        try:
            # Here, because only this option needs it.
            import shtab
        except ImportError:
            parser.error("--print-completion needs an extra: pip install 'deltawire[completion]'")
        _complete_files(parser, shtab.FILE)
        _, shell, _ = given
        print(shtab.complete(parser, shell=shell))
        parser.exit()


def _complete_files(parser: argparse.ArgumentParser, files: Mapping[str, Any]) -> None:
    """Mark the arguments of a parser and of its commands that are names of files."""
    for action in parser._actions:
        if action.dest in _FILES:
            action.complete = files  # type: ignore[attr-defined] # shtab's own attribute
        elif isinstance(action.choices, dict):
            for command in action.choices.values():
                _complete_files(command, files)


class _Parser(argparse.ArgumentParser):
    """Reports wrong usage on one line, without control characters, and the command whose help to read."""

    def __init__(self, *arguments: Any, **options: Any) -> None:  # noqa: ANN401 -- argparse's own
        super().__init__(*arguments, **options)
        # After the defaults of `parents`. The parser of the command that was given sets it last.
        self.set_defaults(prog=self.prog)

    # argparse reports unknown arguments of a command as if they were the program's.
    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override] # noqa: ANN401
        """Parse all arguments."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.prog = options.prog
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return options

    # argparse ignores errors of `write`, so a full disk would lose the help in silence.
    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        if message:
            (file or sys.stderr).write(message)

    def error(self, message: str) -> NoReturn:
        """Print what is wrong, and exit."""
        option, _, problem = message.rpartition(": ")
        if problem == "expected one argument":
            message += f"; a value that begins with - needs {option.removeprefix('argument ')}=VALUE"
        self.exit(USAGE, f"error: {one_line(message)}\nsee {self.prog} --help\n")


def make_parser() -> argparse.ArgumentParser:
    """Every command and option there is."""
    parser = _Parser(
        prog="deltawire",
        description="Chat with models behind a deltawire gateway.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"deltawire {__version__}")
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=("bash", "zsh", "tcsh"),
        help="print a script that completes this command in a shell",
    )
    common = _common_options()
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_chat(commands, common)
    _add_completions(commands, common)

    models = commands.add_parser("models", help="list, look up, watch, register and change models")
    _add_models(models.add_subparsers(title="commands", metavar="COMMAND", required=True), common)

    providers = commands.add_parser("providers", help="list the servers of models", parents=[common])
    providers.set_defaults(run=list_providers)
    health = commands.add_parser(
        "health", help="check providers", parents=[common], description="Exit status 1 if any of them is unhealthy."
    )
    health.add_argument("provider", metavar="PROVIDER", nargs="?", help="its id; without it, all of them")
    health.set_defaults(run=check_health)
    return parser


def count(text: str) -> int:
    """A number of things, as the API's messages can hold it.

    Raises:
        argparse.ArgumentTypeError: It is not a whole number, or out of range.
    """
    return _whole(text, 1, 2**31 - 1)


def _sequence(text: str) -> int:
    """The sequence of an event.

    Raises:
        argparse.ArgumentTypeError: It is not a whole number, or out of range.
    """
    return _whole(text, 0, 2**63 - 1)


def _time(text: str) -> datetime:
    """A time; without a zone it is in UTC.

    Raises:
        argparse.ArgumentTypeError: It is no time.
    """
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        message = f"{text} is not a time: write for example 2026-11-28T12:30"
        raise argparse.ArgumentTypeError(message) from None
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)


def _whole(text: str, least: int, most: int) -> int:
    """A whole number within these limits."""
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        message = f"{text} is not a whole number from {least} to {most}"
        raise argparse.ArgumentTypeError(message)
    return value


def check_text(options: argparse.Namespace) -> None:
    """Check that each value is UTF-8 text.

    Python passes other bytes on as lone surrogates.

    Raises:
        UsageError: A value is not; the message names its option.
    """
    for name, value in vars(options).items():
        for each in value if isinstance(value, list) else [value]:
            if not isinstance(each, str) or name in _FILES:
                continue
            try:
                each.encode()
            except UnicodeEncodeError as error:
                # Two of them are options of some commands and arguments of others.
                named = name in {"prompt", "completion", "model", "provider"}
                message = f"the {name} is not UTF-8 text" if named else f"--{name.replace('_', '-')}: not UTF-8 text"
                raise UsageError(message) from error


def _etag(text: str) -> str:
    """An etag: not an empty one, such as an unset variable of a script leaves, which would mean any.

    Raises:
        argparse.ArgumentTypeError: It is empty.
    """
    if not text:
        message = "is empty: give the one that was read, or leave the option out for any"
        raise argparse.ArgumentTypeError(message)
    return text


def _common_options() -> _Parser:
    """What every command takes."""
    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print messages as protobuf JSON, one per line")
    group = common.add_argument_group("connection")
    target = os.environ.get("DELTAWIRE_TARGET") or DEFAULT_TARGET
    group.add_argument(
        "--target", default=target, help="where the gateway is (default $DELTAWIRE_TARGET, else %(default)s)"
    )
    group.add_argument("--timeout", type=seconds, metavar="SECONDS", help="give up after this long")
    group.add_argument("--tls", action="store_true", help="use TLS")
    group.add_argument("--ca-file", metavar="FILE", help="trusted root certificates, as PEM; implies --tls")
    group.add_argument("--cert-file", metavar="FILE", help="your own certificate, as PEM; implies --tls")
    group.add_argument("--key-file", metavar="FILE", help="its key, as PEM")
    group.add_argument(
        "--token",
        default=os.environ.get("DELTAWIRE_TOKEN"),
        help="your key for the gateway (default $DELTAWIRE_TOKEN, which others cannot see in ps)",
    )
    group.add_argument(
        "--token-header",
        default=os.environ.get("DELTAWIRE_TOKEN_HEADER") or AUTHORIZATION,
        metavar="NAME",
        help=f"header of the key: {AUTHORIZATION}, or {OWN_HEADER} if a proxy uses that one (default $DELTAWIRE_TOKEN_HEADER, "
        f"else {AUTHORIZATION})",
    )
    group.add_argument("--insecure", action="store_true", help="allow tokens over plaintext to other machines")
    group.add_argument("--vllm-token", metavar="TOKEN", help="your own token for vLLM")
    group.add_argument("--request-id", metavar="ID", help="the call's id in the gateway's log")
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
    add_request_options(chat)
    add_stream_options(chat)
    chat.set_defaults(run=run_chat)
    count = commands.add_parser(
        "count-tokens",
        help="count the tokens of a prompt",
        parents=[common],
        description="Takes what `deltawire chat` takes, and generates nothing.",
    )
    add_request_options(count)
    count.set_defaults(run=count_tokens)


def _add_completions(commands: Any, common: argparse.ArgumentParser) -> None:  # noqa: ANN401 -- argparse hides the type
    """The commands about completions that have been asked for."""
    completions = commands.add_parser("completions", help="list completions")
    actions = completions.add_subparsers(title="commands", metavar="COMMAND", required=True)
    listing = actions.add_parser(
        "list",
        help="running and ended completions, newest first",
        parents=[common],
        description="Your own, or with the permission operate those of every caller. No content is listed.",
    )
    listing.add_argument("--caller", default="", help="only those of the caller with this name")
    listing.add_argument("--model", default="", help="only those of this model, by its id or alias")
    listing.add_argument("--provider", default="", help="only those of this provider")
    listing.add_argument("--state", choices=STATES, default=STATES[0], help="only those in this state")
    listing.add_argument(
        "--since", metavar="TIME", type=_time, help="only those from this time on (UTC): 2026-11-28, 2026-11-28T12:30"
    )
    listing.set_defaults(run=list_completions)
    cancel = commands.add_parser(
        "cancel",
        help="end a completion softly",
        parents=[common],
        description="Its readers get a normal end with the text so far. If it has already ended, nothing happens.",
    )
    get = commands.add_parser("get", help="look a completion up", parents=[common])
    resume = commands.add_parser(
        "resume",
        help="read a retained completion",
        parents=[common],
        description="Prints it from its beginning, or after a given event, and continues live.",
    )
    for command in (cancel, get, resume):
        command.add_argument("completion", metavar="ID", help="its id, which the event `started` has, or your own")
    for command in (cancel, get):
        command.add_argument("--caller", default="", help="the caller whose completion it is, for operators")
    resume.add_argument("--after", metavar="N", type=_sequence, help="only what comes after the event of this sequence")
    resume.add_argument(
        "--retention",
        metavar="SECONDS",
        type=seconds,
        default=RESUME_FOR,
        help="how long to resume after lost connections (default %(default)g)",
    )
    cancel.set_defaults(run=cancel_completion)
    get.set_defaults(run=get_completion)
    resume.set_defaults(run=resume_completion)


def _add_models(actions: Any, common: argparse.ArgumentParser) -> None:  # noqa: ANN401 -- argparse hides the type
    """The commands under `models`."""
    listing = actions.add_parser("list", help="all models, or some of them", parents=[common])
    listing.add_argument("--provider", default="", help="only those of this provider")
    listing.add_argument("--type", choices=_TYPES, default=_ANY, help="only those of this type")
    listing.add_argument(
        "--state", choices=("serving", "unavailable", "unknown"), default=_ANY, help="only those in this state"
    )
    listing.add_argument(
        "--source", choices=("registered", "discovered"), default=_ANY, help="only those from this source"
    )
    listing.set_defaults(run=list_models)
    watch = actions.add_parser(
        "watch", help="all models, then every change to them", parents=[common], description=_WATCH_DESCRIPTION
    )
    watch.add_argument(
        "--revision", default="", help="continue after this revision, which --json prints, without the existing models"
    )
    watch.set_defaults(run=watch_models)
    get = actions.add_parser("get", help="one model", parents=[common])
    get.add_argument("model", metavar="MODEL", help="an id or alias")
    get.set_defaults(run=get_model)
    _add_register(actions, common)
    _add_update(actions, common)
    unregister = actions.add_parser("unregister", help="unregister a model", parents=[common])
    unregister.add_argument("model", metavar="MODEL", help="an id or alias")
    unregister.add_argument("--etag", type=_etag, help="only if it still has this etag")
    unregister.set_defaults(run=unregister_model)
    refresh = actions.add_parser(
        "refresh",
        help="list what providers serve now",
        parents=[common],
        description="Exit status 1 if any of them cannot be listed.",
    )
    refresh.add_argument("provider", metavar="PROVIDER", nargs="?", default="", help="its id; without it, all of them")
    refresh.set_defaults(run=refresh_models)


def _add_register(actions: Any, common: argparse.ArgumentParser) -> None:  # noqa: ANN401 -- argparse hides the type
    """The command `models register`."""
    register = actions.add_parser("register", help="register a served model under your own name", parents=[common])
    register.add_argument("model", metavar="ID", help="the id to call it by")
    register.add_argument("--provider", default="", help="the provider that serves it (default: the only one)")
    register.add_argument("--provider-model", metavar="NAME", default="", help="its name at the provider (default: ID)")
    register.add_argument("--type", choices=_TYPES, default="llm", help="its type")
    register.add_argument(
        "--embedding-dimension", metavar="N", type=count, help="the length of a vector; only for the type embedding"
    )
    register.add_argument("--alias", action="append", default=[], help="a further name; repeatable")
    register.add_argument(
        "--annotation",
        metavar="KEY=VALUE",
        dest="annotations",
        action="append",
        default=[],
        help="a free note; repeatable",
    )
    register.set_defaults(run=register_model)


def _add_update(actions: Any, common: argparse.ArgumentParser) -> None:  # noqa: ANN401 -- argparse hides the type
    """The command `models update`."""
    update = actions.add_parser(
        "update",
        help="change a registered model",
        parents=[common],
        description="Fields without an option are kept.",
    )
    update.add_argument("model", metavar="ID", help="its id or an alias")
    update.add_argument("--provider", help="the provider that serves it")
    update.add_argument("--provider-model", metavar="NAME", help="its name at the provider")
    update.add_argument("--type", choices=_TYPES, help="its type")
    update.add_argument(
        "--embedding-dimension", metavar="N", type=count, help="the length of a vector; only for the type embedding"
    )
    aliases = update.add_mutually_exclusive_group()
    aliases.add_argument("--alias", action="append", help="a further name; replaces all existing ones; repeatable")
    aliases.add_argument("--no-aliases", action="store_const", const=[], dest="alias", help="no further names")
    notes = update.add_mutually_exclusive_group()
    notes.add_argument(
        "--annotation",
        metavar="KEY=VALUE",
        dest="annotations",
        action="append",
        help="a note; replaces all existing ones; repeatable",
    )
    notes.add_argument("--no-annotations", action="store_const", const=[], dest="annotations", help="no notes")
    update.add_argument("--etag", type=_etag, help="only if it still has this etag")
    update.set_defaults(run=update_model)
