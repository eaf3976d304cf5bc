"""The status page: what it shows of a registry, and its rates."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from deltawire_server.metrics import status_page
from deltawire_server.metrics.probes import Probes
from deltawire_server.metrics.status_page import StatusPage
from tests.metrics.document import Document


class Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """The time."""
        return self.now


def test_an_empty_registry() -> None:
    """A gateway that is starting."""
    shown = Document(StatusPage(CollectorRegistry(), Probes()).render())
    assert "accepts no calls" in shown.text
    assert shown.text.count("None yet.") == 6
    assert shown.rows("Load")[0] == {"": "completions", "now": "0", "limit": "0"}


def test_ends_of_workers_if_there_are_several() -> None:
    """Only their parent counts them."""
    registry = CollectorRegistry()
    page = StatusPage(registry, Probes())
    assert "workers" not in Document(page.render()).text
    Counter("deltawire_worker_ends", "Ends.", registry=registry).inc(2)
    assert Document(StatusPage(registry, Probes()).render()).rows("Load")[-1] == {
        "": "workers that ended",
        "now": "2",
        "limit": "",
    }


def test_rates_are_those_of_the_last_minute() -> None:
    """First those since the start; then since the oldest view of the last minute; values of a second ago are shown again."""
    registry = CollectorRegistry()
    failed = Counter("deltawire_failed_calls_total", "Failed.", ["reason"], registry=registry)
    clock = Clock()
    page = StatusPage(registry, Probes(), clock)

    def shown() -> dict[str, str]:
        (row,) = Document(page.render()).rows("Failed calls")
        return row

    clock.now += 30
    failed.labels("A").inc(15)
    assert shown() == {"reason": "A", "count": "15", "per minute": "30"}
    failed.labels("A").inc(60)
    clock.now += 0.5
    assert shown()["count"] == "15"
    clock.now += 29.5
    assert shown() == {"reason": "A", "count": "75", "per minute": "120"}
    clock.now += 31
    assert shown()["per minute"] == "0"  # since the second view
    clock.now += 3600
    assert "last 1 h 1 min" in Document(page.render()).text  # no view is left but the start


def test_replicas_and_models() -> None:
    """A replica that was removed is not shown; workers that do not agree are counted; an engine is the current one."""
    registry = CollectorRegistry()
    replica = ["provider", "replica"]
    states = Gauge("deltawire_replica_state", "State.", [*replica, "state"], registry=registry)
    engines = Gauge("deltawire_engine_info", "Engine.", [*replica, "engine", "version"], registry=registry)
    Gauge("deltawire_provider_models", "Models.", ["provider"], registry=registry).labels("p").set(3)
    Counter("deltawire_attempts_total", "Attempts.", replica, registry=registry).labels("p", "b").inc(1234)
    for name, state, seen in (("a", "available", 2), ("a", "ejected", 0), ("b", "available", 1), ("b", "ejected", 1)):
        states.labels("p", name, state).set(seen)
    states.labels("p", "removed", "available").set(0)
    engines.labels("p", "a", "vllm", "0.31").set(0)
    engines.labels("p", "a", "vllm", "0.32").set(1)
    seconds = ["gen_ai_request_model"]
    Histogram("gen_ai_client_operation_duration_seconds", "D.", seconds, registry=registry).labels("<m>&").observe(1.5)
    page = StatusPage(registry, Probes()).render()
    first, second = Document(page).rows("Replicas")
    assert (first["replica"], first["state"], first["engine"], first["models"]) == ("a", "available", "vllm 0.32", "3")
    assert (second["state"], second["engine"]) == ("available for 1, ejected for 1", "unknown")
    assert (second["requests"], second["failed"]) == ("1,234", "0")
    (model,) = Document(page).rows("Completions by model")
    assert (model["model"], model["mean seconds"], model["to first chunk"]) == ("<m>&", "1.500", "")
    assert b"<m>" not in page


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59, "59 s"), (60, "1 min"), (61, "1 min 1 s"), (3600, "1 h"), (90061, "1 d 1 h"), (86400, "1 d")],
)
def test_durations(seconds: float, text: str) -> None:
    """The two largest units."""
    assert status_page._duration(seconds) == text
