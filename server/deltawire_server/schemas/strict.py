"""Selects the argument checks for the tool calls of a request."""

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
"""Limit for the schemas of all strict tools together, in characters; above it, they are not checked."""


async def argument_checks(
    request: ChatRequest, engine: Engine
) -> Mapping[str, Callable[[str], tuple[str, str] | None]]:
    """The checks for one answer: those that the caller requested, else those of strict tools if the engine may not enforce them.

    A proxy may drop `strict`, and then the arguments may violate the schema. A schema that the gateway does not support is not
    checked here, because the caller did not request a check.

    Args:
        request: The request.
        engine: The engine.

    Returns:
        The checks by tool name. They share one `CheckBudget`, so use them for one answer only.
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
