"""What comes from callers without an access key."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health_pb2

from tests.hostile.attack import Attack, Prepared
from tests.hostile.attacks.building import STREAM, sent
from tests.hostile.attacks.requests import empty_messages
from tests.hostile.bars import MIB

if TYPE_CHECKING:
    from tests.hostile.target import Target

_UNKNOWN_CALLER = frozenset({"UNAUTHENTICATED", "RESOURCE_EXHAUSTED"})


def compressed() -> Prepared:
    """31 MiB of empty messages that are 30 KiB on the wire."""
    request = empty_messages(31 * MIB)

    async def run(target: Target) -> Counter[str]:
        return Counter([await target.call(STREAM, request, key=None, compression=grpc.Compression.Gzip)])

    return Prepared(run, 30 * 1024)


DOORS = (
    Attack(
        "31 MiB of empty messages, without a key",
        "callers without a key",
        lambda: sent(STREAM, empty_messages(31 * MIB), key=None),
        _UNKNOWN_CALLER,
        keyed=False,
    ),
    Attack(
        "31 MiB of empty messages, compressed, without a key",
        "callers without a key",
        compressed,
        _UNKNOWN_CALLER | {"UNIMPLEMENTED"},
        keyed=False,
    ),
    Attack(
        "a health check for a name of 8 MiB",
        "callers without a key",
        lambda: sent(
            "/grpc.health.v1.Health/Check",
            health_pb2.HealthCheckRequest(service="x" * (8 * MIB)).SerializeToString(),
            key=None,
        ),
        frozenset({"NOT_FOUND", "RESOURCE_EXHAUSTED", "INVALID_ARGUMENT"}),
        keyed=False,
    ),
)
