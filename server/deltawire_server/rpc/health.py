"""gRPC's health service, for callers without an access key: what a request may hold and what is kept of it is bounded.

All services have the same health, that of this process. So a check whose request has not arrived at once is answered for the
process, and the rest of the request is not received, however long the name in it is.
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
from deltawire_server.rpc.reception import arrived
from deltawire_server.upstream.failures import RETRY_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from grpc import aio

    _Context = aio.ServicerContext[Any, Any]

SERVICE = "grpc.health.v1.Health"

MAX_WATCHES = 1024
"""Watches of health in all. One takes about 20 KiB; clients that watch have one on each of their connections."""

MAX_CONNECTION_WATCHES = 64
"""Watches of health on one connection. A client needs one; a proxy may carry those of many clients on one connection."""

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """Answers the health service's calls. Its methods raise `DeltawireError`s, which `CallInterceptor` makes statuses of."""

    def __init__(self) -> None:
        self._services = frozenset({""})
        self._stopping = asyncio.Event()
        self._watches: Counter[str] = Counter()

    def handler(self) -> grpc.GenericRpcHandler:
        """What to add to the server."""
        serialize = health_pb2.HealthCheckResponse.SerializeToString
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            # Streams of requests, so that they are not received before these methods read them; see `reception`.
            "Check": grpc.stream_unary_rpc_method_handler(self.check, None, serialize),
            "Watch": grpc.stream_stream_rpc_method_handler(self.watch, None, serialize),
        }
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    def start(self, services: Sequence[str]) -> None:
        """From now on these services, by their full names, are known and serve."""
        self._services |= frozenset(services)

    def stop(self) -> None:
        """From now on every service is NOT_SERVING; watches are sent that."""
        self._stopping.set()

    async def check(self, requests: object, context: _Context) -> health_pb2.HealthCheckResponse:
        """Whether a service serves.

        Raises:
            CallerError: NOT_FOUND: there is no such service.
        """
        del requests
        data = await arrived(context)
        if data is not None:
            self._require_known(data)
        # Else this is the answer for the process, which has the same health as each of its services.
        return health_pb2.HealthCheckResponse(status=self._status())

    async def watch(self, requests: object, context: _Context) -> None:
        """Whether a service serves, now and whenever it changes, until the caller or the process ends.

        Raises:
            CallerError: NOT_FOUND: there is no such service.
            GatewayError: TOO_MANY_STREAMS: there are too many watches already. DURATION_LIMIT_EXCEEDED: the request did not
                come with its call.
        """
        del requests
        data = await arrived(context)
        if data is None:
            raise GatewayError(
                Reason.DURATION_LIMIT_EXCEEDED,
                "a request to watch health must come with its call: watch again",
                code=Code.UNAVAILABLE,
                metadata={"limit_seconds": "0"},
                retry_after=RETRY_SECONDS,
            )
        self._require_known(data)
        with self._counted(context.peer()):
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
                f"there is no service of this name: ask for one of {known}, or for none to learn of the process",
                code=Code.NOT_FOUND,
            )

    @contextlib.contextmanager
    def _counted(self, peer: str) -> Iterator[None]:
        if self._watches.total() >= MAX_WATCHES:
            raise _too_many(MAX_WATCHES, "in all")
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
        f"this gateway has {limit} watches of health {where} and no more: use Check, or end one",
        metadata={"limit": str(limit)},
        retry_after=RETRY_SECONDS,
    )
