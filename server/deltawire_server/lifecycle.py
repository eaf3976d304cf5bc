"""The lifecycle of the gRPC server: starting, serving, draining, stopped.

    STARTING ── start ──▶ SERVING ── stop ──▶ DRAINING ──▶ STOPPED

On draining, the health service first reports NOT_SERVING, and calls are still accepted until load balancers have noticed. Then
every connection gets a GOAWAY, so that clients connect elsewhere, and active calls may end. Health only covers this process: a
failed provider does not change it, or all gateways would leave the load balancing at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import socket
from typing import TYPE_CHECKING, Protocol, cast

import grpc
from grpc import aio
from grpc_reflection.v1alpha import reflection, reflection_pb2

from deltawire_server import descriptors
from deltawire_server.certificates import ServerCertificates
from deltawire_server.processes.parent import HEALTH_REMEDY, REMEDY
from deltawire_server.rpc import health
from deltawire_server.rpc.reception import PENDING_REQUESTS
from deltawire_server.settings import ServerSettings, is_local
from deltawire_server.telemetry import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"

MAX_HEALTH_CONNECTIONS = 256
"""Connections of the health listener: a probe opens one for each check, and a load balancer keeps one."""

FAREWELL_SECONDS = 1.0
"""Time for ended calls to send their last message; calls whose callers do not read are cancelled afterwards."""

MAX_PING_STRIKES = 20
"""Pings that may arrive sooner than `min_ping_interval` after the previous one; more close the connection with ENHANCE_YOUR_CALM.
In gRPC, 0 means any number. A message from the server resets the count. The limit allows bursts, such as those of a proxy with
several timers, but not a flood, which has hundreds."""

NEVER_SECONDS = 2_000_000.0
"""As long as gRPC's settings of a duration can be: 23 days, in milliseconds."""

FLUSH_SECONDS = 0.2
"""Time to flush the last messages to the sockets."""

_log = get_logger(__name__)


class ListenError(Exception):
    """The gateway cannot listen on an address."""


class State(enum.Enum):
    """The state of the server."""

    STARTING = enum.auto()
    SERVING = enum.auto()
    DRAINING = enum.auto()
    STOPPED = enum.auto()


class Calls(Protocol):
    """The active calls, for draining."""

    def refuse_new_calls(self) -> None:
        """Refuse new calls from now on."""

    def end_calls(self) -> None:
        """End active calls with a last message to their callers."""

    async def wait_idle(self) -> None:
        """Wait until no call is active."""


class Unregistered:
    """A server for the generated `add_…_to_server` functions, which does not register single methods.

    For each registered method, grpc.aio keeps a task that waits for the next call, and with each call it waits for all of these
    tasks again: 16 methods take 5 % of the time of a short call.
    """

    def __init__(self, server: aio.Server) -> None:
        self.add_generic_rpc_handlers = server.add_generic_rpc_handlers

    def add_registered_method_handlers(self, *_: object) -> None:
        """The generic handlers serve these methods too."""


