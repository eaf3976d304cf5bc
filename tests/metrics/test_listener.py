"""The HTTP listener of the metrics."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from prometheus_client import CollectorRegistry, Counter

from deltawire_server.metrics import listener
from deltawire_server.metrics.listener import MetricsListener, serve_metrics

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def serving() -> Iterator[MetricsListener]:
    """A listener with one metric."""
    registry = CollectorRegistry()
    Counter("seen", "Seen.", registry=registry).inc()
    serving = MetricsListener("127.0.0.1:0", registry)
    yield serving
    serving.close()


def get(address: str, path: str) -> str:
    """The body of a page."""
    with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as response:
        text: str = response.read().decode()
        return text


def test_metrics_are_at_one_path(serving: MetricsListener) -> None:
    """Another path says where they are."""
    assert "seen_total 1.0" in get(serving.address, "/metrics")
    assert "seen_total 1.0" in get(serving.address, "/metrics?name[]=other")
    with pytest.raises(urllib.error.HTTPError, match="404") as caught:
        get(serving.address, "/")
    assert b"/metrics" in caught.value.read()


def test_there_may_be_none() -> None:
    """If the setting is off."""
    assert serve_metrics("", CollectorRegistry(), is_default=False) is None


@pytest.mark.usefixtures("ipv6")
def test_ipv6() -> None:
    """As the setting has it, in brackets."""
    serving = MetricsListener("[::1]:0", CollectorRegistry())
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
