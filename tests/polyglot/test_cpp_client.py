"""The C++ client: its page as written, its example, and what it does with a real gateway."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from deltawire_server.fake_vllm import FakeVllm, Script
from tests.docs.markdown import blocks
from tests.polyglot import stubs
from tests.polyglot.calls import MODEL, ask, chat_request, gateway
from tests.polyglot.client_pages import BROKEN, CALLS, CHUNK, ENDLESS, PRINTED, SALT, SHIPPED_TARGET, says, steps
from tests.polyglot.programs import LIMIT, ROOT, run, started, tool
from tests.polyglot.proxy import envoy
from tests.support.recordings import TRANSCRIPTS

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Certificates

pytestmark = pytest.mark.polyglot

PAGE = ROOT / "client" / "cpp" / "README.md"
SHIPPED_BUILD = "client/cpp/build"
BUILD = ROOT / ".cache" / "cpp"
"""The stubs take a minute to compile: builds share their objects, also with the program of the conformance kit."""
CHAT = str(BUILD / "chat")
WEATHER = str(ROOT / "client" / "examples" / "weather.json")


def built(command: str) -> None:
    """Run a command of the page in the clone; one at a time, because all share a folder. Warnings are errors."""
    BUILD.mkdir(parents=True, exist_ok=True)
    script = f'export BUILD={BUILD} CXXFLAGS="-O0 -Werror"\n{command.replace(SHIPPED_BUILD, str(BUILD))}'
    done = subprocess.run(
        [tool("flock"), str(BUILD / "lock"), "bash", "-euo", "pipefail", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=stubs.TIMEOUT,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> str:
    """After the page's commands up to the first call: a program that runs the page's code, or the scenario, by number.

    They are compiled at once, with the page's command for a program, since gRPC's headers take longer to read than all the rest.
    """
    _install, build, *_ = steps(PAGE)
    tool("g++")
    built(build)
    parts = [block.text for block in blocks(PAGE) if block.language == "cpp"]
    # The address is known only when it runs.
    assert all(part.count(f'"{SHIPPED_TARGET}"') == 1 and part.count("int main() {") == 1 for part in parts)
    parts = [
        part.replace(f'"{SHIPPED_TARGET}"', "argv[1]").replace("main()", "main(int, char** argv)") for part in parts
    ]
    parts = [*parts, (stubs.LANGUAGES / "cpp-client" / "scenario.cc").read_text(encoding="utf-8")]
    renamed = [part.replace("int main(", f"void program_{number}(") for number, part in enumerate(parts)]
    choices = "".join(
        f"if (*argv[1] == '{number}') program_{number}(argc - 1, argv + 1);" for number in range(len(parts))
    )
    folder = tmp_path_factory.mktemp("cpp")
    (folder / "program.cc").write_text(
        "\n".join([*renamed, f"int main(int argc, char** argv) {{ {choices} }}", ""]), encoding="utf-8"
    )
    (own,) = [block.text for block in blocks(PAGE) if block.language == "sh"]
    command = own.replace("program.cc", str(folder / "program.cc")).replace("-o program", f"-o {folder}/program")
    built(command.replace("g++ ", "g++ -O0 -Wall -Wextra -Werror ", 1))
    return str(folder / "program")


@pytest.mark.usefixtures("code")
async def test_the_page_leads_to_an_answer_and_a_tool_call(vllm: FakeVllm, target: str, tmp_path: Path) -> None:
    """Its last two commands, as written but for the address and the folder."""
    vllm.play(SALT, CALLS)
    lines = [step.replace(SHIPPED_TARGET, target).replace(SHIPPED_BUILD, str(BUILD)) for step in steps(PAGE)[-2:]]
    assert [await run("bash", "-c", line, home=tmp_path, folder=ROOT) for line in lines] == PRINTED
    (offered,) = vllm.chats[1].body["tools"]
    assert list(offered["function"]["parameters"]) == ["type", "properties", "required", "additionalProperties"]


async def test_the_code_of_the_page_runs(vllm: FakeVllm, target: str, code: str, tmp_path: Path) -> None:
    """The loop over tool calls, the error, and the watch."""
    vllm.play(CALLS, says(CHUNK.text("It rains.")))
    outcomes = [await run(code, number, target, home=tmp_path) for number in ("0", "1", "2")]
    assert [(each.status, each.err) for each in outcomes] == [(0, "")] * 3
    loop, error, watch = [each.out for each in outcomes]
    assert loop == "It rains.STOP_REASON_END_OF_TURN\n"
    assert vllm.chats[1].body["messages"][-1]["content"] == "rain in Oslo"
    assert error == "5 MODEL_NOT_FOUND no-such-model\n0 0\n"
    first, last = watch.splitlines()
    assert first == f"CHANGE_ADDED {MODEL}"
    assert last.startswith("as of revision ")
    assert last.endswith(" there are 1 models")


@pytest.mark.usefixtures("code")
async def test_tool_calls_and_errors_of_the_example(vllm: FakeVllm, target: str, tmp_path: Path) -> None:
    """A call whose arguments are not JSON, a refusal, a fault in the middle of an answer, and wrong command lines."""
    vllm.play(Script.recording(TRANSCRIPTS / "tool-malformed.sse"))
    failed = await run(CHAT, "--target", target, "--tool", WEATHER, "hi", home=tmp_path)
    assert failed.status == 0, failed.err
    assert "failed tool call: get_weather: the arguments are not JSON" in failed.out
    assert "may be executed" not in failed.out
    refused = await run(CHAT, "--target", target, "--model", "no-such-model", "hi", home=tmp_path)
    assert (refused.status, refused.out) == (1, "")
    assert refused.err.startswith("deltawire: NOT_FOUND (MODEL_NOT_FOUND): ")
    vllm.play(BROKEN)
    broken = await run(CHAT, "--target", target, "hi", home=tmp_path)
    assert (broken.status, broken.out) == (1, "half an ans\n")
    assert broken.err.startswith("deltawire: ABORTED (UPSTREAM_INCOMPLETE): ")
    wrong = await run(CHAT, "--target", target, home=tmp_path)
    assert wrong.status == 2
    assert "usage: chat" in wrong.err
    (tmp_path / "tools.json").write_text('{"name": 5', encoding="utf-8")
    wrong = await run(CHAT, "--tool", "tools.json", "hi", home=tmp_path, folder=tmp_path)
    assert wrong.status == 2
    assert wrong.err.startswith("tools.json: ")


@pytest.mark.usefixtures("code")
async def test_tools_in_either_form(vllm: FakeVllm, target: str, tmp_path: Path) -> None:
    """A list with OpenAI's object and the API's own."""
    own = '{"name": "add", "inputSchema": "{\\"type\\": \\"object\\"}", "strict": false}'
    (tmp_path / "tools.json").write_text(
        f'[{own}, {{"type": "function", "function": {{"name": "sub"}}}}]', encoding="utf-8"
    )
    vllm.play(says(CHUNK.text("3")))
    outcome = await run(CHAT, "--target", target, "--tool", "tools.json", "1 + 2", home=tmp_path, folder=tmp_path)
    assert outcome.status == 0, outcome.err
    add, sub = [each["function"] for each in vllm.chats[0].body["tools"]]
    assert (add["name"], add["parameters"], add["strict"]) == ("add", {"type": "object"}, False)
    assert sub["name"] == "sub"


@pytest.mark.usefixtures("code")
async def test_a_cancel_reaches_the_engine(vllm: FakeVllm, target: str, tmp_path: Path) -> None:
    """Ctrl-C in the middle of an endless answer: the gateway closes its connection to vLLM."""
    vllm.play(ENDLESS)
    async with started(CHAT, "--target", target, "hi", home=tmp_path) as process, asyncio.timeout(LIMIT):
        assert process.stdout is not None
        assert await process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 130
        (request,) = vllm.chats
        await request.closed_early.wait()


@pytest.mark.usefixtures("code")
async def test_it_works_through_envoy(vllm: FakeVllm, tmp_path: Path) -> None:
    """The same answer as the Python client's."""
    vllm.play(*[Script.recording(TRANSCRIPTS / "text-unicode.sse")] * 2)
    async with contextlib.AsyncExitStack() as stack:
        _, address = await stack.enter_async_context(gateway(vllm, tmp_path))
        proxy = await stack.enter_async_context(envoy(tmp_path, address))
        python = await ask(proxy.target, chat_request())
        outcome = await run(CHAT, "--target", proxy.target, "hi", home=tmp_path)
    text = "".join(event["textDelta"]["text"] for event in python.answer if "textDelta" in event)
    assert outcome.status == 0, outcome.err
    assert outcome.out.startswith(text + "\n[")


async def test_tls_keys_and_ends(vllm: FakeVllm, code: str, certificates: Certificates, tmp_path: Path) -> None:
    """A soft end, a look-up, and the end by the destructor, over TLS with a key; never the key over plaintext."""
    keys = tmp_path / "keys"
    keys.write_text(f"ci all sha256:{hashlib.sha256(b'secret').hexdigest()}\n", encoding="utf-8")
    tls = ("--tls-cert-file", str(certificates.server), "--tls-key-file", str(certificates.server_key))
    vllm.play(ENDLESS, ENDLESS)
    async with gateway(vllm, tmp_path, "--access-keys-file", str(keys), *tls) as (_, address):
        outcome = await run(code, "3", address, str(certificates.authority), "secret", home=tmp_path)
        assert outcome.status == 0, outcome.err
        async with asyncio.timeout(LIMIT):
            for request in vllm.chats:
                await request.closed_early.wait()
    assert outcome.out.splitlines() == [
        "COMPLETION_STATE_RUNNING",
        "STOP_REASON_CANCELLED 1",
        "COMPLETION_STATE_COMPLETED",
        "left",
        "a key over plaintext to another machine: use TLS, or plaintext_key",
    ]
