"""gRPC's health service. Callers need no access key, so the size and the number of their requests are limited.

All services have the health of this process. So if the request of a check does not arrive immediately, the check returns the
health of the process, and the rest of the request is not received.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2

from deltawire_server.errors import CallerError, Code, GatewayError, Reason
from deltawire_server.rpc.interceptors import call_record
from deltawire_server.rpc.reception import arrived
from deltawire_server.upstream.failures import RETRY_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from grpc import aio

    _Context = aio.ServicerContext[Any, Any]

SERVICE = "grpc.health.v1.Health"

MAX_WATCHES = 1024
"""Health watches of all connections. One takes about 20 KiB; a client that watches has one on each of its connections."""

MAX_CONNECTION_WATCHES = 64
"""Health watches on one connection, or from one address that a trusted proxy asserts. A client needs one; another proxy may
forward those of many clients over one connection."""

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """Implements the health service. Its methods raise `DeltawireError`s, which `CallInterceptor` converts to statuses."""

    def __init__(self) -> None:
        self._services = frozenset({""})
        self._stopping = asyncio.Event()
        self._watches: Counter[str] = Counter()

    def handler(self) -> grpc.GenericRpcHandler:
        """The handler to add to the server."""
        serialize = health_pb2.HealthCheckResponse.SerializeToString
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            # Registered with streamed requests, so that gRPC does not receive them before these methods read; see `reception`.
            "Check": grpc.stream_unary_rpc_method_handler(self.check, None, serialize),
            "Watch": grpc.stream_stream_rpc_method_handler(self.watch, None, serialize),
        }
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    def start(self, services: Sequence[str]) -> None:
        """Report these services, by their full names, as SERVING from now on."""
        self._services |= frozenset(services)

    def stop(self) -> None:
        """Report every service as NOT_SERVING from now on, also to active watches."""
        self._stopping.set()

    async def check(self, requests: object, context: _Context) -> health_pb2.HealthCheckResponse:
        """Return whether a service serves.

        Raises:
            CallerError: NOT_FOUND: there is no such service.
        """
        del requests
        data = await arrived(context)
        if data is not None:
            self._require_known(data)
        # Otherwise the result is that of the process, which is the same for each of its services.
        return health_pb2.HealthCheckResponse(status=self._status())

    async def watch(self, requests: object, context: _Context) -> None:
        """Stream whether a service serves, now and after each change, until the caller or the process ends.

        Raises:
            CallerError: NOT_FOUND: there is no such service.
            GatewayError: TOO_MANY_STREAMS: there are too many watches. DURATION_LIMIT_EXCEEDED: the request did not arrive
                together with its call.
        """
        del requests
        data = await arrived(context)
        if data is None:
            raise GatewayError(
                Reason.DURATION_LIMIT_EXCEEDED,
                "the request of a health watch must arrive together with its call: watch again",
                code=Code.UNAVAILABLE,
                metadata={"limit_seconds": "0"},
                retry_after=RETRY_SECONDS,
            )
        self._require_known(data)
        with self._counted(call_record(context).origin.peer):
            if not self._stopping.is_set():
                await context.write(health_pb2.HealthCheckResponse(status=SERVING))
                await self._stopping.wait()
            await context.write(health_pb2.HealthCheckResponse(status=NOT_SERVING))
            await asyncio.get_running_loop().create_future()  # the server cancels it when it has stopped

    def _status(self) -> health_pb2.HealthCheckResponse.ServingStatus.ValueType:
        return NOT_SERVING if self._stopping.is_set() else SERVING

    def _require_known(self, data: bytes) -> None:
        try:
            service = health_pb2.HealthCheckRequest.FromString(data).service
        except DecodeError as error:
            message = (
                "the request is not a HealthCheckRequest: its bytes are not protobuf, or a text in it is not UTF-8"
            )
            raise CallerError(Reason.INVALID_REQUEST, message) from error
        if service not in self._services:
            known = ", ".join(sorted(self._services - {""}))
            raise CallerError(
                Reason.INVALID_REQUEST,
                f"there is no service with this name: use one of {known}, or an empty name for the whole process",
                code=Code.NOT_FOUND,
            )

    @contextlib.contextmanager
    def _counted(self, peer: str) -> Iterator[None]:
        if self._watches.total() >= MAX_WATCHES:
            raise _too_many(MAX_WATCHES, "in total")
        if self._watches[peer] >= MAX_CONNECTION_WATCHES:
            raise _too_many(MAX_CONNECTION_WATCHES, "on one connection")
        self._watches[peer] += 1
        try:
            yield
        finally:
            self._watches[peer] -= 1
            if not self._watches[peer]:
                del self._watches[peer]


def _too_many(limit: int, where: str) -> GatewayError:
    return GatewayError(
        Reason.TOO_MANY_STREAMS,
        f"this gateway already has {limit} health watches {where}, which is its limit: use Check, or end a watch",
        metadata={"limit": str(limit)},
        retry_after=RETRY_SECONDS,
    )
