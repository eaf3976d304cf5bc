"""Prometheus' rules and the dashboard on a real Prometheus, and the runbook: as they are shipped."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml

from deltawire.v1 import model_registry_pb2 as pb
from deltawire_server.fake_vllm import Chunks, Script
from deltawire_server.metrics.table import TABLE
from tests.polyglot.programs import LIMIT, run, started, tool
from tests.support.gateway import ask, failure_of, running, settings_of
from tests.support.gateway import tool as function

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from deltawire_server.fake_vllm import FakeVllm
    from tests.support.gateway import Running

# In one process of several, for one server.
pytestmark = [pytest.mark.deploy, pytest.mark.xdist_group("monitoring")]

DEPLOY = Path(__file__).parents[2] / "server" / "deploy"
RULES = DEPLOY / "prometheus" / "rules.yaml"
CONFIG = DEPLOY / "prometheus" / "prometheus.yaml"
DASHBOARD = DEPLOY / "grafana" / "deltawire.json"
RUNBOOK = DEPLOY / "runbook.md"

GROUPS = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
RULES_BY_NAME = {rule.get("alert") or rule["record"]: rule for group in GROUPS for rule in group["rules"]}
ALERTS = {name: rule for name, rule in RULES_BY_NAME.items() if "alert" in rule}
RECORDED = {name for name, rule in RULES_BY_NAME.items() if "record" in rule}
METRICS = {row.name: row for row in TABLE}
CHUNKS = Chunks()

# For each alert, the series under which it fires, and those under which it does not: by series, the values of one-minute samples
# in promtool's notation, "begin+step x count". The labels of the target are added.
CALLS = 'grpc_server_handled_total{grpc_service="deltawire.v1.ChatCompletion",grpc_code="OK"}'
FAILED = 'deltawire_failed_calls_total{reason="%s"}'
STATE = 'deltawire_replica_state{provider="p",replica="r",state="%s"}'
FIRST = 'gen_ai_client_operation_time_to_first_chunk_seconds_bucket{gen_ai_request_model="m",le="%s"}'
LAG = 'deltawire_event_loop_lag_seconds_bucket{le="%s"}'
HELD = 'deltawire_held_bytes{kind="calls"}'
NEVER, ALWAYS, GROWS, ONCE = "0x40", "1x40", "0+60x40", "0x15 1x25"

Series = dict[str, str]
CASES: dict[str, tuple[Series, Series]] = {
    "DeltawireDown": ({"up": NEVER}, {"up": ALWAYS}),
    "DeltawireCallsFail": (
        {CALLS: "0+600x40", FAILED % "UPSTREAM_UNAVAILABLE": GROWS},
        {CALLS: "0+600x40", FAILED % "INVALID_REQUEST": GROWS, FAILED % "UPSTREAM_ERROR": "0+20x40"},
    ),
    "DeltawireDefect": ({FAILED % "INTERNAL": ONCE}, {FAILED % "INTERNAL": "7x40", FAILED % "UPSTREAM_ERROR": GROWS}),
    "DeltawireProviderDown": (
        {STATE % "available": NEVER, STATE % "ejected": ALWAYS},
        # Another one of the provider answers; and one that was removed has no state.
        {
            STATE % "ejected": ALWAYS,
            STATE.replace('"r"', '"s"') % "available": ALWAYS,
            STATE.replace('"p"', '"removed"') % "available": NEVER,
        },
    ),
    "DeltawireReplicaAway": (
        {STATE % "ejected": ALWAYS, STATE % "available": NEVER},
        {STATE % "ejected": "0x9 1x3 0x28", STATE % "available": ALWAYS},
    ),
    "DeltawireFirstChunkSlow": (
        {FIRST % "10.0": "0+90x40", FIRST % "30.0": "0+100x40", FIRST % "+Inf": "0+100x40"},
        {FIRST % "10.0": "0+99x40", FIRST % "30.0": "0+100x40", FIRST % "+Inf": "0+100x40"},
    ),
    "DeltawireEventLoopLate": (
        {LAG % "0.1": "0+90x40", LAG % "0.25": "0+100x40", LAG % "+Inf": "0+100x40"},
        {LAG % "0.1": "0+1000x40", LAG % "0.25": "0+1001x40", LAG % "+Inf": "0+1001x40"},
    ),
    "DeltawireFull": (
        {"deltawire_streams": "95x40", "deltawire_streams_limit": "100x40"},
        {"deltawire_streams": "85x40", "deltawire_streams_limit": "100x40"},
    ),
    "DeltawireCallsQueue": ({"deltawire_queued_calls": ALWAYS}, {"deltawire_queued_calls": "0x9 5x3 0x28"}),
    "DeltawireMemory": (
        {HELD: "80x40", "deltawire_held_limit_bytes": "100x40"},
        {
            HELD: "60x40",
            'deltawire_held_bytes{kind="retained"}': "80x40",
            "deltawire_held_limit_bytes": "100x40",
        },
    ),
    "DeltawireCallersLimited": (
        {FAILED % "CALLER_LIMIT_EXCEEDED": "0+120x40"},
        {FAILED % "CALLER_LIMIT_EXCEEDED": "0+30x40"},
    ),
    "DeltawireWrongKeys": ({FAILED % "UNAUTHENTICATED": GROWS}, {FAILED % "UNAUTHENTICATED": "0+5x40"}),
    "DeltawireToolCallsFail": (
        {
            'deltawire_tool_calls_total{verdict="succeeded"}': GROWS,
            'deltawire_tool_calls_total{verdict="truncated"}': GROWS,
        },
        {
            'deltawire_tool_calls_total{verdict="succeeded"}': GROWS,
            'deltawire_tool_calls_total{verdict="truncated"}': "0+5x40",
        },
    ),
    "DeltawireRegistryBehind": (
        {"deltawire_registry_behind_seconds": "0+60x40"},
        {"deltawire_registry_behind_seconds": "0x9 30x40"},
    ),
    "DeltawireUsageRecordsLost": (
        {'deltawire_usage_records_total{outcome="lost"}': ONCE},
        {
            'deltawire_usage_records_total{outcome="lost"}': "4x40",
            'deltawire_usage_records_total{outcome="written"}': GROWS,
        },
    ),
    "DeltawireWorkersEnd": ({"deltawire_worker_ends_total": ONCE}, {"deltawire_worker_ends_total": NEVER}),
    "DeltawireReloadRefused": (
        {'deltawire_certificate_loads_total{outcome="refused"}': ONCE},
        {
            'deltawire_certificate_loads_total{outcome="ok"}': ONCE,
            'deltawire_settings_reloads_total{outcome="ok"}': GROWS,
        },
    ),
}
AT = "24m"
"""When the alerts are looked at: after every `for`, and within the look-back of a single event at minute 16."""


def on_target(series: str) -> str:
    """A series of a gateway that Prometheus scrapes."""
    name, _, labels = series.rstrip("}").partition("{")
    return f"{name}{{job='deltawire',instance='g:1'{',' + labels if labels else ''}}}"


def test_each_alert_has_a_case_and_a_runbook_entry() -> None:
    """And each entry has an alert, which names it."""
    entries = set(re.findall(r"^## (\w+)$", RUNBOOK.read_text(encoding="utf-8"), re.MULTILINE))
    assert entries == ALERTS.keys() == CASES.keys()
    for name, rule in ALERTS.items():
        assert rule["annotations"]["runbook_url"] == f"runbook.md#{name.lower()}"
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"].endswith(".")
    anchors = re.findall(r"\]\(#(\w+)\)", RUNBOOK.read_text(encoding="utf-8"))
    assert {name.lower() for name in entries} >= set(anchors)


async def test_each_alert_fires_when_it_should(tmp_path: Path) -> None:
    """And only then, by promtool: with the series of its case, and not with those of the quiet one."""
    tests = [
        {
            "interval": "1m",
            "input_series": [{"series": on_target(name), "values": values} for name, values in series.items()],
            "promql_expr_test": [
                {
                    "expr": f"count(ALERTS{{alertname='{alert}',alertstate='firing'}})",
                    "eval_time": AT,
                    "exp_samples": [{"labels": "{}", "value": 1}] if fires else [],
                }
            ],
        }
        for alert, case in CASES.items()
        for fires, series in zip((True, False), case, strict=True)
    ]
    cases = tmp_path / "cases.yaml"
    cases.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests}))
    checked = await run(tool("promtool"), "test", "rules", str(cases), home=tmp_path)
    assert checked.status == 0, checked.out + checked.err


@dataclass(frozen=True)
class Query:
    """An expression of the dashboard or of the rules.

    Attributes:
        where: The panel, or the rule.
        expr: The expression, with values for the dashboard's variables.
    """

    where: str
    expr: str


def queries() -> Iterator[Query]:
    """Every expression that is shipped, those of the variables too."""
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield Query(panel["title"], filled(target["expr"]))
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            (series,) = re.findall(r"^label_values\((.*), \w+\)$", variable["query"]["query"])
            yield Query(f"${variable['name']}", filled(series))
    for name, rule in RULES_BY_NAME.items():
        yield Query(name, rule["expr"])


def filled(expr: str) -> str:
    """As Grafana sends it, with all values of the variables selected."""
    expr = expr.replace("$__rate_interval", "10s")
    for name in ("job", "instance", "provider", "model"):
        expr = expr.replace(f"${name}", ".*")
    assert "$" not in expr
    return expr


def test_the_dashboard_can_be_imported() -> None:
    """What Grafana requires: ids once, a place for each panel, a data source that is chosen; each panel says what it shows."""
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & places
        assert max(x for x, _ in cells) < 24
        places |= cells
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["description"].endswith(".")
            assert panel["targets"]
    names = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(panels)))
    assert used - {"__rate_interval"} == names


@pytest.mark.parametrize("query", [*queries()], ids=lambda query: query.where)
def test_queries_name_what_there_is(query: Query) -> None:
    """Metrics of the table, and their labels."""
    known = {"up": ("job",), **dict.fromkeys(RECORDED, ())}
    for row in METRICS.values():
        for suffix in ("_bucket", "_count", "_sum") if row.kind == "histogram" else ("",):
            known[row.name + suffix] = (*row.labels, "le")
    text = re.sub(r'"[^"]*"', '""', query.expr)
    words = set(re.findall(r"(?<![\w:.])(up|(?:deltawire|grpc|gen_ai)[\w:]*)(?![\w:]*=)", text))
    labels = {label for row in METRICS.values() for label in row.labels}
    metrics = words - labels
    assert metrics
    assert metrics <= known.keys()
    for name, selectors in re.findall(r"([\w:]+)\{([^}]*)\}", text):
        assert set(re.findall(r"(\w+)[=!]", selectors)) <= {*known[name], "job", "instance"}, name
    for by in re.findall(r"\bby \(([^)]*)\)", text):
        assert set(filter(None, re.split(r"[,\s]+", by))) <= {*labels, "le", "job", "instance"}


IDLE = frozenset(
    {
        # Nothing has happened that these are about.
        "Events for operators",
        "$instance",
    }
)
"""Panels of which a query may be empty under the load of the test."""


@asynccontextmanager
async def prometheus(folder: Path, target: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a Prometheus with the shipped files, which scrapes this gateway every second."""
    config = CONFIG.read_text(encoding="utf-8")
    for shipped, used, times in (("127.0.0.1:9464", target, 1), ("_interval: 15s", "_interval: 1s", 2)):
        assert config.count(shipped) == times
        config = config.replace(shipped, used)
    (folder / CONFIG.name).write_text(config)
    shutil.copy(RULES, folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = (
        f"--config.file={folder / CONFIG.name}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    )
    with (folder / "prometheus.log").open("wb") as log:
        async with (
            started(tool("prometheus"), *flags, home=folder, out=log, err=log),
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client,
            asyncio.timeout(LIMIT),
        ):
            while not await answers(client):  # noqa: ASYNC110 (nothing announces it)
                await asyncio.sleep(0.1)
            yield client


async def answers(client: httpx.AsyncClient) -> bool:
    """Whether it is ready."""
    try:
        return (await client.get("/-/ready")).status_code == httpx.codes.OK
    except httpx.ConnectError:
        return False


async def result(client: httpx.AsyncClient, query: str) -> list[dict[str, Any]]:
    """The series of a query; it must be valid."""
    response = await client.post("/api/v1/query", data={"query": query})
    assert response.status_code == httpx.codes.OK, response.text
    series: list[dict[str, Any]] = response.json()["data"]["result"]
    return series


async def load(gateway: Running, vllm: FakeVllm) -> None:
    """One of each: answers, tool calls that succeed and fail, failures of the engine and of callers, a registered model."""
    for arguments in ('{"city": "Oslo"}', "{"):
        call = [CHUNKS.call("get_weather"), CHUNKS.arguments(arguments)]
        vllm.play(Script.chunks([CHUNKS.role(), *call, CHUNKS.finish("tool_calls"), CHUNKS.usage(7, 4)]))
        await gateway.create(ask(tools=[function()]))
    vllm.play(Script.error(500, "no", "InternalServerError"))
    assert (await failure_of(gateway.create())).reason == "UPSTREAM_ERROR"
    assert (await failure_of(gateway.create(ask(model="nope")))).reason == "MODEL_NOT_FOUND"
    for _ in range(5):
        await gateway.create()


async def test_every_query_on_a_real_prometheus(vllm: FakeVllm, tmp_path: Path) -> None:
    """Of the dashboard and of the rules, under load and faults: all are valid, and those of the panels have values."""
    # The second replica does not answer, so that there are attempts that fail, and an ejection.
    replicas = f"{vllm.base_url}/v1,http://127.0.0.1:9/v1"
    settings = settings_of(replicas, tmp_path, metrics={"listen": "127.0.0.1:0"})
    async with running(settings) as gateway, prometheus(tmp_path, gateway.gateway.metrics_address) as client:

        async def call_on() -> None:
            while True:
                await load(gateway, vllm)
                await asyncio.sleep(0.5)

        await gateway.models.RegisterModel(pb.RegisterModelRequest(model_id="mine", provider_model_id="fake"))
        calling = asyncio.create_task(call_on())
        # Rules are evaluated only now and then, so that a panel of one may be empty at first.
        missing, end = [query for query in queries() if query.where not in ALERTS], time.monotonic() + LIMIT
        pending: set[str] = set()
        while missing or not pending >= {"DeltawireReplicaAway", "DeltawireCallsFail"}:
            assert time.monotonic() < end, (missing, pending)
            assert not calling.done(), calling.exception()
            await asyncio.sleep(0.5)
            missing = [query for query in missing if not await result(client, query.expr) and query.where not in IDLE]
            pending = {series["metric"]["alertname"] for series in await result(client, "ALERTS")}
        calling.cancel()
        groups = (await client.get("/api/v1/rules")).json()["data"]["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        assert {rule["name"] for rule in rules} == RULES_BY_NAME.keys()
        assert [rule["lastError"] for rule in rules if rule["health"] == "err"] == []
        assert not pending & {"DeltawireDown", "DeltawireDefect", "DeltawireProviderDown", "DeltawireMemory"}
