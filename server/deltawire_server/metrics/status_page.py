"""The status page: the state of a gateway for people, from its metrics, as HTML without scripts.

It has only what the metrics have: no content of calls, no keys, no callers. So it is the same for one process and for several
workers, and needs no state of its own but the earlier values of the counters, for rates.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from typing import TYPE_CHECKING, NamedTuple, Protocol
from xml.etree.ElementTree import Element, SubElement, tostring

from deltawire_server.metrics.table import WORKER_ENDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from prometheus_client import CollectorRegistry

    from deltawire_server.metrics.probes import Probes

WINDOW_SECONDS = 60.0
"""Rates are those of the time since the oldest view of the page that is at most so old; without one, since the start."""

FRESH_SECONDS = 1.0
"""A page is shown again for so long: many views cost no more than one a second."""

REFRESH_SECONDS = 5
"""How often a browser loads the page again."""

_STYLE = """\
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #1a1a1a; }
h1 { font-size: 1.5em; } h2 { font-size: 1.1em; margin: 1.8em 0 0.4em; } h1 small { font-weight: normal; color: #666; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 0.25em 0.8em 0.25em 0; border-bottom: 1px solid #ddd; vertical-align: top; }
th { font-weight: 600; color: #555; } .number { text-align: right; font-variant-numeric: tabular-nums; }
.good { color: #06652f; } .bad { color: #a8071a; font-weight: 600; } p { color: #666; }
"""

_CHAT = "gen_ai_client_operation_duration_seconds"
_FIRST = "gen_ai_client_operation_time_to_first_chunk_seconds"
_MODEL = "gen_ai_request_model"

MIB = 2**20

_COUNTERS = (
    f"{_CHAT}_count",
    "grpc_server_handled_total",
    "deltawire_failed_calls_total",
    "deltawire_stop_reasons_total",
    "deltawire_tool_calls_total",
)
"""Those that have a rate on the page."""

Labels = tuple[str, ...]


class Cell(NamedTuple):
    """A cell of a table.

    Attributes:
        text: What it shows.
        kind: The class of its style: number, good, bad, or none.
    """

    text: str
    kind: str = ""


class _Values:
    """The samples of a registry at one time."""

    def __init__(self, registry: CollectorRegistry, at: float) -> None:
        self.at = at
        self._samples: dict[str, list[tuple[dict[str, str], float]]] = defaultdict(list)
        for family in registry.collect():
            for sample in family.samples:
                self._samples[sample.name].append((sample.labels, sample.value))

    def by(self, name: str, *labels: str) -> dict[Labels, float]:
        """The sums of a metric by these labels, in the order of the labels' values."""
        sums: dict[Labels, float] = defaultdict(float)
        for own, value in self._samples[name]:
            sums[tuple(own[label] for label in labels)] += value
        return dict(sorted(sums.items()))

    def keep_counters(self) -> None:
        """Drop everything that no rate needs."""
        self._samples = defaultdict(list, {name: self._samples[name] for name in _COUNTERS})

    def total(self, name: str) -> float:
        """The sum of all series of a metric; 0 without any."""
        return sum(value for _, value in self._samples[name])


class _Rate(Protocol):
    def __call__(self, name: str, *labels: str) -> dict[Labels, float]:
        """The growth of a counter per second, by these labels."""


class StatusPage:
    """Renders the page.

    Args:
        registry: The metrics.
        probes: Whether the gateway accepts calls.
    """

    def __init__(
        self, registry: CollectorRegistry, probes: Probes, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._registry = registry
        self._probes = probes
        self._clock = clock
        self._lock = threading.Lock()
        self._since = clock()
        self._views: deque[_Values] = deque()
        self._rendered = float("-inf")
        self._page = b""

    def render(self) -> bytes:
        """The page as HTML in UTF-8, at most `FRESH_SECONDS` old."""
        with self._lock:
            if self._clock() - self._rendered >= FRESH_SECONDS:
                now = _Values(self._registry, self._clock())
                while self._views and now.at - self._views[0].at > WINDOW_SECONDS:
                    self._views.popleft()
                self._page = self._render(now, self._views[0] if self._views else None)
                self._rendered = now.at
                if not self._views or now.at - self._views[-1].at >= REFRESH_SECONDS:
                    now.keep_counters()
                    self._views.append(now)
            return self._page

    def _render(self, now: _Values, before: _Values | None) -> bytes:
        seconds = now.at - (before.at if before else self._since)

        def rate(name: str, *labels: str) -> dict[Labels, float]:
            """The growth per second of a counter since the earlier values."""
            old = before.by(name, *labels) if before else {}
            return {key: (value - old.get(key, 0.0)) / seconds for key, value in now.by(name, *labels).items()}

        ready = self._probes.is_ready()
        version = " ".join(label for (label,) in now.by("deltawire_info", "version"))
        html = Element("html", lang="en")
        head = SubElement(html, "head")
        SubElement(head, "meta", charset="utf-8")
        SubElement(head, "meta", {"http-equiv": "refresh", "content": str(REFRESH_SECONDS)})
        SubElement(head, "title").text = "deltawire"
        SubElement(head, "style").text = _STYLE
        body = SubElement(html, "body")
        title = SubElement(body, "h1")
        title.text = f"deltawire {version} "
        state = SubElement(title, "span", {"class": "good" if ready else "bad"})
        state.text = "accepts calls " if ready else "accepts no calls "
        SubElement(title, "small").text = f"up for {_duration(now.at - self._since)}"
        SubElement(
            body, "p"
        ).text = f"Rates are those of the last {_duration(seconds)}. The metrics are at /metrics, probes at /livez and /readyz."
        for heading, columns, rows in _tables(now, rate):
            SubElement(body, "h2").text = heading
            _table(body, columns, rows)
        page: bytes = tostring(html, "utf-8", method="html")
        return b"<!doctype html>\n" + page


def _tables(now: _Values, rate: _Rate) -> Iterable[tuple[str, str, list[list[Cell]]]]:
    """The headings, the columns, separated by commas, and the rows."""
    yield "Load", ", now, limit", _load(now)
    yield "Replicas", "provider, models, replica, state, engine, requests, failed, ejections", _replicas(now)
    columns = "model, ended, per minute, mean seconds, to first chunk, prompt tokens, tokens"
    yield "Completions by model", columns, _models(now, rate)
    yield "Calls", "method, ended, per minute, OK, mean seconds", _calls(now, rate)
    for heading, label in (("Failed calls", "reason"), ("Ends of choices", "stop_reason"), ("Tool calls", "verdict")):
        name = {"reason": "failed_calls", "stop_reason": "stop_reasons", "verdict": "tool_calls"}[label]
        yield (
            heading,
            f"{label.replace('_', ' ')}, count, per minute",
            _counts(now, rate, f"deltawire_{name}_total", label),
        )


def _load(now: _Values) -> list[list[Cell]]:
    """Sums over all workers, and how many of those have ended, if there is more than one."""
    held = now.by("deltawire_held_bytes", "kind").get(("calls",), 0.0)
    no_limit = Cell("")
    return [
        [Cell("completions"), _count(now.total("deltawire_streams")), _count(now.total("deltawire_streams_limit"))],
        [Cell("calls that wait for a place"), _count(now.total("deltawire_queued_calls")), no_limit],
        [Cell("memory of calls, MiB"), _count(held / MIB), _count(now.total("deltawire_held_limit_bytes") / MIB)],
        [Cell("retained streams"), _count(now.total("deltawire_retained_streams")), no_limit],
        [Cell("registered models"), _count(now.total("deltawire_registry_models")), no_limit],
        [Cell("registry behind, seconds"), _count(now.total("deltawire_registry_behind_seconds")), no_limit],
        *([Cell("workers that ended"), _count(ends), no_limit] for ends in now.by(WORKER_ENDS.name).values()),
    ]


def _replicas(now: _Values) -> list[list[Cell]]:
    models = now.by("deltawire_provider_models", "provider")
    states: dict[Labels, dict[str, int]] = defaultdict(dict)
    for (provider, replica, state), workers in now.by(
        "deltawire_replica_state", "provider", "replica", "state"
    ).items():
        if workers:
            states[provider, replica][state] = int(workers)
    engines = {
        key[:2]: " ".join(key[2:])
        for key, known in now.by("deltawire_engine_info", "provider", "replica", "engine", "version").items()
        if known
    }
    counters = [
        now.by(f"deltawire_{name}_total", "provider", "replica")
        for name in ("attempts", "attempt_failures", "ejections")
    ]
    return [
        [
            Cell(key[0]),
            _count(models.get(key[:1], 0.0)),
            Cell(key[1]),
            _state(seen),
            Cell(engines.get(key, "unknown")),
            *(_count(counter.get(key, 0.0)) for counter in counters),
        ]
        for key, seen in states.items()
    ]


def _models(now: _Values, rate: _Rate) -> list[list[Cell]]:
    seconds, first = now.by(f"{_CHAT}_sum", _MODEL), now.by(f"{_FIRST}_count", _MODEL)
    first_seconds, rates = now.by(f"{_FIRST}_sum", _MODEL), rate(f"{_CHAT}_count", _MODEL)
    tokens = now.by("gen_ai_client_token_usage_sum", _MODEL, "gen_ai_token_type")
    return [
        [
            Cell(key[0]),
            _count(count),
            _count(60 * rates[key]),
            _mean(seconds[key], count),
            _mean(first_seconds.get(key, 0.0), first.get(key, 0.0)),
            _count(tokens.get((*key, "input"), 0.0)),
            _count(tokens.get((*key, "output"), 0.0)),
        ]
        for key, count in now.by(f"{_CHAT}_count", _MODEL).items()
    ]


def _calls(now: _Values, rate: _Rate) -> list[list[Cell]]:
    name, method = "grpc_server_handled_total", ("grpc_service", "grpc_method")
    by_code, rates = now.by(name, *method, "grpc_code"), rate(name, *method)
    seconds = now.by("grpc_server_handling_seconds_sum", *method)
    return [
        [
            Cell("/".join(key)),
            _count(count),
            _count(60 * rates[key]),
            _count(by_code.get((*key, "OK"), 0.0)),
            _mean(seconds.get(key, 0.0), count),
        ]
        for key, count in now.by(name, *method).items()
    ]


def _counts(now: _Values, rate: _Rate, name: str, label: str) -> list[list[Cell]]:
    rates = rate(name, label)
    return [
        [Cell(key[0]), _count(count), _count(60 * rates[key])] for key, count in now.by(name, label).items() if count
    ]


def _table(body: Element, columns: str, rows: list[list[Cell]]) -> None:
    """Add a table, or a sentence if it has no rows."""
    if not rows:
        SubElement(body, "p").text = "None yet."
        return
    table = SubElement(body, "table")
    head = SubElement(table, "tr")
    for column, cell in zip(columns.split(", "), rows[0], strict=True):
        SubElement(head, "th", {"class": cell.kind} if cell.kind == "number" else {}).text = column
    for row in rows:
        line = SubElement(table, "tr")
        for cell in row:
            SubElement(line, "td", {"class": cell.kind} if cell.kind else {}).text = cell.text


def _count(value: float) -> Cell:
    return Cell(f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:,.1f}", "number")


def _mean(total: float, count: float) -> Cell:
    return Cell(f"{total / count:.3f}" if count else "", "number")


def _state(seen: dict[str, int]) -> Cell:
    """The state of a replica, or how many workers see which one if they do not agree."""
    if len(seen) == 1:
        (state,) = seen
    else:
        state = ", ".join(f"{state} for {count}" for state, count in seen.items())
    return Cell(state, "good" if state == "available" else "bad")


def _duration(seconds: float) -> str:
    """With the two largest units: "3 d 4 h"."""
    whole = round(seconds)
    parts = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s")]
    while len(parts) > 1 and not parts[0][0]:
        del parts[0]
    return " ".join([f"{amount} {unit}" for amount, unit in parts[:2] if amount] or ["0 s"])
