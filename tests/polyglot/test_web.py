"""A real Envoy with the shipped configurations for callers without gRPC: pages in a real Chromium, and curl."""

from __future__ import annotations

import asyncio
import json
import os
import re
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf import json_format

from deltawire.v1.chat_completion_pb2 import ChatRequest, StreamChatCompletionRequest, StreamChatCompletionResponse
from deltawire_server.fake_vllm import Chunks, FakeVllm, Script
from tests.polyglot.browser import page, serving
from tests.polyglot.calls import MODEL, ask, chat_request, fold, gateway
from tests.polyglot.documented import commands
from tests.polyglot.programs import ENVOY_CONFIG, LIMIT, ROOT, WEB_CONFIG, Outcome, run, started, tool
from tests.polyglot.proxy import ORIGIN, envoy, web_configuration
from tests.support import recordings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.polyglot.browser import Page
    from tests.polyglot.stubs import Builds

pytestmark = pytest.mark.polyglot

SERVICE = "deltawire.v1.ChatCompletion"
STREAM = "StreamChatCompletion"
CREATE = "CreateChatCompletion"
MIB = 1 << 20
CALLS = 12
"""After which each of two gateways has had a call; where Envoy draws, all find theirs once in 4096 runs."""
CHUNKS = Chunks()
BROKEN = Script.chunks([CHUNKS.role(), CHUNKS.text("half an"), CHUNKS.text(" ans")], after=3, end="cut")

AS_GRPC = {
    "authorization": "Bearer none",
    "grpc-timeout": "60S",
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "tracestate": "a=b",
    "x-deltawire-key": "none",
    "x-deltawire-route": "mine",
    "x-request-id": "page-1",
    "x-vllm-api-token": "token",
}
"""Everything that the API reads: a browser sends none of it unless Envoy allows it."""


def chat(**fields: Any) -> dict[str, Any]:  # noqa: ANN401 -- what JSON can hold
    """A request as JSON."""
    return {"chat": {"messages": [{"user": {"text": "hi"}}], **fields}}


def in_json(request: ChatRequest) -> dict[str, Any]:
    """The same request as JSON."""
    return json_format.MessageToDict(StreamChatCompletionRequest(chat=request))


def parsed(events: list[dict[str, Any]]) -> list[StreamChatCompletionResponse]:
    """Events from their JSON. A name or value that the API does not have is an error."""
    return [json_format.ParseDict(event, StreamChatCompletionResponse()) for event in events]


