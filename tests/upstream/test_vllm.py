"""A vLLM over HTTP: what is asked of it and how, and what its answers come to."""

from __future__ import annotations

import asyncio
import json
import ssl
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from deltawire_server.errors import CallerError, Code, DeltawireError, ProviderError, Reason
from deltawire_server.fake_vllm import FakeVllm, Script
from deltawire_server.upstream.base import CallContext, Health, HealthStatus, ServedModel, Timeouts
from deltawire_server.upstream.failures import MAX_EXCERPT_BYTES
from deltawire_server.upstream.request import FormatKind, TextFormat
from deltawire_server.upstream.vllm import VllmProvider, root_url
from deltawire_server.upstream.vllm_api import MAX_ERROR_BYTES, MAX_SERVED_NAME
from tests.support.pushed import pulled
from tests.support.recordings import TRANSCRIPTS
from tests.upstream.plain import plain
from tests.upstream.support import CALL, CALLERS, CHAT, CHUNK, HI, MODELS, OPERATORS, answer_of, provider, refusal_of
from tests.upstream.test_failures import RECORDED

if TYPE_CHECKING:
    from tests.conftest import Certificates
    from tests.support.gateway import Lines


async def listing_of(body: bytes, said: str = "200 OK") -> tuple[ServedModel, ...]:
    """What a provider that answers this lists."""
    async with plain({MODELS: (said, body)}) as server, provider(f"http://127.0.0.1:{server.port}") as vllm:
        return await vllm.list_models()


async def health_of(health: tuple[str, bytes], sleeping: tuple[str, bytes] | None = None) -> Health:
    """How a provider is that answers this."""
    answers = {"/health": health}
    if sleeping is not None:
        answers["/is_sleeping"] = sleeping
    async with plain(answers) as server, provider(f"http://127.0.0.1:{server.port}/v1") as vllm:
        return await vllm.check_health()


@pytest.mark.parametrize(
    ("operators", "callers", "sent"),
    [
        (None, None, None),
        (OPERATORS, None, f"Bearer {OPERATORS}"),
        (None, CALLERS, f"Bearer {CALLERS}"),
        (OPERATORS, CALLERS, f"Bearer {CALLERS}"),
        (OPERATORS, "", f"Bearer {OPERATORS}"),
    ],
)
async def test_the_callers_token_comes_before_the_operators(
    vllm: FakeVllm, operators: str | None, callers: str | None, sent: str | None
) -> None:
    """And without either, no authorization is sent."""
    async with provider(vllm.base_url, api_token=operators) as p:
        await answer_of(p, CallContext("r", token=callers))
    assert vllm.chats[0].headers.get("authorization") == sent


@pytest.mark.parametrize(
    ("operators", "callers", "sent"),
    [(None, None, None), (None, CALLERS, f"Bearer {CALLERS}"), (OPERATORS, CALLERS, f"Bearer {OPERATORS}")],
)
async def test_a_listing_is_shared_so_the_operators_token_comes_first(
    vllm: FakeVllm, operators: str | None, callers: str | None, sent: str | None
) -> None:
    """Of two tokens, for a listing."""
    async with provider(vllm.base_url, api_token=operators) as p:
        await p.list_models(callers)
    assert vllm.requests[0].headers.get("authorization") == sent


async def test_headers(vllm: FakeVllm) -> None:
    """A request says who asks and what it takes: an uncompressed event stream; and passes on the caller's trace."""
    call = CallContext("request-1", traceparent="00-4bf9-00f0-01", tracestate="a=b")
    async with provider(vllm.base_url, user_agent="deltawire/1.2") as p:
        await answer_of(p, call)
    headers = vllm.chats[0].headers
    assert headers["content-type"] == "application/json"
    assert headers["accept"] == "text/event-stream"
    assert headers["accept-encoding"] == "identity"
    assert headers["user-agent"] == "deltawire/1.2"
    assert (headers["traceparent"], headers["tracestate"]) == ("00-4bf9-00f0-01", "a=b")


async def test_the_operators_headers_go_with_every_request(vllm: FakeVllm) -> None:
    """Chat, listing and health, beside those that are always sent."""
    async with provider(vllm.base_url, headers={"X-Team": "search", "x-cell": "7"}, user_agent="deltawire/1.2") as p:
        await answer_of(p)
        await p.list_models()
        await p.check_health()
    assert {CHAT, MODELS, "/health", "/is_sleeping"} <= {request.path for request in vllm.requests}
    for request in vllm.requests:
        headers = request.headers
        assert (headers["x-team"], headers["x-cell"], headers["user-agent"]) == ("search", "7", "deltawire/1.2")


