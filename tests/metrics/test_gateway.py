"""Every metric of the table, in scrapes of a gateway whose calls succeed and fail in the ways that they count."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import model_registry_pb2
from deltawire_server.app import Gateway
from deltawire_server.completions.adaptive import AdaptiveDelay
from deltawire_server.errors import Reason, RegistryError
from deltawire_server.fake_vllm import Chunks, FakeVllm, Script
from deltawire_server.lifecycle import ListenError
from deltawire_server.metrics import table
from tests.metrics.scrape import Page, scrape, until_scraped
from tests.metrics.test_listener import status
from tests.support.gateway import Running, ask, failure_of, read, read_well, settings_of, tool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.conftest import Certificates, StartGateway
    from tests.support.gateway import Lines

CHUNKS = Chunks()
ANY = {"listen": "127.0.0.1:0"}
STREAM = {
    "grpc_type": "server_stream",
    "grpc_service": "deltawire.v1.ChatCompletion",
    "grpc_method": "StreamChatCompletion",
}


@pytest.fixture
async def gateway(start_gateway: StartGateway) -> AsyncIterator[Running]:
    """A gateway with metrics. They are those of the process, so tests compare two scrapes."""
    async with start_gateway(metrics=ANY) as gateway:
        yield gateway


async def page_of(gateway: Running) -> Page:
    """A scrape."""
    return await scrape(gateway.gateway.metrics_address)


async def added(gateway: Running, before: Page, name: str, **labels: str) -> float:
    """How much a counter has grown. A call is counted shortly after its caller has seen its end."""
    old = before.value(name, **labels)
    page = await until_scraped(gateway.gateway.metrics_address, lambda page: page.value(name, **labels) > old)
    return page.value(name, **labels) - old


async def test_a_completion_is_counted(gateway: Running, vllm: FakeVllm) -> None:
    """The call, the operation of the model, its tokens, the gaps between its chunks, and how it ended."""
    vllm.play(
        Script.chunks([CHUNKS.role(), *map(CHUNKS.text, "abcd"), CHUNKS.finish(), CHUNKS.usage(7, 4)], chunk_delay=0.03)
    )
    before = await page_of(gateway)
    await read_well(gateway.stream())
    assert await added(gateway, before, "grpc_server_started_total", **STREAM) == 1
    assert await added(gateway, before, "grpc_server_handled_total", grpc_code="OK", **STREAM) == 1
    assert await added(gateway, before, "grpc_server_handling_seconds_count", **STREAM) == 1
    operation = {"gen_ai_operation_name": "chat", "gen_ai_provider_name": "vllm", "gen_ai_request_model": "vllm/fake"}
    for name in ("operation_duration_seconds", "operation_time_to_first_chunk_seconds"):
        assert await added(gateway, before, f"gen_ai_client_{name}_count", **operation) == 1
    tokens = {"gen_ai_token_type": "output", **operation}
    assert await added(gateway, before, "gen_ai_client_token_usage_sum", **tokens) == 4
    assert (
        await added(gateway, before, "gen_ai_client_token_usage_sum", **{**tokens, "gen_ai_token_type": "input"}) == 7
    )
    gaps = "gen_ai_client_operation_time_per_output_chunk_seconds"
    assert await added(gateway, before, f"{gaps}_count", **operation) == 6  # of seven chunks
    assert await added(gateway, before, f"{gaps}_sum", **operation) > 0.1
    assert await added(gateway, before, f"{gaps}_bucket", le="+Inf", **operation) == 6
    assert await added(gateway, before, "deltawire_stop_reasons_total", stop_reason="end_of_turn") == 1
    assert await added(gateway, before, "deltawire_usage_total", provenance="exact") == 1
    replica = {"provider": "vllm", "replica": f"{vllm.base_url}/v1"}
    assert await added(gateway, before, "deltawire_attempts_total", **replica) == 1


async def test_a_failed_attempt_is_counted(gateway: Running, vllm: FakeVllm) -> None:
    """With its reason, and so are the call and its completion."""
    vllm.play(Script.error(503, "no"))
    before = await page_of(gateway)
    reason = (await failure_of(gateway.create())).reason
    replica = {"provider": "vllm", "replica": f"{vllm.base_url}/v1"}
    assert await added(gateway, before, "deltawire_attempt_failures_total", reason=reason, **replica) == 1
    assert await added(gateway, before, "deltawire_failed_calls_total", reason=reason) == 1
    # The engine has not answered, so there is no usage, not even an estimated one.
    assert (await page_of(gateway)).value("deltawire_usage_total") == before.value("deltawire_usage_total")
    handled = {"grpc_type": "unary", "grpc_method": "CreateChatCompletion"}
    assert await added(gateway, before, "grpc_server_handled_total", **handled) == 1
    operations = "gen_ai_client_operation_duration_seconds_count"
    assert await added(gateway, before, operations, error_type=reason) == 1


async def test_verdicts_are_counted(gateway: Running, vllm: FakeVllm) -> None:
    """By whether and why not a call can be executed."""
    for arguments in ('{"city": "Oslo"}', "{"):
        call = [CHUNKS.call("get_weather"), CHUNKS.arguments(arguments)]
        chunks = [CHUNKS.role(), *call, CHUNKS.finish("tool_calls"), CHUNKS.usage(1, 2)]
        vllm.play(Script.chunks(chunks))
        before = await page_of(gateway)
        await read_well(gateway.stream(ask(tools=[tool()])))
        verdict = "succeeded" if arguments != "{" else "malformed_json"
        assert await added(gateway, before, "deltawire_tool_calls_total", verdict=verdict) == 1


async def test_a_canceled_call_is_no_failure(gateway: Running, vllm: FakeVllm) -> None:
    """Its code is Canceled, as gRPC's dashboards spell it, and its completion has an error type of its own."""
    vllm.play(Script.generated(tokens=1000, tokens_per_second=20))
    before = await page_of(gateway)
    call = gateway.stream()
    await call.read()
    call.cancel()
    assert await added(gateway, before, "grpc_server_handled_total", grpc_code="Canceled", **STREAM) == 1
    canceled = {"error_type": "canceled"}
    assert await added(gateway, before, "gen_ai_client_operation_duration_seconds_count", **canceled) == 1


