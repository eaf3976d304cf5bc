"""The loop with and without `await`."""

from __future__ import annotations

import asyncio
import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from deltawire._answer import Answer
    from deltawire._tools.loop import PlannedCall, ToolLoop, ToolRun
    from deltawire.v1.chat_completion_pb2 import ChatRequest


def run(loop: ToolLoop, ask: Callable[[ChatRequest], Answer]) -> ToolRun:
    """Run a conversation; the calls of a turn run one after the other.

    Raises:
        TypeError: One of the functions must be awaited.
    """
    if waiting := [each.name for each in loop.functions if each.is_async]:
        message = f"{', '.join(waiting)} must be awaited: use AsyncClient"
        raise TypeError(message)
    while (planned := loop.receive(ask(loop.request))) is not None:
        loop.finish(planned, [_result(loop, each) for each in planned])
    return loop.run


def _result(loop: ToolLoop, planned: PlannedCall) -> str:
    try:
        value = planned.tool.function(**planned.arguments)
    except Exception as error:  # noqa: BLE001 (`on_error` decides)
        return loop.failed(planned, error)
    return loop.returned(planned, value)


async def run_async(loop: ToolLoop, ask: Callable[[ChatRequest], Awaitable[Answer]]) -> ToolRun:
    """Run a conversation; the calls of a turn run concurrently, functions without `async` in threads."""
    while (planned := loop.receive(await ask(loop.request))) is not None:
        loop.finish(planned, await _results(loop, planned))
    return loop.run


async def _results(loop: ToolLoop, planned: list[PlannedCall]) -> list[str]:
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_result_async(loop, each)) for each in planned]
    except BaseExceptionGroup as errors:
        # The first one ended the others. A caller can catch what its function raises, without an exception group.
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def _result_async(loop: ToolLoop, planned: PlannedCall) -> str:
    function = planned.tool.function
    try:
        if planned.tool.is_async:
            value: Any = await function(**planned.arguments)
        else:
            value = await asyncio.to_thread(function, **planned.arguments)
            if inspect.isawaitable(value):  # a function without `async` that returns a coroutine
                value = await value
    except Exception as error:  # noqa: BLE001 (`on_error` decides)
        return loop.failed(planned, error)
    return loop.returned(planned, value)