async def test_without_a_trace_none_is_sent(vllm: FakeVllm) -> None:
    """None is made up either."""
    async with provider(vllm.base_url) as p:
        await answer_of(p)
    assert not vllm.chats[0].headers.keys() & {"traceparent", "tracestate"}


async def test_each_attempt_has_a_request_id_of_its_own(vllm: FakeVllm) -> None:
    """The caller's, with eight hexadecimal digits behind it."""
    async with provider(vllm.base_url) as p:
        await answer_of(p)
        await answer_of(p)
    first, second = (chat.headers["x-request-id"] for chat in vllm.chats)
    assert first != second
    for sent in (first, second):
        begin, _, end = sent.rpartition("-")
        assert begin == "request-1"
        assert len(end) == 8
        assert int(end, 16) >= 0


async def test_no_cookies_are_kept(vllm: FakeVllm) -> None:
    """What one answer sets, the next request does not send."""
    vllm.play(Script.generated(headers={"set-cookie": "replica=7; path=/"}))
    async with provider(vllm.base_url) as p:
        await answer_of(p)
        await answer_of(p)
    assert all("cookie" not in chat.headers for chat in vllm.chats)


async def test_proxies_in_the_environment_are_not_used(vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base URL says where the provider is."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    async with provider(vllm.base_url) as p:
        assert await answer_of(p)


@pytest.mark.parametrize(
    ("written", "root"),
    [
        ("http://h:8000", "http://h:8000"),
        ("http://h:8000/", "http://h:8000"),
        ("http://h:8000/v1", "http://h:8000"),
        ("http://h:8000/v1/", "http://h:8000"),
        ("http://h:8000/v1//", "http://h:8000"),
        ("http://h/prefix", "http://h/prefix"),
        ("http://h/prefix//v1/", "http://h/prefix"),
        ("http://h/prefix/v1", "http://h/prefix"),
        ("http://h/v1x", "http://h/v1x"),
    ],
)
def test_roots(written: str, root: str) -> None:
    """However an operator writes it."""
    assert root_url(written) == root
    assert VllmProvider("p", written).base_urls == (f"{root}/v1",)


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/", "/pre/fix", "/pre/fix/v1", "/pre/fix/v1/"])
async def test_every_form_of_base_url_reaches_every_endpoint(suffix: str) -> None:
    """Chat and models are below /v1, health is beside it; a prefix stays."""
    prefix = "/pre/fix" if "pre" in suffix else ""
    answers = {
        f"{prefix}/v1/chat/completions": ("200 OK\r\ncontent-type: text/event-stream", CHUNK),
        f"{prefix}/v1/models": ("200 OK", b'{"data":[{"id":"m"}]}'),
        f"{prefix}/health": ("200 OK", b""),
    }
    async with plain(answers) as server, provider(f"http://127.0.0.1:{server.port}{suffix}") as p:
        assert await answer_of(p) == CHUNK
        assert await p.list_models() == (ServedModel("m"),)
        assert await p.check_health() == Health(HealthStatus.OK)
        assert {*answers, f"{prefix}/is_sleeping", f"{prefix}/version"} <= {*server.paths}
        assert all(path.startswith(prefix) for path in server.paths)


@pytest.fixture
def tls(certificates: Certificates) -> ssl.SSLContext:
    """A server's side of TLS, with a certificate that no system's authorities signed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.server, certificates.server_key)
    return context


async def test_tls_is_verified_by_default(tls: ssl.SSLContext) -> None:
    """A certificate from an unknown authority is not accepted, and the message says so."""
    async with FakeVllm(ssl_context=tls) as vllm, provider(vllm.base_url) as p:
        error = await refusal_of(p)
        assert (error.reason, error.retry_after) == (Reason.PROVIDER_MISCONFIGURED, None)
        assert error.message.endswith("its certificate is signed by an authority that is not trusted here")
        with pytest.raises(ProviderError) as caught:
            await p.list_models()
        assert caught.value.reason is Reason.PROVIDER_MISCONFIGURED
        assert "its certificate is signed by an authority" in (await p.check_health()).message
        assert not vllm.requests


async def test_tls_by_an_authority_of_ones_own(tls: ssl.SSLContext, certificates: Certificates) -> None:
    """With the CA file all of it works."""
    context = ssl.create_default_context(cafile=certificates.authority)
    async with FakeVllm(ssl_context=tls) as vllm, provider(vllm.base_url, tls=context) as p:
        assert await answer_of(p)
        assert await p.list_models()
        assert (await p.check_health()).status is HealthStatus.OK


async def test_tls_unverified_if_the_operator_says_so(tls: ssl.SSLContext) -> None:
    """Any certificate will do then, for health too."""
    async with FakeVllm(ssl_context=tls) as vllm, provider(vllm.base_url, tls=False) as p:
        assert await answer_of(p)
        assert (await p.check_health()).status is HealthStatus.OK


async def test_tokens_are_in_no_text(vllm: FakeVllm, lines: Lines) -> None:
    """Neither in what represents the parts, nor in errors, nor in any line of the log from debug up."""
    call = CallContext("r", token=CALLERS)
    texts = [repr(call), str(call), repr(CallContext("r"))]
    vllm.play(Script.error(401, "Unauthorized"), Script.error(500, "no"))
    async with provider(vllm.base_url, api_token=OPERATORS, headers={"x-gate": OPERATORS}) as p:
        texts += [repr(p), str(await refusal_of(p, call)), str(await refusal_of(p))]
        await answer_of(p, call)
        await vllm.crash()
        texts += [str(await refusal_of(p, call)), (await p.check_health()).message]
    texts.append(lines.getvalue())
    assert not [text for text in texts if OPERATORS in text or CALLERS in text]
    assert repr(p) == f"VllmProvider('p', '{vllm.base_url}/v1')"


@pytest.mark.parametrize(("name", "expected"), RECORDED.items(), ids=RECORDED)
async def test_recorded_refusals(vllm: FakeVllm, name: str, expected: tuple[Code, Reason, str]) -> None:
    """What a real vLLM said, over HTTP: the code, the reason, the field, and vLLM's own sentence where it helps."""
    code, reason, field = expected
    vllm.play(Script.recording(TRANSCRIPTS / f"{name}.body"))
    async with provider(vllm.base_url) as p:
        error = await refusal_of(p)
    assert (error.code, error.reason, error.metadata.get("field", "")) == (code, reason, field)
    assert [violation.field for violation in error.violations] == ([field] if field else [])
    said = json.loads((TRANSCRIPTS / f"{name}.body").read_bytes()).get("error")
    if isinstance(said, dict):
        assert said["message"] in error.message


@pytest.mark.parametrize("recording", ["err-nonstream-bad-regex.body", "err-bad-regex.sse"])
async def test_an_invalid_regex_is_reported_with_its_field(vllm: FakeVllm, recording: str) -> None:
    """By an HTTP status and by an error event."""
    request = replace(HI, response_format=TextFormat(FormatKind.REGEX, "(unclosed"))
    vllm.play(Script.recording(TRANSCRIPTS / recording))
    async with provider(vllm.base_url) as p:
        with pytest.raises(CallerError) as caught:
            async with p.stream_chat(request, "fake", CALL):
                pass
    assert caught.value.message.startswith("chat.response_format.regex: Grammar error: at 1(8): invalid regex")
    assert caught.value.metadata["field"] == "chat.response_format.regex"


async def test_an_unknown_model_of_the_providers(vllm: FakeVllm) -> None:
    """The name in the metadata is the one that the caller used; vLLM's sentence lists those that there are."""
    async with provider(vllm.base_url) as p:
        error = await refusal_of(p, model="gone")
    assert error.reason is Reason.MODEL_NOT_FOUND
    assert error.metadata["model"] == "asked"
    assert "fake" in error.message


async def test_an_error_that_is_too_large_is_cut(vllm: FakeVllm) -> None:
    """It is no JSON then; its beginning is passed on."""
    vllm.play(Script.answer(b'{"error":"' + b"m" * MAX_ERROR_BYTES + b'"}', status=400))
    async with provider(vllm.base_url) as p:
        message = (await refusal_of(p)).message
    assert message.startswith('{"error":"mmm')
    assert len(message.encode()) <= MAX_EXCERPT_BYTES


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("7", 7.0), ("0", 0.0), ("Wed, 21 Oct 2026 07:28:00 GMT", 1.0), ("-5", 1.0), ("9" * 400, 3600.0)],
)
async def test_retry_after(vllm: FakeVllm, header: str, seconds: float) -> None:
    """Seconds are taken, within reason; a date is not read."""
    vllm.play(Script.error(429, "full", headers={"retry-after": header}))
    async with provider(vllm.base_url) as p:
        error = await refusal_of(p)
    assert (error.reason, error.retry_after) == (Reason.UPSTREAM_OVERLOADED, seconds)


