"""The options of a chat request, for `chat` and `count-tokens`, and the stream options of `chat`.

`request` makes a request of them.
"""

from __future__ import annotations

import argparse
import json
import math

from deltawire._channel import MAX_TIMEOUT
from deltawire._values import EFFORTS

_SAMPLING = (
    ("temperature", float, "randomness; 0 is greedy"),
    ("top_p", float, "consider the likeliest tokens up to this probability mass"),
    ("top_k", int, "consider this many of the likeliest tokens"),
    ("min_p", float, "leave out tokens less likely than this share of the likeliest"),
    ("frequency_penalty", float, "-2 to 2; above 0 discourages repeating often"),
    ("presence_penalty", float, "-2 to 2; above 0 discourages repeating at all"),
    ("repetition_penalty", float, "above 1 discourages tokens of prompt and answer"),
    ("seed", int, "make sampling repeatable"),
    ("max_tokens", int, "maximum number of tokens to generate"),
    ("min_tokens", int, "minimum number of tokens to generate"),
)


def add_request_options(parser: argparse.ArgumentParser) -> None:
    """The options of a request."""
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help='what to say; "-" reads standard input')
    parser.add_argument("--model", help="id or alias (default: the only chat model that the gateway serves)")
    parser.add_argument("--system", metavar="TEXT", help="instructions for the model")
    parser.add_argument(
        "--image",
        metavar="PATH|URL",
        action="append",
        default=[],
        help="an image beside the prompt; the gateway fetches URLs, if its operator allows it; repeatable",
    )
    parser.add_argument(
        "--request",
        metavar="FILE",
        help='a ChatRequest as protobuf JSON, "-" for standard input; other options replace its values and append to its lists',
    )
    _add_tools(parser.add_argument_group("tools"))
    _add_reasoning(parser.add_argument_group("reasoning"))
    _add_form(parser.add_argument_group("the form of the answer"))
    _add_sampling(
        parser.add_argument_group("sampling", "The model's own defaults apply to options that are not given.")
    )
    _add_limits(parser.add_argument_group("the completion"))


def add_stream_options(parser: argparse.ArgumentParser) -> None:
    """The options of a stream."""
    group = parser.add_argument_group("the stream")
    group.add_argument(
        "--usage-updates", action="store_const", const=True, help="send usage updates during the stream, for --json"
    )
    group.add_argument(
        "--coalesce", metavar="SECONDS", type=_delay, help="let the gateway hold deltas for that long and merge them"
    )
    group.add_argument("--heartbeat", metavar="SECONDS", type=seconds, help="send a heartbeat after this much silence")
    group.add_argument(
        "--early-heartbeats",
        action="store_const",
        const=True,
        help="also before the answer begins; gRPC then cannot retry the call",
    )
    group.add_argument(
        "--retention",
        metavar="SECONDS",
        type=seconds,
        help="retain the stream for that long, and resume it if the connection is lost; see `deltawire resume`",
    )


def _add_tools(group: argparse._ArgumentGroup) -> None:
    """Tools, and how their calls are streamed."""
    group.add_argument(
        "--tool",
        metavar="FILE",
        action="append",
        default=[],
        help="OpenAI tool objects as JSON, one or a list; repeatable",
    )
    group.add_argument("--tool-choice", metavar="CHOICE", help="auto, required, none, or a tool's name")
    group.add_argument(
        "--allowed-tool", metavar="NAME", action="append", help="show the model this tool and no others; repeatable"
    )
    group.add_argument(
        "--parallel-tool-calls",
        action=argparse.BooleanOptionalAction,
        help="whether the answer may hold more than one call",
    )
    group.add_argument(
        "--tool-calls",
        choices=("assembled", "incremental"),
        help="send calls once they are complete, or also their fragments",
    )
    group.add_argument(
        "--validate-schema", action="store_const", const=True, help="check calls against the tools' schemas"
    )


def _add_reasoning(group: argparse._ArgumentGroup) -> None:
    """The reasoning."""
    group.add_argument("--reasoning-effort", choices=EFFORTS, help="the reasoning effort")
    group.add_argument(
        "--reasoning-budget", metavar="N", type=int, help="maximum number of reasoning tokens; 0 means none"
    )
    group.add_argument(
        "--no-reasoning",
        action="store_const",
        const=False,
        dest="include_reasoning",
        help="do not send it; the model still reasons",
    )


