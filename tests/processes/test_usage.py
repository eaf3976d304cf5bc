"""Usage records of several workers."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING, Any

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire_server.fake_vllm import Chunks, FakeVllm, Script
from deltawire_server.usage.report import read
from tests.processes.test_gateway import started
from tests.support.gateway import ask

if TYPE_CHECKING:
    from pathlib import Path

    from tests.processes.conftest import StartWorker

KEY = "secret-of-ann-alone"
ANN = (("authorization", f"Bearer {KEY}"),)


async def test_files_of_workers(start_worker: StartWorker, tmp_path: Path) -> None:
    """Each worker has its own; a completion that is passed on is recorded once, where it runs, with its caller."""
    folder = tmp_path / "usage"
    folder.mkdir()
    sections: dict[str, Any] = {"usage": {"folder": str(folder)}, "access": {"keys": f"ann call {KEY}"}}
    async with start_worker(0, **sections) as one, start_worker(1, **sections) as two:
        for worker in (one, two):
            await worker.create(ask(completion_id="c"), metadata=ANN)
            await worker.create(metadata=ANN)
    names = sorted(path.name for path in folder.iterdir())
    assert [name.split("-")[4] for name in names] == ["ab120000", "ab120100"]
    assert read(folder, ["caller"]).groups.keys() == {("ann",)}
    assert read(folder).groups[()].completions == 4


async def test_a_worker_that_is_killed(vllm: FakeVllm, tmp_path: Path) -> None:
    """Its running completion is lost and in no list; that of its sibling is still running, and in the list of every worker."""
    folder = tmp_path / "usage"
    folder.mkdir()
    chunks = Chunks()
    async with started(tmp_path, vllm.base_url, "--set", f"usage.folder={folder}") as gateway:
        both = await gateway.connected()
        ended = read(folder).groups[()].completions
        streams = []
        for worker in both:
            vllm.play(Script.chunks([chunks.role(), chunks.text("a"), asyncio.Event()]))
            streams.append(worker.stream())
            await anext(aiter(streams[-1]))
        totals = read(folder).groups[()]
        assert (totals.completions, totals.running, totals.lost) == (ended, 2, 0)
        for worker in both:
            assert {each.worker for each in (await worker.list(page_size=2)).completions} == {0, 1}
        os.kill(gateway.pid(1), signal.SIGKILL)
        await gateway.logged("worker ended", worker=1)
        totals = read(folder).groups[()]
        assert (totals.completions, totals.running, totals.lost) == (ended, 1, 1)
        await gateway.logged("serving", 2)
        for worker in await gateway.connected():
            page = await worker.list(states=[chat_pb.COMPLETION_STATE_RUNNING])
            assert ([each.worker for each in page.completions], list(page.unreachable_workers)) == ([0], [])
        for stream in streams:
            stream.cancel()
