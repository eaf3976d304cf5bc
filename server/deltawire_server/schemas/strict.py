"""Which checks the arguments of a request's tool calls have to pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltawire_server.schemas.check import argument_check
from deltawire_server.schemas.errors import SchemaError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from deltawire_server.upstream.engine import Engine
    from deltawire_server.upstream.request import ArgumentCheck, ChatRequest

MAX_STRICT_SCHEMAS = 1024 * 1024
"""Characters of all schemas of strict tools that are checked."""


def argument_checks(request: ChatRequest, engine: Engine) -> Mapping[str, ArgumentCheck]:
    """The checks of a request: those that the caller asked for, else those of strict tools that the engine may not enforce.

    A proxy may drop `strict`; then the model's arguments follow the schema or not. A schema that cannot be checked, or not in
    time, is left to the engine: the caller did not ask the gateway for a check.

    Args:
        request: What is asked.
        engine: What answers.

    Returns:
        By the tool's name.
    """
    if request.argument_checks or engine.strict_is_enforced:
        return request.argument_checks
    checks: dict[str, ArgumentCheck] = {}
    tools = [tool for tool in request.offered_tools if tool.strict and tool.input_schema]
    if sum(len(tool.input_schema) for tool in tools) > MAX_STRICT_SCHEMAS:
        return checks
    for tool in tools:
        try:
            checks[tool.name] = argument_check(tool.input_schema)
        except SchemaError:
            continue
    return checks
