"""What the registry costs with 20,000 models, on SQLite and PostgreSQL: `python -m tests.bench registry`."""

from __future__ import annotations

import asyncio
import tempfile
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from sqlalchemy import insert, select

from deltawire import AsyncClient, WatchBookmark
from deltawire_server.registry.rows import values_of
from deltawire_server.registry.store import Store
from deltawire_server.registry.tables import MODELS, NAMES
from tests.bench import servers
from tests.bench.measure import percentile_99
from tests.bench.results import Figure
from tests.bench.servers import Pace
from tests.registry.databases import engine_of, plain
from tests.support.postgres import PostgresServer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from tests.bench.measure import Field
    from tests.bench.servers import Server

COUNT = 20_000
WRITES = 320
PAGES = 200
WRITE = "ms of CPU per write, {} at once, 20,000 models"
PAGE = "ms of CPU per page of 100 of 20,000 models"
SNAPSHOT = "s for a snapshot of 20,000 models"
GAP = "ms between two events of 32 streams of 50 tokens/s, p99, {}"

STREAMS = 32
PAGERS = 4
LIMITS = (f"registry.max_models={2 * COUNT}", f"registry.max_aliases={2 * COUNT}", "metrics.listen=off")


async def registry(_: Field) -> list[Figure]:
    """Writes, pages, snapshots, and how much streams feel of them."""
    figures: list[Figure] = []
    with servers.upstream(Pace(250, 50.0, in_steps=True)) as upstream:
        for name, url in _databases():
            await _fill(url)
            with servers.gateway(upstream, *LIMITS, database=url) as gateway:
                async with AsyncClient(f"127.0.0.1:{gateway.port}") as client:
                    figures += [Figure(what, name, value) for what, value in (await _costs(client, gateway)).items()]
    return figures


def _databases() -> Iterator[tuple[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        yield "SQLite", f"sqlite:///{folder}/registry.db"
    with PostgresServer() as server:
        yield "PostgreSQL", server.create_database()


async def _fill(url: str) -> None:
    """Insert the models: to register them would take minutes."""
    store = Store(url)
    await store.open()
    await store.close()
    models = [
        replace(plain(f"model-{number:05}", f"alias-{number:05}"), provider_model_id=servers.MODEL)
        for number in range(COUNT)
    ]
    rows = [
        {"name": name, "model_id": model.id, "position": place}
        for model in models
        for place, name in enumerate(model.names)
    ]
    with engine_of(url).begin() as connection:
        connection.execute(insert(MODELS), [values_of(model) for model in models])
        connection.execute(insert(NAMES), rows)
        assert len(connection.execute(select(MODELS.c.id)).all()) == COUNT


async def _costs(client: AsyncClient, gateway: Server) -> dict[str, float]:
    async def write(number: int) -> None:
        await client.models.update(f"model-{number:05}", annotations={"note": str(time.monotonic())})

    async def page() -> None:
        listed = client.models.list(page_size=100)
        async for _ in listed:
            break

    costs: dict[str, float] = {}
    for at_once in (1, 32):
        await _in_turn(write, range(20), at_once)
        costs[WRITE.format(at_once)] = await _cpu(gateway, _in_turn(write, range(WRITES), at_once)) / WRITES * 1e3
    await page()
    costs[PAGE] = await _cpu(gateway, _in_turn(lambda _: page(), range(PAGES), 1)) / PAGES * 1e3
    began = time.perf_counter()
    async with client.models.watch() as changes:
        async for change in changes:
            if isinstance(change, WatchBookmark):
                break
    costs[SNAPSHOT] = time.perf_counter() - began
    costs[GAP.format("alone")] = await _gap(client)

    async def for_ever(use: Callable[[int], Awaitable[None]]) -> None:
        while True:
            await use(COUNT // 2)

    users = [asyncio.create_task(for_ever(lambda _: page())) for _ in range(PAGERS)]
    users.append(asyncio.create_task(for_ever(write)))
    try:
        costs[GAP.format("beside 4 pagers and a writer")] = await _gap(client)
    finally:
        for user in users:
            user.cancel()
        await asyncio.wait(users)
    return costs


async def _in_turn(use: Callable[[int], Awaitable[None]], numbers: range, at_once: int) -> None:
    left = iter(numbers)

    async def caller() -> None:
        for number in left:
            await use(number)

    await asyncio.gather(*(caller() for _ in range(at_once)))


async def _cpu(gateway: Server, load: Awaitable[None]) -> float:
    """The seconds of CPU that the gateway takes for a load."""
    before = gateway.cpu_seconds
    await load
    return gateway.cpu_seconds - before


async def _gap(client: AsyncClient) -> float:
    gaps: list[float] = []

    async def stream() -> None:
        last = None
        async with client.chat.stream("hi", model=f"vllm/{servers.MODEL}") as events:
            async for _ in events:
                now = time.perf_counter()
                if last is not None:
                    gaps.append((now - last) * 1e3)
                last = now

    await asyncio.gather(*(stream() for _ in range(STREAMS)))
    return percentile_99(gaps)