async def test_an_error_whose_body_breaks_off_is_told_by_its_status(vllm: FakeVllm) -> None:
    """The status came."""
    vllm.play(Script.chunks([b'{"error":'], status=503, content_type="application/json", end="reset"))
    async with provider(vllm.base_url) as p:
        error = await refusal_of(p)
    assert (error.reason, error.retry_after) == (Reason.UPSTREAM_UNAVAILABLE, 1.0)


@pytest.mark.parametrize("content_type", ["application/json", "text/html", ""])
async def test_an_answer_that_is_no_event_stream(vllm: FakeVllm, content_type: str) -> None:
    """Is nonsense, and the message names what it was."""
    vllm.play(Script.answer(b"{}", content_type=content_type))
    async with provider(vllm.base_url) as p:
        error = await refusal_of(p)
    assert (error.reason, error.code) == (Reason.UPSTREAM_MALFORMED, Code.INTERNAL)
    assert (content_type or "no content type") in error.message


@pytest.mark.parametrize(
    "script",
    [
        Script.generated(header_bytes=0, end="eof"),
        Script.generated(header_bytes=0, end="reset"),
        Script.generated(header_bytes=20, end="eof"),
    ],
    ids=["closed", "reset", "in the status line"],
)
async def test_a_connection_that_breaks_before_the_answer(vllm: FakeVllm, script: Script) -> None:
    """The provider is away: try again."""
    vllm.play(script)
    async with provider(vllm.base_url) as p:
        error = await refusal_of(p)
    assert (type(error), error.reason, error.retry_after) == (ProviderError, Reason.UPSTREAM_UNAVAILABLE, 1.0)
    assert error.metadata == {"provider": "p"}


