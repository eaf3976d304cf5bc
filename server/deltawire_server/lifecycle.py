"""The gRPC server's life: starting, serving, draining, stopped.

    STARTING ── start ──▶ SERVING ── stop ──▶ DRAINING ──▶ STOPPED

Draining is for balancers and clients: health turns NOT_SERVING first, and calls are taken on until the balancers have noticed;
then every connection gets a GOAWAY, so that clients connect elsewhere, and the calls under way may end. Health says whether *this
process* takes calls: a dead provider does not change it, or all replicas would leave the mesh at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import socket
import ssl
from typing import TYPE_CHECKING, Protocol

import grpc
from grpc import aio
from grpc_reflection.v1alpha import reflection, reflection_pb2

from deltawire_server import descriptors
from deltawire_server.rpc import health
from deltawire_server.settings import ServerSettings, is_local
from deltawire_server.telemetry import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

REFLECTION_V1 = "grpc.reflection.v1.ServerReflection"

FAREWELL_SECONDS = 1.0
"""What calls that are ended get to tell their callers; one whose caller does not read is cancelled then."""

MAX_PENDING_REQUESTS = 1_000_000
"""Calls that wait until Python takes them; more than any machine's connections carry at once."""

MAX_PING_STRIKES = 20
"""Pings sooner than `min_ping_interval` after the one before that end a connection, with ENHANCE_YOUR_CALM; in gRPC 0 means any
number. A message that the server sends resets the count. A burst is harmless, such as that of a proxy with several timers;
a flood has hundreds."""

FLUSH_SECONDS = 0.2
"""What the last words get to leave this process."""

_log = get_logger(__name__)


class ListenError(Exception):
    """An address cannot be listened on."""


class State(enum.Enum):
    """Where the server is in its life."""

    STARTING = enum.auto()
    SERVING = enum.auto()
    DRAINING = enum.auto()
    STOPPED = enum.auto()


class Calls(Protocol):
    """The calls under way, as draining needs to see them."""

    def refuse_new_calls(self) -> None:
        """From now on new calls fail."""

    def end_calls(self) -> None:
        """End what is under way, and tell its callers."""

    async def wait_idle(self) -> None:
        """Wait until no call is under way."""


class Lifecycle:
    """One gRPC server.

    Args:
        settings: Where it listens, and its limits.
        interceptors: In order.
        calls: The calls under way, to drain.
    """

    def __init__(self, settings: ServerSettings, interceptors: Sequence[aio.ServerInterceptor], calls: Calls) -> None:
        self._settings = settings
        self._calls = calls
        self._health = health.Health()
        self.descriptors = descriptors.raise_limit()
        """How many files and connections the process may have open."""
        self.max_connections = descriptors.connections(self.descriptors, settings.max_connections)
        """How many of them clients may have."""
        self._server = aio.server(interceptors=interceptors, options=_options(settings, self.max_connections))
        self._stopping: asyncio.Task[None] | None = None
        self._going_away: asyncio.Task[None] | None = None
        self.state = State.STARTING
        self.addresses: tuple[str, ...] = ()
        """What it listens on, once started; with the port that was given for port 0."""

    def add_service(self, add: Callable[[aio.Server], None]) -> None:
        """Add a service before `start`: `add` gets the server."""
        add(self._server)

    async def start(self, services: Sequence[str]) -> None:
        """Listen and serve.

        Args:
            services: The full names of the services that were added, for health and reflection.

        Raises:
            ListenError: An address is taken, or is none of this machine's; or the certificate cannot be used.
        """
        self._server.add_generic_rpc_handlers((self._health.handler(),))
        if self._settings.reflection:
            self._add_reflection([*services, health.SERVICE, reflection.SERVICE_NAME])
        credentials = _credentials(self._settings)
        self.addresses = tuple(self._listen(address, credentials) for address in self._settings.listen)
        self._health.start(services)
        await self._server.start()
        self.state = State.SERVING

    async def stop(self, *, at_once: bool = False) -> None:
        """Drain and stop; when this returns, no call is under way.

        Args:
            at_once: Cancel what is under way instead of waiting for it; also hastens a stop that has begun.
        """
        if at_once and self._stopping is not None:
            self._stopping.cancel()
            await asyncio.wait([self._stopping])
        if self._stopping is None or at_once:
            self._stopping = asyncio.create_task(self._stop(at_once=at_once), name="stop")
        await asyncio.shield(self._stopping)

    async def _stop(self, *, at_once: bool) -> None:
        settings = self._settings
        if self.state is not State.STARTING:
            self.state = State.DRAINING
            self._health.stop()
            if not at_once:
                _log.info("draining", delay=settings.drain_delay, grace=settings.drain_grace)
                await asyncio.sleep(settings.drain_delay)
            self._calls.refuse_new_calls()
            if not at_once:
                # Sends GOAWAY now. Its grace only has to be longer than ours, which an open health watch would use up.
                grace = settings.drain_grace + 2 * FAREWELL_SECONDS
                self._going_away = asyncio.create_task(self._server.stop(grace), name="goaway")
                try:
                    async with asyncio.timeout(settings.drain_grace):
                        await self._calls.wait_idle()
                except TimeoutError:
                    _log.warning("calls under way are ended", grace=settings.drain_grace)
            self._calls.end_calls()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FAREWELL_SECONDS):
                    await self._calls.wait_idle()
        await self._server.stop(FLUSH_SECONDS)
        if self._going_away is not None:
            await self._going_away
        self.state = State.STOPPED

    def _listen(self, address: str, credentials: grpc.ServerCredentials | None) -> str:
        if address.startswith("unix:"):
            _check_socket(address.removeprefix("unix:"))
        try:
            # A unix socket does not leave the machine, and its file's permissions say who may use it.
            if credentials is None or address.startswith("unix:"):
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, credentials)
        except (RuntimeError, ValueError) as error:
            raise ListenError(f"cannot listen on {address}: is it taken by another process? ({error})") from error
        return address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"

    def _add_reflection(self, names: list[str]) -> None:
        reflection.enable_server_reflection(names, self._server)
        # The library only knows v1alpha; v1 has the same messages, and newer tools ask for it first.
        handlers = {
            "ServerReflectionInfo": grpc.stream_stream_rpc_method_handler(
                reflection.aio.ReflectionServicer(names).ServerReflectionInfo,
                request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
                response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
            )
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(REFLECTION_V1, handlers),))


