"""The HTTP listener of the metrics."""

from __future__ import annotations

import socket
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from prometheus_client import CollectorRegistry, Counter

from deltawire_server.metrics import listener
from deltawire_server.metrics.listener import MetricsListener, serve_metrics
from deltawire_server.metrics.probes import HANGING_SECONDS, Probes

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def probes() -> Probes:
    """Of a gateway that is starting."""
    return Probes()


@pytest.fixture
def serving(probes: Probes) -> Iterator[MetricsListener]:
    """A listener with one metric."""
    registry = CollectorRegistry()
    Counter("seen", "Seen.", registry=registry).inc()
    serving = MetricsListener("127.0.0.1:0", registry, probes)
    yield serving
    serving.close()


def get(address: str, path: str) -> str:
    """The body of a page."""
    with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as response:
        text: str = response.read().decode()
        return text


def status(address: str, path: str, method: str = "GET") -> tuple[int, str]:
    """The status of a response and its body."""
    request = urllib.request.Request(f"http://{address}{path}", method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as response:  # noqa: S310 (the listener's)
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_metrics_are_at_one_path(serving: MetricsListener) -> None:
    """Another path says what there is."""
    assert "seen_total 1.0" in get(serving.address, "/metrics")
    assert "seen_total 1.0" in get(serving.address, "/metrics?name[]=other")
    code, text = status(serving.address, "/other")
    assert code == 404
    assert all(path in text for path in ("/metrics", "/livez", "/readyz"))


def test_probes(serving: MetricsListener, probes: Probes) -> None:
    """Alive, from the start on; ready when the gateway says so, also with a query."""
    assert status(serving.address, "/livez") == (200, "alive\n")
    assert status(serving.address, "/readyz")[0] == 503
    probes.is_ready = lambda: True
    assert status(serving.address, "/readyz?verbose") == (200, "accepts calls\n")
    assert status(serving.address, "/readyz", "HEAD") == (200, "")


def test_a_process_that_hangs_is_not_ready(
    serving: MetricsListener, probes: Probes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it last said that it accepts calls."""
    monkeypatch.setattr(Probes, "is_alive", False)
    probes.is_ready = lambda: True
    assert (status(serving.address, "/livez")[0], status(serving.address, "/readyz")[0]) == (503, 503)


def test_an_event_loop_that_hangs_is_not_alive() -> None:
    """After the last of its beats, by a time that no healthy one takes."""
    now = 5.0
    probes = Probes(lambda: now)
    now += 2 * HANGING_SECONDS
    assert probes.is_alive  # it still starts
    probes.beat()
    now += HANGING_SECONDS - 1
    assert probes.is_alive
    now += 1
    assert not probes.is_alive
    probes.beat()
    assert probes.is_alive


def test_nothing_can_be_changed(serving: MetricsListener) -> None:
    """Other methods are refused, and a browser is told not to run scripts nor to show the page within another one."""
    for path in ("/", "/livez", "/readyz"):
        assert status(serving.address, path, "POST")[0] == 405
    with urllib.request.urlopen(f"http://{serving.address}/", timeout=10) as response:
        assert response.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
        assert b"<script" not in response.read()


def test_there_may_be_none() -> None:
    """If the setting is off."""
    assert serve_metrics("", CollectorRegistry(), Probes(), is_default=False) is None


@pytest.mark.usefixtures("ipv6")
def test_ipv6() -> None:
    """As the setting has it, in brackets."""
    serving = MetricsListener("[::1]:0", CollectorRegistry(), Probes())
    try:
        assert get(serving.address, "/metrics") == ""
    finally:
        serving.close()


def test_silent_clients_are_bounded(serving: MetricsListener, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a number, connections are closed at once; a scraper is answered when the silent ones have timed out."""
    monkeypatch.setattr(listener._Handler, "timeout", 0.5)
    host, _, port = serving.address.rpartition(":")
    with ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(listener.MAX_REQUESTS)
        ]
        extra = stack.enter_context(socket.create_connection((host, int(port))))
        extra.settimeout(10)
        assert extra.recv(1) == b""
        for each in silent:
            each.settimeout(3 * listener.REQUEST_SECONDS)
            assert each.recv(1) == b""
    assert "seen_total" in get(serving.address, "/metrics")


def test_a_slow_request_is_cut_off(serving: MetricsListener, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it sends a byte now and then, which begins the socket's own timeout again."""
    monkeypatch.setattr(listener, "REQUEST_SECONDS", 0.3)
    host, _, port = serving.address.rpartition(":")
    with socket.create_connection((host, int(port))) as slow:
        slow.settimeout(0.05)
        begin = time.monotonic()
        while time.monotonic() - begin < 10:
            try:
                slow.sendall(b"G")
                if slow.recv(1) == b"":
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        assert time.monotonic() - begin < 10