async def test_a_provider_that_is_not_there(vllm: FakeVllm) -> None:
    """Chat and listing fail alike, without the address; health says so and does not fail."""
    async with provider(vllm.base_url) as p:
        await vllm.crash()
        error = await refusal_of(p)
        with pytest.raises(ProviderError) as listing:
            await p.list_models()
        health = await p.check_health()
    assert error.reason is listing.value.reason is Reason.UPSTREAM_UNAVAILABLE
    assert p.base_urls[0] not in error.message
    assert health.status is HealthStatus.ERROR
    assert health.message.startswith("Health check failed: ")


@pytest.mark.parametrize("end", ["eof", "cut", "reset"])
async def test_a_body_that_breaks_off_just_ends(vllm: FakeVllm, end: Any) -> None:  # noqa: ANN401 (a fault's name)
    """What is missing is told from its events."""
    vllm.play(Script.generated(tokens=20, after=5, end=end))
    async with provider(vllm.base_url) as p:
        body = await answer_of(p)
    assert b"[DONE]" not in body
    assert body.startswith(b"data: ")


async def test_leaving_early_closes_the_connection(vllm: FakeVllm) -> None:
    """That is what makes vLLM stop."""
    never = asyncio.Event()
    vllm.play(Script.chunks([CHUNK, never]))
    async with provider(vllm.base_url) as p:
        async with p.stream_chat(HI, "fake", CALL) as answering:
            assert await anext(pulled(answering.body)) == CHUNK
        await vllm.chats[0].closed_early.wait()
    assert vllm.running == 0


async def test_a_cancelled_request_closes_the_connection(vllm: FakeVllm) -> None:
    """Also before the first byte of the answer."""
    vllm.play(Script.generated(headers_delay=3600))
    async with provider(vllm.base_url) as p:
        task = asyncio.create_task(answer_of(p))
        chat = await vllm.received()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await chat.closed_early.wait()


async def test_a_body_read_to_its_end_leaves_the_connection_for_the_next(vllm: FakeVllm) -> None:
    """One connection serves one call after the other."""
    async with provider(vllm.base_url) as p:
        for _ in range(3):
            await answer_of(p)
            assert vllm.connections == 1


