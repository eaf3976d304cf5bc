"""Serves metrics, probes and the status page over HTTP, in a thread beside the event loop."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import make_wsgi_app

from deltawire_server.metrics.status_page import StatusPage
from deltawire_server.telemetry import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from prometheus_client import CollectorRegistry

    from deltawire_server.metrics.probes import Probes

MAX_REQUESTS = 64
"""Connections at once: a few scrapers, and some that stay silent for `REQUEST_SECONDS`. Further connections are closed."""

REQUEST_SECONDS = 5.0
"""How long a connection may take, from the request's first byte to the last one of the response."""

POLL_SECONDS = 0.1
"""How often the listener checks whether it has to stop."""

_TEXT = "text/plain; charset=utf-8"

_NOTHING_HERE = (
    "There is nothing here: the status page is at /, the metrics at /metrics, the probes at /livez and /readyz.\n"
)

_HEADERS = [
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"),
]
"""Of the status page and the probes. The page has no scripts, and must not be shown within another one."""

_log = get_logger(__name__)


class MetricsListener:
    """Serves `/metrics`, `/livez`, `/readyz` and the status page at `/`, until `close`.

    The standard library's server runs the application of prometheus-client: another web server would be a dependency for few pages.

    Args:
        address: `host:port`; port 0 selects a free one.
        registry: The metrics.
        probes: Whether the gateway is alive, and whether it accepts calls.

    Raises:
        OSError: From the constructor: the address is in use, or does not belong to this machine.
    """

    def __init__(self, address: str, registry: CollectorRegistry, probes: Probes) -> None:
        host, _, port = address.rpartition(":")
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, place = found[0]
        self._server = _Server(family, place)
        self._server.set_app(_application(registry, probes))
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(POLL_SECONDS,), name="metrics", daemon=True
        )
        self.address = f"{host}:{self._server.server_port}"
        """Where it listens."""
        self._thread.start()

    def close(self) -> None:
        """Stop, in up to `POLL_SECONDS`."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve_metrics(
    address: str, registry: CollectorRegistry, probes: Probes, *, is_default: bool
) -> MetricsListener | None:
    """Serve metrics, probes and the status page as the settings say.

    Args:
        address: `host:port`; empty for none of them.
        registry: The metrics.
        probes: Whether the gateway is alive, and whether it accepts calls.
        is_default: Whether the operator did not choose the address. Then a warning is logged if it cannot be used.

    Returns:
        The listener, which the caller must `close`; `None` without one.

    Raises:
        OSError: The operator's address cannot be used.
    """
    if not address:
        return None
    try:
        return MetricsListener(address, registry, probes)
    except OSError as error:
        problem = f"cannot serve metrics on {address}: {error.strerror or error}"
        if not is_default:
            raise OSError(f"{problem}; use another address, or off (--metrics-listen)") from error
        _log.warning("metrics are not served", problem=problem)
        return None


def _application(registry: CollectorRegistry, probes: Probes) -> Any:  # noqa: ANN401 (as WSGI has it)
    metrics = make_wsgi_app(registry)
    page = StatusPage(registry, probes)

    def answer(path: str) -> tuple[str, str, bytes]:
        if path == "/":
            return "200 OK", "text/html; charset=utf-8", page.render()
        if path == "/livez":
            return _probe(probes.is_alive, "alive", "the event loop hangs")
        if path == "/readyz":
            return _probe(
                probes.is_alive and probes.is_ready(), "accepts calls", "accepts no calls: starting, or shutting down"
            )
        return "404 Not Found", _TEXT, _NOTHING_HERE.encode()

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/metrics":
            # Always the whole page: the library cannot select metrics by name if they are those of several processes.
            environ["QUERY_STRING"] = ""
            response: Iterable[bytes] = metrics(environ, start_response)
            return response
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            status, kind, body = "405 Method Not Allowed", _TEXT, b"Only GET and HEAD: nothing can be changed here.\n"
        else:
            status, kind, body = answer(environ["PATH_INFO"])
        start_response(status, [("Content-Type", kind), ("Content-Length", str(len(body))), *_HEADERS])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    return application


def _probe(passes: bool, good: str, bad: str) -> tuple[str, str, bytes]:
    status, text = ("200 OK", good) if passes else ("503 Service Unavailable", bad)
    return status, _TEXT, f"{text}\n".encode()


def _shut_down(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is closed already
        connection.shutdown(socket.SHUT_RDWR)


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, family: socket.AddressFamily, place: Any) -> None:  # noqa: ANN401 (as the family has it)
        self.address_family = family
        self._turns = threading.BoundedSemaphore(MAX_REQUESTS)
        super().__init__(place, _Handler)

    def server_bind(self) -> None:
        """As in `HTTPServer`, without its lookup of the host's full name, which takes seconds without a name server."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 (the library's)
        """Answer in a thread, unless there are too many."""
        if self._turns.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 (the library's)
        """Answer one request, in time: the socket's own timeout begins again with each byte of a slow client."""
        deadline = threading.Timer(REQUEST_SECONDS, _shut_down, [request])
        deadline.daemon = True
        deadline.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            deadline.cancel()
            self._turns.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 (the library's)
        """The client has disconnected, or was too slow. There is nothing to report."""


class _Handler(WSGIRequestHandler):
    timeout = REQUEST_SECONDS

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the library's)
        """Not logged: a scraper sends a request every few seconds."""
