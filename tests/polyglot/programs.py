"""The other languages' programs: found, run with a limit on their time, and always ended by the test that began them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
from asyncio import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from typing import IO

ROOT = Path(__file__).parents[2]
PROTOS = ROOT / "protos"
NODE_CLIENT = ROOT / "client" / "examples" / "node"
ENVOY_CONFIG = ROOT / "server" / "deploy" / "envoy" / "envoy.yaml"
WEB_CONFIG = ENVOY_CONFIG.with_name("web.yaml")
JWT_CONFIG = ENVOY_CONFIG.with_name("jwt.yaml")
MTLS_CONFIG = ENVOY_CONFIG.with_name("mtls.yaml")
RATE_LIMIT_CONFIG = ENVOY_CONFIG.with_name("ratelimit.yaml")
LOAD_CONFIG = ENVOY_CONFIG.with_name("load.yaml")

LIMIT = 60.0
"""Seconds after which a wait has failed. Nothing takes a tenth of it; a busy machine may."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended, and what it said."""

    status: int
    out: str
    err: str


def tool(name: str) -> str:
    """The path of a program of this environment, or of the system. The test fails if there is none."""
    beside = Path(sys.executable).with_name(name)
    path = str(beside) if beside.exists() else shutil.which(name)
    if path is None:
        pytest.fail(f"{name} is not installed: `make polyglot` installs what these tests need (Node itself it cannot)")
    return path


def node_chat() -> tuple[str, str]:
    """The command of the Node client. The test fails if its packages are not installed."""
    if not (NODE_CLIENT / "node_modules").is_dir():
        pytest.fail("the Node client's packages are not installed: `make polyglot` does it")
    return tool("node"), str(NODE_CLIENT / "chat.js")


@contextlib.asynccontextmanager
async def started(
    *command: str,
    home: Path,
    folder: Path | None = None,
    stdin: int | None = None,
    out: IO[bytes] | int = subprocess.PIPE,
    err: IO[bytes] | int = subprocess.PIPE,
) -> AsyncIterator[subprocess.Process]:
    """A program, ended on leaving if it runs still.

    Its environment is bare: no proxy that the machine may have set comes between it and the gateway.
    """
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8"}
    process = await asyncio.create_subprocess_exec(
        *command, stdin=stdin, stdout=out, stderr=err, env=environment, cwd=folder
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(LIMIT):
                await process.communicate()
        except TimeoutError:
            process.kill()
            await process.communicate()


async def run(*command: str, home: Path, folder: Path | None = None) -> Outcome:
    """Run a program to its end, in the given folder or in this process's."""
    async with started(*command, home=home, folder=folder) as process, asyncio.timeout(LIMIT):
        out, err = await process.communicate()
        status = await process.wait()
    return Outcome(status, out.decode(), err.decode())