async def test_closing_ends_what_is_under_way(vllm: FakeVllm) -> None:
    """The provider sees the connection go."""
    never = asyncio.Event()
    vllm.play(Script.chunks([CHUNK, never]))
    async with provider(vllm.base_url) as p, p.stream_chat(HI, "fake", CALL) as answering:
        await anext(pulled(answering.body))
        await p.close()
        await vllm.chats[0].closed_early.wait()


async def test_served_models() -> None:
    """All that vLLM says of a model; what it does not say is empty."""
    cards = [
        {"id": "base", "root": "/models/base", "parent": None, "max_model_len": 4096},
        {"id": "lora", "root": "/adapters/lora", "parent": "base", "max_model_len": None},
        {"id": "bare"},
        {"id": "odd", "root": 5, "parent": [], "max_model_len": "long"},
    ]
    assert await listing_of(json.dumps({"object": "list", "data": cards}).encode()) == (
        ServedModel("base", "/models/base", "", 4096),
        ServedModel("lora", "/adapters/lora", "base"),
        ServedModel("bare"),
        ServedModel("odd"),
    )


async def test_entries_that_are_none_are_passed_over() -> None:
    """One bad entry does not hide the others; nor does one whose name alone would fill a message."""
    body = b'{"data":[null,5,"x",{},{"id":""},{"id":null},{"id":"m"}]}'
    assert await listing_of(body) == (ServedModel("m"),)
    longest = "x" * MAX_SERVED_NAME
    body = json.dumps({"data": [{"id": "x" * 1_000_000}, {"id": longest}, {"id": f"{longest}x"}]}).encode()
    assert await listing_of(body) == (ServedModel(longest),)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"null",
        b"[]",
        b"{}",
        b'{"data":null}',
        b'{"data":{"id":"m"}}',
        b'{"data":"m"}',
        b'{"data":["\xff"]}',
    ],
)
async def test_a_list_of_models_that_is_none(body: bytes) -> None:
    """Is nonsense, which must not be taken for "serves nothing"."""
    with pytest.raises(ProviderError) as caught:
        await listing_of(body)
    assert caught.value.reason is Reason.UPSTREAM_MALFORMED
    assert "base URL" in caught.value.message


async def test_a_list_of_models_that_breaks_off() -> None:
    """The provider is away."""
    with pytest.raises(ProviderError) as caught:
        await listing_of(b'{"data":[', "200 OK\r\ncontent-length: 100")
    assert caught.value.reason is Reason.UPSTREAM_UNAVAILABLE


@pytest.mark.parametrize(
    ("operators", "callers", "kind", "reason"),
    [
        ("wrong", None, ProviderError, Reason.PROVIDER_MISCONFIGURED),
        ("wrong", "wrong", ProviderError, Reason.PROVIDER_MISCONFIGURED),
        (None, None, ProviderError, Reason.PROVIDER_MISCONFIGURED),
        (None, "wrong", CallerError, Reason.UPSTREAM_UNAUTHENTICATED),
    ],
)
async def test_whose_token_a_listing_refused(
    operators: str | None, callers: str | None, kind: type, reason: Reason
) -> None:
    """The caller's only if it was sent."""
    async with FakeVllm(api_key="right") as vllm, provider(vllm.base_url, api_token=operators) as p:
        with pytest.raises(DeltawireError) as caught:
            await p.list_models(callers)
    assert (type(caught.value), caught.value.reason) == (kind, reason)


OK = ("200 OK", b"")


@pytest.mark.parametrize(
    ("health", "sleeping", "expected"),
    [
        (OK, None, Health(HealthStatus.OK)),
        (OK, ("200 OK", b'{"is_sleeping":false}'), Health(HealthStatus.OK)),
        (
            OK,
            ("200 OK", b'{"is_sleeping":true}'),
            Health(HealthStatus.ERROR, "Health check failed: the engine is asleep"),
        ),
        (OK, ("200 OK", b'{"is_sleeping":1}'), Health(HealthStatus.OK)),
        (OK, ("200 OK", b"[]"), Health(HealthStatus.OK)),
        (OK, ("200 OK", b"<html>"), Health(HealthStatus.OK)),
        (OK, ("200 OK", b"\xff"), Health(HealthStatus.OK)),
        (OK, ("500 Oops", b'{"is_sleeping":true}'), Health(HealthStatus.OK)),
        (("503 Service Unavailable", b""), None, Health(HealthStatus.ERROR, "Health check failed: HTTP 503")),
        (("307 Elsewhere\r\nlocation: /", b""), None, Health(HealthStatus.ERROR, "Health check failed: HTTP 307")),
    ],
)
async def test_health(health: tuple[str, bytes], sleeping: tuple[str, bytes] | None, expected: Health) -> None:
    """/health decides, and /is_sleeping where there is one; neither needs a token."""
    assert await health_of(health, sleeping) == expected


