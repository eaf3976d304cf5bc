"""Text: streamed and unary, several choices, log-probabilities, and every field of the sampling."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest

from deltawire import ChatMessage, ContentPart, Sampling, StopReason, assistant, developer, system, user
from deltawire.v1.chat_completion_pb2 import UsageProvenance
from deltawire.v1.message_pb2 import AssistantMessage, DeveloperMessage, SystemMessage, UserMessage
from tests.e2e.support import MODEL, SEA, forced, kinds

if TYPE_CHECKING:
    from deltawire import AsyncClient
    from tests.e2e.support import Engine

pytestmark = pytest.mark.e2e

EXACT = UsageProvenance.USAGE_PROVENANCE_EXACT


async def test_a_streamed_text(client: AsyncClient, engine: Engine) -> None:
    """Started, text deltas, one end of the choice, and Completed with the whole text and the exact usage."""
    async with client.chat.stream(SEA, model=MODEL, temperature=0.0, max_tokens=24, ignore_eos=True) as stream:
        events = [event async for event in stream]
        answer = await stream.final()
    assert kinds(events) == ["started", "text_delta", "choice_finished", "completed"]
    assert [event.sequence for event in events] == list(range(len(events)))
    started = events[0].started
    assert started.completion_id.startswith("cmpl-")
    assert (started.model, started.alias, started.provider_id) == ("vllm/smollm2", MODEL, "vllm")
    assert started.effective_sampling.max_tokens == 24
    pieces = [event.text_delta.text for event in events if event.HasField("text_delta")]
    assert len(pieces) > 3
    stated = events[-1].completed
    assert "".join(pieces) == stated.choices[0].message.text == answer.text
    assert answer.stop_reason == StopReason.STOP_REASON_OUT_OF_TOKENS
    assert answer.choices[0].engine_finish_reason == "length"
    assert stated.usage.provenance == EXACT
    assert stated.usage.prompt_tokens == engine.prompt_tokens(SEA)
    assert stated.usage.completion_tokens == 24
    assert not stated.HasField("error")
    assert stated.timings.total.ToNanoseconds() >= stated.timings.first_event_latency.ToNanoseconds() > 0


async def test_a_unary_text(client: AsyncClient, engine: Engine) -> None:
    """A unary call returns the same greedy answer as vLLM itself, with the same usage."""
    answer = await client.chat.create(SEA, model=MODEL, temperature=0.0, max_tokens=60)
    theirs = engine.ask(
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": SEA}], "temperature": 0, "max_tokens": 60},
    )
    assert answer.text == theirs["choices"][0]["message"]["content"]
    assert answer.stop_reason == StopReason.STOP_REASON_END_OF_TURN
    assert answer.choices[0].engine_finish_reason == theirs["choices"][0]["finish_reason"] == "stop"
    assert answer.usage.provenance == EXACT
    assert answer.usage.prompt_tokens == theirs["usage"]["prompt_tokens"]
    assert answer.usage.completion_tokens == theirs["usage"]["completion_tokens"]


async def test_characters_are_unchanged(client: AsyncClient) -> None:
    """Characters of several bytes and tokens, line ends, and text that looks like event framing are unchanged."""
    text = 'Zoë: 日本 👩‍🚀 e\u0301\n\ndata: [DONE]\n\n"quoted" \\ end'
    async with client.chat.stream(SEA, model=MODEL, response_format=forced(text)) as stream:
        pieces = [piece async for piece in stream.text]
        answer = await stream.final()
    assert "".join(pieces) == answer.text == text


async def test_roles_and_parts(client: AsyncClient) -> None:
    """Each role with a text or the same text as a part gives the same prompt; a turn of two parts is accepted."""
    turns = [system("Be brief."), developer("Be kind."), user("Hello there."), assistant("Hi."), user(SEA)]
    in_parts = [
        ChatMessage(system=SystemMessage(content=[ContentPart(text="Be brief.")])),
        ChatMessage(developer=DeveloperMessage(content=[ContentPart(text="Be kind.")])),
        ChatMessage(user=UserMessage(content=[ContentPart(text="Hello there.")])),
        ChatMessage(assistant=AssistantMessage(content=[ContentPart(text="Hi.")])),
        user(SEA),
    ]
    answers = [await client.chat.create(each, model=MODEL, max_tokens=8) for each in (turns, in_parts)]
    assert answers[0].text
    assert len({answer.usage.prompt_tokens for answer in answers}) == 1
    assert (await client.chat.create([user(["Hello", " there."]), user(SEA)], model=MODEL, max_tokens=8)).text


async def test_two_choices(client: AsyncClient) -> None:
    """Both choices are streamed, each ends once, and the usage counts both, and the prompt once."""
    async with client.chat.stream(
        SEA, model=MODEL, choice_count=2, temperature=1.0, max_tokens=12, ignore_eos=True, seed=7
    ) as stream:
        events = [event async for event in stream]
        answer = await stream.final()
    assert [event.choice_index for event in events if event.HasField("choice_finished")] in ([0, 1], [1, 0])
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        pieces = [
            event.text_delta.text
            for event in events
            if event.HasField("text_delta") and event.choice_index == choice.index
        ]
        assert "".join(pieces) == choice.text
        assert choice.stop_reason == StopReason.STOP_REASON_OUT_OF_TOKENS
    assert answer.usage.provenance == EXACT
    assert answer.usage.completion_tokens == 24


@pytest.mark.parametrize("whole", [False, True], ids=["streamed", "whole"])
async def test_log_probabilities_of_every_token(client: AsyncClient, *, whole: bool) -> None:
    """Each token has an entry with its bytes and the requested number of alternatives; the chosen one is the likeliest."""
    if whole:
        answer = await client.chat.create(SEA, model=MODEL, temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=3)
    else:
        async with client.chat.stream(
            SEA, model=MODEL, temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=3
        ) as stream:
            answer = await stream.final()
    entries = answer.choices[0].logprobs
    assert len(entries) == 8
    assert b"".join(entry.raw_bytes for entry in entries).decode() == answer.text
    for entry in entries:
        assert len(entry.alternatives) == 3
        assert entry.alternatives[0].token == entry.token
        assert entry.alternatives[0].raw_bytes == entry.raw_bytes
        assert entry.logprob == pytest.approx(entry.alternatives[0].logprob)
        assert math.exp(entry.logprob) <= 1.0


async def test_log_probabilities_without_alternatives(client: AsyncClient) -> None:
    """Without alternatives, only the chosen tokens have log-probabilities."""
    answer = await client.chat.create(SEA, model=MODEL, max_tokens=4, ignore_eos=True, logprobs=True)
    entries = answer.choices[0].logprobs
    assert [len(entry.alternatives) for entry in entries] == [0, 0, 0, 0]


async def test_a_stop_text(client: AsyncClient) -> None:
    """A stop text ends the answer, is not part of the text, and is reported."""
    answer_form = forced("one two three four")
    async with client.chat.stream(SEA, model=MODEL, response_format=answer_form, stop=["four", "three"]) as stream:
        answer = await stream.final()
    assert answer.text == "one two "
    assert answer.stop_reason == StopReason.STOP_REASON_STOP_SEQUENCE
    assert answer.choices[0].matched_stop == "three"
    assert answer.choices[0].engine_finish_reason == "stop"
    whole = await client.chat.create(SEA, model=MODEL, response_format=answer_form, stop=["four", "three"])
    assert whole.text == answer.text
    assert whole.stop_reason == StopReason.STOP_REASON_STOP_SEQUENCE
    assert whole.completed.choices[0].matched_stop == "three"


async def test_a_stop_token(client: AsyncClient, engine: Engine) -> None:
    """A stop token ends the answer and is reported."""
    plain = await client.chat.create(SEA, model=MODEL, temperature=0.0, max_tokens=8)
    last = engine.tokens(plain.text)[3]
    async with client.chat.stream(SEA, model=MODEL, temperature=0.0, max_tokens=8, stop_token_ids=[last]) as stream:
        answer = await stream.final()
    assert answer.stop_reason == StopReason.STOP_REASON_STOP_SEQUENCE
    assert answer.choices[0].matched_token_id == last
    assert answer.text
    assert plain.text.startswith(answer.text)
    assert answer.text != plain.text


async def test_every_sampling_field_is_accepted(client: AsyncClient) -> None:
    """A request with every sampling field is accepted, and `started` returns the sampling that was sent."""
    asked = Sampling(
        temperature=0.7,
        top_p=0.9,
        top_k=20,
        min_p=0.05,
        frequency_penalty=0.1,
        presence_penalty=0.1,
        repetition_penalty=1.1,
        seed=3,
        max_tokens=6,
        min_tokens=2,
        stop=["@@", "##"],
        stop_token_ids=[5, 6],
        ignore_eos=True,
        logit_bias={11: -1.5},
        bad_words=["ocean"],
    )
    assert {field.name for field, _ in asked.ListFields()} == {field.name for field in asked.DESCRIPTOR.fields}
    async with client.chat.stream(SEA, model=MODEL, sampling=asked) as stream:
        answer = await stream.final()
    assert answer.started.effective_sampling == asked
    assert answer.usage.completion_tokens <= 6


async def test_a_seed_makes_sampling_repeatable(client: AsyncClient) -> None:
    """The same seed gives the same text at a high temperature."""
    texts = {
        (await client.chat.create(SEA, model=MODEL, temperature=1.5, seed=1234, max_tokens=16)).text for _ in range(2)
    }
    assert len(texts) == 1


async def test_a_bias_forces_a_token(client: AsyncClient, engine: Engine) -> None:
    """The largest bias forces the token."""
    [token] = engine.tokens("cat")
    answer = await client.chat.create(
        SEA, model=MODEL, temperature=0.0, max_tokens=3, ignore_eos=True, logit_bias={token: 100.0}
    )
    assert answer.text == "catcatcat"


async def test_bad_words_are_not_generated(client: AsyncClient) -> None:
    """The second word of the greedy answer is not generated if it is a bad word."""
    plain = await client.chat.create(SEA, model=MODEL, temperature=0.0, max_tokens=8)
    word = plain.text.split()[1]
    other = await client.chat.create(SEA, model=MODEL, temperature=0.0, max_tokens=8, bad_words=[word])
    assert word not in other.text.split()


async def test_min_tokens_keeps_the_answer_from_ending(client: AsyncClient) -> None:
    """An answer that would end earlier continues to the requested length."""
    plain = await client.chat.create(SEA, model=MODEL, temperature=0.0, max_tokens=60)
    assert plain.stop_reason == StopReason.STOP_REASON_END_OF_TURN
    least = plain.usage.completion_tokens + 10
    longer = await client.chat.create(SEA, model=MODEL, temperature=0.0, min_tokens=least, max_tokens=least)
    assert longer.usage.completion_tokens == least


async def test_the_request_id_is_adopted(client: AsyncClient) -> None:
    """The caller's request id is returned with the answer."""
    answer = await client.chat.create(SEA, model=MODEL, max_tokens=1, request_id="my-own-id")
    assert answer.request_id == "my-own-id"
    assert ("x-request-id", "my-own-id") in answer.initial_metadata
