"""A process that is killed in the midst of its writes leaves a database that is whole, with all that it had done."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from deltawire_server.registry.store import Change, ChangeKind, Store
from tests.registry.databases import execute, whole
from tests.registry.writer import change_of
from tests.support.gateway import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deltawire_server.registry.model import Model

KILLS = 20


@pytest.fixture
def url(database_url: str) -> str:
    """Of each kind of database."""
    return database_url


@pytest.fixture
def writer(url: str) -> Iterator[subprocess.Popen[str]]:
    """Starts processes that write to the database."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.registry.writer", url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait() == 0


def kill_one(writer: subprocess.Popen[str], writes: int, seconds: float) -> list[Change]:
    """Start a writer, kill it so long after so many writes; what it said it did."""
    assert writer.stdin is not None
    assert writer.stdout is not None
    writer.stdin.write("\n")
    writer.stdin.flush()
    process = int(writer.stdout.readline())
    lines = []
    for _ in range(writes):
        lines.append(writer.stdout.readline())
        assert lines[-1] != "ended\n", "the writer has failed"
    time.sleep(seconds)  # not for something to happen: any moment is as good as any other
    os.kill(process, signal.SIGKILL)
    while (line := writer.stdout.readline()) != "ended\n":
        lines.append(line)
    # Whole, since a pipe takes lines of this length whole or not at all.
    return [change_of(line) for line in lines]


def is_alone(url: str) -> bool:
    """Whether nobody is at work on the database: PostgreSQL may still be committing what the dead one had asked for."""
    if url.startswith("sqlite"):
        return True
    others = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    return not execute(url, others)


async def test_killed_at_any_moment(url: str, writer: subprocess.Popen[str]) -> None:
    """It can be opened, no row is half there, and it is at most one write, just done, ahead of what was said."""
    moments = random.Random(20260304)  # noqa: S311 (no secret)
    models: dict[str, Model] = {}
    revision = 1
    said = 0
    for number in range(KILLS):
        # The first ones before anything is written, with the tables half made.
        changes = kill_one(writer, 0 if number < 5 else moments.randint(1, 4), moments.uniform(0, 0.04))
        said += len(changes)
        await until(lambda: is_alone(url))
        store = Store(url)
        await store.open()
        try:
            found, all_models = await store.load()
            unsaid = await store.changes_after(changes[-1].revision if changes else revision)
        finally:
            await store.close()
        assert unsaid is not None
        assert len(unsaid) <= 1
        for change in changes + unsaid:
            assert change.revision == revision + 1
            revision = change.revision
            assert change.model is not None
            if change.kind is ChangeKind.REMOVED:
                assert models.pop(change.model_id) == change.model
            else:
                models[change.model_id] = change.model
        assert found == revision
        assert all_models == [model for _, model in sorted(models.items())]
        assert list(whole(url)) == []
    assert said > KILLS