def _check_socket(path: str) -> None:
    """Refuse a socket that another process listens on: grpc would take it away from there, and remove it in the end."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path.removeprefix("//"))
        except (FileNotFoundError, ConnectionRefusedError):
            return
        except OSError as error:
            raise ListenError(f"cannot listen on unix:{path}: {error}") from error
    raise ListenError(f"cannot listen on unix:{path}: another process does")


def _options(settings: ServerSettings, connections: int) -> list[tuple[str, int]]:
    return [
        # Else a second process on the same port starts silently and takes half of the connections.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", settings.max_receive_bytes),
        # Only the first algorithm, "identity": a compressed request is refused by its headers. Else 30 KiB from a caller that
        # is not known yet become 32 MiB here, and most of a request's bytes, images, gain nothing by compression.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        # By default grpc itself cancels calls of a burst, without a reason: admission is the service's.
        ("grpc.server.max_pending_requests", MAX_PENDING_REQUESTS),
        ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_REQUESTS),
        ("grpc.keepalive_time_ms", _milliseconds(settings.keepalive_time)),
        # The one that decides when a peer that vanished is noticed; grpc.keepalive_timeout_ms has no effect.
        ("grpc.http2.ping_timeout_ms", _milliseconds(settings.ping_timeout)),
        # This is the name that works; grpc.http2.min_recv_ping_interval_without_data_ms is ignored.
        ("grpc.http2.min_ping_interval_without_data_ms", _milliseconds(settings.min_ping_interval)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_ping_strikes", MAX_PING_STRIKES),
        ("grpc.max_concurrent_streams", settings.max_concurrent_streams),
        # Of each address, and silent ones too.
        ("grpc.max_allowed_incoming_connections", max(1, connections // len(settings.listen))),
        ("grpc.server_handshake_timeout_ms", _milliseconds(settings.handshake_timeout)),
        # Without it the window grows to megabytes for a caller that does not read.
        ("grpc.http2.bdp_probe", 0),
    ]


def _credentials(settings: ServerSettings) -> grpc.ServerCredentials | None:
    if settings.tls_cert_file is None or settings.tls_key_file is None:
        return None
    client_ca = settings.tls_client_ca_file
    try:
        # Only to find out what is wrong with them: grpc itself would not say. A password is not asked for.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(settings.tls_cert_file, settings.tls_key_file, password="")
        if client_ca is not None:
            context.load_verify_locations(client_ca)
        return grpc.ssl_server_credentials(
            [(settings.tls_key_file.read_bytes(), settings.tls_cert_file.read_bytes())],
            root_certificates=client_ca.read_bytes() if client_ca else None,
            require_client_auth=client_ca is not None,
        )
    except OSError as error:
        files = ", ".join(str(path) for path in (settings.tls_cert_file, settings.tls_key_file, client_ca) if path)
        raise ListenError(f"cannot use the certificates {files}: {error}") from error


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def plaintext_addresses(settings: ServerSettings) -> tuple[str, ...]:
    """The addresses on which others than this machine are served without TLS; name them when starting."""
    return () if settings.tls else tuple(address for address in settings.listen if not is_local(address))
