"""Images from a caller's request to what vLLM is asked, over a whole gateway."""

from __future__ import annotations

import base64
import functools
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

import pytest

from deltawire.v1 import message_pb2
from deltawire_server import app
from deltawire_server.images.load import MAX_FETCHES, Images
from deltawire_server.settings import ImageSettings, Settings
from tests.images.server import Answer, Names, ok, web
from tests.support.gateway import ask, failure_of, read_badly, read_well, running, settings_of, until
from tests.support.images import PNG

if TYPE_CHECKING:
    from pathlib import Path

    from deltawire.v1 import chat_completion_pb2 as chat_pb
    from deltawire_server.fake_vllm import FakeVllm

FIELD = "chat.messages[0].user.content[1].image"
DATA_URL = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
HOST = "images.example"
SILENT = Answer(b"", hold=True)
SLOW, QUICK = "slow-slow-slow-slow", "quick-quick-quick"


def showing(**source: Any) -> chat_pb.ChatRequest:  # noqa: ANN401 (url or data)
    """A request with a text and an image."""
    image = message_pb2.ContentPart(image=message_pb2.Image(**source))
    content = [message_pb2.ContentPart(text="What is this?"), image]
    return ask(messages=[message_pb2.ChatMessage(user=message_pb2.UserMessage(content=content))])


def settings_with(
    vllm: FakeVllm,
    folder: Path,
    *,
    stream: Any = None,  # noqa: ANN401
    provider: Any = None,  # noqa: ANN401
    access: Any = None,  # noqa: ANN401
    limits: Any = None,  # noqa: ANN401
    **images: Any,  # noqa: ANN401
) -> Settings:
    """Settings with these for images."""
    settings = settings_of(vllm.base_url, folder, stream=stream, provider=provider, access=access, limits=limits)
    return settings.model_copy(update={"images": ImageSettings(**images)})


