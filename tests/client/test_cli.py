"""The command: what goes to standard output, what to standard error, and the exit status."""

from __future__ import annotations

import builtins
import io
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc
import pytest
from google.protobuf.json_format import Parse

import deltawire
from deltawire import ChatRequest, ToolCall, ToolChoice, assistant, system, tool, user
from deltawire._cli import main
from deltawire.v1 import model_registry_pb2 as registry
from deltawire.v1.chat_completion_pb2 import Completed, Sampling, StreamChatCompletionResponse
from tests.client.scripted import (
    WAIT,
    Event,
    Fail,
    Gateway,
    call_failed,
    called,
    calling,
    choice,
    completed,
    finished,
    model,
    numbered,
    reasoning,
    saying,
    started,
    text,
)

if TYPE_CHECKING:
    from pathlib import Path

STATUS = grpc.StatusCode
CALL = ToolCall(call_id="call_1", tool_name="get_weather", arguments='{\n  "city": "Köln"\n}')
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}

Run: TypeAlias = Callable[..., tuple[int, str, str]]


class Terminal(io.StringIO):
    """Text in memory that says it is a terminal."""

    def isatty(self) -> bool:
        """It is."""
        return True


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The developer's own settings stay out."""
    monkeypatch.delenv("DELTAWIRE_TARGET", raising=False)
    monkeypatch.delenv("DELTAWIRE_TOKEN", raising=False)