def canonical(events: list[StreamChatCompletionResponse]) -> bytes:
    """An answer as bytes, the same for the same answer."""
    return json.dumps(fold(events), sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


@dataclass(frozen=True)
class Curl:
    """What curl has received; `gateway` is the header by which Envoy names it."""

    status: int
    kind: str
    body: str
    gateway: str = ""

    @property
    def events(self) -> list[dict[str, Any]]:
        """The events of a stream: whole ones, each in a `data:` of its own, and nothing else."""
        assert (self.status, self.kind) == (200, "text/event-stream"), self
        *blocks, rest = self.body.split("\n\n")
        assert rest == ""
        return [json.loads(block.removeprefix("data: ")) for block in blocks]

    @property
    def reason(self) -> str | None:
        """The reason in an error's details, or in the last event of a stream that broke off."""
        if self.status == 200:
            said: str | None = self.events[-1]["completed"].get("error", {}).get("reason")
            return said and said.removeprefix("ERROR_REASON_")
        assert self.kind == "application/json", self
        (reason,) = [each["reason"] for each in json.loads(self.body)["details"] if "reason" in each]
        return str(reason)


class Json:
    """Calls with curl, through Envoy."""

    def __init__(self, address: str, folder: Path) -> None:
        self.url = f"http://{address}"
        self._folder = folder

    def command(self, path: str, request: object, *flags: str) -> tuple[str, ...]:
        """The command of a call."""
        file = self._folder / "request.json"
        file.write_text(request if isinstance(request, str) else json.dumps(request), encoding="utf-8")
        kind = ("--header", "content-type: application/json")
        return (tool("curl"), "--silent", "--show-error", *kind, "--data", f"@{file}", *flags, f"{self.url}/{path}")

    async def post(self, path: str, request: object, *flags: str) -> Curl:
        """Call to the end. The path is a method's name, or begins with a slash."""
        path = path.removeprefix("/") if path.startswith("/") else f"{SERVICE}/{path}"
        written = "--write-out", "\n%{http_code} %{content_type} %header{x-deltawire-gateway}"
        done = await run(*self.command(path, request, *flags, *written), home=self._folder)
        assert done.status == 0, done.err
        body, _, last = done.out.rpartition("\n")
        status, kind, gateway = last.split(" ")
        return Curl(int(status), kind, body, gateway)


@pytest.fixture
async def rest(target: str, tmp_path: Path) -> AsyncIterator[Json]:
    """Calls in JSON to a gateway, through an Envoy with the shipped configurations."""
    async with envoy(tmp_path, target, web=web_configuration(ORIGIN)) as proxy:
        yield Json(proxy.web, tmp_path)


@dataclass(frozen=True)
class Web:
    """A page whose script calls through Envoy from another origin, and the gateway behind Envoy."""

    page: Page
    rest: Json
    gateway: str

    async def call(self, request: object, **headers: str) -> dict[str, Any]:
        """Stream an answer to the end: its events, and the error as the page reads it."""
        reply: dict[str, Any] = await self.page.call("chat", self.rest.url, request, headers)
        return reply


@asynccontextmanager
async def browsing(builds: Builds, target: str, folder: Path, *, allowed: bool = True) -> AsyncIterator[Web]:
    """A Chromium with a page at an origin that Envoy allows, or not."""
    pages = await asyncio.to_thread(builds.result, "TypeScript")
    with serving(pages.folder / "page") as origin:
        web = web_configuration(re.escape(origin) if allowed else ORIGIN)
        async with envoy(folder, target, web=web) as proxy, page(folder, origin) as opened:
            yield Web(opened, Json(proxy.web, folder), target)


@pytest.fixture
async def web(builds: Builds, target: str, tmp_path: Path) -> AsyncIterator[Web]:
    """A Chromium with a page at an origin that Envoy allows."""
    async with browsing(builds, target, tmp_path) as web:
        yield web


async def documented(folder: Path, command: str) -> Outcome:
    """Run a command of the README, with the shipped files in its folder."""
    for file in (ENVOY_CONFIG, WEB_CONFIG):
        (folder / file.name).write_bytes(file.read_bytes())
    environment = f"PATH={os.path.dirname(tool('envoy'))}:$PATH"  # noqa: PTH120 -- not resolved: it is the environment's own
    return await run("bash", "-euc", f"export {environment}; {command}", home=folder, folder=folder)


async def test_the_documented_commands_work(vllm: FakeVllm, rest: Json, tmp_path: Path) -> None:
    """Envoy accepts the files as they are in the repository; curl prints the stream."""
    copy, start, call = commands("Browsers and curl", ROOT / "server" / "README.md")
    checked = await documented(tmp_path, f"{copy}\n{start} --mode validate")
    assert checked.status == 0, checked.err
    assert call.count("http://127.0.0.1:50080") == 1
    answered = await documented(tmp_path, call.replace("http://127.0.0.1:50080", rest.url))
    events = Curl(200, "text/event-stream", answered.out).events
    assert events[-1]["completed"]
    assert len(vllm.chats) == 1
    # The file itself says the same.
    says = " ".join(re.sub(r"^#|\\$", "", WEB_CONFIG.read_text(encoding="utf-8"), flags=re.MULTILINE).split())
    assert all(" ".join(command.split()) in says for command in (copy, start, call))


def test_the_second_port_has_the_rules_of_the_first() -> None:
    """The same retries and routes: those for callers without gRPC are not only for gRPC."""

    def rules(file: Path) -> str:
        lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
        text = "\n".join(line for line in lines if line and not line.startswith("#"))
        found = re.search(
            r"^retry_policy:.*?(?=^- match: { prefix: / }\ndirect|^http_filters:)", text, re.MULTILINE | re.DOTALL
        )
        assert found
        return re.sub(r"\n?,? ?grpc: {}", "", found[0])

    assert rules(WEB_CONFIG) == rules(ENVOY_CONFIG)


async def test_every_recording_is_the_same_answer_through_each_door(vllm: FakeVllm, web: Web) -> None:
    """Over gRPC, as JSON to curl, and over gRPC-Web to a page: byte for byte, and with the same reason if it failed."""
    failed = set()
    for name in recordings.names():
        request = chat_request(name, choice_count=recordings.load(name).asked["choice_count"])
        script = Script.recording(recordings.TRANSCRIPTS / f"{name}.sse")
        vllm.play(script)
        direct = await ask(web.gateway, request)
        reason = direct.error.reason if direct.error else None
        # Envoy tries such a call twice, and both callers go through it.
        attempts = 2 if direct.error and direct.error.code is grpc.StatusCode.UNAVAILABLE else 1
        vllm.play(*[script] * 2 * attempts)
        seen, curl = await asyncio.gather(web.call(in_json(request)), web.rest.post(STREAM, in_json(request)))
        expected = canonical(direct.events)
        assert canonical(parsed(seen["events"])) == expected, name
        assert (seen["error"] or {}).get("reason") == reason, name
        assert curl.reason == reason, name
        if direct.events:
            assert canonical(parsed(curl.events)) == expected, name
        else:
            assert curl.status >= 400, name
        failed.add((reason, bool(direct.events)))
    # Before the first event, after it, and not at all.
    assert failed > {("UPSTREAM_REJECTED", False), ("UPSTREAM_INCOMPLETE", True), (None, True)}


async def test_a_page_gets_each_event_as_it_comes(vllm: FakeVllm, web: Web) -> None:
    """The first text is there while the engine has not gone on; the page can read which gateway it was, and go back to it."""
    gate = asyncio.Event()
    vllm.play(Script.chunks((CHUNKS.role(), CHUNKS.text("begun"), gate, CHUNKS.text(" and ended"), CHUNKS.finish())))
    async with asyncio.timeout(LIMIT):
        calling = asyncio.create_task(web.call(chat()))
        assert await web.page.reports.get() == "begun"
        assert not calling.done()
        gate.set()
        reply = await calling
    assert reply["error"] is None
    assert reply["events"][-1]["completed"]
    assert reply["gateway"]
    assert (await web.call(chat(), **AS_GRPC | {"x-deltawire-gateway": reply["gateway"]}))["error"] is None
    (_, request) = vllm.chats
    assert request.headers["x-request-id"].startswith("page-1-")
    assert request.headers["traceparent"].startswith("00-0af7651916cd43dd8448eb211c80319c-")


async def test_a_page_reads_why_a_call_failed(vllm: FakeVllm, web: Web) -> None:
    """Before the first event, when the status is in the headers, and after it: status, message, details and trailer."""
    reply = await web.call(chat(model="nobody"))
    assert reply["events"] == []
    error = reply["error"]
    assert (error["code"], error["reason"], error["trailer"]) == ("NotFound", "MODEL_NOT_FOUND", "MODEL_NOT_FOUND")
    assert MODEL in error["message"]
    vllm.play(BROKEN)
    reply = await web.call(chat())
    error = reply["error"]
    incomplete = "UPSTREAM_INCOMPLETE"
    assert (error["code"], error["reason"], error["trailer"]) == ("Aborted", incomplete, incomplete)
    assert "".join(event["textDelta"]["text"] for event in reply["events"] if "textDelta" in event) == "half an ans"
    assert reply["events"][-1]["completed"]["error"]


async def test_a_page_that_cancels_ends_the_generation(vllm: FakeVllm, web: Web) -> None:
    """An endless answer: vLLM's request is closed, nothing runs on."""
    vllm.play(Script.generated(tokens=1_000_000, tokens_per_second=50))
    async with asyncio.timeout(LIMIT):
        calling = asyncio.create_task(web.call(chat()))
        await web.page.reports.get()
        (request,) = vllm.chats
        await web.page.call("cancel")
        assert (await calling)["error"]["code"] == "Canceled"
        await request.closed_early.wait()
    assert vllm.running == 0


async def test_a_page_of_another_origin_cannot_call(
    builds: Builds, vllm: FakeVllm, target: str, tmp_path: Path
) -> None:
    """Nor can it with a request that browsers send without asking first. Nothing reaches the engine."""
    async with browsing(builds, target, tmp_path, allowed=False) as web:
        reply = await web.call(chat())
        assert reply["events"] == []
        assert "fetch" in reply["error"]["message"]
        plain = {"method": "POST", "mode": "no-cors", "body": json.dumps(chat())}
        # It is sent, and answered with 403: the page cannot see that.
        assert (
            await web.page.call(
                "(async (...all) => (await fetch(...all)).type)", f"{web.rest.url}/{SERVICE}/{CREATE}", plain
            )
            == "opaque"
        )
        assert (await web.rest.post(CREATE, chat(), "--header", "origin: https://chat.example.com")).status == 200
        for origin in ("https://chat.example.com.evil.test", "https://chatxexample.com", "null"):
            refused = await web.rest.post(CREATE, chat(), "--header", f"origin: {origin}")
            assert refused.status == 403, origin
    assert len(vllm.chats) == 1


async def test_calls_about_a_completion_reach_its_gateway(vllm: FakeVllm, tmp_path: Path) -> None:
    """By the header that Envoy gave the call, or by the one that the caller chose, as those over gRPC."""
    async with (
        gateway(vllm, tmp_path) as (_, first),
        gateway(vllm, tmp_path) as (_, second),
        envoy(tmp_path, first, second, web=web_configuration(ORIGIN)) as proxy,
    ):
        rest = Json(proxy.web, tmp_path)
        gateways = set()
        for number in range(CALLS):
            made = await rest.post(CREATE, chat())
            gateways.add(made.gateway)
            routed = f"x-deltawire-route: mine-{number}"
            assert (await rest.post(CREATE, chat(completionId=f"mine-{number}"), "--header", routed)).status == 200
            generated = json.loads(made.body)["started"]["completionId"]
            header = f"x-deltawire-gateway: {made.gateway}"
            for completion_id, place in ((generated, header), (f"mine-{number}", routed)):
                found = await rest.post("GetChatCompletion", {"completionId": completion_id}, "--header", place)
                assert found.status == 200, found.body
        assert len(gateways) == 2


async def test_an_error_is_json_with_its_details(rest: Json) -> None:
    """An unknown model is 404, with the google.rpc.Status as JSON and the ErrorInfo in it."""
    answer = await rest.post(CREATE, chat(model="nobody"))
    assert (answer.status, answer.reason) == (404, "MODEL_NOT_FOUND")
    error = json.loads(answer.body)
    assert error["code"] == 5
    assert MODEL in error["message"]
    (info,) = [each for each in error["details"] if each["@type"] == "type.googleapis.com/google.rpc.ErrorInfo"]
    assert info["domain"] == "deltawire.dev"
    assert info["metadata"]["model"] == "nobody"


async def test_violations_of_fields_are_json_too(rest: Json) -> None:
    """A request without messages is 400, and google.rpc.BadRequest names the field."""
    answer = await rest.post(CREATE, {"chat": {}})
    assert answer.status == 400
    bad = [each for each in json.loads(answer.body)["details"] if each["@type"].endswith("/google.rpc.BadRequest")]
    assert "chat.messages" in [violation["field"] for each in bad for violation in each["fieldViolations"]]


async def test_curl_gets_each_event_as_it_comes_and_its_end_ends_the_generation(vllm: FakeVllm, rest: Json) -> None:
    """Of an endless answer: a `data:` for each event; when curl is ended, vLLM's request is closed."""
    vllm.play(Script.generated(tokens=1_000_000, tokens_per_second=50))
    command = rest.command(f"{SERVICE}/{STREAM}", chat(), "--no-buffer")
    async with asyncio.timeout(LIMIT):
        async with started(*command, home=ROOT) as curl:
            assert curl.stdout is not None
            lines = [await curl.stdout.readline() for _ in range(4)]
            assert "started" in json.loads(lines[0].removeprefix(b"data: "))
            assert "textDelta" in json.loads(lines[2].removeprefix(b"data: "))
            (request,) = vllm.chats
            assert vllm.running == 1
        await request.closed_early.wait()
    assert vllm.running == 0


async def test_a_fault_is_in_the_last_event(vllm: FakeVllm, rest: Json) -> None:
    """HTTP/1.1 has no other place for it: the status was sent long before."""
    vllm.play(BROKEN)
    answer = await rest.post(STREAM, chat())
    assert answer.reason == "UPSTREAM_INCOMPLETE"
    assert answer.events[-1]["completed"]["error"]["code"] == grpc.StatusCode.ABORTED.value[0]


async def test_what_is_no_request_is_refused_with_the_reason(vllm: FakeVllm, rest: Json) -> None:
    """By Envoy itself, in plain text."""
    cases: list[tuple[str, object, int, str]] = [
        ("/v1/chat/completions", chat(), 404, "Could not resolve /v1/chat/completions to a method"),
        ("CreateChat", chat(), 404, f"Could not resolve /{SERVICE}/CreateChat to a method"),
        (f"{CREATE}?temprature=1", chat(), 400, 'Could not find field "temprature"'),
        (CREATE, {"chat": {"messages": 1}}, 400, "chat.messages: invalid value 1"),
        (CREATE, chat(reasoning={"effort": "LOTS"}), 400, 'chat.reasoning.effort: invalid value "LOTS"'),
        (CREATE, '{"chat": ', 400, "Unexpected end of string"),
    ]
    for path, request, status, said in cases:
        answer = await rest.post(path, request)
        assert (answer.status, answer.kind) == (status, "text/plain")
        assert said in answer.body
    assert not vllm.chats


async def test_without_a_gateway_the_call_is_refused(vllm: FakeVllm, tmp_path: Path) -> None:
    """At once, by Envoy itself, in plain text."""
    async with (
        gateway(vllm, tmp_path) as (leaving, address),
        envoy(tmp_path, address, web=web_configuration(ORIGIN)) as proxy,
    ):
        await leaving.drain()
        await proxy.until(address, "failed_active_health_check")
        answer = await Json(proxy.web, tmp_path).post(CREATE, chat())
    assert (answer.status, answer.kind, answer.body) == (503, "text/plain", "no healthy upstream")


async def test_unknown_fields_of_a_body_are_ignored(vllm: FakeVllm, rest: Json) -> None:
    """As documented: Envoy cannot refuse them."""
    assert (await rest.post(CREATE, chat(temprature=1))).status == 200
    (request,) = vllm.chats
    assert "temprature" not in request.body


async def test_large_messages_pass(vllm: FakeVllm, rest: Json) -> None:
    """Above Envoy's own limit of 1 MiB, in both directions. What no gateway would accept does not fill Envoy's memory."""
    # As JSON, each of these has six bytes.
    text = "\x01" * MIB
    vllm.play(Script.chunks((CHUNKS.role(), CHUNKS.text(text), CHUNKS.finish())))
    answer = await rest.post(CREATE, {"chat": {"messages": [{"user": {"text": text}}]}})
    assert answer.status == 200, answer.body[:1000]
    assert json.loads(answer.body)["completed"]["choices"][0]["message"]["text"] == text
    refused = await rest.post(CREATE, chat() | {"unknown": "x" * (33 * MIB)})
    assert (refused.status, refused.body) == (413, "Payload Too Large")
    (request,) = vllm.chats
    assert request.body["messages"][0]["content"] == text
