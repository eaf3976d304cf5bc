"""`make conformance`: every client that is installed through every case, and a gateway through every check, as a table."""

from __future__ import annotations

import argparse
import asyncio
import functools
import subprocess
import sys
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from deltawire_server.fake_vllm import FakeVllm, Script
from tests.conformance import cases, client_driver, doors, server_checks
from tests.conformance.cases import group
from tests.conformance.client_driver import ClientError, Outcome
from tests.support.gateway_process import GatewayProcess

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from tests.conformance.case_pb2 import Case

SLOW = Script.generated(tokens=2000, tokens_per_second=400)
"""An answer that can be canceled, and resumed, while it is generated; most checks ask for few tokens of it."""
SERVER = "gateway"
"""The column of the server's checks, and their name for `--language`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for, and print the table. Returns 1 if anything failed, or if there was nothing to run."""
    given = _parsed(arguments)
    chosen = [case for case in cases.load() if case.name.startswith(given.case)]
    if given.list:
        print(*(f"{case.name}: {case.promise}" for case in chosen), sep="\n")
        return 0
    if given.show:
        print(*chosen, sep="\n")
        return 0
    outcomes: dict[str, list[Outcome]] = {}
    for language in given.language or _columns():
        print(f"{language} …", file=sys.stderr, flush=True)
        outcomes[language] = _server(given.case) if language == SERVER else _client(language, chosen)
    failed = [(language, each) for language, column in outcomes.items() for each in column if each.difference]
    for language, outcome in failed:
        print(f"{language}: {outcome.case}: {outcome.difference}\n")
    print(table(outcomes))
    return 1 if failed or not any(outcomes.values()) else 0


@asynccontextmanager
async def gateway_process(vllm: FakeVllm, folder: Path, access_keys: str = "") -> AsyncIterator[str]:
    """The address of a gateway process in front of a fake vLLM of this process."""
    listening = ("--vllm-url", vllm.base_url, "--listen", "127.0.0.1:0", "--metrics-listen", "off")
    flags = (*listening, "--set", "server.drain_delay=0", "--database-url", f"sqlite:///{folder}/registry.db")
    gateway = GatewayProcess(flags, {"DELTAWIRE_ACCESS_KEYS": access_keys}, folder / "gateway.log")
    # In threads, because the vLLM that the gateway asks runs in this one.
    await asyncio.to_thread(gateway.start)
    try:
        yield gateway.address
    finally:
        await asyncio.to_thread(gateway.stop)


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.conformance",
        description="Every client through every case, each door through the cases of one call, a gateway through every check.",
    )
    parser.add_argument(
        "--language",
        action="append",
        choices=_columns(),
        help=f"only this; repeatable. Doors: {', '.join(doors.DOORS)}. {SERVER}: the checks of a server",
    )
    parser.add_argument(
        "--case", default="", metavar="PREFIX", help="only cases and checks whose names begin with this"
    )
    parser.add_argument("--list", action="store_true", help="run nothing; print the names of the cases")
    parser.add_argument("--show", action="store_true", help="run nothing; print the cases, with all that is expected")
    return parser.parse_args(arguments)


def _columns() -> list[str]:
    return [*client_driver.languages(), *doors.DOORS, SERVER]


def _client(language: str, chosen: Sequence[Case]) -> list[Outcome]:
    if language in doors.DOORS:
        door = functools.partial(doors.opened, language)
        fitting = [case for case in chosen if doors.fits(case, language)]
        return asyncio.run(client_driver.run_side_by_side(doors.command(language), fitting, door=door))
    with tempfile.TemporaryDirectory() as folder:
        try:
            command = client_driver.build(language, Path(folder))
            return asyncio.run(client_driver.run_side_by_side(command, chosen))
        except (ClientError, subprocess.TimeoutExpired) as error:
            return [Outcome("build", str(error))]


def _server(prefix: str) -> list[Outcome]:
    async def check(folder: Path) -> list[Outcome]:
        async with FakeVllm(SLOW) as vllm, gateway_process(vllm, folder) as address:
            return await server_checks.run(address, prefix=prefix)

    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(check(Path(folder)))


def table(outcomes: Mapping[str, Sequence[Outcome]]) -> str:
    """Passed and all cases, by group and language."""
    groups = sorted({group(each.case) for column in outcomes.values() for each in column})
    rows = [["", *outcomes]]
    for name in [*groups, "all"]:
        row = [name]
        for column in outcomes.values():
            mine = [each for each in column if name in ("all", group(each.case))]
            passed = sum(not each.difference for each in mine)
            row.append(f"{passed}/{len(mine)}" if mine else "-")
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


if __name__ == "__main__":
    sys.exit(main())
