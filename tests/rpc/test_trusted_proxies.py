"""Callers behind proxies: who is believed, what is believed, and a change of it, over gRPC with real certificates."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf import duration_pb2
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import model_registry_pb2
from deltawire_server.fake_vllm import Chunks, FakeVllm, Script
from tests.support.gateway import Lines, Running, ask, failure_of, read, read_well, settings_of, until
from tests.support.mutual_tls import connected, mutual

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    from tests.conftest import Certificates, StartGateway

CHUNKS = Chunks()
LIST = model_registry_pb2.ListProvidersRequest()
PROXY = "spiffe://mesh/ns/envoy"
XFCC = "x-forwarded-client-cert"
KEY = "secret-of-the-caller"
LINES = f"ann call,read mtls:uri:spiffe://mesh/ann; bob call,read mtls:dns:bob.mesh; key call,read {KEY}"
KEPT = chat_pb.StreamOptions(retention=duration_pb2.Duration(seconds=60))

Metadata = tuple[tuple[str, str], ...]


def certificate_of(name: str) -> Metadata:
    """The header with which Envoy forwards the certificate of a client with this URI."""
    return ((XFCC, f"By={PROXY};Hash=0123;URI=spiffe://mesh/{name}"),)


@asynccontextmanager
async def proxied(
    start_gateway: StartGateway, certificates: Certificates, access: Mapping[str, Any]
) -> AsyncIterator[Running]:
    """A gateway behind a proxy with the certificate of `PROXY`, and the proxy's channel."""
    access = {"trusted_proxies": [f"mtls:uri:{PROXY}"], **access}
    async with (
        start_gateway(server=mutual(certificates), access=access) as gateway,
        connected(gateway, certificates, "envoy", f"URI:{PROXY}") as proxy,
    ):
        yield proxy


def callers(lines: Lines) -> list[str | None]:
    """The caller in the line of each call."""
    return [entry.get("caller") for entry in lines.entries if entry["event"] == "call"]