def fetching(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take this machine for the internet: no setting can."""
    here = ip_address("127.0.0.1")
    seam = functools.partial(Images, permits=here.__eq__, look_up=Names({HOST: [["127.0.0.1"]]}), tls=False)
    monkeypatch.setattr(app, "Images", seam)


def key(value: str) -> tuple[tuple[str, str], ...]:
    """The metadata of a caller with this key."""
    return (("authorization", f"Bearer {value}"),)


def asked(vllm: FakeVllm) -> list[Any]:
    """The content of the last message that vLLM was asked with."""
    content: list[Any] = vllm.chats[-1].body["messages"][-1]["content"]
    return content


@pytest.mark.parametrize("source", [{"data": PNG}, {"url": DATA_URL}, {"url": DATA_URL.replace("png", "x-y")}])
async def test_images_that_come_with_the_request(vllm: FakeVllm, tmp_path: Path, source: dict[str, Any]) -> None:
    """Reach vLLM with the type that their bytes say."""
    async with running(settings_of(vllm.base_url, tmp_path)) as gateway:
        await read_well(gateway.stream(showing(**source)))
    assert asked(vllm) == [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": DATA_URL}},
    ]


async def test_addresses_are_refused_by_default(vllm: FakeVllm, tmp_path: Path) -> None:
    """Streamed and whole, by the field, and vLLM is not asked."""
    async with running(settings_of(vllm.base_url, tmp_path)) as gateway:
        events, streamed = await read_badly(gateway.stream(showing(url=f"https://{HOST}/")))
        whole = await failure_of(gateway.create(showing(url=f"https://{HOST}/")))
    assert not events
    for failure in (streamed, whole):
        assert (failure.reason, failure.fields) == ("INVALID_REQUEST", [f"{FIELD}.url"])
        assert "images.urls" in failure.message
    assert not vllm.chats


async def test_addresses_are_fetched(vllm: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And vLLM gets the bytes."""
    fetching(monkeypatch)
    async with web({"/a.png": ok(PNG)}) as server:
        rules = {"urls": "fetch", "allowed_hosts": f"{HOST}:{server.port}", "schemes": "http"}
        async with running(settings_with(vllm, tmp_path, **rules)) as gateway:
            await read_well(gateway.stream(showing(url=f"http://{HOST}:{server.port}/a.png")))
            failure = await failure_of(gateway.create(showing(url=f"http://{HOST}:{server.port}/b.png")))
    assert asked(vllm)[1] == {"type": "image_url", "image_url": {"url": DATA_URL}}
    assert len(vllm.chats) == 1
    assert failure.reason == "IMAGE_UNAVAILABLE"
    assert failure.metadata.items() >= {"field": f"{FIELD}.url", "host": HOST}.items()


async def test_the_real_judge_is_in_a_gateway(vllm: FakeVllm, tmp_path: Path) -> None:
    """With any host allowed, this machine is not: here where vLLM itself listens."""
    port = vllm.base_url.rpartition(":")[2]
    rules = {"urls": "fetch", "allowed_hosts": f"*,*:{port}", "schemes": "http,https"}
    async with running(settings_with(vllm, tmp_path, **rules)) as gateway:
        for host in ("127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]"):
            failure = await failure_of(gateway.create(showing(url=f"http://{host}:{port}/metrics")))
            assert (failure.reason, failure.fields) == ("INVALID_REQUEST", [f"{FIELD}.url"])
    assert "/metrics" not in [request.path for request in vllm.requests]


async def test_addresses_are_passed_on(vllm: FakeVllm, tmp_path: Path) -> None:
    """In their one form, for vLLM to fetch."""
    async with running(settings_with(vllm, tmp_path, urls="pass")) as gateway:
        await read_well(gateway.stream(showing(url=f"HTTPS://{HOST.upper()}:443/a.png")))
    assert asked(vllm)[1] == {"type": "image_url", "image_url": {"url": f"https://{HOST}/a.png"}}


async def test_a_cancelled_call_fetches_no_more(
    vllm: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is closed, and vLLM never asked."""
    fetching(monkeypatch)
    async with web({"/": SILENT}) as server:
        rules = {"urls": "fetch", "allowed_hosts": f"*:{server.port}", "schemes": "http", "timeout": 3600}
        async with running(settings_with(vllm, tmp_path, **rules)) as gateway:
            call = gateway.stream(showing(url=f"http://{HOST}:{server.port}/"))
            await until(lambda: len(server.heads) == 1)
            call.cancel()
            await until(lambda: not server.open)
    assert not vllm.chats


async def test_fetching_counts_into_the_time_to_the_first_event(
    vllm: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the provider, which ends the call."""
    fetching(monkeypatch)
    async with web({"/": SILENT}) as server:
        rules = {"urls": "fetch", "allowed_hosts": f"*:{server.port}", "schemes": "http", "timeout": 3600}
        settings = settings_with(vllm, tmp_path, provider={"first_event_timeout": 0.2}, **rules)
        async with running(settings) as gateway:
            failure = await failure_of(gateway.create(showing(url=f"http://{HOST}:{server.port}/")))
            await until(lambda: not server.open)
    assert failure.reason == "UPSTREAM_TIMEOUT"


async def test_others_do_not_wait(vllm: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While images are fetched, calls without images go their way."""
    fetching(monkeypatch)
    async with web({"/": SILENT}) as server:
        rules = {"urls": "fetch", "allowed_hosts": f"*:{server.port}", "schemes": "http", "timeout": 3600}
        settings = settings_with(vllm, tmp_path, limits={"image_fetches": 0}, **rules)
        async with running(settings) as gateway:
            calls = [gateway.stream(showing(url=f"http://{HOST}:{server.port}/")) for _ in range(40)]
            await until(lambda: len(server.heads) > 30)
            await read_well(gateway.stream())
            for call in calls:
                call.cancel()


async def test_a_caller_with_a_slow_host_delays_only_its_own(
    vllm: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has a quarter of the fetches by default, and its other images wait for these; another caller's do not."""
    fetching(monkeypatch)
    async with web({"/silent": SILENT, "/": ok(PNG)}) as server:
        rules = {"urls": "fetch", "allowed_hosts": f"*:{server.port}", "schemes": "http", "timeout": 3600}
        access = {"keys": f"slow call {SLOW}; quick call {QUICK}"}
        async with running(settings_with(vllm, tmp_path, access=access, **rules)) as gateway:
            url = f"http://{HOST}:{server.port}/"
            calls = [gateway.stream(showing(url=f"{url}silent"), metadata=key(SLOW)) for _ in range(40)]
            await until(lambda: gateway.gateway._worker.active == 40 and len(server.heads) == MAX_FETCHES // 4)
            await read_well(gateway.stream(showing(url=url), metadata=key(QUICK)))
            assert len(server.heads) == MAX_FETCHES // 4 + 1
            for call in calls:
                call.cancel()


async def test_limits_reach_their_places(vllm: FakeVllm, tmp_path: Path) -> None:
    """Each key of the settings under its own name; by what it refuses, or where it lies."""
    rules = {
        "urls": "fetch",
        "allowed_hosts": HOST,
        "schemes": "http",
        "max_images": 1,
        "max_image_bytes": 1024,
        "max_fetched_bytes": 2048,
        "timeout": 3,
        "max_redirects": 4,
    }
    settings = settings_with(vllm, tmp_path, **rules)
    async with running(settings) as gateway:
        policy = gateway.gateway._images._policy
        assert (policy.urls, policy.allowed_hosts, policy.schemes) == ("fetch", (HOST,), ("http",))
        assert (policy.max_image_bytes, policy.max_fetched_bytes) == (1024, 2048)
        assert (policy.timeout, policy.max_redirects) == (3, 4)
        large = await failure_of(gateway.create(showing(data=PNG + bytes(1024))))
        assert "more than 1024 bytes" in large.message
        two = showing(data=PNG)
        two.messages.append(two.messages[0])
        many = await failure_of(gateway.create(two))
        assert "exceeds the limit of 1 images" in many.message
        streamed = (await read_badly(gateway.stream(two)))[1]
        assert streamed.message == many.message
