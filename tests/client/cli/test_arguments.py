"""The command line: help, the version, and what is said of wrong usage."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import deltawire
from deltawire._cli import main

if TYPE_CHECKING:
    from tests.client.cli.support import Run
    from tests.client.scripted import Gateway


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """The program and its version, also as a module."""
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"deltawire {deltawire.__version__}\n"


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["chat"],
        ["models"],
        ["models", "list"],
        ["models", "watch"],
        ["models", "register"],
        ["models", "update"],
        ["models", "refresh"],
        ["providers"],
        ["health"],
        ["cancel"],
        ["get"],
        ["resume"],
        ["count-tokens"],
    ],
)
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Every command explains itself; chat with examples."""
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: {' '.join(['deltawire', *command])}")
    if command in ([], ["chat"]):
        assert "examples:" in out


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["chat", "--request", "-", "-"], "cannot be both"),
        (["chat", "--model", "llama"], "there is no prompt: standard input is empty"),
        (
            ["chat", "--max-tokens", "2147483648", "hi"],
            "error: --max-tokens: 2147483648 is not a whole number from -2147483648 to 2147483647\n",
        ),
        (
            ["chat", "--reasoning-budget", "2147483648", "hi"],
            "error: --reasoning-budget: 2147483648 is not a whole number from -2147483648 to 2147483647",
        ),
        (["chat", "--priority", "99999999999", "hi"], "error: --priority: 99999999999 is not a whole number from -2"),
        (
            ["chat", "--logprobs", "2147483648", "hi"],
            "error: --logprobs: 2147483648 is not a whole number from -2147483648 to 2147483647",
        ),
        (["chat", "--seed", "99999999999999999999", "hi"], "error: --seed: 99999999999999999999 is not a whole"),
        (
            ["chat", "--logit-bias=2147483648=1", "hi"],
            "error: --logit-bias: {2147483648: 1.0} does not give a finite number for a whole",
        ),
        (
            ["chat", "--choices", "2147483648", "hi"],
            "error: --choices: 2147483648 is not a whole number from -2147483648 to 2147483647",
        ),
        (["chat", "--image", "", "hi"], "error: --image is empty: give a file or a URL"),
        (["chat", "--max-tokens", "many", "hi"], "invalid int value: 'many'"),
        (["chat", "--target", "gateway:1", "--token", "key", "hi"], "or allow it with --insecure"),
        (["chat", "--target", "gateway:1", "--vllm-token", "key", "hi"], "or allow it with --insecure"),
        (["chat", "--cert-file", "cert.pem", "hi"], "give both --cert-file and --key-file, or neither"),
        (["chat", "--ca-file", "/nowhere/ca.pem", "hi"], "/nowhere/ca.pem: No such file or directory"),
        (["models", "register", "llama", "--annotation", "owner"], "--annotation owner: not KEY=VALUE"),
        (["models", "update", "llama", "--annotation", "owner"], "--annotation owner: not KEY=VALUE"),
        (["models", "update", "llama", "--etag", "r1"], "there is nothing to change"),
        (["models", "update", "llama", "--alias", "l", "--etag", ""], "--etag: is empty"),
        (["models", "unregister", "llama", "--etag", ""], "--etag: is empty"),
        (["models", "list", "--target", ""], "the target is empty: write host:port"),
        (["models", "list", "--target", "http://gateway:1/"], "is a URL: write gateway:1"),
        (["models", "list", "--token", "a\nb"], "error: --token must be printable ASCII"),
        (
            ["models", "update", "llama", "--alias", "l", "--no-aliases"],
            "--no-aliases: not allowed with argument --alias",
        ),
        (["models", "register", "bge", "--embedding-dimension", "0"], "0 is not a whole number from 1 to 2147483647"),
        (["models", "register", "bge", "--embedding-dimension", "many"], "many is not a whole number from 1 to"),
        (["models", "list", "--state", "asleep"], "invalid choice: 'asleep'"),
        (["models", "watch", "--revision", "\udcff"], "error: --revision: not UTF-8 text"),
        (["chat", "--model", "llama", "h\udcff"], "error: the prompt is not UTF-8 text"),
        (["chat", "--model", "llama", "--stop", "a", "--stop", "\udcff", "hi"], "error: --stop: not UTF-8 text"),
        (["chat", "--system", "\udcff", "hi"], "error: --system: not UTF-8 text"),
        (["chat", "--request-id", "\udcff", "hi"], "error: --request-id: not UTF-8 text"),
        (
            ["chat", "--request-id", "ü", "hi"],
            "error: --request-id must be printable ASCII, to be sent in a header: 'ü' is not\n",
        ),
        (["models", "list", "--vllm-token", "a b"], "error: --vllm-token must be printable ASCII without spaces"),
        (
            ["chat", "--target", "gateway", "hi"],
            "error: --target gateway: needs a port from 1 to 65535, as in 127.0.0.1:50051\n",
        ),
        (["chat", "--target", "::1", "hi"], "error: --target ::1: needs a port"),
        (["chat", "--target", "dns:///gateway", "hi"], "error: --target dns:///gateway: needs a port"),
        (["chat", "--target", "127.0.0.1:115587", "hi"], "error: --target 127.0.0.1:115587: needs a port"),
        (["chat", "--target", "127.0.0.1:0", "hi"], "error: --target 127.0.0.1:0: needs a port"),
        (["models", "get", "\udcff"], "error: the model is not UTF-8 text"),
        (["chat", "--template-kwargs", "{", "hi"], "--template-kwargs: not JSON: Expecting"),
        (["chat", "--extra-body", "[]", "hi"], "--extra-body: not a JSON object: []"),
        (
            ["chat", "--logit-bias", "5", "hi"],
            "--logit-bias: 5 is not ID=X with an ID of 0 or above, such as 1734=-100",
        ),
        (["chat", "--logit-bias", "a=1", "hi"], "--logit-bias: a=1 is not ID=X"),
        (["chat", "--logit-bias=-1=2", "hi"], "--logit-bias: -1=2 is not ID=X with an ID of 0 or above"),
        (["chat", "--logit-bias", "1=nan", "hi"], "error: --logit-bias: {1: nan} does not give a finite number"),
        (["chat", "--temperature", "inf", "hi"], "error: --temperature: inf is not a finite number"),
        (["chat", "hi", "--stop", "-x"], "expected one argument; a value that begins with - needs --stop=VALUE"),
        (["chat", "--soft-time-limit", "0", "hi"], "--soft-time-limit: 0 is not a number of seconds above 0"),
        (["chat", "--timeout", "0", "hi"], "--timeout: 0 is not a number of seconds above 0"),
        (["models", "list", "--timeout", "-1"], "--timeout: -1 is not a number of seconds above 0 and up to"),
        (
            ["chat", "--retention", "nan", "hi"],
            "--retention: nan is not a number of seconds above 0 and up to 1000000000",
        ),
        (["chat", "--heartbeat", "1e300", "hi"], "--heartbeat: 1e300 is not a number of seconds above 0 and up to"),
        (["chat", "--coalesce", "soon", "hi"], "--coalesce: soon is not a number of seconds from 0"),
        (["chat", "--coalesce", "-1", "hi"], "--coalesce: -1 is not a number of seconds from 0"),
        (["chat", "--reasoning-effort", "much", "hi"], "invalid choice: 'much'"),
        (
            ["chat", "--stop-token-id", "2147483648", "hi"],
            "error: --stop-token-id: 2147483648 is not a whole number from -2147483648 to 2147483647",
        ),
        (["chat", "--bad-word", "\udcff", "hi"], "error: --bad-word: not UTF-8 text"),
        (["resume", "mine", "--after", "-1"], "--after: -1 is not a whole number from 0 to 9223372036854775807"),
        (["resume", "mine", "--after", "x"], "--after: x is not a whole number from 0 to 9223372036854775807"),
        (["cancel"], "the following arguments are required: ID"),
        (["get", "\udcff"], "error: the completion is not UTF-8 text"),
        (["models"], "the following arguments are required: COMMAND"),
        (["sing"], "invalid choice: 'sing'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_wrong_usage(gateway: Gateway, run: Run, arguments: list[str], what: str) -> None:
    """Status 2 and a sentence that says what to change; nothing is called."""
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert what.lower() in err.lower()
    assert gateway.calls == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chat", "--nope", "hi"], "unrecognized arguments: --nope\nsee deltawire chat --help"),
        (["models", "get"], "the following arguments are required: MODEL\nsee deltawire models get --help"),
        ([], "the following arguments are required: COMMAND\nsee deltawire --help"),
    ],
)
def test_wrong_usage_is_one_line_and_a_hint(run: Run, arguments: list[str], message: str) -> None:
    """The usage of a command is longer than a screen, so it is printed by --help alone."""
    assert run(*arguments) == (2, "", f"error: {message}\n")
