"""A real Envoy with mutual TLS on both sides: the gateway knows whose calls it forwards, and trusts no other client."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from deltawire import AsyncClient, CallError, CompletionNotFoundError, UnauthenticatedError, tls_credentials
from tests.polyglot.calls import MODEL, find_completions, gateway
from tests.polyglot.programs import LIMIT
from tests.polyglot.proxy import mtls_envoy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import grpc

    from deltawire._metadata import Metadata
    from deltawire_server.fake_vllm import FakeVllm
    from tests.conftest import Certificates
    from tests.support.gateway import Lines

pytestmark = pytest.mark.polyglot

PROXY = "spiffe://mesh/ns/envoy"
KEY = "secret-of-the-caller"
LINES = f"ann call mtls:uri:spiffe://mesh/ann\nbob call mtls:dns:bob.mesh\ncarl call mtls:cn:carl\nkey call {KEY}\n"
XFCC = "x-forwarded-client-cert"
"""The metadata of a client that pretends to be another one."""
FORGED: Metadata = ((XFCC, "Hash=1;URI=spiffe://mesh/ann"), ("x-forwarded-for", "192.0.2.7"))


def flags_of(certificates: Certificates) -> tuple[str, ...]:
    """The settings of a gateway that trusts the Envoy."""
    tls = ("--tls-cert-file", str(certificates.server), "--tls-key-file", str(certificates.server_key))
    mutual = ("--tls-client-ca-file", str(certificates.authority))
    return (*tls, *mutual, "--set", f"access.trusted_proxies=mtls:uri:{PROXY}", "--metrics-listen", "off")


@asynccontextmanager
async def proxied(
    vllm: FakeVllm, folder: Path, certificates: Certificates, *flags: str
) -> AsyncIterator[tuple[str, str]]:
    """The addresses of an Envoy and of the gateway behind it, which trusts it."""
    async with (
        gateway(vllm, folder, *flags_of(certificates), *flags) as (_, address),
        mtls_envoy(folder, certificates, PROXY, address) as envoy,
    ):
        yield envoy, address


def credentials_of(certificates: Certificates, name: str, names: str) -> grpc.ChannelCredentials:
    """A certificate of these names."""
    certificate, key = certificates.sign(name, names)
    return tls_credentials(ca_file=certificates.authority, cert_file=certificate, key_file=key)


@asynccontextmanager
async def client(
    target: str, certificates: Certificates, name: str, names: str, token: str | None = None
) -> AsyncIterator[AsyncClient]:
    """A client with a certificate of these names."""
    credentials = credentials_of(certificates, name, names)
    async with AsyncClient(
        target, credentials=credentials, token=token, token_header="x-deltawire-key", timeout=LIMIT
    ) as made:
        yield made


async def ask(made: AsyncClient, metadata: Metadata = (), completion_id: str | None = None) -> str:
    """One answer."""
    return (await made.chat.create("hi", model=MODEL, completion_id=completion_id, metadata=metadata)).text


async def test_clients_behind_one_envoy_are_callers_of_their_own(
    vllm: FakeVllm, tmp_path: Path, certificates: Certificates, lines: Lines
) -> None:
    """By URI, DNS name and common name; a header that the client itself sends has no effect; an unknown client is refused."""
    keys = tmp_path / "keys"
    keys.write_text(LINES)
    async with proxied(vllm, tmp_path, certificates, "--access-keys-file", str(keys)) as (envoy, direct):
        async with (
            client(envoy, certificates, "ann", "URI:spiffe://mesh/ann") as ann,
            client(envoy, certificates, "bob", "URI:spiffe://mesh/b,DNS:b.mesh,DNS:bob.mesh") as bob,
            client(envoy, certificates, "carl", "") as carl,
        ):
            for each in (ann, bob, carl):
                assert await ask(each)
            assert await ask(bob, FORGED)
        for name, names in (("eve", "DNS:eve.mesh"), ('eve";DNS="bob.mesh', ""), ("carl", "DNS:eve.mesh")):
            async with client(envoy, certificates, name, names) as eve:
                with pytest.raises(UnauthenticatedError, match="no name of the caller"):
                    await ask(eve, FORGED)
        async with client(direct, certificates, "mallory", "DNS:bob.mesh") as mallory:
            assert await ask(mallory, FORGED)  # not behind Envoy, and so only who its certificate says
    calls = [entry for entry in lines.entries if entry["event"] == "call" and "ChatCompletion" in entry["method"]]
    assert [entry.get("caller") for entry in calls] == ["ann", "bob", "carl", "bob", None, None, None, "bob"]
    # In place of 127.0.0.1, Envoy asserts another address of this machine.
    (peer,) = {entry["peer"] for entry in calls[:-1]}
    assert (peer.count(":"), peer == "ipv4:192.0.2.7") == (1, False)
    assert all("via" in entry for entry in calls[:-1])
    assert "via" not in calls[-1]


async def test_completions_on_an_open_gateway_belong_to_the_client(
    vllm: FakeVllm, tmp_path: Path, certificates: Certificates
) -> None:
    """Ids are those of one client, through Envoy or not."""
    async with (
        proxied(vllm, tmp_path, certificates) as (envoy, direct),
        client(envoy, certificates, "ann", "URI:spiffe://mesh/ann") as ann,
        client(direct, certificates, "ann-too", "URI:spiffe://mesh/ann") as same,
        client(envoy, certificates, "bob", "DNS:bob.mesh") as bob,
    ):
        assert await ask(ann, completion_id="mine")
        await asyncio.gather(ann.chat.get("mine"), same.chat.get("mine"))
        for metadata in ((), FORGED):
            with pytest.raises(CompletionNotFoundError):
                await bob.chat.get("mine", metadata=metadata)


async def test_calls_about_a_completion_reach_its_gateway(
    vllm: FakeVllm, tmp_path: Path, certificates: Certificates
) -> None:
    """Behind the same Envoy with two gateways."""
    flags = flags_of(certificates)
    async with (
        gateway(vllm, tmp_path, *flags) as (_, first),
        gateway(vllm, tmp_path, *flags) as (_, second),
        mtls_envoy(tmp_path, certificates, PROXY, first, second) as envoy,
    ):
        await find_completions(envoy, credentials_of(certificates, "ann", "URI:spiffe://mesh/ann"))


async def test_a_key_beside_a_token_for_the_proxy(vllm: FakeVllm, tmp_path: Path, certificates: Certificates) -> None:
    """In its own header it is the caller's key, and the token reaches neither the access check nor vLLM."""
    keys = tmp_path / "keys"
    keys.write_text(LINES)
    token: Metadata = (("authorization", "Bearer eyJhbGciOi.eyJzdWIiOi.c2lnbmF0dXJl"),)
    async with proxied(vllm, tmp_path, certificates, "--access-keys-file", str(keys)) as (envoy, _):
        async with client(envoy, certificates, "eve", "DNS:eve.mesh", KEY) as made:
            assert await ask(made, token)
        (chat,) = vllm.chats
        assert not {"authorization", "x-deltawire-key", XFCC} & {name.lower() for name in chat.headers}
        async with client(envoy, certificates, "ann", "URI:spiffe://mesh/ann") as made:
            with pytest.raises(CallError, match=r"looks like a JSON Web Token.*x-deltawire-key"):
                await ask(made, token)
