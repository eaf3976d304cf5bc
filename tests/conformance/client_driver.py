"""Runs a client program through cases: starts it, speaks its protocol, and compares what it reports with what is expected."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import os
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from google.protobuf import json_format
from google.protobuf.message import DecodeError

from tests.conformance import scripted_server
from tests.conformance.cases import ID_OF_REQUEST
from tests.conformance.conformance_pb2 import ClientCase, ClientResult
from tests.conformance.fold import tidy_result

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractAsyncContextManager
    from types import TracebackType

    from tests.conformance.case_pb2 import Case
    from tests.conformance.scripted_server import ScriptedServer

    Door = Callable[[str], AbstractAsyncContextManager[str]]

ROOT: Final = Path(__file__).parents[2]
CLIENTS: Final = Path(__file__).parent / "clients"
CASE_LIMIT: Final = 30.0
"""Seconds after which a client hangs. No case takes a tenth of it; a busy machine may."""
BREAK_DELAYS: Final = (0.05, 0.5, 3.0)
"""Seconds before a call is broken off: see `ScriptedServer.play`."""
BUILD_LIMIT: Final = 600.0
_MAX_RESULT: Final = 64 * 1024 * 1024


class ClientError(Exception):
    """A client program cannot be built, started or understood."""


@dataclass(frozen=True)
class Outcome:
    """The result of a case or a check; `difference` is empty if it passed."""

    case: str
    difference: str = ""


def languages() -> list[str]:
    """The names of the clients in the kit: the folders in `clients/`."""
    return sorted(path.parent.name for path in CLIENTS.glob("*/command"))


def build(language: str, folder: Path) -> list[str]:
    """Build a client program into a folder. Returns the command that starts it, from the root of the repository.

    Raises:
        ClientError: It cannot be built; the message has the output.
    """
    source = CLIENTS / language
    script = source / "build.sh"
    if script.exists():
        made = subprocess.run(
            [str(script), str(folder)],
            cwd=ROOT,
            env=_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=BUILD_LIMIT,
            check=False,
        )
        if made.returncode:
            raise ClientError(f"{script} failed with status {made.returncode}:\n{made.stdout}")
    return [line.replace("OUTDIR", str(folder)) for line in (source / "command").read_text().splitlines() if line]


def _environment() -> dict[str, str]:
    """That of this process, with the Python that runs it as `python`, and without a proxy between client and server."""
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return kept | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": ""}


class Program:
    """A client program that runs: `async with Program(command) as program`. Leaving ends it.

    Attributes:
        process: The process.
    """

    process: asyncio.subprocess.Process

    def __init__(self, command: Sequence[str], limit: float = CASE_LIMIT) -> None:
        self._command = command
        self._limit = limit
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 -- closed on leaving

    async def __aenter__(self) -> Self:
        try:
            self.process = await asyncio.create_subprocess_exec(
                *self._command,
                cwd=ROOT,
                env=_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                limit=_MAX_RESULT,
                start_new_session=True,
            )
        except OSError as error:
            self._errors.close()
            raise ClientError(f"{self._command[0]} cannot be started: {error}") from error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.kill()
        self._errors.close()

    async def kill(self) -> None:
        """End the program now, if it runs."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
        # What it did not read does not matter.
        assert self.process.stdin is not None
        self.process.stdin.close()
        await self.process.wait()

    async def exchange(self, case: ClientCase) -> ClientResult:
        """Exchange a case for its result.

        Raises:
            ClientError: The program ended, or does not speak the protocol; the message has the end of its errors.
            TimeoutError: It hangs.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        data = case.SerializeToString()
        try:
            async with asyncio.timeout(self._limit):
                self.process.stdin.write(struct.pack(">I", len(data)) + data)
                await self.process.stdin.drain()
                (size,) = struct.unpack(">I", await self.process.stdout.readexactly(4))
                if size > _MAX_RESULT:
                    raise ClientError(f"a result of {size} bytes: does the program print to its standard output?")
                return ClientResult.FromString(await self.process.stdout.readexactly(size))
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            raise ClientError(f"the program ended within the case\n{await self._end()}") from error
        except DecodeError as error:
            raise ClientError(f"the program wrote something else than a ClientResult: {error}") from error

    async def finish(self) -> str:
        """Close the program's input. Returns what is wrong with its end, or ""."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            async with asyncio.timeout(self._limit):
                status = await self.process.wait()
        except TimeoutError:
            return f"the program has not ended {self._limit:g} s after the end of its input"
        return "" if status == 0 else f"the program ended with status {status}\n{await self._end()}"

    async def _end(self) -> str:
        """How it ended, and the last lines of its standard error."""
        await self.kill()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").splitlines()[-20:]
        return "\n".join([f"(status {self.process.returncode})", *lines])


