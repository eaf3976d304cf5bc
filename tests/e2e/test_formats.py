"""Every response format: the answer of a real vLLM follows it."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest

from deltawire import ResponseFormat, StopReason, json_schema
from tests.e2e.support import LIGHT_SCHEMA, MODEL, SEA

if TYPE_CHECKING:
    from deltawire import Answer, AsyncClient
    from tests.e2e.support import Engine

pytestmark = pytest.mark.e2e


async def ask(client: AsyncClient, form: ResponseFormat | str, *, max_tokens: int = 200) -> Answer:
    """The greedy answer in this format."""
    return await client.chat.create(SEA, model=MODEL, response_format=form, temperature=0.0, max_tokens=max_tokens)


async def test_text(client: AsyncClient) -> None:
    """The format `text` has no effect."""
    plain = await client.chat.create(SEA, model=MODEL, temperature=0.0, max_tokens=12)
    assert (await ask(client, "text", max_tokens=12)).text == plain.text


async def test_json_object(client: AsyncClient) -> None:
    """The answer begins an object, which a model this small may not close."""
    answer = await ask(client, "json_object", max_tokens=24)
    assert answer.text.lstrip().startswith("{")


@pytest.mark.parametrize("strict", [None, True])
async def test_json_schema(client: AsyncClient, engine: Engine, *, strict: bool | None) -> None:
    """The answer is JSON that follows the schema."""
    # Between two tokens of JSON white space is allowed, and the model would rather break lines than go on.
    breaks = {token: -100.0 for text in ("\n", "\n\n", "\n\n\n") for token in engine.tokens(text)}
    answer = await client.chat.create(
        'Say {"room": "hall", "percent": 5}.',
        model=MODEL,
        response_format=json_schema(LIGHT_SCHEMA, name="light", strict=strict),
        temperature=0.0,
        max_tokens=100,
        logit_bias=breaks,
    )
    assert answer.stop_reason == StopReason.STOP_REASON_END_OF_TURN
    value = json.loads(answer.text)
    assert value["room"] in ("kitchen", "bedroom", "hall")
    assert 0 <= value["percent"] <= 100


async def test_regex(client: AsyncClient) -> None:
    """The whole text matches the pattern."""
    answer = await ask(client, ResponseFormat(regex=r"[a-f]{3}-\d{2}"))
    assert re.fullmatch(r"[a-f]{3}-\d{2}", answer.text)


@pytest.mark.parametrize(
    "grammar",
    ['root ::= "up" | "down" | "wait " [0-9] "s"', 'start: "up" | "down" | "wait " /[0-9]/ "s"'],
    ids=["gbnf", "lark"],
)
async def test_grammar(client: AsyncClient, grammar: str) -> None:
    """The text follows the grammar, in either notation."""
    answer = await ask(client, ResponseFormat(grammar=grammar))
    assert re.fullmatch(r"up|down|wait \ds", answer.text)


async def test_choice(client: AsyncClient) -> None:
    """The text is one of the choices, including quotes."""
    values = ['a "quoted" one', "another", "日本"]
    answer = await ask(client, ResponseFormat(choice=ResponseFormat.Choice(values=values)))
    assert answer.text in values


async def test_structural_tag(client: AsyncClient) -> None:
    """The text in the tag follows the schema of the tag."""
    tag = {
        "type": "structural_tag",
        "format": {
            "type": "tag",
            "begin": "<light>",
            "content": {"type": "json_schema", "json_schema": LIGHT_SCHEMA},
            "end": "</light>",
        },
    }
    answer = await ask(client, ResponseFormat(structural_tag=json.dumps(tag)))
    found = re.fullmatch(r"<light>(.*)</light>", answer.text, re.DOTALL)
    assert found is not None, answer.text
    assert json.loads(found.group(1)).keys() == {"room", "percent"}
