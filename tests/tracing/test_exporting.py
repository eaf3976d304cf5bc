"""When traces are exported, what the log says if they cannot be, and that no call and no end waits for a collector."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

import pytest

from deltawire_server.tracing import otel, tracer
from deltawire_server.tracing.exporting import exporting
from tests.support.gateway import Lines, read_well
from tests.test_main import started
from tests.tracing.conftest import VERSION
from tests.tracing.test_traces import STREAM

if TYPE_CHECKING:
    from pathlib import Path

    from deltawire_server.fake_vllm import FakeVllm
    from tests.conftest import StartGateway
    from tests.support.collector import Collector
    from tests.tracing.conftest import Traced

GRPC = entry_points(group="opentelemetry_traces_exporter", name="otlp_proto_grpc")
ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
PROBLEM = "OpenTelemetry reports a problem"
NOT_EXPORTED = "traces are not exported"


async def is_recording(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether spans are recorded with these variables."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    async with exporting(os.environ, VERSION):
        return isinstance(tracer.current, otel.RecordingTracer)


@pytest.mark.parametrize(
    ("variables", "records"),
    [
        ({}, False),
        ({"OTEL_SERVICE_NAME": "chat"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        (ENDPOINT, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1"}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp,console"}, True),
        (ENDPOINT | {"OTEL_TRACES_EXPORTER": "none"}, False),
        (ENDPOINT | {"OTEL_SDK_DISABLED": "True"}, False),
        (ENDPOINT | {"OTEL_SDK_DISABLED": "false"}, True),
        (ENDPOINT | {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, True),
    ],
)
async def test_the_variables_that_export_traces(
    monkeypatch: pytest.MonkeyPatch, lines: Lines, variables: dict[str, str], records: bool
) -> None:
    """The standard ones, while they are not empty; one line is logged if they do."""
    assert await is_recording(variables, monkeypatch) is records
    assert not isinstance(tracer.current, otel.RecordingTracer)
    assert [entry["event"] for entry in lines.entries] == ["traces are exported"] * records


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        (
            {"OTEL_TRACES_EXPORTER": "zipkin"},
            "there is no exporter 'zipkin'; if opentelemetry-exporter-zipkin provides",
        ),
        (
            {"OTEL_EXPORTER_OTLP_PROTOCOL": "carrier/pigeon"},
            "the protocol 'carrier/pigeon' is unknown; use one of grpc, ",
        ),
        ({"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}, "if opentelemetry-exporter-otlp-proto-http provides"),
        ({"OTEL_BSP_MAX_QUEUE_SIZE": "-1"}, "max_queue_size must be a positive integer.: correct the OTEL_ variables"),
    ],
)
async def test_variables_that_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, lines: Lines, variables: dict[str, str], problem: str
) -> None:
    """One warning that names the remedy; the gateway serves without traces."""
    # As without the package, which may be installed where the tests run.
    monkeypatch.setattr(otel, "entry_points", lambda **of: GRPC if of["name"] == "otlp_proto_grpc" else ())
    assert not await is_recording(ENDPOINT | variables, monkeypatch)
    assert [entry["event"] for entry in lines.entries] == [NOT_EXPORTED]
    assert problem in lines.entries[0]["problem"]


async def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, lines: Lines, start_gateway: StartGateway) -> None:
    """One warning with the command that installs it; calls are served."""
    monkeypatch.delitem(sys.modules, "deltawire_server.tracing.otel")
    monkeypatch.delattr("deltawire_server.tracing.otel")
    for name in [name for name in sys.modules if name.startswith("opentelemetry.sdk")]:
        monkeypatch.setitem(sys.modules, name, None)
    async with exporting(ENDPOINT, VERSION), start_gateway() as gateway:
        await gateway.create()
    (entry,) = (entry for entry in lines.entries if entry["level"] == "warning")
    assert entry["event"] == NOT_EXPORTED
    assert "is missing: pip install 'deltawire[otel]'" in entry["problem"]


def test_nothing_is_imported_without_the_variables() -> None:
    """Not by the whole gateway, in a process of its own."""
    program = "import sys, deltawire_server.app; print([name for name in sys.modules if 'opentelemetry' in name])"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"


@pytest.mark.parametrize("dead", ["refuses", "is silent"])
async def test_a_dead_collector(
    start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch, lines: Lines, dead: str
) -> None:
    """Calls are answered, the process ends after a limited time, and few lines are logged, whatever the library reports."""
    monkeypatch.setattr(otel, "FLUSH_SECONDS", 0.2)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")  # export at once
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "2")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1")
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        if dead == "is silent":
            bound.listen()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{bound.getsockname()[1]}")
        async with exporting(os.environ, VERSION), start_gateway() as gateway:
            for _ in range(20):
                assert await read_well(gateway.stream())
    problems = [entry["event"] for entry in lines.entries if entry["level"] == "warning"]
    # A thread of the library may report its problem afterwards.
    problems.remove("traces may be lost: the collector did not take the last ones in time")
    # Of a silent one, the library reports only full queues, and that once in 20 seconds, whichever test caused it.
    assert problems == [PROBLEM] or (dead == "is silent" and not problems)


async def test_the_reports_of_the_library(lines: Lines) -> None:
    """One is logged, then none for a while, then one again."""
    reports = otel._Reports()
    for number in range(3):
        reports.handle(logging.makeLogRecord({"levelno": logging.WARNING, "msg": "failure %d", "args": (number,)}))
    reports._quiet_until = 0.0
    reports.handle(logging.makeLogRecord({"levelno": logging.WARNING, "msg": "again"}))
    assert [(entry["event"], entry["problem"]) for entry in lines.entries] == [
        (PROBLEM, "failure 0"),
        (PROBLEM, "again"),
    ]


async def test_a_second_start_in_one_process(start_gateway: StartGateway, traced: Traced) -> None:
    """Each exports what its calls do, and reports problems once."""
    for count in (2, 4):
        async with traced() as collector, start_gateway() as gateway:
            await gateway.create()
        assert len(collector.spans) == count


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_the_last_spans_of_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vllm: FakeVllm, collector: Collector, workers: str
) -> None:
    """They are exported when it drains; a worker's name its number."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")  # only at the end
    arguments = ("--vllm-url", f"{vllm.base_url}/v1", "--metrics-listen", "off", "--workers", workers)
    async with started(*arguments) as (process, gateway):
        await read_well(gateway.stream())
        process.signal(signal.SIGTERM)
        assert await process.ended() == 0
    assert [span.name for span in collector.spans] == [STREAM, "chat fake"]
    assert {span.resource.get("deltawire.worker") for span in collector.spans} <= ({None} if workers == "1" else {0, 1})
