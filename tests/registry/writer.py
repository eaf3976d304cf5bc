"""A process that writes to a registry without end, and says what it has done: for tests that kill it.

`python -m tests.registry.writer URL`. Each line on standard input starts a writer, which prints its process's id, then a line
for each write that has succeeded, once it has; when it has been killed, "ended" is printed.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

from deltawire_server.registry.rows import model_of_record, record_of
from deltawire_server.registry.store import Change, ChangeKind, Store
from tests.registry.databases import LLAMA

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


def line_of(change: Change) -> str:
    """A change as it is printed."""
    assert change.model is not None
    return json.dumps([change.revision, change.kind.name, change.model_id, record_of(change.model)])


def change_of(line: str) -> Change:
    """The change that was printed."""
    revision, kind, model_id, record = json.loads(line)
    return Change(revision, ChangeKind[kind], model_id, model_of_record(record))


async def writes(store: Store, number: int) -> AsyncGenerator[Change]:
    """Register, update twice and unregister, some models at a time."""
    models = []
    for step in range(1_000_000):
        model_id = f"{number}-{step}"
        model = await store.insert(replace(LLAMA, id=model_id, aliases=(f"{model_id}-a", f"{model_id}-b")))
        assert model is not None
        yield Change(model.revision, ChangeKind.ADDED, model_id, model)
        for aliases in ((), (f"{model_id}-b", f"{model_id}-c")):
            model = await store.update(model, replace(model, aliases=aliases))
            assert model is not None
            yield Change(model.revision, ChangeKind.MODIFIED, model_id, model)
        models.append(model)
        if len(models) == 3:
            gone = await store.delete(models.pop(0).aliases[1])
            assert gone is not None
            yield gone


async def write(url: str, number: int) -> None:
    """Open the database and write until killed."""
    # More room than one gets by chance, and so little that records are removed, too.
    store = Store(url, changes_kept=20)
    await store.open()
    async with aclosing(writes(store, number)) as changes:
        async for change in changes:
            # In one write: `print` makes two of it where Python does not buffer, and a kill between them leaves half a line.
            sys.stdout.write(f"{line_of(change)}\n")
            sys.stdout.flush()


def main() -> None:
    """Start writers: forked, since starting a Python takes longer than a test of one wants to."""
    for number, _ in enumerate(sys.stdin):
        process = os.fork()
        if process == 0:
            print(os.getpid(), flush=True)
            asyncio.run(write(sys.argv[1], number))
        os.waitpid(process, 0)
        print("ended", flush=True)


if __name__ == "__main__":
    main()
