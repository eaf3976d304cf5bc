"""What comes from callers without an access key."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2

from tests.hostile.attack import Attack, Prepared
from tests.hostile.attacks.building import STREAM, sent
from tests.hostile.attacks.requests import empty_messages
from tests.hostile.bars import MIB
from tests.hostile.target import CALL_SECONDS
from tests.support.raw_http2 import message, raw_client

if TYPE_CHECKING:
    from tests.hostile.target import Target

AREA = "callers without a key"
HEALTH = "/grpc.health.v1.Health/"
_UNKNOWN_CALLER = frozenset({"UNAUTHENTICATED", "RESOURCE_EXHAUSTED"})


def compressed() -> Prepared:
    """19 MiB of empty messages that are 19 KiB on the wire."""
    request = empty_messages(19 * MIB)

    async def run(target: Target) -> Counter[str]:
        return Counter([await target.call(STREAM, request, key=None, compression=grpc.Compression.Gzip)])

    return Prepared(run, 19 * 1024)


def watches(count: int) -> Prepared:
    """Watches of the health of services with names of 8 MiB; each ends when it is answered."""
    request = health_pb2.HealthCheckRequest(service="x" * (8 * MIB)).SerializeToString()

    async def watch(target: Target) -> str:
        async with target.channel() as channel:
            start: aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(f"{HEALTH}Watch")
            call = start(request, timeout=CALL_SECONDS)
            try:
                await call.read()
            except aio.AioRpcError as error:
                return error.code().name
            call.cancel()
            return "OK"

    async def run(target: Target) -> Counter[str]:
        return Counter([await watch(target) for _ in range(count)])

    return Prepared(run, len(request))


def large_metadata() -> Prepared:
    """A call with 200 KiB of metadata."""

    async def run(target: Target) -> Counter[str]:
        metadata = {f"x-{number}": "x" * 4096 for number in range(50)}
        return Counter([await target.call(STREAM, b"", key=None, metadata=metadata)])

    return Prepared(run, 200 * 1024)


def resets(count: int) -> Prepared:
    """Calls on one connection, each reset as soon as it is begun."""

    async def run(target: Target) -> Counter[str]:
        async with raw_client(target.address) as client:
            for number in range(count):
                client.connection.reset_stream(client.call(STREAM, body=message(b"x", 1000)))
                client.flush()
                if number % 100 == 0:
                    await client.drain()
        return Counter({"CANCELLED": count})

    return Prepared(run, count * 100)


def pings(count: int) -> Prepared:
    """A flood of pings on one connection."""

    async def run(target: Target) -> Counter[str]:
        async with raw_client(target.address) as client:
            for _ in range(count):
                client.connection.ping(bytes(8))
            client.flush()
            await client.until(lambda: client.terminated)
            return Counter({"ENHANCE_YOUR_CALM" if client.terminated else "OK": 1})

    return Prepared(run, count * 17)


def silent(count: int) -> Prepared:
    """Connections on which nothing is sent."""

    async def run(target: Target) -> Counter[str]:
        host, _, port = target.address.rpartition(":")
        connections = [await asyncio.open_connection(host, int(port)) for _ in range(count)]
        for _, writer in connections:
            writer.close()
        return Counter({"closed": count})

    return Prepared(run, count)


DOORS = (
    Attack(
        "19 MiB of empty messages, without a key",
        AREA,
        lambda: sent(STREAM, empty_messages(19 * MIB), key=None),
        _UNKNOWN_CALLER,
        keyed=False,
    ),
    Attack(
        "19 MiB of empty messages, compressed, without a key",
        AREA,
        compressed,
        _UNKNOWN_CALLER | {"UNIMPLEMENTED"},
        keyed=False,
    ),
    Attack(
        "19 MiB to a method that there is not",
        AREA,
        lambda: sent("/deltawire.v1.ChatCompletion/Nope", empty_messages(19 * MIB), key=None),
        frozenset({"UNIMPLEMENTED"}),
        keyed=False,
    ),
    Attack(
        "a health check for a name of 8 MiB",
        AREA,
        lambda: sent(
            f"{HEALTH}Check",
            health_pb2.HealthCheckRequest(service="x" * (8 * MIB)).SerializeToString(),
            key=None,
        ),
        # OK: the answer is for the process, since the name is not received.
        frozenset({"OK", "NOT_FOUND"}),
        keyed=False,
    ),
    Attack(
        "20 health watches of names of 8 MiB",
        AREA,
        lambda: watches(20),
        frozenset({"UNAVAILABLE", "NOT_FOUND"}),
        keyed=False,
    ),
    Attack(
        "19 MiB of reflection",
        AREA,
        lambda: sent("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", bytes(19 * MIB), key=None),
        _UNKNOWN_CALLER,
        keyed=False,
    ),
    Attack("200 KiB of metadata", AREA, large_metadata, frozenset({"RESOURCE_EXHAUSTED"}), keyed=False),
    Attack("100 calls that are reset at once", AREA, lambda: resets(100), frozenset({"CANCELLED"}), keyed=False),
    Attack("500 pings", AREA, lambda: pings(500), frozenset({"ENHANCE_YOUR_CALM"}), keyed=False),
    Attack("200 silent connections", AREA, lambda: silent(200), frozenset({"closed"}), keyed=False),
)
