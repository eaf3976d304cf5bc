"""Which checks apply to the arguments of a request's tool calls."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from deltawire_server.schemas.check import MAX_EFFORT, compiled_checks
from deltawire_server.upstream.request import CheckBudget

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from deltawire_server.upstream.engine import Engine
    from deltawire_server.upstream.request import ArgumentCheck, ChatRequest

MAX_STRICT_SCHEMAS = 1024 * 1024
"""Characters of all schemas of strict tools that are checked."""


async def argument_checks(
    request: ChatRequest, engine: Engine
) -> Mapping[str, Callable[[str], tuple[str, str] | None]]:
    """The checks of one answer: those that the caller asked for, else those of strict tools that the engine may not enforce.

    A proxy may drop `strict`; then the model's arguments follow the schema or not. A schema that cannot be checked, or not in
    time, is left to the engine: the caller did not ask the gateway for a check.

    Args:
        request: What is asked.
        engine: What answers.

    Returns:
        By the tool's name. They share one `CheckBudget`, so use them for one answer only.
    """
    checks = request.argument_checks
    if not checks and not engine.strict_is_enforced:
        tools = [tool for tool in request.offered_tools if tool.strict and tool.input_schema]
        if sum(len(tool.input_schema) for tool in tools) <= MAX_STRICT_SCHEMAS:
            checks, _ = await compiled_checks({tool.name: tool.input_schema for tool in tools})
    budget = CheckBudget(MAX_EFFORT)
    return {name: partial(_checked, check, budget) for name, check in checks.items()}


def _checked(check: ArgumentCheck, budget: CheckBudget, arguments: str) -> tuple[str, str] | None:
    return check(arguments, budget)