@pytest.mark.parametrize("answers", [(("", b""), None), (OK, ("", b""))])
async def test_health_when_the_connection_breaks(answers: tuple[tuple[str, bytes], tuple[str, bytes] | None]) -> None:
    """Not well, and why; at either request."""
    health = await health_of(*answers)
    assert health.status is HealthStatus.ERROR
    assert health.message.startswith("Health check failed: ")


async def test_health_success(vllm: FakeVllm) -> None:
    """A vLLM that is up is OK; asked at /health beside /v1."""
    async with provider(f"{vllm.base_url}/v1") as p:
        assert await p.check_health() == Health(HealthStatus.OK)
    assert [request.path for request in vllm.requests] == ["/health", "/is_sleeping"]


async def test_a_wrong_token_is_not_well() -> None:
    """/health asks for no key, so a wrong one is looked for where it matters; without one, callers bring their own."""
    async with FakeVllm(api_key="right") as vllm:
        for token, status in (("right", HealthStatus.OK), ("wrong", HealthStatus.ERROR), (None, HealthStatus.OK)):
            async with provider(vllm.base_url, api_token=token) as p:
                health = await p.check_health()
                assert health.status is status
                assert ("rejects the token" in health.message) is (status is HealthStatus.ERROR)


async def test_health_without_static_key() -> None:
    """Health needs no token, and the right one does no harm. Kept; that a wrong one looked well too is fixed."""
    async with FakeVllm(api_key="key") as vllm:
        for token in (None, "key"):
            async with provider(vllm.base_url, api_token=token) as p:
                assert (await p.check_health()).status is HealthStatus.OK


async def test_health_of_an_engine_that_died_and_one_that_sleeps(vllm: FakeVllm) -> None:
    """Both are ERROR, though a sleeping one's /health is 200."""
    async with provider(vllm.base_url) as p:
        vllm.sleep()
        assert "asleep" in (await p.check_health()).message
        vllm.wake()
        assert (await p.check_health()).status is HealthStatus.OK
        vllm.healthy = False
        assert "503" in (await p.check_health()).message


def test_what_it_is() -> None:
    """The rest of what a provider says of itself."""
    timeouts = Timeouts(1.0, 2.0)
    p = VllmProvider("p", "http://h", "http://i/v1/", default_max_tokens=5, timeouts=timeouts, refresh_interval=7.0)
    assert (p.id, p.kind, p.default_max_tokens, p.timeouts) == ("p", "vllm", 5, timeouts)
    assert (p.base_urls, p.refresh_interval) == (("http://h/v1", "http://i/v1"), 7.0)
    assert repr(p) == "VllmProvider('p', 'http://h/v1', 'http://i/v1')"
    assert VllmProvider("p", "http://h").timeouts == Timeouts()


@pytest.mark.parametrize(
    ("allowed", "listed"),
    [
        ((), ["llama", "team-a/x", "team-b/x"]),
        (("llama",), ["llama"]),
        (("team-?/*", "Llama"), ["team-a/x", "team-b/x"]),
        (("*/x", "l*"), ["llama", "team-a/x", "team-b/x"]),
        (("other",), []),
    ],
)
async def test_allowed_models(allowed: tuple[str, ...], listed: list[str]) -> None:
    """Names and patterns, in which case matters: others are not listed, and asking for one is refused here."""
    async with (
        FakeVllm(models=("llama", "team-a/x", "team-b/x")) as vllm,
        provider(vllm.base_url, allowed_models=allowed) as p,
    ):
        assert [model.id for model in await p.list_models()] == listed
        for model in ("llama", "team-a/x", "team-b/x"):
            if model in listed:
                await answer_of(p, model=model)
                continue
            error = await refusal_of(p, model=model)
            assert (type(error), error.reason) == (ProviderError, Reason.MODEL_NOT_SERVED)
            assert error.metadata == {"model": model, "provider": "p"}
            assert "not listed in allowed_models" in error.message
        assert len(vllm.chats) == len(listed)