async def run(
    command: Sequence[str], cases: Iterable[Case], *, limit: float = CASE_LIMIT, door: Door = contextlib.nullcontext
) -> list[Outcome]:
    """Run a client program through cases, in order. A program that ends or hangs is started again for the next case.

    Args:
        command: See `build`.
        cases: The cases.
        limit: Seconds after which a program hangs.
        door: Given the address of the scripted server, the one at which the program reaches it.

    Raises:
        ClientError: The program cannot be started.
    """
    outcomes: list[Outcome] = []
    remaining = list(cases)
    while remaining:
        async with (
            scripted_server.serving() as server,
            door(server.target) as target,
            Program(command, limit) as program,
        ):
            while remaining:
                case = remaining.pop(0)
                try:
                    difference = await _difference(server, target, program, case)
                except TimeoutError:
                    outcomes.append(Outcome(case.name, f"no result after {limit:g} s; the program was ended"))
                    break
                except ClientError as error:
                    outcomes.append(Outcome(case.name, str(error)))
                    break
                outcomes.append(Outcome(case.name, difference))
            else:
                if wrong := await program.finish():
                    outcomes.append(Outcome("end/of-input", wrong))
    return outcomes


async def run_side_by_side(
    command: Sequence[str], cases: Sequence[Case], programs: int = 2, *, door: Door = contextlib.nullcontext
) -> list[Outcome]:
    """The same with several programs at once, each with its part of the cases: most of their time they wait."""
    shares = [cases[number::programs] for number in range(programs)]
    results = await asyncio.gather(*(run(command, share, door=door) for share in shares))
    return sorted((outcome for result in results for outcome in result), key=lambda outcome: outcome.case)


async def _difference(server: ScriptedServer, target: str, program: Program, case: Case) -> str:
    """Play one case; one that breaks a call off, later if it fails. Returns what is wrong, or ""."""
    breaks = any(step.HasField("break") for call in case.calls for step in call.steps)
    difference = ""
    for delay in BREAK_DELAYS if breaks else (0.0,):
        difference = await _played(server, target, program, case, delay)
        if not difference:
            break
    return difference


async def _played(server: ScriptedServer, target: str, program: Program, case: Case, delay: float) -> str:
    server.play(case, delay)
    call = ClientCase()
    call.CopyFrom(case.call)
    call.target = target
    began = time.monotonic()
    try:
        result = tidy_result(await program.exchange(call))
    except BaseException:
        await program.kill()
        await server.finish()
        raise
    wrong = await server.finish()
    compared = [_compare(expected, result, server.completion_id) for expected in case.expected]
    if all(compared):
        wrong.append(min(compared, key=len))
    if not wrong:
        return ""
    return "\n".join([case.promise, *wrong, f"(after {time.monotonic() - began:.2f} s)"])


def _compare(expected: ClientResult, given: ClientResult, completion_id: str) -> str:
    """The difference between two results, or ""."""
    left, right = ClientResult(), ClientResult()
    left.CopyFrom(expected)
    right.CopyFrom(given)
    if left.HasField("failure") and not left.failure.code:
        right.failure.code = 0
    old, new = (
        json_format.MessageToJson(each, ensure_ascii=False, sort_keys=True)
        .replace(ID_OF_REQUEST, completion_id)
        .splitlines()
        for each in (left, right)
    )
    return "\n".join(difflib.unified_diff(old, new, "expected", "reported", lineterm="", n=4))