async def test_the_current_state_is_shown(gateway: Running, vllm: FakeVllm) -> None:
    """Streams, what they hold, what is retained, and what is registered."""
    await gateway.models.RegisterModel(
        model_registry_pb2.RegisterModelRequest(model_id="mine", provider_model_id="fake", provider_id="vllm")
    )
    vllm.play(Script.generated(tokens=1000, tokens_per_second=20))
    options = chat_pb.StreamOptions(retention=Duration(seconds=60))
    call = gateway.stream(options=options)
    await call.read()
    page = await until_scraped(gateway.gateway.metrics_address, lambda page: page.value("deltawire_streams") > 0)
    assert page.value("deltawire_streams_limit") == 1000
    assert page.value("deltawire_retained_streams") == 1
    assert page.value("deltawire_held_bytes", kind="retained") > 0
    assert page.value("deltawire_held_bytes", kind="calls") <= page.value("deltawire_held_limit_bytes")
    assert page.value("deltawire_registry_models") == 1
    assert page.value("deltawire_registry_behind_seconds") == 0
    assert page.value("deltawire_registry_changes_total", kind="added") >= 1
    assert page.value("deltawire_info") == 1
    assert page.value("deltawire_event_loop_lag_seconds_count") > 0
    call.cancel()


async def test_replicas_are_shown(start_gateway: StartGateway, vllm: FakeVllm) -> None:
    """What each was found to be, and whether it gets calls; none of one that was removed."""
    # Nothing listens at the second: its calls are answered by the first, and it is ejected.
    replicas = [f"{vllm.base_url}/v1", "http://127.0.0.1:9/v1"]
    async with start_gateway(base_url=",".join(replicas), metrics=ANY) as running:
        address = running.gateway.metrics_address
        for _ in range(4):
            await running.create()
        state, away = "deltawire_replica_state", ("ejected", "probation")
        page = await until_scraped(
            address, lambda page: sum(page.value(state, replica=replicas[1], state=each) for each in away) == 1
        )
        assert page.value(state, replica=replicas[1]) == 1
        assert page.value(state, replica=replicas[0], state="available") == 1
        assert page.value("deltawire_provider_models", provider="vllm") == 1
        engine = {"replica": replicas[0], "engine": "vllm", "version": "0.32.0"}
        await until_scraped(address, lambda page: page.value("deltawire_engine_info", **engine) == 1)
        alone = settings_of(vllm.base_url, Path("unused")).providers
        await running.gateway.reload(running.gateway._settings.model_copy(update={"providers": alone}))
        await until_scraped(address, lambda page: page.value(state, replica=replicas[1]) == 0)


