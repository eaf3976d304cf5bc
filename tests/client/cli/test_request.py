"""What a chat asks, by its options, files and standard input."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from google.protobuf.duration_pb2 import Duration

from deltawire import (
    ChatRequest,
    ResponseFormat,
    StreamOptions,
    ToolChoice,
    chat_request,
    choice,
    grammar,
    image,
    json_schema,
    regex,
    structural_tag,
    system,
    user,
)
from deltawire._cli.arguments import make_parser
from deltawire._cli.request import _NAMES
from deltawire._requests import CHAT_OPTIONS, STREAMING_OPTIONS
from deltawire.v1.chat_completion_pb2 import Sampling, StreamChatCompletionRequest
from tests.client.cli.support import Run, asked
from tests.client.scripted import Gateway, saying

if TYPE_CHECKING:
    from pathlib import Path


WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}


def test_no_delay_is_a_delay(gateway: Gateway, run: Run) -> None:
    """It is sent: 0 is not the same as not given."""
    gateway.will(*saying("hi"))
    assert run("chat", "--model", "llama", "--coalesce", "0", "hi")[0] == 0
    assert gateway.last.request.options == StreamOptions(max_coalesce_delay=Duration())


def test_every_option(gateway: Gateway, run: Run, tmp_path: Path) -> None:
    """Each arrives in its field."""
    one, many = tmp_path / "one.json", tmp_path / "many.json"
    one.write_text(json.dumps(WEATHER))
    many.write_text(json.dumps([{"name": "a"}, {"name": "b", "strict": True}]))
    gateway.will(*saying("hi"))
    status, _, err = run(
        "chat", "--model", "llama", "--system", "be kind", "--tool", str(one), "--tool", str(many),
        "--tool-choice", "required", "--temperature", "0", "--top-p", "0.9", "--top-k", "40", "--min-p", "0.1",
        "--frequency-penalty", "-1", "--presence-penalty", "1", "--repetition-penalty", "1.5", "--seed", "7",
        "--max-tokens", "9", "--min-tokens", "2", "--stop", "END", "--stop", "FIN", "--token", "key",
        "--vllm-token", "other", "--request-id", "mine", "--timeout", "60", "hi",
    )  # fmt: skip
    assert (status, err) == (0, "")
    request = asked(gateway)
    assert list(request.messages) == [system("be kind"), user("hi")]
    assert [each.name for each in request.tools] == ["get_weather", "a", "b"]
    assert request.tool_choice == ToolChoice(mode=ToolChoice.MODE_REQUIRED)
    assert request.sampling == Sampling(
        temperature=0, top_p=0.9, top_k=40, min_p=0.1, frequency_penalty=-1, presence_penalty=1,
        repetition_penalty=1.5, seed=7, max_tokens=9, min_tokens=2, stop=["END", "FIN"],
    )  # fmt: skip
    metadata = gateway.last.metadata
    assert metadata["authorization"] == "Bearer key"
    assert metadata["x-vllm-api-token"] == "other"
    assert metadata["x-request-id"] == "mine"


def test_every_other_option(gateway: Gateway, run: Run, tmp_path: Path) -> None:
    """Each arrives in its field, and what is about the stream in its options."""
    tag = tmp_path / "tag.json"
    tag.write_text('{ "type": "structural_tag" }')
    gateway.will(*saying("hi"))
    status, _, err = run(
        "chat", "--model", "llama", "--allowed-tool", "a", "--allowed-tool", "b", "--no-parallel-tool-calls",
        "--tool-calls", "incremental", "--validate-schema", "--reasoning-effort", "high", "--reasoning-budget", "0",
        "--no-reasoning", "--structural-tag", str(tag), "--choices", "2", "--logprobs", "3", "--stop-token-id", "7",
        "--stop-token-id", "8", "--ignore-eos", "--logit-bias", "5=-100", "--logit-bias", "6=0.5", "--bad-word", "no",
        "--soft-time-limit", "1.5", "--completion-id", "mine", "--priority", "-1", "--cache-salt", "salt",
        "--user", "somebody", "--template-kwargs", '{"a" : 1}', "--extra-body", "{}", "--usage-updates",
        "--coalesce", "0.05", "--heartbeat", "20", "--early-heartbeats", "--retention", "60", "hi",
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert gateway.last.request == StreamChatCompletionRequest(
        chat=chat_request(
            "hi",
            model="llama",
            allowed_tools=["a", "b"],
            parallel_tool_calls=False,
            incremental_tool_calls=True,
            validate_schema=True,
            reasoning="high",
            reasoning_token_budget=0,
            include_reasoning=False,
            response_format=structural_tag('{ "type": "structural_tag" }'),
            choice_count=2,
            logprobs=3,
            stop_token_ids=[7, 8],
            ignore_eos=True,
            logit_bias={5: -100, 6: 0.5},
            bad_words=["no"],
            soft_time_limit=1.5,
            completion_id="mine",
            priority=-1,
            cache_salt="salt",
            user="somebody",
            chat_template_kwargs='{"a" : 1}',
            extra_body="{}",
        ),
        options=StreamOptions(
            usage_updates=True,
            max_coalesce_delay=Duration(nanos=50_000_000),
            heartbeat_interval=Duration(seconds=20),
            early_heartbeats=True,
            retention=Duration(seconds=60),
        ),
    )


def test_every_argument_of_a_request_has_an_option() -> None:
    """What the client takes can be typed: a new argument shows here."""
    options = vars(make_parser().parse_args(["chat", "--logit-bias", "1=1", "hi"]))
    made = {"tools", "incremental_tool_calls", "logit_bias", "response_format"}
    # A whole message cannot be typed, but its fields can.
    whole = {"sampling", "stream_options"}
    named = {_NAMES.get(name, name) for name in options}
    assert (CHAT_OPTIONS | STREAMING_OPTIONS) - made - whole <= named


@pytest.mark.parametrize(
    ("option", "value", "form"),
    [
        ("--response-format", "json_object", ResponseFormat(json_object=ResponseFormat.JsonObject())),
        ("--regex", "a+", regex("a+")),
        ("--choice", "yes", choice(["yes"])),
        ("--json-schema", b'{"type": "object"}', json_schema('{"type": "object"}')),
        ("--grammar", b'root ::= "a"', grammar('root ::= "a"')),
    ],
)
def test_the_form_of_the_answer(
    gateway: Gateway, run: Run, tmp_path: Path, option: str, value: str | bytes, form: ResponseFormat
) -> None:
    """Typed, or in a file where it is long; one of them, not two."""
    if isinstance(value, bytes):
        path = tmp_path / "form"
        path.write_bytes(value)
        value = str(path)
    gateway.will(*saying("hi"))
    assert run("chat", "--model", "llama", option, value, "hi")[0] == 0
    assert asked(gateway).response_format == form
    other = "--choice" if option == "--regex" else "--regex"
    status, _, err = run("chat", "--model", "llama", option, value, other, "a", "hi")
    assert (status, "not allowed with" in err) == (2, True)


def test_images(gateway: Gateway, run: Run, tmp_path: Path) -> None:
    """Beside the prompt: a file's bytes, and a URL as it is; or after the messages of a request."""
    path = tmp_path / "cat.png"
    path.write_bytes(b"png")
    gateway.will(*saying("hi"))
    url = "https://example.com/cat.png"
    assert run("chat", "--model", "llama", "--image", str(path), "--image", url, "What?")[0] == 0
    assert list(asked(gateway).messages) == [user(["What?", image(b"png"), image(url)])]
    gateway.will(*saying("hi"))
    request = '{"model": "llama", "messages": [{"user": {"text": "1"}}]}'
    assert run("chat", "--request", "-", "--image", str(path), stdin=request)[0] == 0
    assert list(asked(gateway).messages) == [user("1"), user(image(b"png"))]
    status, _, err = run("chat", "--model", "llama", "--image", str(tmp_path / "dog.png"), "What?")
    assert (status, err) == (2, f"error: {tmp_path}/dog.png: No such file or directory\n")


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_standard_input_is_the_prompt(gateway: Gateway, run: Run, arguments: list[str]) -> None:
    """If it is no terminal, or if it is asked for."""
    gateway.will(*saying("hi"))
    assert run("chat", "--model", "llama", *arguments, stdin="from a pipe\n")[0] == 0
    assert asked(gateway).messages[0] == user("from a pipe\n")


