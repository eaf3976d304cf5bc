"""Rules, dashboard and runbook name only what exists, and belong together."""

from __future__ import annotations

import json
import re

import pytest

from deltawire_server.errors import FOR_OPERATORS, Reason
from deltawire_server.metrics.table import TABLE
from tests.deploy import files
from tests.docs.markdown import blocks
from tests.metrics.test_table import README

PARTS = {"histogram": ("_bucket", "_count", "_sum"), "counter": ("",), "gauge": ("",)}
"""The endings of the series of a metric."""

SERIES = {row.name + part: {*row.labels, "job", "instance"} for row in TABLE for part in PARTS[row.kind]}
BUILT_IN = {"up": {"job", "instance"}}
RECORDED = {name: set[str]() for name in re.findall(r"record: (\S+)", files.RULES.read_text())}


@pytest.mark.parametrize("name", files.texts())
def test_queries_name_metrics_that_exist(name: str) -> None:
    """With labels that they have. Those of the recording rules are in the tests with Prometheus."""
    text = files.texts()[name]
    known = SERIES | BUILT_IN | RECORDED
    found = files.selectors(text)
    assert found
    for selector, metric in found.items():
        assert metric in known, selector
        if metric not in RECORDED:
            assert files.labels_of(selector) <= known[metric], selector
    assert files.grouped(text) <= {*(label for row in TABLE for label in row.labels), "job", "instance", "le", "fault"}


def test_every_reason_is_of_those_who_have_to_act() -> None:
    """The two lists of the rules are the reasons for operators; reasons that are added are the callers' by default."""
    lists = re.findall(r'"([A-Z_|()]{30,})"', files.RULES.read_text())
    upstream, gateway, attempts = (
        {reason for reason in Reason if re.fullmatch(pattern, reason.name)} for pattern in lists
    )
    assert upstream == attempts == {each for each in FOR_OPERATORS if each.name.startswith(("UPSTREAM_", "PROVIDER_"))}
    assert gateway == FOR_OPERATORS - upstream | {Reason.DRAINING, Reason.INTERNAL}


def test_every_alert_has_an_entry_in_the_runbook() -> None:
    """To which its URL points, and every entry has an alert; in the same order."""
    alerts = files.alerts()
    assert re.findall(r"^### (Deltawire\w+)$", files.RUNBOOK.read_text(), re.MULTILINE) == alerts
    links = re.findall(r"runbook_url: (\S+)", files.ALERTS.read_text())
    assert links == [f"server/deploy/runbook.md#{alert.lower()}" for alert in alerts]


def test_every_entry_of_the_runbook_answers_the_same_questions() -> None:
    """What it means, what callers notice, how to find the cause, and what to do."""
    entries = re.split(r"^### .*$", files.RUNBOOK.read_text(), flags=re.MULTILINE)[1:]
    for entry in entries:
        assert re.findall(r"^\*\*(.+?)\*\*", entry, re.MULTILINE) == ["Meaning.", "Callers.", "Cause.", "Action."], (
            entry
        )


def test_the_documentation_has_the_shipped_job() -> None:
    """Which tests with Prometheus run."""
    lines = [line for line in (files.PROMETHEUS / "prometheus.yaml").read_text().splitlines() if "#" not in line]
    job = "\n".join(lines[lines.index("scrape_configs:") :])
    assert job in {block.text.strip() for block in blocks(README)}


def test_the_dashboard_can_be_imported() -> None:
    """Its panels have ids of their own, do not overlap, and take their data from a variable; all variables are used."""
    dashboard = json.loads(files.DASHBOARD.read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert all(x < 24 for x, _ in cells)
        taken |= cells
        for target in panel.get("targets", ()):
            assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert target["expr"].count("(") == target["expr"].count(")")
    text = files.DASHBOARD.read_text()
    names = {each["name"] for each in dashboard["templating"]["list"]}
    assert names == {"datasource", "job", "instance", "provider", "model"}
    assert set(re.findall(r"\$\{?([a-z]+)", text)) == names


def test_every_metric_is_shown_or_alerts() -> None:
    """Except one of which the dashboard shows the other side: calls that have ended."""
    used = {metric for text in files.texts().values() for metric in files.selectors(text).values()}
    unused = {row.name for row in TABLE if not any(row.name + part in used for part in PARTS[row.kind])}
    assert unused == {"grpc_server_started_total"}
