"""Usage records of several workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltawire_server.usage.report import read
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
