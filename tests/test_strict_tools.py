"""Tools with `strict` where a proxy may drop it: the gateway checks the arguments itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deltawire_server.schemas import argument_check
from deltawire_server.schemas.strict import MAX_STRICT_SCHEMAS, argument_checks
from deltawire_server.upstream.engine import Engine, EngineKind
from deltawire_server.upstream.request import ChatMessage, ChatRequest, Role, ToolSpec

CITY = '{"type":"object","properties":{"city":{"type":"string"}},"required":["city"]}'
TOOLS = (
    ToolSpec("strict", input_schema=CITY, strict=True),
    ToolSpec("free", input_schema=CITY, strict=False),
    ToolSpec("unsaid", input_schema=CITY),
    ToolSpec("any", strict=True),
    ToolSpec("invalid", input_schema='{"type":"nothing"}', strict=True),
)
REQUEST = ChatRequest("m", (ChatMessage(Role.USER, ("hi",)),), tools=TOOLS)
VLLM = Engine(EngineKind.VLLM)


@pytest.mark.parametrize("kind", [EngineKind.PROXY, EngineKind.UNKNOWN])
async def test_strict_tools_are_checked_here(kind: EngineKind) -> None:
    """Only they, and only if there is a schema that can be checked."""
    checks = await argument_checks(REQUEST, Engine(kind))
    assert [*checks] == ["strict"]
    assert checks["strict"]('{"city":"Oslo"}') is None
    assert checks["strict"]('{"city":5}')


async def test_a_vllm_itself_enforces_it() -> None:
    """Nothing is checked twice."""
    assert await argument_checks(REQUEST, VLLM) == {}


async def test_what_the_caller_asked_for_comes_first() -> None:
    """With `validate_schema` all tools are checked, whatever answers."""
    request = replace(REQUEST, argument_checks={"free": argument_check(CITY)})
    for engine in (VLLM, Engine(EngineKind.PROXY)):
        checks = await argument_checks(request, engine)
        assert [*checks] == ["free"]
        assert checks["free"]('{"city":5}') == ("/city", '5 is not of type "string"')


async def test_schemas_that_are_too_large_are_left_to_the_engine() -> None:
    """The caller did not ask for a check, so that it is no reason to refuse the call."""
    large = replace(TOOLS[0], input_schema=CITY[:-1] + " " * MAX_STRICT_SCHEMAS + "}")
    assert await argument_checks(replace(REQUEST, tools=(large,)), Engine(EngineKind.PROXY)) == {}
