"""Both event loops: the gateway runs on uvloop, programs that embed it may not. Nothing may be left after a test."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

FACTORIES: Mapping[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
}


def pytest_asyncio_loop_factories(config: object, item: object) -> Mapping[str, Callable[[], Any]]:  # noqa: ARG001
    """Each test runs once on each."""
    return FACTORIES


def _sockets() -> int:
    count = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            count += os.readlink(entry).startswith("socket:")  # noqa: PTH115 (a target that is no path)
        except FileNotFoundError:
            continue  # the descriptor that lists them
    return count


@pytest.fixture(autouse=True)
async def nothing_is_left() -> AsyncIterator[None]:
    """After a test there are no more sockets and tasks than before, and no timers."""
    loop = asyncio.get_running_loop()
    sockets, tasks = _sockets(), len(asyncio.all_tasks())
    yield
    for _ in range(100):
        if _sockets() <= sockets and len(asyncio.all_tasks()) <= tasks:
            break
        await asyncio.sleep(0.01)
    assert _sockets() <= sockets
    assert len(asyncio.all_tasks()) <= tasks
    timers = [timer for timer in getattr(loop, "_scheduled", ()) if not timer.cancelled()]
    assert not timers