def test_a_request_in_a_file(gateway: Gateway, run: Run, tmp_path: Path) -> None:
    """It is sent as it is."""
    path = tmp_path / "request.json"
    path.write_text('{"model": "llama", "messages": [{"user": {"text": "hi"}}], "choiceCount": 2}')
    gateway.will(*saying("hi"))
    assert run("chat", "--request", str(path))[0] == 0
    assert asked(gateway) == ChatRequest(model="llama", messages=[user("hi")], choice_count=2)


def test_options_are_laid_over_a_request(gateway: Gateway, run: Run) -> None:
    """They replace values; the prompt comes after the messages, instructions before them."""
    request = '{"model": "a", "messages": [{"user": {"text": "1"}}], "sampling": {"seed": "1", "topK": 2}}'
    gateway.will(*saying("hi"))
    arguments = ("--request", "-", "--model", "b", "--seed", "3", "--system", "0", "2")
    assert run("chat", *arguments, stdin=request)[0] == 0
    assert asked(gateway) == ChatRequest(
        model="b", messages=[system("0"), user("1"), user("2")], sampling=Sampling(seed=3, top_k=2)
    )


def test_tools_in_an_object(gateway: Gateway, run: Run, tmp_path: Path) -> None:
    """As in the body of a request to OpenAI's API."""
    path = tmp_path / "tools.json"
    path.write_text(json.dumps({"tools": [WEATHER, {"name": "b"}]}))
    gateway.will(*saying("hi"))
    assert run("chat", "--tool", str(path), "hi")[0] == 0
    assert [each.name for each in asked(gateway).tools] == ["get_weather", "b"]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ('{"tools": [{"name": "a"}, 3]}', "tools.json: tool 2: not a JSON object"),
        ("{", "tools.json: not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("3", "tools.json: not a JSON object"),
        ('[{"name": "a"}, 3]', "tools.json: tool 2: not a JSON object"),
        ('[{"name": "a"}, {}]', 'tools.json: tool 2: the tool has no "name"'),
        (
            '{"name": "a", "input_schema": {}}',
            'the tool has an unknown member "input_schema"; known are description, name',
        ),
        (
            '{"type": "function", "strict": true, "function": {"name": "a"}}',
            'the tool has an unknown member "strict"; known are function, type',
        ),
        ('{"type": "web_search"}', "tools.json: the tool's \"type\" is 'web_search'"),
        (b"\xff", "tools.json: not UTF-8 text"),
        ("[" * 1_000_000 + "]" * 1_000_000, "tools.json: not JSON: "),
        (None, "tools.json: No such file or directory"),
    ],
)
def test_tool_files_that_are_wrong(run: Run, tmp_path: Path, content: str | bytes | None, what: str) -> None:
    """The message names the file, the tool and what is wrong."""
    path = tmp_path / "tools.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    status, _, err = run("chat", "--model", "llama", "--tool", str(path), "hi")
    assert status == 2
    assert what in err
    assert err.startswith(f"error: {tmp_path}")


