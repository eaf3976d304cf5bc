"""The Go client: its page as written, its own tests, and what its example does with a real gateway."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from deltawire_server.fake_vllm import FakeVllm, Script
from tests.docs.markdown import blocks
from tests.polyglot import stubs
from tests.polyglot.calls import MODEL, ask, chat_request, gateway
from tests.polyglot.client_pages import BROKEN, CALLS, CHUNK, ENDLESS, PRINTED, SALT, SHIPPED_TARGET, says, steps
from tests.polyglot.programs import LIMIT, ROOT, Outcome, run, started, tool
from tests.polyglot.proxy import envoy
from tests.support.recordings import TRANSCRIPTS

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.polyglot

CLIENT = ROOT / "client" / "go"
PAGE = CLIENT / "README.md"
TAGS = "-tags grpc133"


def shell(script: str, folder: Path) -> Outcome:
    """Run commands in a copy of a clone, after those of the page that set Go up."""
    *_, environment, _build, _chat, _tool = steps(PAGE)
    # The cache, which runs share, holds gRPC and what it needs.
    lines = [f"export GOCACHE={ROOT}/.cache/go HOME={folder}", "unset GOFLAGS", environment, script]
    command = ["bash", "-euo", "pipefail", "-c", "\n".join(lines)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=stubs.TIMEOUT, check=False)
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the clone, after the page's commands up to the first call, which build its example."""
    _install, copy, generate, _environment, build, *_ = steps(PAGE)
    tool("go")
    folder = tmp_path_factory.mktemp("go")
    stubs.workspace(folder)
    shutil.copytree(CLIENT, folder / "client" / "go")
    shutil.copytree(
        ROOT / "client" / "examples", folder / "client" / "examples", ignore=shutil.ignore_patterns("node*")
    )
    built = shell(f"{copy}\n{generate}\n{build}", folder)
    assert (built.status, built.out, built.err) == (0, "", "")
    return folder


async def chat(clone: Path, target: str, *flags: str) -> Outcome:
    """Run the example to its end."""
    return await run(str(clone / "build" / "chat"), "--target", target, *flags, home=clone)


async def test_the_page_leads_to_an_answer_and_a_tool_call(vllm: FakeVllm, target: str, clone: Path) -> None:
    """Its last two commands, as written but for the address."""
    vllm.play(SALT, CALLS)
    *_, answer, call = steps(PAGE)
    outcomes = [await asyncio.to_thread(shell, line.replace(SHIPPED_TARGET, target), clone) for line in (answer, call)]
    assert outcomes == PRINTED


async def test_the_code_of_the_page_runs(vllm: FakeVllm, target: str, clone: Path) -> None:
    """The loop over tool calls, the error, and the watch."""
    vllm.play(CALLS, says(CHUNK.text("It rains.")))
    printed = []
    for number, block in enumerate(block for block in blocks(PAGE) if block.language == "go"):
        (clone / f"page-{number}.go").write_text(block.text.replace(SHIPPED_TARGET, target), encoding="utf-8")
        built = await asyncio.to_thread(shell, f"go build {TAGS} -o page-{number} page-{number}.go", clone)
        assert built.status == 0, built.err
        outcome = await run(str(clone / f"page-{number}"), home=clone)
        assert (outcome.status, outcome.err) == (0, "")
        printed.append(outcome.out)
    loop, error, watch = printed
    assert loop == "It rains.STOP_REASON_END_OF_TURN\n"
    assert vllm.chats[1].body["messages"][-1]["content"] == "rain in Oslo"
    assert error == "NotFound MODEL_NOT_FOUND [] <nil> no-such-model\n"
    first, last = watch.splitlines()
    assert first == f"CHANGE_ADDED {MODEL}"
    assert last.startswith("as of revision ")
    assert last.endswith(" there are 1 models")


def test_its_own_tests_pass(clone: Path) -> None:
    """On a server in their own process; formatted, vetted, and compiled as a current grpc-go needs it."""
    script = f"gofmt -l client/go\ngo vet {TAGS} deltawire.dev/go deltawire.dev/go/chat\ngo build deltawire.dev/go"
    assert shell(script, clone) == Outcome(0, "", "")
    tested = shell(f"go test {TAGS} -count 1 -timeout {LIMIT:g}s deltawire.dev/go", clone)
    assert tested.status == 0, tested.out + tested.err


async def test_a_failed_tool_call_is_shown_as_failed(vllm: FakeVllm, target: str, clone: Path) -> None:
    """Arguments that are not JSON are never shown as a call that can be executed."""
    vllm.play(Script.recording(TRANSCRIPTS / "tool-malformed.sse"))
    outcome = await chat(clone, target, "--tool", str(ROOT / "client/examples/weather.json"), "hi")
    assert outcome.status == 0, outcome.err
    assert "failed tool call: get_weather: the arguments are not JSON" in outcome.out
    assert "may be executed" not in outcome.out


async def test_errors_of_the_example(vllm: FakeVllm, target: str, clone: Path) -> None:
    """A refusal, a fault in the middle of an answer, and a wrong command line."""
    refused = await chat(clone, target, "--model", "no-such-model", "hi")
    assert (refused.status, refused.out) == (1, "")
    assert refused.err.startswith("deltawire: NotFound (MODEL_NOT_FOUND): ")
    vllm.play(BROKEN)
    broken = await chat(clone, target, "hi")
    assert (broken.status, broken.out) == (1, "half an ans\n")
    assert broken.err.startswith("deltawire: Aborted (UPSTREAM_INCOMPLETE): ")
    wrong = await chat(clone, target)
    assert wrong.status == 2
    assert "usage: chat" in wrong.err


async def test_a_cancel_reaches_the_engine(vllm: FakeVllm, target: str, clone: Path) -> None:
    """Ctrl-C in the middle of an endless answer: the gateway closes its connection to vLLM."""
    vllm.play(ENDLESS)
    command = (str(clone / "build" / "chat"), "--target", target, "hi")
    async with started(*command, home=clone) as process, asyncio.timeout(LIMIT):
        assert process.stdout is not None
        assert await process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 130
        (request,) = vllm.chats
        await request.closed_early.wait()


async def test_it_works_through_envoy(vllm: FakeVllm, tmp_path: Path, clone: Path) -> None:
    """The same answer as the Python client's."""
    vllm.play(*[Script.recording(TRANSCRIPTS / "text-unicode.sse")] * 2)
    async with contextlib.AsyncExitStack() as stack:
        _, address = await stack.enter_async_context(gateway(vllm, tmp_path))
        proxy = await stack.enter_async_context(envoy(tmp_path, address))
        python = await ask(proxy.target, chat_request())
        outcome = await chat(clone, proxy.target, "hi")
    text = "".join(event["textDelta"]["text"] for event in python.answer if "textDelta" in event)
    assert outcome.status == 0, outcome.err
    assert outcome.out.startswith(text + "\n[")
