"""Why a connection failed: what is said of certificates and names, and whether trying again may help."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import TYPE_CHECKING

import pytest

from deltawire_server.errors import Code, ProviderError, Reason
from deltawire_server.fake_vllm import FakeVllm
from deltawire_server.upstream.base import HealthStatus
from tests.upstream.support import provider, refusal_of

if TYPE_CHECKING:
    from deltawire_server.errors import DeltawireError
    from tests.conftest import Certificates


async def failure_everywhere(
    base_url: str, said: str, reason: Reason = Reason.PROVIDER_MISCONFIGURED
) -> DeltawireError:
    """The failure of a call; the listing and the health check have the same words."""
    async with provider(base_url) as p:
        error = await refusal_of(p)
        with pytest.raises(ProviderError) as caught:
            await p.list_models()
        health = await p.check_health()
    assert said in error.message
    assert said in caught.value.message
    assert said in health.message
    assert health.status is HealthStatus.ERROR
    assert error.reason is caught.value.reason is reason
    assert (error.retry_after is None) is (reason is Reason.PROVIDER_MISCONFIGURED)
    return error


async def test_a_certificate_that_is_not_accepted(certificates: Certificates) -> None:
    """From an unknown authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.server, certificates.server_key)
    async with FakeVllm(ssl_context=context) as vllm:
        error = await failure_everywhere(vllm.base_url, "its certificate is signed by an authority")
        assert error.code is Code.FAILED_PRECONDITION
        assert not vllm.requests


async def test_tls_to_a_plain_port() -> None:
    """The scheme is wrong: the server takes the greeting for a bad request, as vLLM's does."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        await reader.read(65536)
        writer.close()

    listener = await asyncio.start_server(refuse, "127.0.0.1", 0)
    async with listener:
        port = listener.sockets[0].getsockname()[1]
        await failure_everywhere(f"https://127.0.0.1:{port}", "it does not speak TLS")


@pytest.mark.parametrize("label", ["no-such-host", "x" * 64])
async def test_a_name_that_does_not_exist(label: str) -> None:
    """Nothing is resolved for it, or it cannot even be asked for."""
    await failure_everywhere(f"http://{label}.invalid:8000", "its host name ")


async def test_a_port_where_nothing_listens() -> None:
    """That can change by itself."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        await failure_everywhere(url, "the connection is refused", Reason.UPSTREAM_UNAVAILABLE)


@pytest.mark.usefixtures("ipv6")
async def test_ipv6() -> None:
    """An address in brackets is reached as any other."""
    async with FakeVllm(host="::1") as vllm, provider(f"http://[::1]:{vllm.port}/v1") as p:
        assert [model.id for model in await p.list_models()] == ["fake"]