def test_requests_that_are_wrong(run: Run) -> None:
    """The message names the source and the field."""
    status, _, err = run("chat", "--request", "-", stdin='{"modle": "llama"}')
    assert status == 2
    assert err.startswith("error: standard input: not a ChatRequest: ")
    assert "modle" in err


@pytest.mark.parametrize("content", ["null", "5", '"a"', "[]", ""])
def test_a_request_that_is_not_an_object(gateway: Gateway, run: Run, tmp_path: Path, content: str) -> None:
    """The message names the file; an empty list is not an empty request."""
    path = tmp_path / "request.json"
    path.write_text(content)
    assert run("chat", "--request", str(path)) == (2, "", f"error: {path}: not a JSON object\n")
    assert gateway.calls == []


def test_a_field_that_is_not_an_object(run: Run) -> None:
    """The message names the field, and has no words of Python's."""
    status, _, err = run("chat", "--request", "-", stdin='{"messages": [5]}')
    problem = "Failed to parse messages field: it must be an object."
    assert (status, err) == (2, f"error: standard input: not a ChatRequest: {problem}\n")


def test_a_byte_order_mark(gateway: Gateway, run: Run, tmp_path: Path) -> None:
    """It is no part of a file or of standard input."""
    request, tools = tmp_path / "request.json", tmp_path / "tools.json"
    request.write_text('{"messages": [{"user": {"text": "1"}}]}', encoding="utf-8-sig")
    tools.write_text(json.dumps(WEATHER), encoding="utf-8-sig")
    gateway.will(*saying("hi"))
    assert run("chat", "--request", str(request), "--tool", str(tools), "-", stdin="\ufeff2")[0] == 0
    assert list(asked(gateway).messages) == [user("1"), user("2")]


def test_a_message_in_the_form_of_openai(run: Run) -> None:
    """The message shows the form to write instead."""
    request = '{"messages": [{"role": "user", "content": "hi"}]}'
    status, _, err = run("chat", "--request", "-", stdin=request)
    assert (status, err.endswith('write {"user": {"text": "hi"}}\n'), err.count("\n")) == (2, True, 1)


@pytest.mark.parametrize("arguments", [[], ["--request", "-"]])
def test_standard_input_that_is_no_text(run: Run, arguments: list[str]) -> None:
    """Bytes that are not UTF-8 come as lone surrogates."""
    result = run("chat", "--model", "llama", *arguments, stdin="h\udcff")
    assert result == (2, "", "error: standard input: not UTF-8 text\n")
