"""The server's life: where it listens, what it says of itself, and how it ends."""

from __future__ import annotations

import asyncio
import re
import socket
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from deltawire import AsyncClient
from deltawire.v1 import error_reason_pb2, model_registry_pb2
from deltawire_server.app import SERVICES, Gateway
from deltawire_server.fake_vllm import Chunks, FakeVllm, Script
from deltawire_server.lifecycle import Lifecycle, ListenError, State, _options, plaintext_addresses
from deltawire_server.rpc.interceptors import CallInterceptor
from deltawire_server.settings import ServerSettings
from tests.support.gateway import (
    WAIT,
    Lines,
    Running,
    kinds,
    read,
    read_badly,
    read_well,
    settings_of,
    until,
    until_refused,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.conftest import Certificates, StartGateway

CHUNKS = Chunks()
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
LIST = model_registry_pb2.ListProvidersRequest()


def lifecycle(**fields: Any) -> Lifecycle:  # noqa: ANN401 (those of the settings)
    """A server without services of ours."""
    calls = CallInterceptor()
    return Lifecycle(ServerSettings(**{"listen": "127.0.0.1:0", "drain_delay": 0, **fields}), [calls], calls)


async def health_of(channel: aio.Channel, service: str = "") -> int:
    """What the health service says of a service."""
    response = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
    return int(response.status)


async def reflected(channel: aio.Channel, version: str) -> list[str]:
    """The services that reflection of this version lists."""
    call: Any = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    responses = call(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    (response,) = [response async for response in responses]
    return [service.name for service in response.list_services_response.service]


@pytest.mark.parametrize("service", ["", *SERVICES])
async def test_health(served: Running, vllm: FakeVllm, service: str) -> None:
    """The process and both services serve, whether or not the provider does."""
    assert await health_of(served.channel, service) == SERVING
    await vllm.crash()
    assert await health_of(served.channel, service) == SERVING


async def test_health_of_what_there_is_not(served: Running) -> None:
    """NOT_FOUND, as grpc's health protocol has it."""
    with pytest.raises(aio.AioRpcError) as caught:
        await health_of(served.channel, "nope")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection(served: Running, version: str) -> None:
    """Both versions list the same; tools ask for v1 first."""
    names = await reflected(served.channel, version)
    assert {*SERVICES, "grpc.health.v1.Health"} <= set(names)


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_without_reflection(start_gateway: StartGateway, version: str) -> None:
    """It can be turned off."""
    async with start_gateway(server={"reflection": False}) as gateway:
        with pytest.raises(aio.AioRpcError) as caught:
            await reflected(gateway.channel, version)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def tls_settings(certificates: Certificates, *, mutual: bool = False) -> dict[str, Any]:
    """Settings of a listener with TLS."""
    settings = {"tls_cert_file": certificates.server, "tls_key_file": certificates.server_key}
    return settings | ({"tls_client_ca_file": certificates.authority} if mutual else {})


def credentials(certificates: Certificates, *, client: bool = False) -> grpc.ChannelCredentials:
    """A client's side of TLS, with or without a certificate of its own."""
    return grpc.ssl_channel_credentials(
        certificates.authority.read_bytes(),
        certificates.client_key.read_bytes() if client else None,
        certificates.client.read_bytes() if client else None,
    )


async def test_tls(start_gateway: StartGateway, certificates: Certificates, lines: Lines) -> None:
    """A caller that knows the authority is served, one that speaks plaintext is not."""
    async with start_gateway(server=tls_settings(certificates)) as gateway:
        async with aio.secure_channel(gateway.address, credentials(certificates)) as channel:
            await read_well(Running(gateway.gateway, channel).stream())
        with pytest.raises(aio.AioRpcError) as caught:
            await gateway.models.ListProviders(LIST)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert (await lines.find("serving"))["tls"] == "yes"


async def test_old_connections_are_replaced(start_gateway: StartGateway, vllm: FakeVllm, lines: Lines) -> None:
    """A stream on the old connection runs to its end, and the next call uses a new one."""
    vllm.play(Script.generated(tokens=200, tokens_per_second=100))
    async with start_gateway(server={"max_connection_age": 0.3}) as gateway:
        reading = asyncio.create_task(read_well(gateway.stream()))
        async with asyncio.timeout(WAIT):
            while len({entry["peer"] for entry in lines.entries if entry["event"] == "call"}) < 2:
                await gateway.models.ListModels(model_registry_pb2.ListModelsRequest())
                await asyncio.sleep(0.1)
        assert not reading.done()
        assert kinds(await reading)[-1] == "completed"


async def test_mutual_tls(start_gateway: StartGateway, certificates: Certificates, lines: Lines) -> None:
    """A caller without a certificate is refused."""
    async with start_gateway(server=tls_settings(certificates, mutual=True)) as gateway:
        async with aio.secure_channel(gateway.address, credentials(certificates, client=True)) as channel:
            await read_well(Running(gateway.gateway, channel).stream())
        async with aio.secure_channel(gateway.address, credentials(certificates)) as channel:
            with pytest.raises(aio.AioRpcError) as caught:
                await Running(gateway.gateway, channel).models.ListProviders(LIST)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert (await lines.find("serving"))["tls"] == "mutual"


@pytest.mark.parametrize("tls", [False, True])
async def test_a_unix_socket(
    start_gateway: StartGateway, tmp_path: Path, certificates: Certificates, tls: bool
) -> None:
    """Needs no TLS even where TCP has it: its permissions guard it."""
    address = f"unix:{tmp_path}/gateway.sock"
    listen = {"listen": [address, "127.0.0.1:0"], **(tls_settings(certificates) if tls else {})}
    async with start_gateway(server=listen) as gateway:
        assert gateway.gateway.addresses[0] == address
        assert gateway.gateway.addresses[1].startswith("127.0.0.1:")
        assert not gateway.gateway.addresses[1].endswith(":0")
        await read_well(gateway.stream())


async def test_a_port_that_is_taken(
    start_gateway: StartGateway, served: Running, tmp_path: Path, vllm: FakeVllm
) -> None:
    """By another gateway too: the second one must not take half of the connections."""
    with pytest.raises(ListenError, match=re.escape(f"cannot listen on {served.address}: Address already in use")):
        async with start_gateway(server={"listen": served.address}):
            pass
    await read_well(served.stream())
    settings = settings_of(vllm.base_url, tmp_path)
    async with Gateway(settings) as other:
        assert other.addresses != (served.address,)


async def test_an_address_of_another_machine(start_gateway: StartGateway) -> None:
    """Cannot be listened on either."""
    with pytest.raises(ListenError, match=r"192\.0\.2\.1:0: Cannot assign requested address"):
        async with start_gateway(server={"listen": "192.0.2.1:0", "allow_plaintext": True}):
            pass


async def test_a_certificate_that_went_away(certificates: Certificates, tmp_path: Path) -> None:
    """Between reading the settings and starting."""
    copy = tmp_path / "server.pem"
    copy.write_bytes(certificates.server.read_bytes())
    settings = ServerSettings(**{**tls_settings(certificates), "tls_cert_file": copy, "listen": "127.0.0.1:0"})
    copy.unlink()
    calls = CallInterceptor()
    server = Lifecycle(settings, [calls], calls)
    with pytest.raises(ListenError, match=r"server\.pem"):
        await server.start([])
    await server.stop()
    assert server.state is State.STOPPED


async def test_plaintext_to_other_machines_is_named(start_gateway: StartGateway, lines: Lines) -> None:
    """At start-up; what only this machine reaches is not."""
    listen = ["0.0.0.0:0", "127.0.0.1:0"]
    async with start_gateway(server={"listen": listen, "allow_plaintext": True}) as gateway:
        entry = await lines.find("serving without TLS to other machines")
        assert entry["addresses"] == ["0.0.0.0:0"]
        assert len(gateway.gateway.addresses) == 2
    assert (await lines.find("serving"))["tls"] == "no"


def test_plaintext_addresses(certificates: Certificates) -> None:
    """None with TLS."""
    listen = ("0.0.0.0:1", "[::1]:1", "unix:/x", "10.0.0.1:1")
    assert plaintext_addresses(ServerSettings(listen=listen, allow_plaintext=True)) == ("0.0.0.0:1", "10.0.0.1:1")
    assert plaintext_addresses(ServerSettings(**{**tls_settings(certificates), "listen": listen})) == ()


def test_options() -> None:
    """The settings of connections reach grpc under the names that work."""
    settings = ServerSettings(max_receive_bytes=4096, keepalive_time=30, ping_timeout=20, min_ping_interval=0.0001)
    options = dict(_options(settings, 1))
    assert options["grpc.max_receive_message_length"] == 4096
    assert options["grpc.keepalive_time_ms"] == 30_000
    assert options["grpc.http2.ping_timeout_ms"] == 20_000
    assert options["grpc.http2.min_ping_interval_without_data_ms"] == 1
    assert options["grpc.keepalive_permit_without_calls"] == 1
    assert options["grpc.so_reuseport"] == 0
    assert options["grpc.compression_enabled_algorithms_bitset"] == 1
    assert (
        options["grpc.server.max_pending_requests"] == options["grpc.server.max_pending_requests_hard_limit"] > 100_000
    )


async def test_a_client_that_pings_often_is_served_on(start_gateway: StartGateway, vllm: FakeVllm) -> None:
    """Pings cost it nothing, also while nothing comes."""
    gate = asyncio.Event()
    vllm.play(Script.chunks([CHUNKS.role(), gate, CHUNKS.finish()]))
    options = (
        ("grpc.keepalive_time_ms", 50),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    )
    async with start_gateway(server={"min_ping_interval": 3600}, options=options) as gateway:
        call = gateway.stream()
        messages = aiter(call)
        await anext(messages)
        await asyncio.sleep(0.5)  # ten pings
        gate.set()
        assert kinds([event async for event in messages])[-1] == "completed"


async def test_a_caller_that_vanished_is_noticed(start_gateway: StartGateway, vllm: FakeVllm) -> None:
    """The connection goes silent, as after a power failure: keepalive pings detect it, and vLLM stops."""
    vllm.play(Script.chunks([CHUNKS.role(), asyncio.Event()]))
    frozen = asyncio.Event()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (data := await reader.read(65536)) and not frozen.is_set():
                writer.write(data)
            await asyncio.Event().wait()
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    forwards: list[asyncio.Task[None]] = []
    async with start_gateway(server={"keepalive_time": 0.1, "ping_timeout": 0.2}) as gateway:

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            host, _, port = gateway.address.rpartition(":")
            other_reader, other_writer = await asyncio.open_connection(host, int(port))
            forwards.append(asyncio.create_task(forward(reader, other_writer)))
            forwards.append(asyncio.create_task(forward(other_reader, writer)))

        proxy = await asyncio.start_server(accept, "127.0.0.1", 0)
        address = f"127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
        async with asyncio.timeout(WAIT), aio.insecure_channel(address) as channel:
            messages = aiter(Running(gateway.gateway, channel).stream())
            await anext(messages)
            frozen.set()
            await vllm.chats[0].closed_early.wait()
        for task in forwards:
            task.cancel()
        await asyncio.wait(forwards)
        proxy.close()


@pytest.mark.usefixtures("late_requests")
async def test_a_drain(start_gateway: StartGateway, vllm: FakeVllm) -> None:
    """Health turns first, then no call is taken; what is under way ends well. A health watch holds nothing up."""
    gate = asyncio.Event()
    vllm.play(Script.chunks([CHUNKS.role(), gate, CHUNKS.text("whole"), CHUNKS.finish()]))
    async with start_gateway(server={"drain_delay": 0.5}) as gateway:
        watch: Any = health_pb2_grpc.HealthStub(gateway.channel).Watch(health_pb2.HealthCheckRequest())
        statuses = aiter(watch)
        assert (await anext(statuses)).status == SERVING
        messages = aiter(gateway.stream())
        await anext(messages)
        drained = asyncio.create_task(gateway.gateway.drain())
        assert (await anext(statuses)).status == NOT_SERVING
        for service in SERVICES:
            assert await health_of(gateway.channel, service) == NOT_SERVING
        await until_refused(gateway)
        assert not drained.done()
        gate.set()
        assert kinds([event async for event in messages]) == ["text_delta", "choice_finished", "completed"]
        await drained


async def test_a_drain_sends_goaway_first(start_gateway: StartGateway, vllm: FakeVllm, tmp_path: Path) -> None:
    """A client that keeps its connection is sent elsewhere at once, and not only when the grace of another's call is over."""
    gate = asyncio.Event()
    vllm.play(Script.chunks([CHUNKS.role(), gate, CHUNKS.finish()]))
    addresses = [f"unix:{tmp_path}/{name}.sock" for name in "ab"]
    async with start_gateway(server={"listen": addresses[0]}) as first, start_gateway(server={"listen": addresses[1]}):
        messages = aiter(first.stream())
        await anext(messages)
        # Balanced by gRPC itself: of two addresses it stays with the one that it connected to first.
        async with aio.insecure_channel(f"unix:{tmp_path}/pinned.sock") as pinned:
            (tmp_path / "pinned.sock").symlink_to(tmp_path / "a.sock")
            await read_well(Running(first.gateway, pinned).stream())
            (tmp_path / "pinned.sock").unlink()
            (tmp_path / "pinned.sock").symlink_to(tmp_path / "b.sock")
            drained = asyncio.create_task(first.gateway.drain())
            await until(lambda: pinned.get_state() is not grpc.ChannelConnectivity.READY)
            await read_well(Running(first.gateway, pinned).stream())
            assert not drained.done()
        gate.set()
        assert kinds([event async for event in messages])[-1] == "completed"
        await drained


async def test_a_client_gets_through_a_drain(start_gateway: StartGateway, vllm: FakeVllm, tmp_path: Path) -> None:
    """Its retries find another gateway; none of its calls fails, in whichever moment of the drain it is made."""
    gate = asyncio.Event()
    vllm.play(Script.chunks([CHUNKS.role(), gate, CHUNKS.finish()]))
    sockets = {name: tmp_path / f"{name}.sock" for name in ("first", "second", "any")}
    async with (
        start_gateway(server={"listen": f"unix:{sockets['first']}"}) as first,
        start_gateway(server={"listen": f"unix:{sockets['second']}"}),
    ):
        messages = aiter(first.stream())
        await anext(messages)
        sockets["any"].symlink_to(sockets["first"])
        async with AsyncClient(f"unix:{sockets['any']}") as client:
            await client.providers.list()
            sockets["any"].unlink()
            sockets["any"].symlink_to(sockets["second"])
            drained = asyncio.create_task(first.gateway.drain())
            for _ in range(300):
                await client.providers.list()
        assert not drained.done()
        gate.set()
        assert kinds([event async for event in messages])[-1] == "completed"
        await drained


async def test_grace_has_an_end(start_gateway: StartGateway, vllm: FakeVllm, lines: Lines) -> None:
    """What is under way after it is ended by the contract: what came, usage, why; and the provider stops."""
    vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("so far"), asyncio.Event()]))
    async with start_gateway(server={"drain_grace": 0.1}) as gateway:
        stream = gateway.stream()
        await anext(aiter(stream))
        drained = asyncio.create_task(gateway.gateway.drain())
        events, failure = await read_badly(stream)
        await drained
        await lines.find("active calls are ended")
        await vllm.chats[0].closed_early.wait()
    completed = events[-1].completed
    assert completed.choices[0].message.text == "so far"
    assert (completed.error.code, completed.error.reason) == (10, error_reason_pb2.ERROR_REASON_DRAINING)
    assert (failure.code, failure.reason) == (grpc.StatusCode.ABORTED, "DRAINING")


