"""The TypeScript client: its page as written, its package, and what it does with a real gateway."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import shutil
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from deltawire.v1.chat_completion_pb2 import StopReason
from deltawire_server.fake_vllm import Chunks, Script
from tests.docs.markdown import blocks
from tests.polyglot import browser, stubs
from tests.polyglot.browser import serving
from tests.polyglot.calls import gateway
from tests.polyglot.client_pages import HEADING, SHIPPED_TARGET, two_gateways
from tests.polyglot.documented import commands
from tests.polyglot.programs import LIMIT, ROOT, run, started, tool
from tests.polyglot.proxy import ORIGIN, envoy, web_configuration
from tests.support.recordings import TRANSCRIPTS

if TYPE_CHECKING:
    from pathlib import Path

    from deltawire_server.fake_vllm import FakeVllm
    from tests.conftest import Certificates

pytestmark = pytest.mark.polyglot

CLIENT = ROOT / "client" / "typescript"
PAGE = CLIENT / "README.md"
BROKEN = Script.chunks([Chunks().role(), Chunks().text("half")], after=2, end="cut")
FAULT = {"code": "Aborted", "reason": "UPSTREAM_INCOMPLETE", "text": "half"}
ENDLESS = Script.generated(tokens=1_000_000, tokens_per_second=20)


def says(text: str) -> Script:
    """An answer of one piece of text."""
    chunk = Chunks()
    return Script.chunks([chunk.role(), chunk.text(text), chunk.finish()])


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client's folder in a copy of the clone, built by the page's commands, with the page's examples."""
    install, enter, packages, build, *_ = commands(HEADING, PAGE)
    assert (install.split()[:2], enter, packages) == (["apt-get", "install"], "cd client/typescript", "npm ci")
    clone = tmp_path_factory.mktemp("clone")
    stubs.workspace(clone)
    (clone / "node_modules").unlink()
    shutil.copytree(ROOT / "client" / "examples", clone / "client" / "examples", ignore=_UNCOMMITTED)
    folder = clone / "client" / "typescript"
    shutil.copytree(CLIENT, folder, ignore=_UNCOMMITTED)
    tool("protoc")
    if not (CLIENT / "node_modules").is_dir():
        pytest.fail("the TypeScript client's packages are not installed: `make polyglot` does it")
    (folder / "node_modules").symlink_to(CLIENT / "node_modules")
    for program in (stubs.LANGUAGES / "typescript-client").iterdir():
        shutil.copy(program, folder / "examples")
    for number, block in enumerate(each for each in blocks(PAGE) if each.language == "ts"):
        (folder / "src" / f"page-{number}.ts").write_text(block.text, encoding="utf-8")
    done = subprocess.run(build.split(), cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


_UNCOMMITTED = shutil.ignore_patterns("node_modules", "dist", "gen")


async def page(number: int, package: Path, target: str) -> str:
    """Run an example of the page, with another address."""
    path = package / "dist" / f"page-{number}.js"
    script = path.with_stem(f"{path.stem}-{target.rpartition(':')[2]}")
    script.write_text(path.read_text(encoding="utf-8").replace(SHIPPED_TARGET, target), encoding="utf-8")
    outcome = await run(tool("node"), str(script), home=package)
    assert (outcome.status, outcome.err) == (0, "")
    return outcome.out


async def scenario(name: str, package: Path, target: str, **options: Any) -> Any:  # noqa: ANN401
    """What came of a scenario."""
    path = package / f"{name}.json"
    path.write_text(json.dumps(options), encoding="utf-8")
    outcome = await run(tool("node"), str(package / "examples" / "scenario.js"), name, target, str(path), home=package)
    assert (outcome.status, outcome.err) == (0, "")
    return json.loads(outcome.out)


async def test_the_page_leads_to_an_answer_and_a_tool_call(vllm: FakeVllm, target: str, package: Path) -> None:
    """Its last two commands, in at most eight."""
    steps = commands(HEADING, PAGE)
    assert len(steps) <= 8
    vllm.play(*[Script.recording(TRANSCRIPTS / "tool-text-before.sse")] * 2)
    outs = []
    for step in steps[-2:]:
        command = step.replace("chat.js", f"chat.js --target {target}")
        outcome = await run("bash", "-c", command, home=package, folder=package)
        assert (outcome.status, outcome.err) == (0, "")
        outs.append(outcome.out)
    assert "tool call get_weather({" in outs[1]
    assert outs[1].endswith("tool calls may be executed, 21 tokens]\n")
    assert [each["function"]["name"] for each in vllm.chats[1].body["tools"]] == ["get_weather"]


async def test_the_example_reports_failures(vllm: FakeVllm, target: str, package: Path) -> None:
    """On standard error, with a status."""
    chat = (tool("node"), str(package / "examples" / "chat.js"))
    outcome = await run(*chat, "--target", target, "--model", "no-such-model", "hi", home=package)
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err.startswith("NotFound MODEL_NOT_FOUND: ")
    vllm.play(BROKEN)
    outcome = await run(*chat, "--target", target, "hi", home=package)
    assert (outcome.status, outcome.out) == (1, "half\n")
    assert outcome.err.startswith("Aborted UPSTREAM_INCOMPLETE: ")
    outcome = await run(*chat, home=package)
    assert outcome.status == 2
    assert "usage: node chat.js" in outcome.err
    (package / "tools.json").write_text('{"name": "f", "parameter": {}}', encoding="utf-8")
    outcome = await run(*chat, "--tool", "tools.json", "hi", home=package, folder=package)
    assert outcome.status == 2
    assert '"parameter" is unknown' in outcome.err
    outcome = await run(
        "env", "DELTAWIRE_TOKEN=key", *chat, "--target", "gateway.example:50051", "hi", home=package, folder=package
    )
    assert (outcome.status, outcome.err.count("\n")) == (2, 1)
    assert "use TLS" in outcome.err


async def test_a_tool_may_have_fields_without_a_value(package: Path) -> None:
    """As objects of JavaScript often do."""
    made = "{ name: 'f', description: undefined, parameters: null }"
    code = f"import {{ tool }} from 'deltawire/node'; const made = {made}; const {{ parameters, ...own }} = made;"
    code += (
        " for (const given of [{ function: made }, own]) { console.log(tool(given).name, tool(given).inputSchema); }"
    )
    outcome = await run(tool("node"), "--input-type=module", "-e", code, home=package, folder=package)
    assert (outcome.status, outcome.out.split()) == (0, ["f", "f"]), outcome.err


async def test_the_examples_of_the_page_run(vllm: FakeVllm, target: str, package: Path) -> None:
    """With the answers that they print."""
    vllm.play(Script.recording(TRANSCRIPTS / "tool-text-before.sse"), says("Yes."))
    assert (await page(0, package, target)).splitlines()[-1].startswith("Yes.END_OF_TURN ")
    assert [message["role"] for message in vllm.chats[1].body["messages"]] == ["user", "assistant", "tool"]
    failure = await page(1, package, target)
    assert failure.startswith("NotFound MODEL_NOT_FOUND {")
    assert "model: 'no-such-model'" in failure
    added, bookmark = (await page(2, package, target)).splitlines()
    assert added == "ADDED vllm/fake"
    assert bookmark.endswith("[ 'vllm/fake' ]")


async def test_the_package_has_what_is_imported(package: Path) -> None:
    """And neither sources nor tests."""
    outcome = await run("npm", "pack", "--dry-run", "--json", "--ignore-scripts", home=package, folder=package)
    assert outcome.status == 0, outcome.err
    names = {each["path"] for each in json.loads(outcome.out)[0]["files"]}
    assert {"package.json", "README.md", "examples/chat.js", "dist/node.js", "dist/web.d.ts"} <= names
    assert {name.split("/")[0] for name in names} == {"package.json", "README.md", "examples", "dist"}


async def test_ctrl_c_in_the_example_reaches_the_engine(vllm: FakeVllm, target: str, package: Path) -> None:
    """In the middle of an endless answer."""
    vllm.play(ENDLESS)
    chat = (tool("node"), str(package / "examples" / "chat.js"), "--target", target, "hi")
    async with started(*chat, home=package) as process, asyncio.timeout(LIMIT):
        assert process.stdout is not None
        assert await process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 130
        (request,) = vllm.chats
        await request.closed_early.wait()


@pytest.mark.parametrize("name", ["leave", "abort", "close"])
async def test_every_end_of_a_call_reaches_the_engine(vllm: FakeVllm, target: str, package: Path, name: str) -> None:
    """Leaving the loop and a signal; closing the client ends the call, but not what is retained."""
    vllm.play(ENDLESS)
    outcome = await scenario(name, package, target)
    if name == "close":
        assert outcome == "Canceled"
        assert vllm.running == 1
        return
    assert outcome is True or outcome["code"] == "Canceled"
    (request,) = vllm.chats
    async with asyncio.timeout(LIMIT):
        await request.closed_early.wait()
    assert vllm.running == 0


async def test_whole_answers_counts_and_states(target: str, package: Path, vllm: FakeVllm) -> None:
    """The calls with one response."""
    vllm.play(says("Yes."))
    assert await scenario("create", package, target) == ["Yes.", "COMPLETED", True]


async def test_two_gateways_behind_envoy(vllm: FakeVllm, tmp_path: Path, package: Path) -> None:
    """Soft cancels reach the gateway that has the stream, and so does a client that knows only a chosen id."""
    async with two_gateways(vllm, tmp_path) as target:
        vllm.play(*[ENDLESS] * 13)
        assert await scenario("softly", package, target) == ["CANCELLED"]
        assert await scenario("another", package, target) == ["RUNNING", "CANCELLED", True]
        vllm.play(*[says("Yes.")] * 12)
        assert await scenario("remember", package, target) == ["COMPLETED"]
        assert len(vllm.chats) == 25


async def test_a_fault_in_the_middle(vllm: FakeVllm, target: str, package: Path) -> None:
    """The reason of the gateway, with what had arrived."""
    vllm.play(BROKEN)
    assert await scenario("fail", package, target) == FAULT


async def test_tls_and_a_key(vllm: FakeVllm, tmp_path: Path, package: Path, certificates: Certificates) -> None:
    """The gateway's certificate is checked, and its key is sent in either header; without a key the call is refused."""
    keys = tmp_path / "keys"
    keys.write_text(f"ci all sha256:{hashlib.sha256(b'secret').hexdigest()}\n", encoding="utf-8")
    flags = (
        "--access-keys-file",
        keys,
        "--tls-cert-file",
        certificates.server,
        "--tls-key-file",
        certificates.server_key,
    )
    tls = {"ca": certificates.authority.read_text(encoding="utf-8")}
    async with gateway(vllm, tmp_path, *map(str, flags)) as (_, address):
        for header in ("authorization", "x-deltawire-key"):
            vllm.play(says("Yes."))
            options = {"tls": tls, "key": "secret", "keyHeader": header}
            assert (await scenario("create", package, address, **options))[0] == "Yes."
        assert (await scenario("fail", package, address, tls=tls))["reason"] == "UNAUTHENTICATED"
        assert (await scenario("fail", package, address, tls=True, timeoutMs=5_000))["code"] == "Unavailable"


async def test_grpc_web(vllm: FakeVllm, tmp_path: Path, package: Path) -> None:
    """The same through the other port of Envoy, with the client for browsers and Node's `fetch`."""
    async with (
        gateway(vllm, tmp_path) as (_, first),
        gateway(vllm, tmp_path) as (_, second),
        envoy(tmp_path, first, second, web=web_configuration(ORIGIN)) as proxy,
    ):
        url = f"http://{proxy.web}"
        vllm.play(*[ENDLESS] * 14)
        assert await scenario("softly", package, url) == ["CANCELLED"]
        assert await scenario("another", package, url) == ["RUNNING", "CANCELLED", True]
        assert (await scenario("abort", package, url))["code"] == "Canceled"
        async with asyncio.timeout(LIMIT):
            await vllm.chats[-1].closed_early.wait()
        vllm.play(says("Yes."))
        assert (await scenario("create", package, url))[0] == "Yes."
        vllm.play(BROKEN)
        assert await scenario("fail", package, url) == FAULT


async def test_a_browser(vllm: FakeVllm, target: str, tmp_path: Path, package: Path) -> None:
    """A page at another origin in Chromium: text as it comes, failures, and a stream that is resumed and ended softly."""
    bundle = (str(stubs.LANGUAGES / "typescript" / "node_modules" / ".bin" / "esbuild"), "examples/page.js", "--bundle")
    bundled = await run(
        *bundle, f"--outfile={tmp_path}/pages/page.js", "--log-level=warning", home=package, folder=package
    )
    assert (bundled.status, bundled.err) == (0, "")
    (tmp_path / "pages" / "index.html").write_text('<!doctype html><title>page</title><script src="page.js"></script>')
    with serving(tmp_path / "pages") as origin:
        web = web_configuration(re.escape(origin))
        async with envoy(tmp_path, target, web=web) as proxy, browser.page(tmp_path, origin) as page:
            url = f"http://{proxy.web}"
            gate = asyncio.Event()
            chunk = Chunks()
            vllm.play(Script.chunks([chunk.role(), chunk.text("begun"), gate, chunk.text(", ended"), chunk.finish()]))
            asking = asyncio.create_task(page.call("chat", url))
            async with asyncio.timeout(LIMIT):
                assert await page.reports.get() == "begun"
            gate.set()
            assert (await asking)["text"] == "begun, ended"
            assert (await page.call("chat", url, "no-such-model"))["reason"] == "MODEL_NOT_FOUND"
            vllm.play(BROKEN)
            assert await page.call("chat", url) == FAULT
            vllm.play(ENDLESS)
            assert await page.call("goOn", url) == StopReason.STOP_REASON_CANCELLED
