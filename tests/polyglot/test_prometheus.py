"""The rules and the dashboard in a real Prometheus."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import signal
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc import aio

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import model_registry_pb2
from deltawire_server.fake_vllm import Chunks, FakeVllm, Script
from tests.deploy import files
from tests.polyglot.alert_cases import ALONE, CASES, JOB, MINUTES
from tests.polyglot.programs import LIMIT, run, tool
from tests.polyglot.prometheus import prometheus
from tests.processes.test_gateway import started
from tests.support.gateway import Running, ask
from tests.support.gateway import tool as weather

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Certificates
    from tests.polyglot.prometheus import Prometheus

pytestmark = pytest.mark.polyglot

CHUNKS = Chunks()
KEPT = chat_pb.StreamOptions(retention=Duration(seconds=60))


async def test_the_shipped_files_are_valid(tmp_path: Path) -> None:
    """As they are in the repository, by Prometheus' own check of the configuration and of its rules."""
    checked = await run(tool("promtool"), "check", "config", str(files.PROMETHEUS / "prometheus.yaml"), home=tmp_path)
    assert checked.status == 0, checked.out + checked.err
    assert "2 rule files found" in checked.out


async def test_every_alert_fires_and_does_not(tmp_path: Path) -> None:
    """For the series of its cases, by Prometheus' own test of rules."""
    assert set(CASES) == set(files.alerts())
    together, tests = run_of({}, []), []
    for alert, cases in CASES.items():
        for number, case in enumerate(cases):
            for firing, given in ((True, case.fires), (False, case.fires | case.quiet)):
                job = "deltawire" if alert in ALONE else f"{alert} {number} {'fires' if firing else 'does not'}"
                series = {name.replace(JOB, job): values for name, values in given.items()}
                firings = f'count(ALERTS{{alertname="{alert}", alertstate="firing", job="{job}"}})'
                expected = [{"labels": "{}", "value": 1}] if firing else []
                query = {"expr": firings, "eval_time": f"{MINUTES}m", "exp_samples": expected}
                if alert in ALONE:
                    tests.append(run_of(series, [query]))
                else:
                    together["input_series"] += run_of(series, [])["input_series"]
                    together["promql_expr_test"].append(query)
    rules = [str(files.RULES), str(files.ALERTS)]
    file = tmp_path / "tests.json"  # which is YAML too
    file.write_text(json.dumps({"rule_files": rules, "evaluation_interval": "1m", "tests": [together, *tests]}))
    done = await run(tool("promtool"), "test", "rules", str(file), home=tmp_path)
    assert done.status == 0, done.out + done.err


def run_of(series: dict[str, str], queries: list[dict[str, Any]]) -> dict[str, Any]:
    """A test in the form of promtool."""
    given = [{"series": name, "values": values} for name, values in series.items()]
    return {"interval": "1m", "input_series": given, "promql_expr_test": queries}


async def test_every_query_has_an_answer(vllm: FakeVllm, tmp_path: Path, certificates: Certificates) -> None:
    """A number, while calls to a gateway of two workers succeed and fail: the panels, the rules, and what alerts select."""
    usage = tmp_path / "usage"
    usage.mkdir()
    replicas = f"{vllm.base_url},http://127.0.0.1:9/v1"  # nothing listens at the second
    flags = ["--metrics-listen", "127.0.0.1:0", "--set", "server.max_streams=1", "--set", f"usage.folder={usage}"]
    flags += ["--tls-cert-file", str(certificates.server), "--tls-key-file", str(certificates.server_key)]
    async with started(tmp_path, replicas, *flags) as workers, contextlib.AsyncExitStack() as stack:
        (serving,) = await workers.logged("serving")
        shown = await stack.enter_async_context(prometheus(tmp_path, serving["metrics"]))
        credentials = grpc.ssl_channel_credentials(certificates.authority.read_bytes())
        channel = await stack.enter_async_context(aio.secure_channel(serving["addresses"][0], credentials))
        gateway = Running(None, channel)  # type: ignore[arg-type]  # in another process
        workers.process.send_signal(signal.SIGHUP)
        async with asyncio.TaskGroup() as group:
            load = [group.create_task(call_for_ever(gateway, vllm)), group.create_task(wait_for_ever(gateway))]
            await check(shown)
            for task in load:
                task.cancel()


async def check(shown: Prometheus) -> None:
    """Wait until every query has an answer."""
    text = files.texts()
    queries = {query for listed in files.panels().values() for query in listed}
    queries |= {selector for each in text.values() for selector in files.selectors(each)}
    # The second replica, and the certificate of the tests.
    queries |= {f'ALERTS{{alertname="Deltawire{alert}"}}' for alert in ("ReplicaEjected", "CertificateExpires")}
    queries |= {f"{metric} != 0" for metric in ("deltawire_usage_total", "process_resident_memory_bytes")}
    queries |= {
        f"count by ({label}) ({series}) and on ({label}) {series}" for series, label in files.variables().values()
    }
    missing = queries
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LIMIT):
            while missing := {query for query in missing if not await shown.values(query)}:  # noqa: ASYNC110 (nothing announces it)
                await asyncio.sleep(0.2)
    assert not missing, "\n".join(missing)
    for query in files.runbook():
        await shown.values(query)
    groups = (await shown.get("rules"))["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["name"] for rule in rules if rule["type"] == "alerting"} == set(files.alerts())
    assert [(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] != "ok"] == []
    alerts = (await shown.get("alerts"))["alerts"]
    assert alerts
    for alert in alerts:
        assert not {"<error", "<no value>"} & set(" ".join(alert["annotations"].values()).split()), alert


async def call_for_ever(gateway: Running, vllm: FakeVllm) -> None:
    """Calls that succeed and calls that fail, one after the other."""
    call = [CHUNKS.role(), CHUNKS.call("get_weather"), CHUNKS.arguments("{"), CHUNKS.finish("tool_calls")]
    for turn in itertools.count():
        chats = [ask(), ask(tools=[weather()]), ask(model="absent"), ask(messages=[])]
        scripts = [Script.error(500, "no"), Script.chunks(call), Script.generated(tokens=20, tokens_per_second=200)]
        vllm.play(*scripts)
        for chat in [*chats, ask()]:
            with contextlib.suppress(aio.AioRpcError):
                await gateway.create(chat)
        name = model_registry_pb2.RegisterModelRequest(
            model_id=f"mine-{turn}", provider_model_id="fake", provider_id="vllm"
        )
        with contextlib.suppress(aio.AioRpcError):
            await gateway.models.RegisterModel(name)


async def wait_for_ever(gateway: Running) -> None:
    """Streams that take the only place from the other calls for a while, are retained, and some of which are canceled."""
    for turn in itertools.count():
        call = gateway.stream(options=KEPT)
        with contextlib.suppress(aio.AioRpcError):
            await call.read()
            if turn % 2:
                call.cancel()
            while not call.done():
                await call.read()