@pytest.fixture
def run(gateway: Gateway, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command against the gateway; `stdin` is text, or a list of lines typed at a terminal."""

    def run(*arguments: str, stdin: str | list[Any] = "") -> tuple[int, str, str]:
        if isinstance(stdin, str):
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        else:
            monkeypatch.setattr(sys, "stdin", Terminal())
            monkeypatch.setattr(builtins, "input", typed(iter(stdin)))
        monkeypatch.setenv("DELTAWIRE_TARGET", gateway.target)
        try:
            status = main(arguments)
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def typed(lines: Iterator[Any]) -> Callable[[str], str]:
    """What `input` does when somebody types this; an exception is a key like Ctrl-D."""

    def answer(prompt: str = "") -> str:
        print(prompt, end="")
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    return answer


def asked(gateway: Gateway, index: int = -1) -> ChatRequest:
    """What a chat call asked for."""
    request: ChatRequest = gateway.calls[index].request.chat
    return request


# --- chat: output ----------------------------------------------------------------------------------------------------


def test_text(gateway: Gateway, run: Run) -> None:
    """The text, a newline after it, nothing else."""
    gateway.will(*saying("Hel", "lo"))
    assert run("chat", "--model", "llama", "hi") == (0, "Hello\n", "")
    assert asked(gateway) == ChatRequest(model="llama", messages=[user("hi")])


def test_text_that_ends_its_line(gateway: Gateway, run: Run) -> None:
    """No empty line is added."""
    gateway.will(*saying("Hello\n"))
    assert run("chat", "--model", "llama", "hi")[1] == "Hello\n"


def test_json(gateway: Gateway, run: Run) -> None:
    """Every event on a line of its own, which reads back as the event; names and enums as protobuf JSON has them."""
    gateway.will(*saying("Hé", "lo"))
    status, out, err = run("chat", "--model", "llama", "--json", "hi")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert [Parse(line, StreamChatCompletionResponse()) for line in lines] == saying("Hé", "lo")
    assert json.loads(lines[1]) == {"sequence": "1", "choiceIndex": 0, "textDelta": {"text": "Hé"}}
    assert json.loads(lines[-1])["completed"]["choices"][0]["stopReason"] == "STOP_REASON_END_OF_TURN"


def test_tool_calls(gateway: Gateway, run: Run) -> None:
    """One readable line each, on a line of its own."""
    gateway.will(*calling(CALL, said="Let me look."))
    status, out, _ = run("chat", "--model", "llama", "hi")
    assert (status, out) == (0, 'Let me look.\ntool call: get_weather({"city": "Köln"})\n')


def test_tool_calls_that_failed(gateway: Gateway, run: Run) -> None:
    """With what the model wrote, on one line too; and why the answer ended."""
    nameless = call_failed("", "{}", 1)
    events = numbered(
        started(), call_failed("f", '{"a":\n 1'), nameless, finished(reason="OUT_OF_TOKENS"),
        completed(choice(reason="OUT_OF_TOKENS")),
    )  # fmt: skip
    gateway.will(*events)
    status, out, err = run("chat", "--model", "llama", "hi")
    assert status == 0
    assert out.splitlines() == [
        'tool call failed: f({"a": 1): TRUNCATED: the answer was cut',
        "tool call failed: (no name)({}): TRUNCATED: the answer was cut",
    ]
    assert err == "note: the answer ended with OUT_OF_TOKENS\n"


def test_several_choices(gateway: Gateway, run: Run) -> None:
    """The first as it comes, the others after it, whole."""
    broken = call_failed("g", "{", 0, 1)
    other = choice(1, "B", "OUT_OF_TOKENS", calls=[CALL], failed_tool_calls=[broken.tool_call_delta])
    gateway.will(
        *numbered(
            started(), text("a"), text("B", 1), called(CALL, 0, 1), broken, text("b"), finished(0),
            finished(1, "OUT_OF_TOKENS"), completed(choice(0, "ab"), other),
        )
    )  # fmt: skip
    status, out, err = run("chat", "--model", "llama", "hi")
    assert status == 0
    assert out.splitlines() == [
        "ab",
        "--- choice 1",
        "B",
        'tool call: get_weather({"city": "Köln"})',
        "tool call failed: g({): TRUNCATED: the answer was cut",
    ]
    assert err == "note: choice 1 ended with OUT_OF_TOKENS\n"


def test_reasoning_is_for_terminals(gateway: Gateway, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dimmed, on standard error, and the terminal is as it was before the text begins; in a file it is not there."""
    events = numbered(
        started(), reasoning("h"), reasoning("m\x1b[31m"), text("hi"), finished(), completed(choice(said="hi"))
    )
    gateway.will(*events)
    assert run("chat", "--model", "llama", "hi") == (0, "hi\n", "")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    gateway.will(*events)
    assert run("chat", "--model", "llama", "hi")[1] == "hi\n"
    assert terminal.getvalue() == "\x1b[2mhm␛[31m\x1b[0m\n"


def test_reasoning_that_breaks_off(gateway: Gateway, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal is as it was, also then."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    gateway.will(*numbered(started(), reasoning("hm")))
    assert run("chat", "--model", "llama", "hi")[0] == 1
    assert terminal.getvalue().startswith("\x1b[2mhm\x1b[0m\nerror: UNKNOWN: the stream ended without its last event\n")


def test_a_model_does_not_steer_the_terminal(gateway: Gateway, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control characters are shown on a terminal, and kept in a file."""
    said = "a\x1b]52;c;eA==\x07\x9b\tb\n"
    gateway.will(*saying(said))
    assert run("chat", "--model", "llama", "hi")[1] == said
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    gateway.will(*saying(said))
    run("chat", "--model", "llama", "hi")
    assert terminal.getvalue() == "a␛]52;c;eA==␇\ufffd\tb\n"


# --- chat: failures --------------------------------------------------------------------------------------------------


def test_a_failed_call(gateway: Gateway, run: Run) -> None:
    """Status 1; name, reason, message, every violation on a line, when to try again, and the request id."""
    fail = Fail(
        STATUS.INVALID_ARGUMENT,
        "INVALID_REQUEST",
        "two fields",
        violations=[("chat.messages", "is empty"), ("chat.model", "is empty")],
        retry_after=1.5,
    )
    gateway.will(fail)
    status, out, err = run("chat", "--model", "llama", "--request-id", "mine", "hi")
    assert (status, out) == (1, "")
    assert err.splitlines() == [
        "error: INVALID_ARGUMENT (INVALID_REQUEST): two fields",
        "  chat.messages: is empty",
        "  chat.model: is empty",
        "  try again in 1.5 s",
        "  request id: mine",
    ]


def faulted() -> list[Event]:
    """A stream that a fault ended, as far as the gateway could tell."""
    error = Completed.Error(code=10, reason=15, message="it broke off")  # type: ignore[arg-type]
    end = completed(choice(said="Hel", reason="UPSTREAM_INCOMPLETE"), error=error)
    return numbered(started(), text("Hel"), finished(reason="UPSTREAM_INCOMPLETE"), end)


@pytest.mark.parametrize("end", [[], [Fail(STATUS.ABORTED, "UPSTREAM_INCOMPLETE", "it broke off")]])
def test_a_fault_keeps_what_came(gateway: Gateway, run: Run, end: list[Fail]) -> None:
    """The text stays on a line of its own; the status is 1 even if a proxy lost the call's own."""
    gateway.will(*faulted(), *end)
    status, out, err = run("chat", "--model", "llama", "hi")
    assert (status, out) == (1, "Hel\n")
    assert err.startswith("error: ABORTED (UPSTREAM_INCOMPLETE): it broke off\n")


def test_a_fault_in_json(gateway: Gateway, run: Run) -> None:
    """`completed` with its error is printed like every event."""
    gateway.will(*faulted(), Fail(STATUS.ABORTED, "UPSTREAM_INCOMPLETE"))
    status, out, err = run("chat", "--model", "llama", "--json", "hi")
    assert status == 1
    assert json.loads(out.splitlines()[-1])["completed"]["error"] == {
        "code": 10,
        "reason": "ERROR_REASON_UPSTREAM_INCOMPLETE",
        "message": "it broke off",
    }
    assert err.startswith("error: ABORTED")


def test_a_stream_that_breaks_the_rules(gateway: Gateway, run: Run) -> None:
    """It is an error with its request id."""
    gateway.will(*saying("a")[1:])
    status, _, err = run("chat", "--model", "llama", "--request-id", "mine", "hi")
    assert status == 1
    assert "event 0 was expected and 1 came" in err
    assert "request id: mine" in err


# --- chat: the request -----------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_standard_input_is_the_prompt(gateway: Gateway, run: Run, arguments: list[str]) -> None:
    """If it is no terminal, or if it is asked for."""
    gateway.will(*saying("hi"))
    assert run("chat", "--model", "llama", *arguments, stdin="from a pipe\n")[0] == 0
    assert asked(gateway).messages[0] == user("from a pipe\n")


def test_a_request_in_a_file(gateway: Gateway, run: Run, tmp_path: Path) -> None:
    """It is sent as it is."""
    path = tmp_path / "request.json"
    path.write_text('{"model": "llama", "messages": [{"user": {"content": [{"text": "hi"}]}}], "choiceCount": 2}')
    gateway.will(*saying("hi"))
    assert run("chat", "--request", str(path))[0] == 0
    assert asked(gateway) == ChatRequest(model="llama", messages=[user("hi")], choice_count=2)


def test_options_are_laid_over_a_request(gateway: Gateway, run: Run) -> None:
    """They replace values; the prompt comes after the messages, instructions before them."""
    request = (
        '{"model": "a", "messages": [{"user": {"content": [{"text": "1"}]}}], "sampling": {"seed": "1", "topK": 2}}'
    )
    gateway.will(*saying("hi"))
    arguments = ("--request", "-", "--model", "b", "--seed", "3", "--system", "0", "2")
    assert run("chat", *arguments, stdin=request)[0] == 0
    assert asked(gateway) == ChatRequest(
        model="b", messages=[system("0"), user("1"), user("2")], sampling=Sampling(seed=3, top_k=2)
    )


@pytest.mark.parametrize(
    ("models", "chosen"),
    [
        ([model("llama")], "llama"),
        ([model("bge", type=registry.MODEL_TYPE_EMBEDDING), model("llama")], "llama"),
        ([model("llama", provider_model_id="m"), model("vllm/m", source=registry.MODEL_SOURCE_DISCOVERED)], "llama"),
        ([model("vllm/m", source=registry.MODEL_SOURCE_DISCOVERED), model("z", provider_model_id="m")], "z"),
    ],
)
def test_the_only_model(gateway: Gateway, run: Run, models: list[registry.Model], chosen: str) -> None:
    """Without --model it is taken; a model and its registration are one."""
    gateway.will(registry.ListModelsResponse(models=models))
    gateway.will(*saying("hi"))
    assert run("chat", "hi")[0] == 0
    assert asked(gateway).model == chosen


def test_no_model_to_choose(gateway: Gateway, run: Run) -> None:
    """Several are listed, none is said to be none, and who did not answer is named."""
    gateway.will(registry.ListModelsResponse(models=[model("b"), model("a")]))
    assert run("chat", "hi") == (2, "", "error: there is more than one model; give --model, one of: a, b\n")
    gateway.will(registry.ListModelsResponse(unreachable_provider_ids=["vllm"]))
    status, _, err = run("chat", "hi")
    assert status == 2
    assert err.splitlines() == [
        "note: did not answer, so models may be missing: vllm",
        "error: there is no model to chat with",
    ]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("{", "tools.json: not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("3", "tools.json: not an object"),
        ('[{"name": "a"}, 3]', "tools.json: tool 2: not an object"),
        ('[{"name": "a"}, {}]', 'tools.json: tool 2: the tool has no "name"'),
        ('{"type": "web_search"}', "tools.json: the tool's \"type\" is 'web_search'"),
        (b"\xff", "tools.json: not UTF-8 text"),
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


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["chat", "--request", "-", "-"], "cannot be both"),
        (["chat", "--model", "llama"], "there is no prompt: standard input is empty"),
        (["chat", "--model", "llama", "--max-tokens", "-1", "hi"], "out of range"),
        (["chat", "--max-tokens", "many", "hi"], "invalid int value: 'many'"),
        (["chat", "--target", "gateway:1", "--token", "key", "hi"], "or allow it with --insecure"),
        (["chat", "--target", "gateway:1", "--vllm-token", "key", "hi"], "or allow it with --insecure"),
        (["chat", "--cert-file", "cert.pem", "hi"], "give both or neither"),
        (["chat", "--ca-file", "/nowhere/ca.pem", "hi"], "/nowhere/ca.pem: No such file or directory"),
        (["models", "register", "llama", "--metadata", "owner"], "--metadata owner: not KEY=VALUE"),
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


# --- chat: a conversation --------------------------------------------------------------------------------------------


def test_a_conversation(gateway: Gateway, run: Run) -> None:
    """Each turn knows those before it; empty lines are nothing; Ctrl-D ends it well."""
    gateway.will(*saying("one"))
    gateway.will(*saying("two"))
    status, out, err = run("chat", "--model", "llama", "--system", "be brief", stdin=["1?", "  ", "2?", EOFError()])
    assert (status, out) == (0, "> one\n> > two\n> ")
    assert err.startswith("llama; Ctrl-C stops an answer")
    turns = [system("be brief"), user("1?"), assistant("one"), user("2?")]
    assert list(asked(gateway).messages) == turns


def test_tool_calls_in_a_conversation(gateway: Gateway, run: Run) -> None:
    """Whoever types is asked for the results."""
    gateway.will(*calling(CALL))
    gateway.will(*saying("Rain."))
    status, out, _ = run("chat", "--model", "llama", stdin=["Köln?", "rain", EOFError()])
    assert status == 0
    assert 'result of get_weather({"city": "Köln"})> ' in out
    assert list(asked(gateway).messages) == [user("Köln?"), assistant(tool_calls=[CALL]), tool(CALL, "rain")]


def test_a_failed_turn_leaves_no_trace(gateway: Gateway, run: Run) -> None:
    """The error is shown, and the conversation goes on without the turn; so it does without a tool's result."""
    gateway.will(Fail(STATUS.INTERNAL, "INTERNAL"))
    gateway.will(*calling(CALL))
    gateway.will(*saying("hi"))
    status, _, err = run("chat", "--model", "llama", stdin=["1?", "2?", EOFError(), "3?", EOFError()])
    assert status == 0
    assert "error: INTERNAL (INTERNAL): it failed" in err
    assert "note: no result, so the turn is dropped" in err
    assert list(asked(gateway).messages) == [user("3?")]


def test_ctrl_c_at_the_prompt(run: Run) -> None:
    """It ends everything."""
    status, _, err = run("chat", "--model", "llama", stdin=[KeyboardInterrupt()])
    assert status == 130
    assert err.endswith("interrupted\n")


def test_ctrl_c_in_an_answer(gateway: Gateway, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends that answer, keeps what came, and the conversation goes on."""

    class Stopped(Terminal):
        """Standard output whose reader presses Ctrl-C when the text comes."""

        def write(self, piece: str) -> int:
            """Write, and then be interrupted."""
            super().write(piece)
            if piece == "Hel":
                raise KeyboardInterrupt
            return len(piece)

    out = Stopped()
    monkeypatch.setattr(sys, "stdout", out)
    gateway.will(*saying("Hel", "lo")[:2], WAIT)
    gateway.will(*saying("yes"))
    status, _, err = run("chat", "--model", "llama", stdin=["1?", "2?", EOFError()])
    assert status == 0
    assert "note: the answer was stopped" in err
    assert "Hel" in out.getvalue()
    assert gateway.calls[0].ended.wait(10)
    assert list(asked(gateway).messages)[-1] == user("2?")


# --- The process -----------------------------------------------------------------------------------------------------


def start(gateway: Gateway, *arguments: str) -> subprocess.Popen[bytes]:
    """Start the command as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "deltawire", *arguments],
        env=os.environ | {"DELTAWIRE_TARGET": gateway.target},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_ctrl_c(gateway: Gateway) -> None:
    """The call is cancelled, what came is kept, the status is 130."""
    gateway.will(*saying("Hel", "lo")[:2], WAIT)
    with start(gateway, "chat", "--model", "llama", "hi") as process:
        assert process.stdout is not None
        assert process.stdout.read(3) == b"Hel"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert (out, err) == (b"\n", b"interrupted\n")
    assert gateway.last.ended.wait(10)


def test_a_reader_that_has_gone(gateway: Gateway) -> None:
    """As with `| head -1`: the call is cancelled, and nothing is said about it."""
    gateway.will(*saying("Hel", *["lo\n"] * 5000))
    with start(gateway, "chat", "--model", "llama", "--json", "hi") as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b'{"started"')
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """The program and its version, also as a module."""
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"deltawire {deltawire.__version__}\n"


def test_it_runs_as_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m deltawire` is the same program."""
    monkeypatch.setattr(sys, "argv", ["deltawire", "--version"])
    with pytest.raises(SystemExit):
        runpy.run_module("deltawire", run_name="__main__")
    assert capsys.readouterr().out == f"deltawire {deltawire.__version__}\n"


@pytest.mark.parametrize(
    "command", [[], ["chat"], ["models"], ["models", "list"], ["models", "register"], ["providers"], ["health"]]
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


def test_the_token_of_the_environment(gateway: Gateway, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it is in no list of processes; the option comes before it."""
    monkeypatch.setenv("DELTAWIRE_TOKEN", "from-env")
    for arguments, expected in ([], "Bearer from-env"), (["--token", "given"], "Bearer given"):
        gateway.will(registry.ListProvidersResponse())
        run("providers", *arguments)
        assert gateway.last.metadata["authorization"] == expected


def test_tls_is_used_if_asked_for(gateway: Gateway, run: Run) -> None:
    """A gateway that speaks plaintext is not talked to."""
    status, _, err = run("providers", "--tls", "--timeout", "5")
    assert status == 1
    assert err.startswith("error: UNAVAILABLE: ")
    assert gateway.calls == []


# --- models, providers, health ---------------------------------------------------------------------------------------

LLAMA = model("llama", provider_model_id="meta/llama", max_context_tokens=8192, aliases=["l", "ll"])
FOUND = model("vllm/qwen", source=registry.MODEL_SOURCE_DISCOVERED)


def test_models_list(gateway: Gateway, run: Run) -> None:
    """A table over all pages; who did not answer is on standard error."""
    gateway.will(registry.ListModelsResponse(models=[LLAMA], next_page_token="2"))
    gateway.will(registry.ListModelsResponse(models=[FOUND], unreachable_provider_ids=["other"]))
    status, out, err = run("models", "list")
    assert status == 0
    assert out == (
        "ID         TYPE  SOURCE      PROVIDER  CONTEXT  ALIASES\n"
        "llama      llm   registered  vllm      8192     l, ll\n"
        "vllm/qwen  llm   discovered  vllm      -\n"
    )
    assert err == "note: did not answer, so models may be missing: other\n"


def test_models_list_in_json(gateway: Gateway, run: Run) -> None:
    """A model on each line."""
    gateway.will(registry.ListModelsResponse(models=[LLAMA, FOUND]))
    _, out, _ = run("models", "list", "--json")
    assert [Parse(line, registry.Model()) for line in out.splitlines()] == [LLAMA, FOUND]


def test_models_get(gateway: Gateway, run: Run) -> None:
    """What is known, a line for each; in JSON, one line."""
    known = model("llama", metadata={"b": "2", "a": "1"}, root="/models/llama", parent="base", max_context_tokens=5)
    known.create_time.FromJsonString("2025-01-02T03:04:05Z")
    known.update_time.FromJsonString("2025-01-03T03:04:05Z")
    gateway.will(registry.GetModelResponse(model=known))
    assert run("models", "get", "l")[1] == (
        "id:        llama\nprovider:  vllm\nserved as: llama\ntype:      llm\nsource:    registered\n"
        "metadata:  a=1, b=2\ncontext:   5 tokens\nroot:      /models/llama\nparent:    base\n"
        "created:   2025-01-02T03:04:05Z\nupdated:   2025-01-03T03:04:05Z\n"
    )
    gateway.will(registry.GetModelResponse(model=known))
    assert Parse(run("models", "get", "--json", "l")[1], registry.Model()) == known
    assert gateway.last.request.model_id == "l"


def test_models_of_a_later_version(gateway: Gateway, run: Run) -> None:
    """A type that is not known here is shown by its number."""
    gateway.will(registry.GetModelResponse(model=model("m", type=99)))
    assert "type:      99\n" in run("models", "get", "m")[1]


def test_models_register_and_unregister(gateway: Gateway, run: Run) -> None:
    """Every option arrives in its field."""
    gateway.will(registry.RegisterModelResponse(model=LLAMA))
    status, out, _ = run(
        "models", "register", "llama", "--provider", "vllm", "--provider-model", "meta/llama", "--type", "rerank",
        "--alias", "l", "--alias", "ll", "--metadata", "owner=me", "--metadata", "note=a=b",
    )  # fmt: skip
    assert status == 0
    assert out.startswith("id:        llama\n")
    assert gateway.last.request == registry.RegisterModelRequest(
        model_id="llama",
        provider_id="vllm",
        provider_model_id="meta/llama",
        type=registry.MODEL_TYPE_RERANK,
        aliases=["l", "ll"],
        metadata={"owner": "me", "note": "a=b"},
    )
    gateway.will(registry.UnregisterModelResponse())
    assert run("models", "unregister", "l") == (0, "l is no longer registered\n", "")
    gateway.will(registry.UnregisterModelResponse())
    assert run("models", "unregister", "--json", "l") == (0, "{}\n", "")


def test_providers(gateway: Gateway, run: Run) -> None:
    """A table, or a provider on each line."""
    vllm = registry.Provider(id="vllm", kind="vllm", base_url="http://127.0.0.1:8000/v1")
    gateway.will(registry.ListProvidersResponse(providers=[vllm]))
    assert run("providers")[1] == "ID    KIND  URL\nvllm  vllm  http://127.0.0.1:8000/v1\n"
    gateway.will(registry.ListProvidersResponse(providers=[vllm]))
    assert Parse(run("providers", "--json")[1], registry.Provider()) == vllm


def test_health(gateway: Gateway, run: Run) -> None:
    """Of all providers; one that is down makes the status 1."""
    well = registry.CheckProviderHealthResponse(status=registry.HEALTH_STATUS_OK)
    down = registry.CheckProviderHealthResponse(status=registry.HEALTH_STATUS_ERROR, message="HTTP 503")
    gateway.will(registry.ListProvidersResponse(providers=[registry.Provider(id="a"), registry.Provider(id="b")]))
    gateway.will(well)
    gateway.will(down)
    status, out, _ = run("health")
    assert status == 1
    assert out == "PROVIDER  STATUS  MESSAGE\na         OK\nb         ERROR   HTTP 503\n"


def test_health_of_one(gateway: Gateway, run: Run) -> None:
    """As asked for, in JSON too."""
    well = registry.CheckProviderHealthResponse(status=registry.HEALTH_STATUS_OK)
    gateway.will(well)
    status, out, _ = run("health", "--json", "vllm")
    assert (status, json.loads(out)) == (0, {"providerId": "vllm", "status": "HEALTH_STATUS_OK"})
    assert [call.method for call in gateway.calls] == ["CheckProviderHealth"]


def test_arguments_that_are_no_json_are_still_one_line(gateway: Gateway, run: Run) -> None:
    """Whatever a later gateway may send."""
    gateway.will(*calling(ToolCall(call_id="c", tool_name="f", arguments="not\njson")))
    assert run("chat", "--model", "llama", "hi")[1] == "tool call: f(not json)\n"
