"""The table of metrics in the documentation: that of the code."""

from __future__ import annotations

from pathlib import Path

from deltawire_server.metrics.table import TABLE, Row

README = Path(__file__).parents[2] / "server" / "README.md"
HEAD = ["| metric | kind | labels | |", "| --- | --- | --- | --- |"]


def line(row: Row) -> str:
    """A metric's line of the table."""
    labels = ", ".join(f"`{label}`" for label in row.labels)
    return f"| `{row.name}` | {row.kind} | {labels} | {row.description} |"


def test_the_documentation_has_every_metric() -> None:
    """In the order of the code; after a change, copy the table from the failure."""
    table = "\n".join([*HEAD, *map(line, TABLE)])
    assert table in README.read_text(), f"server/README.md needs this table:\n{table}"


def test_every_metric_has_a_name_of_its_kind() -> None:
    """As Prometheus' conventions have it: counters end with `_total`, and all have a prefix that says whose they are."""
    for row in TABLE:
        assert row.name.startswith(("grpc_server_", "gen_ai_client_", "process_", "deltawire_"))
        assert row.name.endswith("_total") == (row.kind == "counter")
        assert row.description.endswith(".")
