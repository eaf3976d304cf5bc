"""Single figures: memory, the delay of a cancellation, bytes on the wire, refusals, and the time of imports."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import grpc
import httpx
from grpc import aio

from deltawire.v1 import chat_completion_pb2_grpc
from tests.bench import servers
from tests.bench.load import HttpLoad, chat_request, load_of
from tests.bench.measure import SCENARIOS, Field, noted, percentile_99, sample
from tests.bench.registry_costs import registry
from tests.bench.results import Figure
from tests.bench.servers import Pace, Server
from tests.support.collector import Collector

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from tests.bench.load import Load

MEMORY = "KiB of memory per idle stream"
CANCEL_P50 = "ms from cancel to the upstream's closed connection, p50"
CANCEL_P99 = "ms from cancel to the upstream's closed connection, p99"
PACED_BYTES = "bytes received per answer of 150 tokens, 50 tokens/s"
FLAT_BYTES = "bytes received per answer of 150 tokens, flat out"
IMPORT = "ms of an import"
CAPACITY = "calls of 4 tokens per second of CPU of the busiest worker"
PLAIN_SSE = "upstream, usage at the end only"

IDLE_STREAMS = 500
CANCELS = 100
CANCEL_SECONDS = 5.0
"""A peer that has not closed the connection after this time counts with this time."""

CAPACITY_STREAMS = 64
CAPACITY_CALLS = 25
CAPACITY_REPEAT = 4

REFUSED_CALLS = (100, 1000)
REFUSED_REPEAT = 7

TELEMETRY = next(scenario for scenario in SCENARIOS if scenario.name == "steps-64")
TELEMETRY_REPEAT = 7
TELEMETRY_COST = "CPU time per token ÷ without metrics and traces"
WITHOUT = "neither"

IMPORTS = ("import grpc", "import deltawire", "from deltawire import Client")
IMPORT_REPEAT = 7


async def memory(field: Field) -> list[Figure]:
    """Resident memory of a fresh process per stream that has begun and waits for its next token."""

    async def of(server: Server) -> list[Figure]:
        async with load_of(server) as load, contextlib.AsyncExitStack() as streams:
            async with load.hold():
                before = server.memory_kib
            await asyncio.gather(*(streams.enter_async_context(load.hold()) for _ in range(IDLE_STREAMS)))
            return [Figure(MEMORY, server.name, (server.memory_kib - before) / IDLE_STREAMS)]

    pace = Pace(150, 0.5)
    with servers.upstream(pace) as upstream, servers.bare_grpc(pace) as bare:
        return [*await _each(field, upstream, of), *await of(bare)]


async def cancel(field: Field) -> list[Figure]:
    """The time for which the engine generates for a caller that has canceled, beside 64 streams of other callers."""
    with servers.upstream(Pace(10_000, 50.0, in_steps=True)) as upstream:

        async def of(server: Server) -> list[Figure]:
            async with load_of(server) as load, HttpLoad(upstream) as control:
                others = asyncio.create_task(load.run(64, 1))
                try:
                    delays = [await _cancel_delay(load, control) for _ in range(CANCELS)]
                finally:
                    others.cancel()
                    await asyncio.wait([others])
            return [
                Figure(CANCEL_P50, server.name, statistics.median(delays) * 1e3),
                Figure(CANCEL_P99, server.name, percentile_99(delays) * 1e3),
            ]

        return [*await _each(field, upstream, of), *await of(upstream)]


async def _cancel_delay(load: Load, control: HttpLoad) -> float:
    before = len(await control.closed())
    async with load.hold():
        begin = time.perf_counter()
    while time.perf_counter() < begin + CANCEL_SECONDS:
        await asyncio.sleep(0.005)
        if len(closed := await control.closed()) > before:
            # Clocks of two processes on one machine: Linux counts both from the same instant.
            return closed[before] - begin
    return CANCEL_SECONDS


async def wire(field: Field) -> list[Figure]:
    """What a caller receives over TCP, framing included: messages of gRPC, and server-sent events."""
    figures = []
    for name, pace in ((PACED_BYTES, Pace(150, 50.0)), (FLAT_BYTES, Pace(150))):

        async def of(server: Server, name: str = name, tokens: int = pace.tokens) -> list[Figure]:
            return [Figure(name, server.name, await _received(server, load_of, tokens))]

        with servers.upstream(pace) as upstream:
            figures += [*await _each(field, upstream, of), *await of(upstream)]
            plain = await _received(upstream, partial(HttpLoad, running_usage=False), pace.tokens)
            figures.append(Figure(name, PLAIN_SSE, plain))
    return figures


async def _received(server: Server, load_of: Callable[[Server], Load], tokens: int) -> float:
    """The bytes of the second answer, as the first one is beside the greeting of the connection."""
    received = 0

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, count: bool) -> None:
        nonlocal received
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                received += len(data) if count else 0
                writer.write(data)
        writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", server.port)
        await asyncio.gather(copy(reader, to_server, count=False), copy(from_server, writer, count=True))

    async with await asyncio.start_server(relay, "127.0.0.1") as listener:
        port = listener.sockets[0].getsockname()[1]
        async with load_of(replace(server, port=port)) as load:
            await load.run(1, tokens)
            before = received
            await load.run(1, tokens)
            return float(received - before)


async def workers(field: Field) -> list[Figure]:
    """What one and two workers carry, by CPU time: the callers and the upstream need the cores of the machine too.

    Each caller has its own connection, because the kernel assigns connections to workers. The fastest of several turns counts.
    """
    carried: dict[str, float] = {}
    async with contextlib.AsyncExitStack() as stack:
        upstream = stack.enter_context(servers.upstream(Pace(4)))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        gateways = []
        for count in (1, 2):
            settings = (f"server.workers={count}", *field.settings)
            database = f"sqlite:///{folder}/{count}.db"  # workers share it
            server = stack.enter_context(servers.gateway(upstream, *settings, database=database))
            load = await stack.enter_async_context(load_of(server, channels=CAPACITY_STREAMS))
            gateways.append((f"{count} worker{'s' * (count > 1)}", server, load))
        for _turn in range(CAPACITY_REPEAT):
            for name, server, load in gateways:
                before = server.worker_seconds
                await load.run(CAPACITY_STREAMS, 4, calls=CAPACITY_CALLS)
                took = (after - began for after, began in zip(server.worker_seconds, before, strict=True))
                calls = CAPACITY_STREAMS * CAPACITY_CALLS / max(took)
                carried[name] = max(carried.get(name, 0.0), calls)
    return [Figure(CAPACITY, name, calls) for name, calls in carried.items()]


async def telemetry(_: Field) -> list[Figure]:
    """CPU time per token with metrics, which are scraped, and with traces, ÷ that of a gateway without either.

    The scrapes come once a second, fifteen times as often as Prometheus' own default. The median of the ratios of seven turns.
    """
    with contextlib.ExitStack() as stack:
        upstream = stack.enter_context(servers.upstream(TELEMETRY.pace))
        metrics = servers.free_port()
        collector = stack.enter_context(Collector())
        exporting = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint,
            "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
        }
        uncounted = partial(servers.gateway, upstream, "metrics.listen=off", module="tests.bench.uncounted")
        gateways = {
            WITHOUT: stack.enter_context(uncounted()),
            "metrics": stack.enter_context(servers.gateway(upstream, f"metrics.listen=127.0.0.1:{metrics}")),
            "traces of 1 % of the calls": stack.enter_context(
                uncounted(variables={**exporting, "OTEL_TRACES_SAMPLER_ARG": "0.01"})
            ),
            "traces of all calls": stack.enter_context(uncounted(variables=exporting)),
        }
        async with contextlib.AsyncExitStack() as loads, httpx.AsyncClient(trust_env=False) as scraper:
            load_by_name = {name: await loads.enter_async_context(load_of(each)) for name, each in gateways.items()}
            scraping = asyncio.create_task(_scrape_for_ever(scraper, f"http://127.0.0.1:{metrics}/metrics"))
            ratios: dict[str, list[float]] = {name: [] for name in gateways}
            for turn in range(TELEMETRY_REPEAT + 1):
                cpu = {
                    name: (await sample(gateways[name], load, TELEMETRY)).cpu_micros
                    for name, load in load_by_name.items()
                }
                assert not scraping.done(), scraping.exception()
                if turn:  # the first one warms up
                    for name, micros in cpu.items():
                        ratios[name].append(micros / cpu[WITHOUT])
            scraping.cancel()
        assert collector.requests
    return [Figure(TELEMETRY_COST, name, statistics.median(of)) for name, of in ratios.items()]


async def _scrape_for_ever(client: httpx.AsyncClient, url: str) -> None:
    while True:
        (await client.get(url)).raise_for_status()
        await asyncio.sleep(1)


async def refusals(_: Field) -> list[Figure]:
    """Calls at once to a full gateway without a queue, and to a bare server that refuses all; the median of several bursts."""
    pace = Pace(10_000, 1.0)
    figures = []
    with (
        servers.upstream(pace) as upstream,
        servers.gateway(upstream, "server.max_streams=1", "limits.queue_size=0", "metrics.listen=off") as gateway,
        servers.bare_grpc(pace, "--refuse") as bare,
    ):
        async with load_of(gateway) as load, load.hold():
            for count in REFUSED_CALLS:
                took: dict[str, list[float]] = {gateway.name: [], bare.name: []}
                for _turn in range(REFUSED_REPEAT):
                    for server in (gateway, bare):
                        took[server.name].append(await _refused(server, count))
                name = f"ms to the refusal of {count:,} calls at once, p99"
                figures += [Figure(name, who, statistics.median(times)) for who, times in took.items()]
    return figures


async def _refused(server: Server, count: int) -> float:
    """The 99th percentile of the milliseconds until calls at once are refused."""
    async with aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        method = chat_completion_pb2_grpc.ChatCompletionStub(channel).StreamChatCompletion

        async def call() -> float:
            begin = time.perf_counter()
            code = await method(chat_request()).code()
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            return (time.perf_counter() - begin) * 1e3

        await call()  # connects
        return percentile_99(await asyncio.gather(*(call() for _ in range(count))))


async def imports(_: Field) -> list[Figure]:
    """Imports in fresh interpreters, in turns; the median, without the interpreter's own start."""
    code = "import time; begin = time.perf_counter()\n{}\nprint(time.perf_counter() - begin)"
    took: dict[str, list[float]] = {statement: [] for statement in IMPORTS}
    for _turn in range(IMPORT_REPEAT):
        for statement, times in took.items():
            command = [sys.executable, "-c", code.format(statement)]
            done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=True)
            times.append(float(done.stdout) * 1e3)
    return [Figure(IMPORT, statement, statistics.median(times)) for statement, times in took.items()]


COSTS: Mapping[str, Callable[[Field], Awaitable[list[Figure]]]] = {
    "memory": memory,
    "cancel": cancel,
    "wire": wire,
    "workers": workers,
    "refusals": refusals,
    "registry": registry,
    "telemetry": telemetry,
    "imports": imports,
}
"""What measures the single figures, by its name on the command line."""


async def _each(field: Field, upstream: Server, of: Callable[[Server], Awaitable[list[Figure]]]) -> list[Figure]:
    """Measure one server after the other, each in a fresh process; a peer that fails has no figures."""
    figures: list[Figure] = []
    for name, start in field.servers():
        with noted(name), start(upstream) as server:
            figures += await of(server)
    return figures