class Lifecycle:
    """The gRPC server, and that of the health listener.

    Args:
        settings: The listener and its limits.
        interceptors: The interceptors, in order.
        calls: The active calls, to drain.
    """

    def __init__(self, settings: ServerSettings, interceptors: Sequence[aio.ServerInterceptor], calls: Calls) -> None:
        self._settings = settings
        self._calls = calls
        self._health = health.Health()
        self.descriptors = descriptors.raise_limit()
        """The limit of open files and connections of the process."""
        self.max_connections = descriptors.connections(self.descriptors, settings.max_connections)
        """The limit of client connections."""
        limit = max(1, self.max_connections // len(settings.listen))
        self._server = aio.server(interceptors=interceptors, options=_options(settings, limit))
        self._health_server: aio.Server | None = None
        if settings.health_address:
            limit = min(MAX_HEALTH_CONNECTIONS, self.max_connections)
            self._health_server = aio.server(interceptors=interceptors, options=_options(settings, limit))
        self._stopping: asyncio.Task[None] | None = None
        self._going_away: asyncio.Task[None] | None = None
        self.state = State.STARTING
        self.certificates: ServerCertificates | None = None
        """The certificates of its TLS listeners, from `listen` on; `None` without TLS."""
        self.addresses: tuple[str, ...] = ()
        """The addresses that it listens on, from `listen` to the end of `stop`; with the selected port for port 0."""
        self.health_address = ""
        """The address of the health listener, likewise; empty for none."""

    def add_service(self, add: Callable[[aio.Server], None]) -> None:
        """Add a service before `start`. `add` is called with the server."""
        add(cast("aio.Server", Unregistered(self._server)))

    def listen(self) -> None:
        """Listen without serving: connections wait until `start`, which does this first otherwise.

        Raises:
            ListenError: An address is in use or does not belong to this machine, or the certificate cannot be used.
        """
        self.certificates = _certificates(self._settings)
        self.addresses = tuple(map(self._listen, self._settings.listen))
        if self._health_server is not None:
            add = self._health_server.add_insecure_port
            self.health_address = _add_port(self._settings.health_address, add, HEALTH_REMEDY)

    async def start(self, services: Sequence[str]) -> None:
        """Serve.

        Args:
            services: The full names of the services that were added, for health and reflection.

        Raises:
            ListenError: From `listen`.
        """
        if not self.addresses:
            self.listen()
        self._server.add_generic_rpc_handlers((self._health.handler(),))
        if self._settings.reflection:
            self._add_reflection([*services, health.SERVICE, reflection.SERVICE_NAME])
        self._health.start(services)
        await self._server.start()
        if self._health_server is not None:
            self._health_server.add_generic_rpc_handlers((self._health.handler(),))
            await self._health_server.start()
        self.state = State.SERVING

    async def stop(self, *, at_once: bool = False) -> None:
        """Drain and stop. When this returns, no call is active.

        Args:
            at_once: Cancel active calls instead of waiting for them; also shortens a stop that has begun.
        """
        if at_once and self._stopping is not None:
            self._stopping.cancel()
            await asyncio.wait([self._stopping])
        if self._stopping is None or at_once:
            self._stopping = asyncio.create_task(self._stop(at_once=at_once), name="stop")
        await asyncio.shield(self._stopping)

    async def _stop(self, *, at_once: bool) -> None:
        settings = self._settings
        if self.state is State.STARTING:
            # gRPC crashes the process when it frees a server that was never started.
            self._calls.refuse_new_calls()
            await self._server.start()
            if self._health_server is not None:
                await self._health_server.start()
        else:
            self.state = State.DRAINING
            self._health.stop()
            if not at_once:
                _log.info("draining", delay=settings.drain_delay, grace=settings.drain_grace)
                await asyncio.sleep(settings.drain_delay)
            self._calls.refuse_new_calls()
            if not at_once:
                # Sends GOAWAY now. gRPC's grace must be longer than the gateway's own, because open health watches would use it up.
                grace = settings.drain_grace + 2 * FAREWELL_SECONDS
                self._going_away = asyncio.create_task(self._server.stop(grace), name="goaway")
                try:
                    async with asyncio.timeout(settings.drain_grace):
                        await self._calls.wait_idle()
                except TimeoutError:
                    _log.warning("active calls are ended", grace=settings.drain_grace)
            self._calls.end_calls()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FAREWELL_SECONDS):
                    await self._calls.wait_idle()
        await self._server.stop(FLUSH_SECONDS)
        if self._going_away is not None:
            await self._going_away
        if self._health_server is not None:
            await self._health_server.stop(FLUSH_SECONDS)  # last, as the probes of a draining gateway go on
        self.addresses = ()
        self.health_address = ""
        self.state = State.STOPPED

    def _listen(self, address: str) -> str:
        if address.startswith("unix:"):
            _check_socket(address.removeprefix("unix:"))
        # A unix socket is not reachable from other machines, and its file's permissions control access.
        if self.certificates is None or address.startswith("unix:"):
            return _add_port(address, self._server.add_insecure_port)
        credentials = self.certificates.credentials()
        return _add_port(address, lambda address: self._server.add_secure_port(address, credentials))

    def _add_reflection(self, names: list[str]) -> None:
        reflection.enable_server_reflection(names, self._server)
        # The library only supports v1alpha. v1 has the same messages, and newer tools try it first.
        handlers = {
            "ServerReflectionInfo": grpc.stream_stream_rpc_method_handler(
                reflection.aio.ReflectionServicer(names).ServerReflectionInfo,
                request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
                response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
            )
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(REFLECTION_V1, handlers),))


