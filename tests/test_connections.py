"""What connections may do to a gateway: pings, streams, silence, and file descriptors."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import subprocess
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from h2.settings import SettingCodes

from deltawire_server import descriptors
from deltawire_server.lifecycle import MAX_PING_STRIKES
from tests.support.ports import free_port
from tests.support.raw_http2 import message, raw_client

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import StartGateway
    from tests.support.gateway import Lines

LIST = "/deltawire.v1.ModelRegistry/ListModels"
ENHANCE_YOUR_CALM = 11
REFUSED_STREAM = 7


async def test_a_flood_of_pings_ends_its_connection(start_gateway: StartGateway) -> None:
    """After `MAX_PING_STRIKES`, and no other connection."""
    async with start_gateway() as gateway, raw_client(gateway.address) as other, raw_client(gateway.address) as client:
        for _ in range(10 * MAX_PING_STRIKES):
            client.connection.ping(bytes(8))
        client.flush()
        await client.until(lambda: client.terminated)
        assert client.terminated is not None
        assert client.terminated.error_code == ENHANCE_YOUR_CALM
        assert await other.status(other.call(LIST, body=message(b""), end=True)) == "0"


async def test_pings_that_keep_their_distance_are_never_too_many(start_gateway: StartGateway) -> None:
    """However many; on a connection without calls, and while nothing is sent."""
    async with start_gateway(server={"min_ping_interval": 0.005}) as gateway, raw_client(gateway.address) as client:
        for _ in range(3 * MAX_PING_STRIKES):
            await asyncio.sleep(0.01)
            client.connection.ping(bytes(8))
            client.flush()
        assert await client.status(client.call(LIST, body=message(b""), end=True)) == "0"
        assert client.terminated is None


async def test_calls_of_a_connection_are_bounded(start_gateway: StartGateway) -> None:
    """The others are refused by HTTP/2, as never begun: clients send them again."""
    async with start_gateway(server={"max_concurrent_streams": 3}) as gateway, raw_client(gateway.address) as client:
        assert client.connection.remote_settings.max_concurrent_streams == 3
        # A client that does not heed it.
        client.connection.remote_settings[SettingCodes.MAX_CONCURRENT_STREAMS] = 100
        client.connection.remote_settings.acknowledge()
        streams = [client.call(LIST, body=message(b"", 10)) for _ in range(5)]
        await client.until(lambda: len(client.resets) == 2)
        assert client.resets == streams[3:]


async def test_a_silent_connection_is_closed(start_gateway: StartGateway) -> None:
    """After `handshake_timeout`."""
    async with start_gateway(server={"handshake_timeout": 0.2}) as gateway:
        host, _, port = gateway.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        async with asyncio.timeout(10):
            while await reader.read(1024):
                pass
        writer.close()


async def test_connections_are_bounded(start_gateway: StartGateway, lines: Lines) -> None:
    """Those beyond are closed; those within are served, and one that closes makes room."""
    async with start_gateway(server={"max_connections": 2}) as gateway:
        assert (await lines.find("serving"))["max_connections"] == 2
        async with raw_client(gateway.address) as first:
            async with raw_client(gateway.address):
                async with raw_client(gateway.address) as third:
                    assert third.closed
                assert await first.status(first.call(LIST, body=message(b""), end=True)) == "0"
            await asyncio.sleep(0.1)
            async with raw_client(gateway.address) as fourth:
                assert await fourth.status(fourth.call(LIST, body=message(b""), end=True)) == "0"


@pytest.mark.parametrize(("limit", "wanted", "allowed"), [(256, 10_000, 128), (1 << 20, 10_000, 10_000), (1, 5, 1)])
def test_descriptors_are_kept_from_clients(limit: int, wanted: int, allowed: int) -> None:
    """At least half of them."""
    assert descriptors.connections(limit, wanted) == allowed


@pytest.mark.parametrize(
    ("soft", "hard", "raised"),
    [
        (256, 1024, 1024),
        (1024, 1024, 1024),
        (256, resource.RLIM_INFINITY, descriptors.MOST),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, descriptors.MOST),
    ],
)
def test_the_limit_is_raised(monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, raised: int) -> None:
    """To the hard one, and not touched if it is there."""
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: limits.append(limit))
    assert descriptors.raise_limit() == raised
    assert limits == ([(raised, hard)] if soft == 256 else [])


def test_a_limit_that_must_not_be_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays."""

    def forbidden(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1024))
    monkeypatch.setattr(resource, "setrlimit", forbidden)
    assert descriptors.raise_limit() == 256


async def test_silent_sockets_do_not_deafen_a_gateway_with_few_descriptors(tmp_path: Path) -> None:
    """It serves the connections that it has, can open files, and takes new connections when the silent ones are closed."""
    address = f"127.0.0.1:{free_port()}"
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (128, 256));"
        "from deltawire_server.__main__ import main; sys.exit(main())"
    )
    arguments = [
        f"--listen={address}",
        "--vllm-url=http://127.0.0.1:9/v1",
        f"--database-url=sqlite:///{tmp_path}/registry.db",
        "--set=server.handshake_timeout=2",
        "--set=server.drain_delay=0",
        "--log-format=json",
    ]
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, *arguments, stdout=subprocess.DEVNULL, stderr=output
        )
    try:
        with ExitStack() as sockets:
            async with aio.insecure_channel(address) as channel, asyncio.timeout(60):
                await channel.channel_ready()
                check = health_pb2_grpc.HealthStub(channel).Check
                host, _, port = address.rpartition(":")
                for _ in range(300):
                    sockets.enter_context(socket.create_connection((host, int(port))))
                await asyncio.sleep(0.5)
                assert (await check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
                assert len(os.listdir(f"/proc/{process.pid}/fd")) < 200  # noqa: PTH208 (a count)
                await asyncio.sleep(2.5)
                async with raw_client(address) as client:
                    assert await client.status(client.call(LIST, body=message(b""), end=True)) == "0"
    finally:
        process.terminate()
        await process.wait()
    (serving,) = [line for line in map(json.loads, log.read_text().splitlines()) if line["event"] == "serving"]
    assert (serving["file_descriptors"], serving["max_connections"]) == (256, 128)
