"""Two workers of one gateway in this process, each on its own port, so that a test can choose which one it calls."""

from __future__ import annotations

import socket
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol

import pytest
from grpc import aio

from deltawire_server.app import Gateway
from deltawire_server.processes.worker_process import WorkerProcess
from tests.support.gateway import Running, settings_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from deltawire_server.fake_vllm import FakeVllm

SMALL_WINDOW = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
"""Little of a stream that its caller does not read is in buffers."""


class StartWorker(Protocol):
    """Runs one of two workers in front of the test's `vllm`."""

    def __call__(
        self, number: int, incarnation: int = 0, **sections: Mapping[str, Any]
    ) -> AbstractAsyncContextManager[Running]: ...


@pytest.fixture
def start_worker(vllm: FakeVllm, tmp_path: Path) -> StartWorker:
    """Runs workers, whose parent is the test."""

    @asynccontextmanager
    async def start(number: int, incarnation: int = 0, **sections: Mapping[str, Any]) -> AsyncIterator[Running]:
        parent, control = socket.socketpair()
        with parent, control:
            parent.send(b"\n")  # it may serve
            process = WorkerProcess(
                number, 2, incarnation, "ab12", str(tmp_path), ("127.0.0.1:0",), control=control.fileno()
            )
            settings = settings_of(vllm.base_url, tmp_path, **sections)
            async with (
                Gateway(settings, process) as gateway,
                aio.insecure_channel(gateway.addresses[0], options=SMALL_WINDOW) as channel,
            ):
                yield Running(gateway, channel)

    return start


@pytest.fixture
async def workers(start_worker: StartWorker) -> AsyncIterator[list[Running]]:
    """Both workers."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(start_worker(number)) for number in range(2)]
