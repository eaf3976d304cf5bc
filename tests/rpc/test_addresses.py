"""No failure shows a caller where a provider is: its id is what callers know it by."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from grpc import aio

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import model_registry_pb2
from tests.support.gateway import ask, running, settings_of
from tests.support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from tests.conftest import Certificates
    from tests.support.gateway import Lines, Running

HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\ncontent-type: "
ANSWERS = {
    "closes": b"",
    "no HTTP": b"220 mail ESMTP\r\n",
    "half a head": b"HTTP/1.1 200 OK\r\nconte",
    "too many headers": b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 500 + b"\r\n",
    "no JSON": HEAD + b"application/json\r\n\r\nno!",
    "HTML": HEAD + b"text/html\r\n\r\n<p>",
    "no events": HEAD + b"text/event-stream\r\n\r\n:x\n",
    "a body of its own length": b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\nzz",
    "a large document": b"HTTP/1.1 200 OK\r\ncontent-length: 99999999\r\n\r\n" + b"x" * (20 << 20),
    **{
        f"status {status}": b"HTTP/1.1 %d x\r\ncontent-length: 0\r\n\r\n" % status
        for status in (204, 302, 400, 401, 403, 404, 405, 408, 413, 422, 429, 500, 501, 502, 503, 504)
    },
}
"""What a server may answer everything with, but silence, which has its own tests."""


@asynccontextmanager
async def answering(answer: bytes) -> AsyncIterator[str]:
    """A server that answers every request so; its address."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/prefix/v1"


@asynccontextmanager
async def nowhere(scheme: str, host: str) -> AsyncIterator[str]:
    """Where nothing listens, or what does not resolve."""
    yield f"{scheme}://{host}:{free_port()}/prefix/v1"


def away(scheme: str, host: str) -> Callable[[], AbstractAsyncContextManager[str]]:
    """Makes `nowhere`."""
    return lambda: nowhere(scheme, host)


SERVERS: dict[str, Callable[[], AbstractAsyncContextManager[str]]] = {
    "refused": away("http", "127.0.0.1"),
    "refused, with TLS": away("https", "127.0.0.1"),
    "no such name": away("http", "no-such-name.invalid"),
    **{what: (lambda answer=answer: answering(answer)) for what, answer in ANSWERS.items()},  # type: ignore[misc]
}


async def failures(gateway: Running) -> list[aio.AioRpcError | str]:
    """How every call fails that asks the provider; or its answer, as text, if it does not."""
    models = gateway.models
    calls: list[Any] = [
        gateway.create(ask(model="vllm/fake")),
        gateway.create(ask(model="vllm/fake", completion_id="mine")),
        gateway.chat.CountTokens(chat_pb.CountTokensRequest(chat=ask(model="vllm/fake"))),
        models.GetModel(model_registry_pb2.GetModelRequest(model_id="fake")),
        models.RefreshModels(model_registry_pb2.RefreshModelsRequest()),
        models.RegisterModel(
            model_registry_pb2.RegisterModelRequest(model_id="m", provider_id="vllm", provider_model_id="fake")
        ),
    ]
    found: list[aio.AioRpcError | str] = []
    for call in calls:
        try:
            found.append(str(await call))
        except aio.AioRpcError as error:
            found.append(error)
    return found


def shown(failure: aio.AioRpcError | str) -> str:
    """All that a caller sees of it."""
    if isinstance(failure, str):
        return failure
    return f"{failure.details()} {[*(failure.trailing_metadata() or ())]} {[*(failure.initial_metadata() or ())]}"


async def check(base_urls: str, folder: Path) -> None:
    """Check that callers see neither host nor port of these addresses."""
    provider = {"base_url": base_urls, "connect_timeout": 5, "engine": "proxy"}
    async with running(settings_of(base_urls.split(",")[0], folder, provider=provider)) as gateway:
        found = await failures(gateway)
    assert any(isinstance(failure, aio.AioRpcError) for failure in found)
    for base_url in base_urls.split(","):
        parts = urlsplit(base_url)
        for hidden in (str(parts.port), parts.hostname, "prefix"):
            assert hidden
            assert not [failure for failure in found if hidden in shown(failure)]


@pytest.mark.parametrize("what", SERVERS)
async def test_a_failure_shows_no_address(tmp_path: Path, what: str) -> None:
    """Neither in the status nor in its details nor in metadata, whatever the server does."""
    async with SERVERS[what]() as base_url:
        await check(base_url, tmp_path)


async def test_the_failures_of_replicas_show_no_address(tmp_path: Path, lines: Lines) -> None:
    """The message lists each of them; the log has their addresses."""
    async with nowhere("http", "127.0.0.1") as one, answering(ANSWERS["status 503"]) as other:
        await check(f"{one},{other}", tmp_path)
        entry = await lines.find("replica failed", base_url=one)
    assert (entry["provider"], entry["reason"]) == ("vllm", "UPSTREAM_UNAVAILABLE")
    assert "the connection is refused" in entry["error"]


async def test_a_wrong_certificate_shows_no_address(tmp_path: Path, certificates: Certificates) -> None:
    """Though OpenSSL's own words hold the name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificates.sign("other-host", "DNS:other.example"))
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=context)
    async with server:
        port = server.sockets[0].getsockname()[1]
        url = f"https://127.0.0.1:{port}/prefix/v1"
        provider = {"tls_verify": certificates.authority, "engine": "proxy"}
        async with running(settings_of(url, tmp_path, provider=provider)) as gateway:
            found = [shown(failure) for failure in await failures(gateway)]
    assert "certificate is for another" in found[0]
    assert not [text for text in found if str(port) in text or "127.0.0.1" in text or "other.example" in text]