async def test_certificates_are_shown(start_gateway: StartGateway, certificates: Certificates, tmp_path: Path) -> None:
    """When that of the listener expires, and whether the current files are used: those of the server, and of providers."""
    server = {"tls_cert_file": tmp_path / "tls.crt", "tls_key_file": tmp_path / "tls.key"}
    authority = tmp_path / "ca.pem"
    expiry, used = "deltawire_certificate_expiry_timestamp_seconds", "deltawire_certificates_last_load_successful"

    def put(certificate: Path, key: Path) -> None:
        for file, source in zip(server.values(), (certificate, key), strict=True):
            file.write_bytes(source.read_bytes())

    put(certificates.server, certificates.server_key)
    authority.write_bytes(certificates.authority.read_bytes())
    async with start_gateway(server=server, provider={"tls_verify": authority}, metrics=ANY) as running:
        address = running.gateway.metrics_address
        page = await until_scraped(address, lambda page: page.value(expiry) > time.time())
        assert page.value(used) == 2
        put(certificates.server, certificates.client_key)
        await until_scraped(address, lambda page: page.value(used, used_by="server") == 0)
        put(certificates.client, certificates.client_key)
        await until_scraped(address, lambda page: page.value(used, used_by="server") == 1)
        authority.write_text("no certificate")
        await until_scraped(address, lambda page: page.value(used, used_by="providers") == 0)
        authority.write_bytes(certificates.authority.read_bytes())
        await until_scraped(address, lambda page: page.value(used, used_by="providers") == 1)


async def test_the_process_is_measured(gateway: Running) -> None:
    """Under the names that every process has in Prometheus; CPU time is only counted up."""
    page = await until_scraped(gateway.gateway.metrics_address, lambda page: page.value("process_open_fds") > 0)
    assert page.value("process_resident_memory_bytes") > 10_000_000
    assert page.value("process_open_fds") < page.value("process_max_fds")
    assert 0 < page.value("process_start_time_seconds") < time.time()
    assert await added(gateway, page, "process_cpu_seconds_total") > 0


async def test_failures_begin_at_zero(gateway: Running) -> None:
    """Prometheus does not see the first one of a series that begins with it."""
    page = await page_of(gateway)
    assert {sample.labels["reason"] for sample in page.samples("deltawire_failed_calls_total")} == {
        reason.name for reason in Reason
    }
    for name in ("usage_records", "settings_reloads", "images"):
        assert len(page.samples(f"deltawire_{name}_total")) > 1


async def test_ready_while_calls_are_accepted(start_gateway: StartGateway) -> None:
    """Not any more when a drain begins, while the gateway is alive, and still serves its metrics and the page."""

    async def codes(running: Running) -> list[int]:
        address = running.gateway.metrics_address
        return [(await asyncio.to_thread(status, address, path))[0] for path in ("/livez", "/readyz", "/")]

    async with start_gateway(server={"drain_delay": 3600}, metrics=ANY) as running:
        assert await codes(running) == [200, 200, 200]
        drained = asyncio.create_task(running.gateway.drain())
        await running.create()
        assert await codes(running) == [200, 503, 200]
        await running.gateway.stop()
        await asyncio.wait([drained])


async def test_every_metric_of_the_table_is_in_a_scrape(gateway: Running) -> None:
    """With its description. Those with labels have a series as soon as there is something to count."""
    page = await page_of(gateway)
    for row in table.TABLE:
        if row is table.WORKER_ENDS:
            continue  # see tests/processes
        assert page.documented[row.name.removesuffix("_total")] == row.description