async def test_a_trusted_proxy_names_its_callers(
    start_gateway: StartGateway, certificates: Certificates, lines: Lines
) -> None:
    """By URI or DNS name, unary and streamed; one whose names no line has is refused, and the refusal says the names."""
    async with proxied(start_gateway, certificates, {"keys": LINES}) as proxy:
        await read_well(proxy.stream(metadata=certificate_of("ann")))
        await proxy.create(metadata=((XFCC, "URI=spiffe://mesh/ann,Hash=1;URI=;DNS=bob.mesh"),))
        failure = await failure_of(proxy.create(metadata=certificate_of("eve")))
    assert (failure.code, failure.reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
    assert "no name of the caller (mtls:uri:spiffe://mesh/eve) is authorized" in failure.message
    assert callers(lines) == ["ann", "bob", None]
    assert (await lines.find("serving"))["access"] == "keys: 1, mTLS identities: 2, trusted proxies: 1"


async def test_nobody_else_is_believed(start_gateway: StartGateway, certificates: Certificates, lines: Lines) -> None:
    """The headers of a caller that is no trusted proxy have no effect: malformed or not, it is the caller of its certificate."""
    headers = [certificate_of("ann"), ((XFCC, "URI="),), (("x-forwarded-for", "192.0.2.1"),)]
    async with (
        proxied(start_gateway, certificates, {"keys": LINES}) as proxy,
        connected(proxy, certificates, "bob", "URI:spiffe://mesh/other,DNS:bob.mesh") as bob,
        connected(proxy, certificates, "eve", f"DNS:eve.mesh,email:{PROXY}") as eve,
    ):
        for metadata in headers:
            await bob.create(metadata=metadata)
            assert (await failure_of(eve.create(metadata=metadata))).reason == "UNAUTHENTICATED"
    assert callers(lines) == ["bob", None] * 3
    calls = [entry for entry in lines.entries if entry["event"] == "call"]
    assert all(entry["peer"].startswith("ipv4:127.0.0.1:") and "via" not in entry for entry in calls)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (((XFCC, 'URI="a:b'),), "its header x-forwarded-client-cert is malformed"),
        (((XFCC, ""),), "its header x-forwarded-client-cert is malformed"),
        (((XFCC, "Hash=1;URI="),), "has no URI, DNS name or common name: configure the proxy to forward"),
        (certificate_of("ann") + certificate_of("bob"), "is sent several times"),
        (certificate_of("ann") * 2, "is sent several times"),
    ],
)
@pytest.mark.parametrize("is_open", [False, True])
async def test_what_cannot_be_used_is_refused(
    start_gateway: StartGateway, certificates: Certificates, metadata: Metadata, message: str, *, is_open: bool
) -> None:
    """The caller does not become the proxy, which would be let in; on an open gateway neither."""
    access = {} if is_open else {"keys": f"envoy all mtls:uri:{PROXY}; {LINES}"}
    async with proxied(start_gateway, certificates, access) as proxy:
        failure = await failure_of(proxy.create(metadata=metadata))
        assert (failure.code, failure.reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
        assert "the proxy does not name this caller" in failure.message
        assert message in failure.message
        await proxy.create()  # its own call


async def test_a_proxy_that_names_nobody_is_a_caller(
    start_gateway: StartGateway, certificates: Certificates, lines: Lines
) -> None:
    """By its own certificate, if that has a line."""
    async with proxied(start_gateway, certificates, {"keys": f"envoy call mtls:uri:{PROXY}; {LINES}"}) as proxy:
        await proxy.create()
        await proxy.create(metadata=certificate_of("ann"))
    assert callers(lines) == ["envoy", "ann"]


async def test_a_key_counts_alone(start_gateway: StartGateway, certificates: Certificates, lines: Lines) -> None:
    """Whatever the proxy asserts, and in whichever header the key is; `authorization` may then be a token for the proxy."""
    token = ("authorization", "Bearer eyJhbGciOi.eyJzdWIiOi.c2lnbmF0dXJl")
    async with proxied(start_gateway, certificates, {"keys": LINES}) as proxy:
        for metadata in (
            (("authorization", f"Bearer {KEY}"), *certificate_of("ann")),
            (("x-deltawire-key", KEY), token, (XFCC, "malformed")),
            (("x-deltawire-key", KEY), ("authorization", "Basic x")),
        ):
            await proxy.create(metadata=metadata)
        refused = await failure_of(proxy.create(metadata=(("x-deltawire-key", f"{KEY}x"), *certificate_of("ann"))))
        assert "the key is not valid" in refused.message
        refused = await failure_of(proxy.create(metadata=(token, *certificate_of("ann"))))
        assert "looks like a JSON Web Token" in refused.message
        assert "x-deltawire-key: …" in refused.message
    assert callers(lines) == ["key", "key", "key", None, None]
    assert "secret-of" not in lines.getvalue()


async def test_headers_of_keys_are_not_forwarded(start_gateway: StartGateway, vllm: FakeVllm) -> None:
    """Neither the key nor what is beside it reaches vLLM."""
    metadata = (("x-deltawire-key", KEY), ("authorization", "Bearer a.b.c"), (XFCC, "URI=a:b"))
    async with start_gateway(access={"keys": f"key call {KEY}"}) as gateway:
        await gateway.create(metadata=metadata)
    (chat,) = vllm.chats
    assert not {"x-deltawire-key", "authorization", XFCC} & {name.lower() for name in chat.headers}


async def test_a_header_of_the_operators(start_gateway: StartGateway, tmp_path: Path, lines: Lines) -> None:
    """Its value is a name, which lines with proxy: match. Here the proxy uses a unix socket; at the port nobody is believed."""
    listen = {"listen": [f"unix:{tmp_path}/gateway.sock", "127.0.0.1:0"]}
    access = {"keys": "alice call proxy:alice@example.com", "trusted_proxies": ["unix"], "caller_header": "X-Caller"}
    caller = (("x-caller", "alice@example.com"),)
    async with start_gateway(server=listen, access=access) as gateway:
        await gateway.create(metadata=caller)
        for value, message in (
            ("spiffe://mesh/ann", "no name of the caller (proxy:spiffe://mesh/ann) is authorized"),
            ("", "its header x-caller cannot be used: the name of a caller must be 1 to 256"),
            ("alice@example.com, bob", "its header x-caller cannot be used"),
            ("x" * 257, "its header x-caller cannot be used"),
        ):
            failure = await failure_of(gateway.create(metadata=(("x-caller", value),)))
            assert failure.reason == "UNAUTHENTICATED"
            assert message in failure.message
        assert "several times" in (await failure_of(gateway.create(metadata=caller * 2))).message
        async with aio.insecure_channel(gateway.gateway.addresses[1]) as channel:
            other = Running(gateway.gateway, channel)
            assert "requires authentication" in (await failure_of(other.create(metadata=caller))).message
    assert callers(lines) == ["alice", *[None] * 6]
    summary = "keys: 0, mTLS identities: 0, asserted names: 1, trusted proxies: 1"
    assert (await lines.find("serving"))["access"] == summary


async def test_the_peer_is_the_address_that_the_proxy_asserts(
    start_gateway: StartGateway, certificates: Certificates, lines: Lines
) -> None:
    """The last one, in the log and as the caller's identity where no name is known; what is no address is ignored."""
    async with proxied(start_gateway, certificates, {}) as proxy:
        for value in ("10.0.0.1, 192.0.2.7", "2001:db8::7", "unknown", ""):
            await proxy.create(metadata=(("x-forwarded-for", value),))
    calls = [entry for entry in lines.entries if entry["event"] == "call"]
    assert [entry["peer"] for entry in calls[:2]] == ["ipv4:192.0.2.7", "ipv6:2001:db8::7"]
    assert all(entry["via"].startswith("ipv4:127.0.0.1:") for entry in calls[:2])
    assert all(entry["peer"].startswith("ipv4:127.0.0.1:") and "via" not in entry for entry in calls[2:])


async def test_receiving_is_shared_among_the_callers_of_a_proxy(
    start_gateway: StartGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their names, or else by their addresses."""
    seen: list[str] = []
    listen = {"listen": f"unix:{tmp_path}/gateway.sock"}
    async with start_gateway(server=listen, access={"trusted_proxies": "unix"}) as gateway:
        receive = gateway.gateway._calls._reception.receive

        async def noted(context: Any, check: Any, caller: str) -> bytes:  # noqa: ANN401
            seen.append(caller)
            return await receive(context, check, caller)

        monkeypatch.setattr(gateway.gateway._calls._reception, "receive", noted)
        for address in ("192.0.2.7", "192.0.2.8"):
            await gateway.create(metadata=(("x-forwarded-for", address),))
            await gateway.create(metadata=(("x-forwarded-for", address), *certificate_of("ann")))
    assert seen[0::2] == ["ipv4:192.0.2.7", "ipv4:192.0.2.8"]
    assert len(set(seen[1::2])) == 1
    assert seen[1] not in seen[0::2]


async def test_each_address_behind_a_proxy_has_limits_of_its_own(start_gateway: StartGateway, tmp_path: Path) -> None:
    """With or without ports. The addresses of one IPv6 network are those of one host."""
    listen = {"listen": f"unix:{tmp_path}/gateway.sock"}
    limits = {"requests_per_minute": 1}
    async with start_gateway(server=listen, access={"trusted_proxies": "unix"}, limits=limits) as gateway:
        for address in ("192.0.2.7", "192.0.2.8:4711", "2001:db8:0:1::7", "[2001:db8:0:2::7]:443"):
            await gateway.create(metadata=(("x-forwarded-for", address),))
        for address in ("192.0.2.7:1", "192.0.2.8", "2001:db8:0:1::8", "2001:db8:0:2::7"):
            failure = await failure_of(gateway.create(metadata=(("x-forwarded-for", address),)))
            assert failure.reason == "CALLER_LIMIT_EXCEEDED"


@pytest.mark.usefixtures("late_requests")
async def test_health_watches_are_shared_among_the_addresses_behind_a_proxy(
    start_gateway: StartGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has the number of a connection of its own."""
    monkeypatch.setattr("deltawire_server.rpc.health.MAX_CONNECTION_WATCHES", 1)
    listen = {"listen": f"unix:{tmp_path}/gateway.sock"}

    async with start_gateway(server=listen, access={"trusted_proxies": "unix"}) as gateway:
        health: Any = health_pb2_grpc.HealthStub(gateway.channel)
        watches = []
        for address in ("192.0.2.7", "192.0.2.8", "192.0.2.7"):
            watches.append(health.Watch(health_pb2.HealthCheckRequest(), metadata=(("x-forwarded-for", address),)))
            read = watches[-1].read()
            if len(watches) < 3:
                assert (await read).status == health_pb2.HealthCheckResponse.SERVING
                continue
            with pytest.raises(aio.AioRpcError) as caught:
                await read
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_an_open_gateway_separates_them(start_gateway: StartGateway, certificates: Certificates) -> None:
    """Ids are scoped to the name that the proxy asserts, which is the same as that of a caller without a proxy."""
    async with (
        proxied(start_gateway, certificates, {}) as proxy,
        connected(proxy, certificates, "ann", "URI:spiffe://mesh/ann") as ann,
    ):
        await proxy.create(ask(completion_id="mine"), metadata=certificate_of("ann"))
        await proxy.look_up("mine", metadata=certificate_of("ann"))
        await ann.look_up("mine")
        for metadata in (certificate_of("bob"), ()):
            failure = await failure_of(proxy.look_up("mine", metadata=metadata))
            assert failure.reason == "COMPLETION_NOT_FOUND"
        model = model_registry_pb2.RegisterModelRequest(model_id="m", provider_model_id="fake")
        registered = await proxy.models.RegisterModel(model, metadata=certificate_of("ann"))
        assert registered.model.owner == "spiffe://mesh/ann"


async def test_names_of_other_kinds_are_other_owners(start_gateway: StartGateway, tmp_path: Path) -> None:
    """A name in the operator's header is not that of a certificate, even if it is spelled the same."""
    listen = {"listen": f"unix:{tmp_path}/gateway.sock"}
    access = {"trusted_proxies": "unix", "caller_header": "x-caller"}
    async with start_gateway(server=listen, access=access) as gateway:
        await gateway.create(ask(completion_id="mine"), metadata=(("x-caller", "uri:spiffe://mesh/ann"),))
        await gateway.gateway.reload(
            settings_of("http://h", tmp_path, server=listen, access={"trusted_proxies": "unix"})
        )
        failure = await failure_of(gateway.look_up("mine", metadata=certificate_of("ann")))
        assert failure.reason == "COMPLETION_NOT_FOUND"


@pytest.mark.usefixtures("late_requests")
async def test_reflection_for_a_caller_that_a_proxy_names(
    start_gateway: StartGateway, certificates: Certificates
) -> None:
    """Any number of requests for one with a line, one for others."""
    request = reflection_pb2.ServerReflectionRequest(list_services="")

    async def answers(proxy: Running, metadata: Metadata) -> int:
        call: Any = proxy.channel.stream_stream(
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        )
        return len([each async for each in call(iter([request] * 3), metadata=metadata)])

    async with proxied(start_gateway, certificates, {"keys": LINES}) as proxy:
        assert await answers(proxy, certificate_of("ann")) == 3
        for metadata in (certificate_of("eve"), ((XFCC, "malformed"),)):
            assert await answers(proxy, metadata) == 1


CHANGED: dict[str, dict[str, Any]] = {
    "the proxy": {"trusted_proxies": ["mtls:dns:other.mesh"]},
    "all proxies": {"trusted_proxies": []},
    "the header": {"caller_header": "x-caller"},
}


@pytest.mark.parametrize("change", CHANGED)
@pytest.mark.parametrize("keys", [None, LINES])
async def test_calls_end_with_the_trust(
    start_gateway: StartGateway,
    certificates: Certificates,
    vllm: FakeVllm,
    tmp_path: Path,
    change: str,
    keys: str | None,
) -> None:
    """Streams, also retained ones without a reader, and whole answers. The same caller's own calls and the proxy's continue."""
    gate = asyncio.Event()
    vllm.play(*[Script.chunks([CHUNKS.role(), CHUNKS.text("one "), gate, CHUNKS.text("two"), CHUNKS.finish()])] * 5)
    before = {"trusted_proxies": [f"mtls:uri:{PROXY}"]}
    if keys:
        before["keys"] = f"{keys}; envoy call mtls:uri:{PROXY}"  # type: ignore[assignment]
    asserted = certificate_of("ann")
    async with (
        proxied(start_gateway, certificates, before) as proxy,
        connected(proxy, certificates, "ann", "URI:spiffe://mesh/ann") as ann,
    ):
        stream, kept = proxy.stream(metadata=asserted), proxy.stream(metadata=asserted, options=KEPT)
        others = [ann.stream(), proxy.stream()]
        for call in (stream, kept, *others):
            assert (await anext(aiter(call))).WhichOneof("event") == "started"
        whole = asyncio.ensure_future(failure_of(proxy.create(metadata=asserted)))
        await until(lambda: vllm.running == 5)
        kept.cancel()

        after = settings_of(vllm.base_url, tmp_path, server=mutual(certificates), access={**before, **CHANGED[change]})
        await proxy.gateway.reload(after)

        _, failure = await read(stream)
        assert failure is not None
        assert (failure.code, failure.reason) == (grpc.StatusCode.ABORTED, "ACCESS_CHANGED")
        assert (await whole).reason == "ACCESS_CHANGED"
        await until(lambda: vllm.running == 2)
        gate.set()
        for call in others:
            await read_well(call)
        await proxy.create(metadata=asserted)  # the proxy's own call now


async def test_a_call_that_was_admitted_ends_with_the_trust(
    start_gateway: StartGateway,
    certificates: Certificates,
    vllm: FakeVllm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before it runs a completion, too."""
    monkeypatch.setattr("deltawire_server.app.REVOKED_SECONDS", 0.05)
    waits = asyncio.Event()

    async def resolve(*_: object) -> None:
        waits.set()
        await asyncio.Event().wait()

    async with proxied(start_gateway, certificates, {}) as proxy:
        monkeypatch.setattr(proxy.gateway._registry, "resolve", resolve)
        failed = asyncio.ensure_future(failure_of(proxy.create(metadata=certificate_of("ann"))))
        await waits.wait()
        await proxy.gateway.reload(settings_of(vllm.base_url, tmp_path, server=mutual(certificates)))
        assert (await failed).reason == "ACCESS_CHANGED"


async def test_trust_that_is_new(
    start_gateway: StartGateway, certificates: Certificates, vllm: FakeVllm, tmp_path: Path, lines: Lines
) -> None:
    """Applies from the next call, on open connections too, and ends no call but watches."""
    async with proxied(start_gateway, certificates, {"trusted_proxies": [], "keys": LINES}) as proxy:
        assert (await failure_of(proxy.create(metadata=certificate_of("ann")))).reason == "UNAUTHENTICATED"
        access = {"keys": LINES, "trusted_proxies": f"mtls:dns:other, mtls:uri:{PROXY}"}
        await proxy.gateway.reload(settings_of(vllm.base_url, tmp_path, server=mutual(certificates), access=access))
        await proxy.create(metadata=certificate_of("ann"))
    assert (await lines.find("access loaded"))["access"] == "keys: 1, mTLS identities: 2, trusted proxies: 2"
