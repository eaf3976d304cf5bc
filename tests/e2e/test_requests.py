"""Each field of a request has its effect on a real vLLM.

Where a model this small, or this server's flags, cannot show a field's effect, the test holds that vLLM takes the field; its
docstring says "accepted only", and why. Formats are in `test_formats`, tool calls in `test_tools`, stops in `test_text`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from deltawire import (
    AsyncClient,
    FieldNotSupportedError,
    InvalidRequestError,
    StopReason,
    UpstreamRejectedError,
    assistant,
    chat_request,
    tool,
    tool_definition,
    user,
)
from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1.tool_pb2 import ToolCall
from deltawire_server import settings
from deltawire_server.app import Gateway
from deltawire_server.fake_vllm.described import CHAT_FIELDS
from deltawire_server.upstream.base import CallContext
from deltawire_server.upstream.engine import EngineKind
from deltawire_server.upstream.request import ChatMessage, Reasoning, Role, Sampling, ToolSpec
from deltawire_server.upstream.request import ChatRequest as PlainRequest
from deltawire_server.upstream.vllm import VllmProvider
from deltawire_server.upstream.vllm_fields import STRICT
from tests.e2e.support import CALL_SECONDS, LIGHT, MODEL, SEA, WEATHER, call_text, forced

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from deltawire import Answer, ChatRequest
    from tests.e2e.support import Engine
    from tests.support.vllm_cpu import VllmServer

pytestmark = pytest.mark.e2e


def asked(prompt: Any = SEA, *, sampling: Any = None, **fields: Any) -> ChatRequest:  # noqa: ANN401 (whatever the message takes)
    """A greedy request for a short answer, with these fields."""
    request = chat_request(prompt, model=MODEL, temperature=0.0, max_tokens=8)
    request.MergeFrom(chat_pb.ChatRequest(**fields))
    if sampling:
        request.sampling.MergeFrom(chat_pb.Sampling(**sampling))
    return request


async def greedy(client: AsyncClient, **sampling: Any) -> Answer:  # noqa: ANN401 (whatever the sampling takes)
    """The greedy answer, with this sampling."""
    return await client.chat.create(asked(sampling=sampling))


async def prompt_tokens(client: AsyncClient, request: ChatRequest) -> int:
    """The number of prompt tokens of a request."""
    return (await client.chat.create(request)).usage.prompt_tokens


@pytest.mark.parametrize(
    "narrow",
    [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 0.0}],
    ids=lambda narrow: next(iter(narrow)),
)
async def test_fields_that_leave_the_likeliest_token(client: AsyncClient, narrow: dict[str, float]) -> None:
    """At a high temperature, each of these fields leaves the greedy text."""
    plain = await greedy(client, max_tokens=16)
    hot = [await greedy(client, max_tokens=16, temperature=2.0, seed=seed) for seed in (1, 2)]
    assert len({plain.text, *(answer.text for answer in hot)}) == 3
    for seed in (1, 2):
        answer = await greedy(client, **{"max_tokens": 16, "temperature": 2.0, "seed": seed} | narrow)
        assert answer.text == plain.text


@pytest.mark.parametrize(
    ("name", "value"), [("frequency_penalty", 2.0), ("presence_penalty", 2.0), ("repetition_penalty", 1.8)]
)
async def test_penalties(client: AsyncClient, name: str, value: float) -> None:
    """Penalties change the text, because they make received tokens less likely."""
    plain = await greedy(client, max_tokens=60, ignore_eos=True)
    other = await greedy(client, max_tokens=60, ignore_eos=True, **{name: value})
    assert len(set(other.text.split())) / len(other.text.split()) > len(set(plain.text.split())) / len(
        plain.text.split()
    )


async def test_min_tokens(client: AsyncClient) -> None:
    """The answer does not end earlier."""
    plain = await greedy(client, max_tokens=100)
    length = plain.usage.completion_tokens
    assert length < 90
    longer = await greedy(client, max_tokens=length + 10, min_tokens=length + 5)
    assert longer.usage.completion_tokens >= length + 5
    assert longer.text.startswith(plain.text)


async def test_ignore_eos(client: AsyncClient) -> None:
    """The answer continues to its token limit."""
    plain = await greedy(client, max_tokens=100)
    answer = await greedy(client, max_tokens=100, ignore_eos=True)
    assert plain.usage.completion_tokens < 100
    assert answer.usage.completion_tokens == 100


async def test_bad_words(client: AsyncClient, engine: Engine) -> None:
    """A bad word is not generated."""
    plain = await greedy(client, max_tokens=40)
    # Words are forbidden by their tokens, and with a space before them only if both forms have as many.
    word = next(
        word
        for word in plain.text.split()[1:]
        if len(engine.tokens(word)) == len(engine.tokens(f" {word}")) == 1 and word.isalpha()
    )
    answer = await greedy(client, max_tokens=40, bad_words=[word])
    assert word in plain.text.split()
    assert word not in answer.text.split()


async def test_seeds_differ(client: AsyncClient) -> None:
    """Different seeds give different texts; the same seed gives the same text."""
    texts = [(await greedy(client, max_tokens=16, temperature=1.5, seed=seed)).text for seed in (1, 2, 1)]
    assert texts[0] == texts[2] != texts[1]


async def test_several_answers_with_log_probabilities(client: AsyncClient) -> None:
    """Each choice has as many entries as tokens."""
    request = asked(
        choice_count=2,
        logprobs=chat_pb.Logprobs(top_k=2),
        sampling={"temperature": 1.0, "seed": 7, "max_tokens": 6, "ignore_eos": True},
    )
    answer = await client.chat.create(request)
    assert [len(choice.logprobs) for choice in answer.choices] == [6, 6]
    for choice in answer.choices:
        assert b"".join(entry.raw_bytes for entry in choice.logprobs).decode(errors="replace") == choice.text
        # The one that was chosen comes first, and need not be among the two likeliest.
        assert all(len(entry.alternatives) in (2, 3) for entry in choice.logprobs)


async def test_reasoning_of_an_earlier_turn(client: AsyncClient) -> None:
    """The reasoning is accepted; the template of this model omits it."""
    turn = assistant("Hi.", reasoning="They greet me.")
    plain = await prompt_tokens(client, asked([user("Hi"), assistant("Hi."), user(SEA)]))
    assert await prompt_tokens(client, asked([user("Hi"), turn, user(SEA)])) == plain


def history(call_id: str = "c", name: str = "get_weather", arguments: str = '{"city":"Oslo"}') -> ChatRequest:
    """A request with a tool call and its result."""
    past = ToolCall(call_id=call_id, tool_name=name, arguments=arguments)
    return asked([user("Weather?"), assistant(tool_calls=[past]), tool(call_id, "Rain")])


async def test_an_earlier_call(client: AsyncClient) -> None:
    """The prompt has the name and the arguments of the call; the id is accepted, but no template shows it."""
    plain = await prompt_tokens(client, history())
    assert await prompt_tokens(client, history(name="get_weather_of_tomorrow")) > plain
    assert await prompt_tokens(client, history(arguments='{"city":"Oslo","country":"Norway"}')) > plain
    assert await prompt_tokens(client, history(call_id="another-id")) == plain


async def test_the_description_of_a_tool(client: AsyncClient) -> None:
    """The prompt has name, description and input schema of a tool, but not its output schema."""

    async def cost(**fields: Any) -> int:  # noqa: ANN401 (whatever the tool takes)
        described = type(LIGHT)(**({"name": "t", "input_schema": "{}"} | fields))
        return await prompt_tokens(client, asked(tools=[described]))

    plain = await cost()
    assert await cost(name="a_much_longer_name") > plain
    assert await cost(description="What it does and when to use it") > plain
    assert await cost(input_schema='{"type":"object","properties":{"some_city":{"type":"string"}}}') > plain
    assert await cost(output_schema='{"type":"object","properties":{"some_city":{"type":"string"}}}') == plain


async def test_only_allowed_tools_are_shown(client: AsyncClient) -> None:
    """The prompt has as many tokens as with that tool alone, and a required call is one of it."""
    alone = await prompt_tokens(client, asked(tools=[LIGHT]))
    request = asked(tools=[WEATHER, LIGHT], allowed_tools=["set_light"])
    assert await prompt_tokens(client, request) == alone
    request.tool_choice.mode = request.tool_choice.MODE_REQUIRED
    request.sampling.max_tokens = 512
    answer = await client.chat.create(request)
    assert {call.tool_name for call in answer.tool_calls} == {"set_light"}
    assert answer.tool_calls_executable


async def test_a_tool_that_is_not_allowed_fails(client: AsyncClient) -> None:
    """A call of a tool that is not allowed is not executable."""
    request = asked(
        tools=[WEATHER, tool_definition("other", "", input_schema={})],
        allowed_tools=["get_weather"],
        response_format=forced(call_text("{}", name="other")),
        sampling={"max_tokens": 100},
    )
    answer = await client.chat.create(request)
    assert not answer.tool_calls
    assert len(answer.failed_tool_calls) == 1


async def test_template_arguments(client: AsyncClient) -> None:
    """The template shows an argument to the model."""
    plain = await prompt_tokens(client, asked())
    assert await prompt_tokens(client, asked(chat_template_kwargs='{"date_string": "1 May 2026"}')) > plain
    assert await prompt_tokens(client, asked(chat_template_kwargs='{"no_such": "1 May 2026"}')) == plain


async def test_every_effort(client: AsyncClient) -> None:
    """The template shows the effort to the model; no reasoning is shown in another way too."""
    words = [number for number in chat_pb.ReasoningEffort.values() if number]
    costs = {number: await prompt_tokens(client, asked(reasoning=chat_pb.Reasoning(effort=number))) for number in words}
    plain = await prompt_tokens(client, asked())
    assert all(cost > plain for cost in costs.values())
    assert costs[chat_pb.REASONING_EFFORT_NONE] > costs[chat_pb.REASONING_EFFORT_LOW]


async def test_a_token_budget_without_a_reasoning_parser(client: AsyncClient) -> None:
    """VLLM rejects the budget, and the caller gets a normal error."""
    with pytest.raises(UpstreamRejectedError) as caught:
        await client.chat.create(asked(reasoning=chat_pb.Reasoning(token_budget=5)))
    assert "thinking_token_budget" in caught.value.message


@pytest.mark.parametrize(
    "fields",
    [
        {"priority": -3},
        {"priority": 3},
        {"cache_salt": "0123456789abcdef"},
        {"cache_salt": "ß" * 128},
        {"user": "user-1"},
        {"reasoning": chat_pb.Reasoning(include=True)},
        {"reasoning": chat_pb.Reasoning(include=False)},
    ],
    ids=lambda fields: next(iter(fields)),
)
async def test_taken(client: AsyncClient, fields: dict[str, Any]) -> None:
    """The field is accepted, and the answer is the same.

    The server does not schedule by priority (priority), its cache is not seen from outside (cache_salt), it makes no use of the
    user, and it has no reasoning parser (include).
    """
    plain = await client.chat.create(asked())
    assert (await client.chat.create(asked(**fields))).text == plain.text


@pytest.mark.parametrize("salt", ["a" * 129, "a/b"])
async def test_an_invalid_cache_salt(client: AsyncClient, salt: str) -> None:
    """VLLM rejects a salt that its schema allows; the error names the field."""
    with pytest.raises(UpstreamRejectedError) as caught:
        await client.chat.create(asked(cache_salt=salt))
    assert [violation.field for violation in caught.value.violations] == ["chat.cache_salt"]


EXTRA = "allowed_*,include_stop_str_in_output,repetition_detection,guided_json"


@pytest.fixture
async def generous(vllm: VllmServer, tmp_path: Path) -> AsyncIterator[AsyncClient]:
    """A client of a gateway, in this process, whose operator allows some further fields."""
    flags = ["--listen", "127.0.0.1:0", "--database-url", f"sqlite:///{tmp_path / 'registry.db'}"]
    flags += ["--set", f"providers.vllm.allowed_extra_fields={EXTRA}"]
    variables = {"VLLM_URL": vllm.base_url, "VLLM_API_TOKEN": vllm.api_key}
    async with (
        Gateway(settings.parse(flags, variables).settings) as gateway,
        AsyncClient(gateway.addresses[0], timeout=CALL_SECONDS) as client,
    ):
        yield client


async def test_extra_fields(generous: AsyncClient, engine: Engine) -> None:
    """An extra field forces a token, and another one includes the stop text."""
    [token] = engine.tokens("cat")
    answer = await generous.chat.create(
        asked(extra_body=json.dumps({"allowed_token_ids": [token]}), sampling={"max_tokens": 3})
    )
    assert answer.text == "catcatcat"
    answer = await generous.chat.create(
        asked(
            extra_body='{"include_stop_str_in_output": true}',
            response_format=forced("one two three"),
            sampling={"stop": ["two"]},
        )
    )
    assert answer.text == "one two"


async def test_a_model_that_repeats_itself(generous: AsyncClient, engine: Engine) -> None:
    """The engine detects repetition only on request by an extra field; then the stop reason is REPETITION."""
    [token] = engine.tokens("cat")
    request = asked(
        extra_body='{"repetition_detection": {"max_pattern_size": 2, "min_count": 4}}',
        sampling={"logit_bias": {token: 100.0}, "max_tokens": 40, "ignore_eos": True},
    )
    answer = await generous.chat.create(request)
    assert answer.stop_reason == StopReason.STOP_REASON_REPETITION
    assert answer.choices[0].engine_finish_reason == "repetition"
    assert answer.text.startswith("catcat")
    assert answer.usage.completion_tokens < 40


async def test_extra_fields_that_are_not_allowed(client: AsyncClient, generous: AsyncClient) -> None:
    """A field that the operator does not allow, or that vLLM would ignore, is refused."""
    with pytest.raises(InvalidRequestError, match="allowed_extra_fields"):
        await client.chat.create(asked(extra_body='{"allowed_token_ids": [5]}'))
    with pytest.raises(FieldNotSupportedError) as caught:
        await generous.chat.create(asked(extra_body='{"guided_json": {}}'))
    assert [violation.field for violation in caught.value.violations] == ["chat.extra_body.guided_json"]
    assert "guided_json" in caught.value.message


@pytest.fixture
async def provider(vllm: VllmServer) -> AsyncIterator[VllmProvider]:
    """The gateway's own side of vLLM."""
    provider = VllmProvider("vllm", vllm.base_url, api_token=vllm.api_key, tls=False)
    yield provider
    await provider.close()


async def test_vllm_has_every_field(provider: VllmProvider) -> None:
    """The OpenAPI document of vLLM has every field, so there is no notice; the document of the fake vLLM has the same fields."""
    request = PlainRequest(
        MODEL,
        (ChatMessage(Role.USER, ("hi",)),),
        tools=(ToolSpec("t", strict=True),),
        parallel_tool_calls=True,
        sampling=Sampling(max_tokens=1, bad_words=("x",)),
        reasoning=Reasoning("low", include=True),
        priority=0,
        cache_salt="s",
        chat_template_kwargs='{"a":1}',
        user="me",
    )
    async with provider.stream_chat(request, MODEL, CallContext("r")) as answering:
        assert answering.notices == ()
        assert b'"error"' not in b"".join([data async for data in answering.body])
    (reader,) = provider._engines.values()
    engine = await reader.known()
    assert (engine.kind, engine.detail) == (EngineKind.VLLM, "")
    assert engine.fields == frozenset({*CHAT_FIELDS, STRICT})
