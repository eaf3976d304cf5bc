"""The Ruby client: its page as written, its example, and what it does with a real gateway."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from deltawire import __version__
from deltawire_server.fake_vllm import FakeVllm, Script
from tests.docs.markdown import blocks
from tests.polyglot import stubs
from tests.polyglot.calls import MODEL, ask, chat_request, gateway
from tests.polyglot.client_pages import (
    BROKEN,
    CALLS,
    CHUNK,
    ENDLESS,
    PRINTED,
    SALT,
    SHIPPED_TARGET,
    says,
    steps,
    two_gateways,
)
from tests.polyglot.programs import LIMIT, ROOT, Outcome, run, started, tool
from tests.polyglot.proxy import envoy
from tests.support.recordings import TRANSCRIPTS

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Certificates

pytestmark = pytest.mark.polyglot

CLIENT = ROOT / "client" / "ruby"
PAGE = CLIENT / "README.md"
CHAT = "client/ruby/examples/chat.rb"


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the clone, after the page's commands up to the first call; also the page's code and the scenarios."""
    _install, generate, *_ = steps(PAGE)
    tool("ruby")
    folder = tmp_path_factory.mktemp("ruby")
    stubs.workspace(folder)
    shutil.copytree(CLIENT, folder / "client" / "ruby", ignore=shutil.ignore_patterns("v1"))
    (folder / "client" / "examples").mkdir()
    shutil.copy(ROOT / "client" / "examples" / "weather.json", folder / "client" / "examples")
    shutil.copy(stubs.LANGUAGES / "ruby-client" / "scenario.rb", folder)
    shutil.copy(ROOT / "LICENSE", folder)
    for number, block in enumerate(block for block in blocks(PAGE) if block.language == "ruby"):
        # The address is known only when it runs.
        assert block.text.count(f"'{SHIPPED_TARGET}'") == 1
        (folder / f"page-{number}.rb").write_text(block.text.replace(f"'{SHIPPED_TARGET}'", "ARGV[0]"), "utf-8")
    done = subprocess.run(
        ["bash", "-c", generate], cwd=folder, capture_output=True, text=True, timeout=stubs.TIMEOUT, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder


async def shell(clone: Path, script: str) -> Outcome:
    """Run commands in the copy, after that of the page which names the library."""
    _install, _generate, library, *_ = steps(PAGE)
    return await run("bash", "-euo", "pipefail", "-c", f"{library}\n{script}", home=clone, folder=clone)


async def ruby(clone: Path, *arguments: str) -> Outcome:
    """Run a program to its end."""
    return await run(tool("ruby"), "-I", "client/ruby/lib", *arguments, home=clone, folder=clone)


async def scenario(clone: Path, *arguments: str) -> list[str]:
    """The lines that came of a scenario."""
    outcome = await ruby(clone, "scenario.rb", *arguments)
    assert outcome.status == 0, outcome.err
    return outcome.out.splitlines()


async def test_the_page_leads_to_an_answer_and_a_tool_call(vllm: FakeVllm, target: str, clone: Path) -> None:
    """Its last two commands, as written but for the address."""
    vllm.play(SALT, CALLS)
    assert [await shell(clone, step.replace(SHIPPED_TARGET, target)) for step in steps(PAGE)[-2:]] == PRINTED
    (offered,) = vllm.chats[1].body["tools"]
    assert list(offered["function"]["parameters"]) == ["type", "properties", "required", "additionalProperties"]


async def test_the_code_of_the_page_runs(vllm: FakeVllm, target: str, clone: Path) -> None:
    """The loop over tool calls, the error, and the watch."""
    vllm.play(CALLS, says(CHUNK.text("It rains.")))
    outcomes = [await ruby(clone, f"page-{number}.rb", target) for number in range(3)]
    assert [(each.status, each.err) for each in outcomes] == [(0, "")] * 3
    loop, error, watch = [each.out for each in outcomes]
    assert loop == "It rains.STOP_REASON_END_OF_TURN\n"
    assert vllm.chats[1].body["messages"][-1]["content"] == "rain in Oslo"
    assert error.splitlines() == [":NOT_FOUND", "true", '"MODEL_NOT_FOUND"', '"no-such-model"', "[]", "nil"]
    first, last = watch.splitlines()
    assert first == f"CHANGE_ADDED {MODEL}"
    assert last.startswith("as of revision ")
    assert last.endswith(" there are 1 models")


async def test_it_is_a_gem(clone: Path) -> None:
    """Built and installed as the page says, into a folder of its own, with the stubs, and without warnings by Ruby."""
    (own,) = [block.text.strip() for block in blocks(PAGE) if block.language == "sh"]
    # Debian's packages have what it depends on; the test asks no server. Ruby gems warn that it has no homepage.
    installed = own.replace("gem install ", "gem install --local --no-document ")
    assert installed != own
    script = f"""
        for file in $(find client/ruby -name '*.rb' ! -path '*/v1/*') scenario.rb; do ruby -wc $file >/dev/null; done
        unset RUBYLIB
        export GEM_PATH="$(gem env path)" GEM_HOME="$PWD/gems"
        ({installed}) >gem.log 2>&1 || {{ cat gem.log; exit 1; }}
        ruby -e 'require "deltawire"; puts Gem.loaded_specs["deltawire"].version, Deltawire::V1::Tool.new.name.size'
        cmp LICENSE gems/gems/deltawire-{__version__}/LICENSE
    """
    assert await shell(clone, script) == Outcome(0, f"{__version__}\n0\n", "")


async def test_text_is_utf8_in_every_locale(vllm: FakeVllm, target: str, tmp_path: Path, clone: Path) -> None:
    """The prompt, and text of any script as the Python client reads it, directly and through Envoy."""
    vllm.play(*[Script.recording(TRANSCRIPTS / "text-unicode.sse")] * 3)
    python = (await ask(target, chat_request())).answer
    text = "".join(event["textDelta"]["text"] for event in python if "textDelta" in event)
    async with envoy(tmp_path, target) as proxy:
        for locale, address in (("C", target), ("C.UTF-8", proxy.target)):
            outcome = await shell(clone, f"LC_ALL={locale} ruby {CHAT} --target {address} 'Grüße, 世界'")
            assert (outcome.status, outcome.err) == (0, "")
            assert outcome.out.startswith(text + "\n[")
            assert vllm.chats[-1].body["messages"][-1]["content"] == "Grüße, 世界"


async def test_the_example_reports_failures(vllm: FakeVllm, target: str, clone: Path) -> None:
    """A call whose arguments are not JSON, a fault in the middle of an answer, a refusal, and wrong command lines."""
    vllm.play(
        Script.recording(TRANSCRIPTS / "tool-malformed.sse"),
        BROKEN,
    )
    own = '{"name": "add", "inputSchema": "{\\"type\\": \\"object\\"}", "strict": false}'
    (clone / "tools.json").write_text(f'[{own}, {{"function": {{"name": "get_weather"}}}}]', encoding="utf-8")
    failed = await ruby(clone, CHAT, "--target", target, "--tool", "tools.json", "hi")
    assert failed.status == 0, failed.err
    assert "failed tool call: get_weather: the arguments are not JSON" in failed.out
    assert "may be executed" not in failed.out
    add, weather = [each["function"] for each in vllm.chats[0].body["tools"]]
    assert (add["name"], add["parameters"], add["strict"]) == ("add", {"type": "object"}, False)
    assert weather["name"] == "get_weather"
    broken = await ruby(clone, CHAT, "--target", target, "hi")
    assert (broken.status, broken.out) == (1, "half an ans\n")
    assert broken.err.startswith("ABORTED (UPSTREAM_INCOMPLETE): ")
    refused = await ruby(clone, CHAT, "--target", target, "--model", "no-such-model", "hi")
    assert (refused.status, refused.out) == (1, "")
    assert refused.err.startswith("NOT_FOUND (MODEL_NOT_FOUND): ")
    keyed = await shell(clone, f"DELTAWIRE_TOKEN=key ruby {CHAT} --target gateway.example:50051 hi")
    assert (keyed.status, keyed.err.count("\n")) == (2, 1)
    assert keyed.err.startswith("the key would go over plaintext to another machine")
    wrong = await ruby(clone, CHAT, "--target", target)
    assert wrong.status == 2
    assert wrong.err.startswith("usage: chat.rb")
    (clone / "tools.json").write_text('{"type": "web_search"}', encoding="utf-8")
    wrong = await ruby(clone, CHAT, "--tool", "tools.json", "hi")
    assert wrong.status == 2
    assert wrong.err.startswith("tools.json: ")


async def test_ctrl_c_reaches_the_engine(vllm: FakeVllm, target: str, clone: Path) -> None:
    """In the middle of an endless answer: the gateway closes its connection to vLLM."""
    vllm.play(ENDLESS)
    command = (tool("ruby"), "-I", "client/ruby/lib", CHAT, "--target", target, "hi")
    async with started(*command, home=clone, folder=clone) as process, asyncio.timeout(LIMIT):
        assert process.stdout is not None
        assert await process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 130
        (request,) = vllm.chats
        await request.closed_early.wait()


async def test_every_end_of_a_call_reaches_the_engine(vllm: FakeVllm, target: str, clone: Path) -> None:
    """A cancel by a signal, leaving the block, exceptions of Timeout and of another thread, and closing the client."""
    vllm.play(*[ENDLESS] * 5)
    canceled = "Deltawire::CallError CANCELLED: canceled by the caller"
    closed = "Deltawire::CallError CANCELLED: the client was closed"
    assert await scenario(clone, "ends", target) == [canceled, canceled, "not needed any more", closed, closed]
    assert len(vllm.chats) == 5
    async with asyncio.timeout(LIMIT):
        for request in vllm.chats:
            await request.closed_early.wait()


async def test_two_gateways_behind_envoy(vllm: FakeVllm, tmp_path: Path, clone: Path) -> None:
    """Soft cancels reach the gateway that has the stream, and so does a client that knows only an id, chosen or generated."""
    async with two_gateways(vllm, tmp_path) as target:
        vllm.play(*[ENDLESS] * 13)
        assert await scenario(clone, "softly", target) == ["[[:STOP_REASON_CANCELLED, :COMPLETION_STATE_COMPLETED]]"]
        assert await scenario(clone, "another", target) == [
            "COMPLETION_STATE_RUNNING",
            "COMPLETION_STATE_RUNNING",
            "STOP_REASON_CANCELLED",
        ]


async def test_tls_and_a_key(vllm: FakeVllm, tmp_path: Path, clone: Path, certificates: Certificates) -> None:
    """The gateway's certificate is checked, and the key is sent in either header, but not over plaintext to another machine."""
    keys = tmp_path / "keys"
    keys.write_text(f"ci all sha256:{hashlib.sha256(b'secret').hexdigest()}\n", encoding="utf-8")
    tls = ("--tls-cert-file", str(certificates.server), "--tls-key-file", str(certificates.server_key))
    vllm.play(*[says(CHUNK.text("Yes."))] * 2)
    async with gateway(vllm, tmp_path, "--access-keys-file", str(keys), *tls) as (_, address):
        *printed, keyless, stub, untrusting, refused = await scenario(
            clone, "tls", address, str(certificates.authority), "secret"
        )
    assert printed == ["Yes.", "1"] * 2
    assert keyless.startswith("Deltawire::CallError UNAUTHENTICATED (UNAUTHENTICATED): ")
    assert stub == "the stub has no key either"
    assert untrusting == "UNAVAILABLE"
    assert refused.startswith("the key would go over plaintext")


async def test_a_fork(vllm: FakeVllm, target: str, clone: Path) -> None:
    """A client works in children of its process until it is used; afterwards it says why not. They leave its streams alone."""
    vllm.play(*[says(CHUNK.text("Yes."))] * 3, ENDLESS)
    *answers, refused, own = await scenario(clone, "forks", target)
    assert answers == ["Yes."] * 3
    assert refused == "this client was used before a fork, which gRPC does not support: fork first"
    assert own == "STOP_REASON_CANCELLED"
