"""The rules, the dashboard and the runbook, as far as they can be read without Prometheus and Grafana."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.docs.markdown import blocks

DEPLOY = Path(__file__).parents[2] / "server" / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
RULES, ALERTS = PROMETHEUS / "rules.yaml", PROMETHEUS / "alerts.yaml"
RUNBOOK = DEPLOY / "runbook.md"
DASHBOARD = DEPLOY / "grafana" / "deltawire.json"

_SELECTOR = re.compile(
    r"\b(up|(?:deltawire|gen_ai_client|grpc_server|process|job_\w+:deltawire)_\w[\w:]*)\b(\{[^}]*\})?"
)
_PROSE = re.compile(r"^ *(?:#|summary:|description:|runbook_url:).*$", re.MULTILINE)
"""The lines of rules that are not queries."""

_LABELS = re.compile(r"\b(?:by|on|ignoring|group_left)\s*\(([^)]*)\)")
_MATCHER = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")


def alerts() -> list[str]:
    """The names of all alerts."""
    return re.findall(r"- alert: (\w+)", ALERTS.read_text())


def panels() -> dict[str, list[str]]:
    """The queries of each panel of the dashboard, with all variables at All."""
    shown = [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]
    queries = {panel["title"]: [_whole(target["expr"]) for target in panel["targets"]] for panel in shown}
    assert len(queries) == len(shown)
    return queries


def variables() -> dict[str, tuple[str, str]]:
    """The series and the label from which each variable of the dashboard has its values."""
    listed = [each["query"] for each in json.loads(DASHBOARD.read_text())["templating"]["list"] if "query" in each]
    found = [re.fullmatch(r"label_values\((.*), (\w+)\)", each["query"]) for each in listed if isinstance(each, dict)]
    return {each[2]: (_whole(each[1]), each[2]) for each in found if each}


def runbook() -> list[str]:
    """The queries of the runbook."""
    return [query for block in blocks(RUNBOOK) if block.language == "promql" for query in block.text.splitlines()]


def texts() -> dict[str, str]:
    """Everything that has queries, by where it is."""
    rules = {path.name: _PROSE.sub("", path.read_text()) for path in (RULES, ALERTS)}
    variable = "\n".join(series for series, _ in variables().values())
    return rules | {
        DASHBOARD.name: "\n".join([*(query for queries in panels().values() for query in queries), variable]),
        RUNBOOK.name: "\n".join(runbook()),
    }


def selectors(text: str) -> dict[str, str]:
    """The selectors of a text: each as it is written, and the metric that it is of."""
    return {found[0]: found[1] for found in _SELECTOR.finditer(text)}


def labels_of(selector: str) -> set[str]:
    """The labels that a selector matches."""
    return set(_MATCHER.findall(selector.partition("{")[2]))


def grouped(text: str) -> set[str]:
    """The labels by which a text groups and joins."""
    return {label.strip() for listed in _LABELS.findall(text) for label in listed.split(",")} - {""}


def _whole(query: str) -> str:
    query = query.replace("$__rate_interval", "1m")
    return re.sub(r"\$(?:job|instance|provider|model)\b", ".*", query)