async def test_types_are_those_of_the_api(gateway: Running) -> None:
    """Not those of the gateway's handlers, which all take streams."""
    health = health_pb2_grpc.HealthStub(gateway.channel)
    before = await page_of(gateway)
    await health.Check(health_pb2.HealthCheckRequest())
    check = {"grpc_service": "grpc.health.v1.Health", "grpc_method": "Check"}
    assert await added(gateway, before, "grpc_server_handled_total", grpc_type="unary", **check) == 1


async def test_models_and_versions_beyond_a_limit_share_a_label(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tens of thousands of models, or an engine that always has another version, are not as many series."""
    monkeypatch.setattr(table, "_models", set())
    labels = {table.operation("p", f"m{number}")[2] for number in range(3 * table.MAX_MODELS)}
    assert len(labels) == table.MAX_MODELS + 1
    assert table.operation("p", "m0")[2] == "m0"
    monkeypatch.setattr(table, "_versions", set())
    versions = {table.engine_version(f"0.{number}") for number in range(3 * table.MAX_VERSIONS)}
    assert len(versions) == table.MAX_VERSIONS + 1


@pytest.mark.parametrize(
    ("code", "label"),
    [("OK", "OK"), ("NOT_FOUND", "NotFound"), ("CANCELLED", "Canceled"), ("RESOURCE_EXHAUSTED", "ResourceExhausted")],
)
def test_codes_have_the_names_of_dashboards(code: str, label: str) -> None:
    """Those of Go."""
    assert table.code_label(code) == label


async def test_an_address_in_use_is_an_error_if_the_operator_chose_it(
    gateway: Running, vllm: FakeVllm, tmp_path: Path, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default is not: several gateways may run on one machine."""
    taken = gateway.gateway.metrics_address
    settings = settings_of(vllm.base_url, tmp_path / "b", metrics={"listen": taken})
    with pytest.raises(ListenError, match=r"cannot serve metrics on .*--metrics-listen"):
        async with Gateway(settings):
            pass
    monkeypatch.setattr(type(settings.metrics), "is_default", True)
    (tmp_path / "b").mkdir()
    async with Gateway(settings) as other:
        assert other.metrics_address == ""
    await lines.find("metrics are not served")


async def test_the_busy_process_is_shown(start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """The delay of deltas under load."""
    monkeypatch.setattr(AdaptiveDelay, "adapt", lambda adaptive, *_: setattr(adaptive, "seconds", 0.075))
    async with start_gateway(server={"max_adaptive_delay": 0.1}, metrics=ANY) as gateway:
        await until_scraped(
            gateway.gateway.metrics_address, lambda page: page.value("deltawire_adaptive_delay_seconds") == 0.075
        )


async def test_an_unreadable_registry_is_behind(start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """For as long as its database cannot be read."""
    async with start_gateway(metrics=ANY) as gateway:
        follower = gateway.gateway._registry._follower
        address = gateway.gateway.metrics_address

        async def fail() -> None:
            raise RegistryError(Reason.STORE_UNAVAILABLE, "away")

        with monkeypatch.context() as away:
            away.setattr(follower, "catch_up", fail)
            following = asyncio.create_task(follower._catch_up_at_last())
            await until_scraped(address, lambda page: page.value("deltawire_registry_behind_seconds") > 0)
        await following
        await until_scraped(address, lambda page: page.value("deltawire_registry_behind_seconds") == 0)


async def test_refusals_are_counted(start_gateway: StartGateway, vllm: FakeVllm) -> None:
    """By their reason, as other failures."""
    vllm.play(Script.generated(tokens=1000, tokens_per_second=20))
    async with start_gateway(server={"max_streams": 1}, metrics=ANY) as gateway:
        before = await page_of(gateway)
        call = gateway.stream()
        await call.read()
        _, failure = await read(gateway.stream())
        assert failure is not None
        assert await added(gateway, before, "deltawire_failed_calls_total", reason="TOO_MANY_STREAMS") == 1
        call.cancel()
