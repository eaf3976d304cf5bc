"""How costs grow with streams, tokens, the size of arguments and registered models: `make bench-curves`."""

from __future__ import annotations

import argparse
import contextlib
import sqlite3
import sys
import tempfile
from pathlib import Path

import uvloop

from deltawire import AsyncClient
from tests.bench import report, servers
from tests.bench.load import load_of
from tests.bench.measure import THOUSANDS, Field, Scenario, measure, sample
from tests.bench.results import CURVES, PEERS, RUN, Results, Row, machine
from tests.bench.servers import DELTAWIRE, MODEL, SMALLEST, Pace

REPEAT = 1
STEPS = Pace(20, 5.0, in_steps=True)

LOADS = {
    "streams": [
        Scenario("streams", f"{count:,} streams of 5 tokens/s, in steps", count, STEPS, settings=THOUSANDS, at=count)
        for count in (1, 10, 100, 500, 1000, 2000)
    ],
    "tokens": [
        Scenario("tokens", f"16 streams of {tokens:,} tokens, flat out", 16, Pace(tokens), at=tokens)
        for tokens in (10, 100, 1000, 10_000)
    ],
    "arguments": [
        Scenario("arguments", f"4 tool calls, arguments in {size:,} pieces", 4, Pace(size, tool_call=True), at=size)
        for size in (10, 100, 1000, 10_000, 100_000)
    ],
}
"""The curves that a load draws, by name. A piece of an argument has 4 bytes on average."""

MODELS = (10, 100, 1000, 10_000, 20_000)
SHORT = Scenario("models", "short calls, {:,} registered models", 16, Pace(4), calls=25, per_call=True)


async def models(repeat: int) -> list[Row]:
    """Short calls to the last of so many registered models, each number on a gateway of its own."""
    rows = []
    limits = (f"registry.max_models={MODELS[-1]}", f"registry.max_aliases={MODELS[-1]}")
    for count in MODELS:
        with tempfile.TemporaryDirectory() as folder, servers.upstream(SHORT.pace) as upstream:
            file = Path(folder) / "registry.db"
            database = f"sqlite:///{file}"
            with servers.gateway(upstream, database=database) as gateway:
                async with AsyncClient(f"127.0.0.1:{gateway.port}") as client:
                    await client.models.register("model-0", provider_model_id=MODEL)
            _multiply(file, count)
            with servers.gateway(upstream, *limits, database=database) as gateway:
                async with load_of(gateway, model=f"model-{count - 1}") as load:
                    samples = [await sample(gateway, load, SHORT) for _ in range(repeat + 1)]
            rows.append(Row(SHORT.name, SHORT.title.format(count), DELTAWIRE, count, samples[1:]))
    return rows


def _multiply(database: Path, count: int) -> None:
    """Copy the only model under further names: 20,000 registrations would take minutes."""
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        columns = [name for _, name, *_ in connection.execute("PRAGMA table_info(models)") if name != "id"]
        copied = ", ".join(columns)
        names = [(f"model-{number}",) for number in range(1, count)]
        connection.executemany(f"INSERT INTO models (id, {copied}) SELECT ?, {copied} FROM models LIMIT 1", names)  # noqa: S608
        connection.executemany("INSERT INTO names VALUES (?1, ?1, 0)", names)


async def _run(results: Results, names: list[str], field: Field) -> None:
    for name in names:
        curve = [models(REPEAT + 1)] if name == SHORT.name else [measure(each, field, REPEAT) for each in LOADS[name]]
        for rows in curve:
            measured = await rows
            print(report.text(measured), flush=True)
            results.rows += measured
            results.write(RUN / CURVES)


def main() -> None:
    """Measure, print, and write the points down."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.curves", description=__doc__)
    names = [*LOADS, SHORT.name]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"the curves (default: all): {', '.join(names)}")
    parser.add_argument("--peers", type=Path, default=PEERS, help=f"the folder of the peers (default {PEERS})")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(names):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    results = Results(machine(arguments.peers))
    field = Field(arguments.peers.absolute(), without=("smg", "litellm", SMALLEST))
    uvloop.run(_run(results, arguments.names or names, field))
    print(f"written to {RUN / CURVES}")
    sys.exit(report.failures(results) or None)


if __name__ == "__main__":
    main()