def _add_form(group: argparse._ArgumentGroup) -> None:
    """The form of the answer."""
    forms = group.add_mutually_exclusive_group()
    forms.add_argument("--response-format", choices=("text", "json_object"), help="free text, or any JSON object")
    forms.add_argument("--json-schema", metavar="FILE", help="JSON that follows this JSON Schema")
    forms.add_argument("--regex", metavar="PATTERN", help="text that matches a regular expression")
    forms.add_argument("--choice", metavar="TEXT", action="append", help="one of these texts; repeatable")
    forms.add_argument("--grammar", metavar="FILE", help="text that follows this grammar, EBNF or Lark")
    forms.add_argument("--structural-tag", metavar="FILE", help="a structural tag of vLLM's, as JSON")
    group.add_argument("--choices", metavar="N", type=int, help="how many answers to generate")
    group.add_argument(
        "--logprobs", metavar="N", type=int, help="send log-probabilities with N alternatives each, for --json"
    )


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    """How tokens are chosen and when to stop."""
    for name, kind, text in _SAMPLING:
        metavar = "N" if kind is int else "X"
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)
    group.add_argument("--stop", metavar="TEXT", action="append", help="a text that ends the answer; repeatable")
    group.add_argument(
        "--stop-token-id", metavar="ID", type=int, action="append", help="a token that ends the answer; repeatable"
    )
    group.add_argument(
        "--ignore-eos", action="store_const", const=True, help="continue after the model's end-of-sequence token"
    )
    group.add_argument(
        "--logit-bias",
        metavar="ID=X",
        type=_bias,
        action="append",
        help="make a token likelier, or less; -100 to 100; repeatable",
    )
    group.add_argument(
        "--bad-word", metavar="TEXT", action="append", help="a text that must not be generated; repeatable"
    )


def _add_limits(group: argparse._ArgumentGroup) -> None:
    """The options of the completion as a whole."""
    group.add_argument(
        "--soft-time-limit",
        metavar="SECONDS",
        type=seconds,
        help="end the answer normally after this long, with the text so far",
    )
    group.add_argument("--completion-id", metavar="ID", help="an id of your own, to cancel, look up and resume it by")
    group.add_argument(
        "--priority", metavar="N", type=int, help="a lower number is served earlier, if the engine supports it"
    )
    group.add_argument(
        "--cache-salt",
        metavar="TEXT",
        help="share the engine's prefix cache only with requests that have the same salt",
    )
    group.add_argument("--user", metavar="TEXT", help="the end user's id, for the engine")
    group.add_argument(
        "--template-kwargs", metavar="JSON", type=_json_object, help="arguments for the model's chat template"
    )
    group.add_argument(
        "--extra-body", metavar="JSON", type=_json_object, help="further fields for the engine, of those allowed"
    )


def seconds(text: str) -> float:
    """A length of time, in seconds above 0.

    Raises:
        argparse.ArgumentTypeError: It is not a number, or out of range.
    """
    return _length(text, "above 0 and up", math.nextafter(0, 1))


def _delay(text: str) -> float:
    """A length of time, in seconds, 0 or above.

    Raises:
        argparse.ArgumentTypeError: It is not a number, or out of range.
    """
    return _length(text, "from 0", 0)


def _length(text: str, least_in_words: str, least: float) -> float:
    """A length of time, in seconds from `least` to MAX_TIMEOUT."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value <= MAX_TIMEOUT:
        message = f"{text} is not a number of seconds {least_in_words} to {MAX_TIMEOUT}"
        raise argparse.ArgumentTypeError(message)
    return value


def _bias(text: str) -> tuple[int, float]:
    """A token and what is added to its logit.

    Raises:
        argparse.ArgumentTypeError: It is not ID=X.
    """
    token, _, bias = text.partition("=")
    try:
        pair = int(token), float(bias)
    except ValueError:
        pair = -1, 0.0
    if pair[0] < 0:
        message = f"{text} is not ID=X with an ID of 0 or above, such as 1734=-100"
        raise argparse.ArgumentTypeError(message)
    return pair


def _json_object(text: str) -> str:
    """JSON text of an object, verbatim.

    Raises:
        argparse.ArgumentTypeError: It is not JSON, or not an object.
    """
    try:
        is_object = isinstance(json.loads(text), dict)
    except (ValueError, RecursionError) as error:
        message = f"not JSON: {error}"
        raise argparse.ArgumentTypeError(message) from error
    if not is_object:
        message = f"not a JSON object: {text}"
        raise argparse.ArgumentTypeError(message)
    return text
