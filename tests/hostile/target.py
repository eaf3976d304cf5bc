"""The gateway under attack: a process of its own with the default settings, an access key, and an upstream that obeys."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import sys
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from grpc import aio

from tests.faults.upstream import MODEL, Plan, Upstream
from tests.support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

KEY = "a-key-that-only-the-tests-know"
CHAT = "/deltawire.v1.ChatCompletion/"
MODELS = "/deltawire.v1.ModelRegistry/"

START_SECONDS = 30.0
CALL_SECONDS = 60.0
"""Deadline of every call: a gateway that hangs is reported, not waited for."""


@dataclass
class Target:
    """A gateway process.

    Attributes:
        address: Where it listens.
        pid: Of its process.
        upstream: What answers its provider's requests.
        log: The file with what it wrote.
    """

    address: str
    pid: int
    upstream: Upstream
    log: Path

    @property
    def resident(self) -> int:
        """Bytes in memory now."""
        return self._status("VmRSS")

    @property
    def peak(self) -> int:
        """The most bytes that were in memory since `reset_peak`."""
        return self._status("VmHWM")

    def reset_peak(self) -> None:
        """Forget the peak."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def _status(self, name: str) -> int:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024

    @asynccontextmanager
    async def channel(self) -> AsyncIterator[aio.Channel]:
        """A connection of its own that takes and sends messages of any size."""
        options = [
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        async with aio.insecure_channel(self.address, options) as channel:
            yield channel

    async def call(
        self,
        method: str,
        request: bytes,
        *,
        key: str | None = KEY,
        plan: Plan | None = None,
        metadata: Mapping[str, str] | None = None,
        compression: grpc.Compression | None = None,
    ) -> str:
        """Make one call on a connection of its own and read it to its end.

        Args:
            method: As gRPC names it.
            request: The request's bytes, which need not be a message.
            key: The access key; `None` to send none.
            plan: What the upstream answers.
            metadata: More of it.
            compression: Of the request.

        Returns:
            The status code's name.
        """
        request_id = secrets.token_hex(8)
        headers = {"x-request-id": request_id, **(metadata or {})}
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        if plan is not None:
            self.upstream.plans[request_id] = plan
        async with self.channel() as channel:
            # Every method is called as a stream: a unary one is the same on the wire.
            start: aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(method)
            call = start(request, timeout=CALL_SECONDS, metadata=tuple(headers.items()), compression=compression)
            try:
                async for _ in call:
                    pass
            except aio.AioRpcError as error:
                return error.code().name
            finally:
                self.upstream.plans.pop(request_id, None)
        return "OK"

    async def calls(self, count: int, method: str, request: bytes, *, key: str | None = KEY) -> Counter[str]:
        """Make equal calls at once, each on a connection of its own.

        Returns:
            How many ended with which status code.
        """
        return Counter(await asyncio.gather(*(self.call(method, request, key=key) for _ in range(count))))


@asynccontextmanager
async def target(folder: Path, settings: Mapping[str, str] | None = None) -> AsyncIterator[Target]:
    """Run a gateway process, with some settings that differ from the defaults.

    Args:
        folder: For its files.
        settings: By `section.key`.
    """
    (folder / "access.keys").write_text(f"tests all {KEY}\n")
    (folder / "access.keys").chmod(0o600)
    log = folder / "gateway.log"
    address = f"127.0.0.1:{free_port()}"
    async with Upstream() as upstream:
        command = [
            str(Path(sys.executable).with_name("deltawire-server")),
            f"--listen={address}",
            f"--vllm-url={upstream.base_url}",
            f"--database-url=sqlite:///{folder}/registry.db",
            f"--access-keys-file={folder}/access.keys",
            "--set=server.drain_delay=0",
            "--set=server.drain_grace=0",
            *(f"--set={name}={value}" for name, value in (settings or {}).items()),
        ]
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("DELTAWIRE_", "VLLM_"))
        }
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(*command, stdout=output, stderr=output, env=environment)
            try:
                async with aio.insecure_channel(address) as channel:
                    await asyncio.wait_for(channel.channel_ready(), START_SECONDS)
                yield Target(address, process.pid, upstream, log)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
                try:
                    await asyncio.wait_for(process.wait(), 10)
                except TimeoutError:
                    process.kill()
                    await process.wait()


__all__ = ["CHAT", "KEY", "MODEL", "MODELS", "Target", "target"]