@pytest.mark.usefixtures("late_requests")
async def test_during_the_delay_calls_are_taken(start_gateway: StartGateway) -> None:
    """The gateway serves during the drain delay, and `stop` ends the delay."""
    async with start_gateway(server={"drain_delay": 3600}) as gateway:
        watch: Any = health_pb2_grpc.HealthStub(gateway.channel).Watch(health_pb2.HealthCheckRequest())
        statuses = aiter(watch)
        await anext(statuses)
        drained = asyncio.create_task(gateway.gateway.drain())
        assert (await anext(statuses)).status == NOT_SERVING
        await read_well(gateway.stream())
        await gateway.gateway.stop()
        await asyncio.wait([drained])


@asynccontextmanager
async def health_channel(gateway: Running) -> AsyncIterator[aio.Channel]:
    """A channel to the health listener, in plaintext."""
    async with aio.insecure_channel(gateway.gateway.health_address) as channel:
        yield channel


async def test_a_health_listener(start_gateway: StartGateway, certificates: Certificates, lines: Lines) -> None:
    """Beside a listener with mutual TLS and access lines, it serves the same health without either, and nothing else."""
    server = {**tls_settings(certificates, mutual=True), "health_listen": "0.0.0.0:0"}
    async with (
        start_gateway(server=server, access={"keys": "ops all secret-of-operations"}) as gateway,
        health_channel(gateway) as channel,
    ):
        assert (await lines.find("serving"))["health"] == gateway.gateway.health_address
        for service in ("", *SERVICES):
            assert await health_of(channel, service) == SERVING
        with pytest.raises(aio.AioRpcError) as caught:
            await health_of(channel, "nope")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        for call in (Running(gateway.gateway, channel).models.ListProviders(LIST), reflected(channel, "v1")):
            with pytest.raises(aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert gateway.gateway.health_address == ""
    assert "serving without TLS to other machines" not in {entry["event"] for entry in lines.entries}


@pytest.mark.usefixtures("late_requests")
async def test_the_health_listener_during_a_drain(start_gateway: StartGateway, vllm: FakeVllm) -> None:
    """It answers NOT_SERVING until the last call has ended, also when the other addresses take no calls any more."""
    gate = asyncio.Event()
    vllm.play(Script.chunks([CHUNKS.role(), gate, CHUNKS.finish()]))
    async with start_gateway(server={"health_listen": "127.0.0.1:0"}) as gateway, health_channel(gateway) as channel:
        watch: Any = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        statuses = aiter(watch)
        assert (await anext(statuses)).status == SERVING
        messages = aiter(gateway.stream())
        await anext(messages)
        drained = asyncio.create_task(gateway.gateway.drain())
        assert (await anext(statuses)).status == NOT_SERVING
        await until_refused(gateway)
        assert await health_of(channel) == NOT_SERVING
        assert not drained.done()
        gate.set()
        assert kinds([event async for event in messages])[-1] == "completed"
        await drained
        with pytest.raises(aio.AioRpcError) as caught:
            await anext(statuses)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_port_for_health_that_is_taken(start_gateway: StartGateway, served: Running) -> None:
    """The gateway does not start, and the message names the setting."""
    problem = f"cannot listen on {served.address}: Address already in use; use another address (--health-listen)"
    with pytest.raises(ListenError, match=re.escape(problem)):
        async with start_gateway(server={"health_listen": served.address}):
            pass
    await read_well(served.stream())


async def test_connections_of_the_health_listener_are_bounded(
    start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own limit, so that they leave the other addresses theirs."""
    monkeypatch.setattr("deltawire_server.lifecycle.MAX_HEALTH_CONNECTIONS", 2)
    async with start_gateway(server={"health_listen": "127.0.0.1:0", "max_connections": 4}) as gateway:
        host, _, port = gateway.gateway.health_address.rpartition(":")
        opened = [await asyncio.open_connection(host, int(port)) for _ in range(4)]
        # An HTTP/2 server speaks first on each connection that it keeps.
        kept = [bool(await reader.read(1)) for reader, _ in opened]
        assert sorted(kept) == [False, False, True, True]
        await read_well(gateway.stream())
        for _, writer in opened:
            writer.close()


async def test_states() -> None:
    """From starting to stopped, and stopping again changes nothing."""
    server = lifecycle()
    states = [server.state]
    await server.start([])
    states.append(server.state)
    for at_once in (False, False, True):
        await server.stop(at_once=at_once)
        states.append(server.state)
    assert states == [State.STARTING, State.SERVING, State.STOPPED, State.STOPPED, State.STOPPED]


@pytest.mark.parametrize("health", ["off", "127.0.0.1:0"])
async def test_stopping_what_never_started(health: str) -> None:
    """Is nothing to wait for."""
    server = lifecycle(drain_delay=3600, health_listen=health)
    await server.stop()
    assert server.state is State.STOPPED


async def test_two_who_stop_wait_for_the_same(start_gateway: StartGateway, vllm: FakeVllm) -> None:
    """One drain, however many ask for it."""
    gate = asyncio.Event()
    vllm.play(Script.chunks([CHUNKS.role(), gate, CHUNKS.finish()]))
    async with start_gateway() as gateway:
        messages = aiter(gateway.stream())
        await anext(messages)
        drains = [asyncio.create_task(gateway.gateway.drain()) for _ in range(2)]
        gate.set()
        await asyncio.gather(*drains)
        assert kinds([event async for event in messages])[-1] == "completed"


async def test_leaving_cancels_what_is_under_way(start_gateway: StartGateway, vllm: FakeVllm) -> None:
    """No call outlives its gateway, and no connection to the provider either."""
    vllm.play(Script.chunks([CHUNKS.role(), asyncio.Event()]))
    async with start_gateway() as gateway:
        reading = asyncio.create_task(read(gateway.stream()))
        chat = await vllm.received()
    await chat.closed_early.wait()
    await asyncio.wait([reading])
    await until(lambda: vllm.connections == 0)


@pytest.mark.parametrize("wrong", ["tls_cert_file", "tls_key_file", "tls_client_ca_file"])
async def test_certificates_that_are_none(certificates: Certificates, tmp_path: Path, wrong: str) -> None:
    """Are named when starting, and not taken for a port in use."""
    broken = tmp_path / "broken.pem"
    broken.write_text("nonsense")
    server = lifecycle(**(tls_settings(certificates, mutual=True) | {wrong: broken}))
    with pytest.raises(ListenError, match=r"cannot use the certificates .*broken\.pem"):
        await server.start([])
    await server.stop()


async def test_a_key_of_another_certificate(certificates: Certificates) -> None:
    """Does not fit, and that is said."""
    server = lifecycle(tls_cert_file=certificates.server, tls_key_file=certificates.client_key)
    with pytest.raises(ListenError, match="cannot use the certificates"):
        await server.start([])
    await server.stop()


async def test_a_unix_socket_that_is_listened_on_is_refused(start_gateway: StartGateway, tmp_path: Path) -> None:
    """It is not taken away from its owner; one that a killed process left behind is taken over."""
    address = f"unix:{tmp_path}/gateway.sock"
    async with start_gateway(server={"listen": [address]}) as gateway:
        with pytest.raises(ListenError, match="another process listens on it"):
            await lifecycle(listen=[address]).start([])
        await read_well(gateway.stream())
    left_behind = socket.socket(socket.AF_UNIX)
    left_behind.bind(f"{tmp_path}/left.sock")
    left_behind.close()
    server = lifecycle(listen=[f"unix:{tmp_path}/left.sock"])
    await server.start([])
    await server.stop(at_once=True)


async def test_a_unix_socket_in_no_folder_is_named(tmp_path: Path) -> None:
    """The failure says which."""
    with pytest.raises(ListenError, match=r"none/gateway\.sock: its folder must exist"):
        await lifecycle(listen=[f"unix:{tmp_path}/none/gateway.sock"]).start([])