def _add_port(address: str, add: Callable[[str], int], remedy: str = REMEDY) -> str:
    """Listen on an address; return it with its port.

    Raises:
        ListenError: It cannot be used.
    """
    try:
        port = add(address)
    except (RuntimeError, ValueError) as error:
        raise ListenError(f"cannot listen on {address}: {_problem(address)}; {remedy}") from error
    return address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"


def _check_socket(path: str) -> None:
    """Refuse a socket that another process listens on: grpc would replace the socket, and remove it on shutdown."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path.removeprefix("//"))
        except (FileNotFoundError, ConnectionRefusedError):
            return
        except OSError as error:
            raise ListenError(f"cannot listen on unix:{path}: {error}; {REMEDY}") from error
    raise ListenError(f"cannot listen on unix:{path}: another process listens on it; {REMEDY}")


def _problem(address: str) -> str:
    """Why an address cannot be used, from another attempt: gRPC's error does not say it."""
    if address.startswith("unix:"):
        return "its folder must exist and be writable"
    host, _, port = address.rpartition(":")
    try:
        family, *_, where = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.bind(where)
    except OSError as error:
        return error.strerror or str(error)
    return "gRPC cannot use it"


def _options(settings: ServerSettings, connections: int) -> list[tuple[str, int]]:
    """The options of a server, with the limit of connections at each of its addresses."""
    return [
        # With 1, a second process on the same port starts without an error and gets half of the connections. Workers do that on
        # purpose, on a port that their parent holds.
        ("grpc.so_reuseport", int(settings.workers > 1)),
        ("grpc.max_receive_message_length", settings.max_receive_bytes),
        # Only the first algorithm, "identity": a compressed request is refused by its headers. Otherwise 30 KiB from an
        # unauthenticated caller could become 32 MiB here. Images, the largest part of requests, do not compress anyway.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        *PENDING_REQUESTS,
        ("grpc.keepalive_time_ms", _milliseconds(settings.keepalive_time)),
        # gRPC itself varies it by a tenth. Without a grace, open calls may go on.
        ("grpc.max_connection_age_ms", _milliseconds(settings.max_connection_age or NEVER_SECONDS)),
        # This option determines when a vanished peer is detected; grpc.keepalive_timeout_ms has no effect.
        ("grpc.http2.ping_timeout_ms", _milliseconds(settings.ping_timeout)),
        # This name is effective; grpc.http2.min_recv_ping_interval_without_data_ms is ignored.
        ("grpc.http2.min_ping_interval_without_data_ms", _milliseconds(settings.min_ping_interval)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_ping_strikes", MAX_PING_STRIKES),
        ("grpc.max_concurrent_streams", settings.max_concurrent_streams),
        # Includes idle connections.
        ("grpc.max_allowed_incoming_connections", connections),
        ("grpc.server_handshake_timeout_ms", _milliseconds(settings.handshake_timeout)),
        # With the probe, the window grows to megabytes for a caller that does not read.
        ("grpc.http2.bdp_probe", 0),
    ]


def _certificates(settings: ServerSettings) -> ServerCertificates | None:
    if settings.tls_cert_file is None or settings.tls_key_file is None:
        return None
    try:
        return ServerCertificates(settings.tls_cert_file, settings.tls_key_file, settings.tls_client_ca_file)
    except OSError as error:
        paths = (settings.tls_cert_file, settings.tls_key_file, settings.tls_client_ca_file)
        files = ", ".join(str(path) for path in paths if path)
        raise ListenError(f"cannot use the certificates {files}: {error}") from error


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def plaintext_addresses(settings: ServerSettings) -> tuple[str, ...]:
    """The addresses that serve other machines without TLS, for a warning at startup."""
    return () if settings.tls else tuple(address for address in settings.listen if not is_local(address))
