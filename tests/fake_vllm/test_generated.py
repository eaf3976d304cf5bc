"""What the look-alike makes up has a real vLLM's shape, and does what the request asks."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from deltawire_server.fake_vllm import FakeVllm, Script
from tests.fake_vllm.raw import ASK, TRANSCRIPTS, events, http, shape

if TYPE_CHECKING:
    import httpx

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "unit": {"enum": ["celsius", "fahrenheit"]},
                "days": {"type": "integer", "minimum": 3},
                "notes": {"type": ["string", "null"]},
                "where": {"type": "object", "properties": {"exact": {"type": "boolean"}}, "required": ["exact"]},
                "tags": {"type": "array"},
                "kind": {"const": "x"},
                "spare": {"type": "number"},
            },
            "required": ["city", "unit", "days", "notes", "where", "tags", "kind"],
        },
    },
}
ARGUMENTS = {
    "city": "Oslo",
    "unit": "celsius",
    "days": 3,
    "notes": "Oslo",
    "where": {"exact": True},
    "tags": [],
    "kind": "x",
}
NAMED = {"type": "function", "function": {"name": "get_weather"}}


async def ask(vllm: FakeVllm, **changes: object) -> httpx.Response:
    """Ask for a chat."""
    async with http(vllm.base_url) as client:
        return await client.post("/v1/chat/completions", json=ASK | changes)


async def stream(vllm: FakeVllm, **changes: object) -> list[dict[str, Any]]:
    """Ask for a streamed chat and decode it."""
    return events((await ask(vllm, **changes)).content)


def text(chunks: list[dict[str, Any]], index: int = 0) -> str:
    """Join a choice's text."""
    parts = [
        choice["delta"].get("content") for chunk in chunks for choice in chunk["choices"] if choice["index"] == index
    ]
    return "".join(part or "" for part in parts)


def arguments(chunks: list[dict[str, Any]]) -> list[str]:
    """Collect the fragments of arguments."""
    entries = [
        call for chunk in chunks for choice in chunk["choices"] for call in choice["delta"].get("tool_calls", ())
    ]
    return [entry["function"]["arguments"] for entry in entries if "arguments" in entry["function"]]


def finish(chunks: list[dict[str, Any]]) -> list[str]:
    """Collect the finish reasons."""
    return [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]


def recorded_shapes(name: str) -> list[object]:
    """Give a recording's shapes of chunks, each once."""
    shapes: list[object] = []
    for event in events((TRANSCRIPTS / name).read_bytes()):
        if shape(event) not in shapes:
            shapes.append(shape(event))
    return shapes


@pytest.mark.parametrize(
    ("recording", "changes"),
    [
        ("text-greedy.sse", {}),
        ("text-usage.sse", {"max_tokens": 7, "stream_options": {"include_usage": True}}),
        ("tool-required-one.sse", {"tools": [WEATHER], "tool_choice": "required"}),
        ("tool-one.sse", {"tools": [WEATHER], "tool_choice": "required", "stream_options": {"include_usage": True}}),
        ("tool-named.sse", {"tools": [WEATHER], "tool_choice": NAMED}),
    ],
)
async def test_chunks_are_shaped_as_recorded(recording: str, changes: dict[str, Any]) -> None:
    """Members, their order and their kinds, chunk kind by chunk kind, are those of the recording."""
    async with FakeVllm() as vllm:
        seen: list[object] = []
        for chunk in await stream(vllm, **changes):
            if shape(chunk) not in seen:
                seen.append(shape(chunk))
    assert seen == recorded_shapes(recording)


@pytest.mark.parametrize(
    ("recording", "changes"),
    [("text-nonstream.body", {}), ("tool-one-nonstream.body", {"tools": [WEATHER], "tool_choice": "required"})],
)
async def test_bodies_are_shaped_as_recorded(recording: str, changes: dict[str, Any]) -> None:
    """An answer that is not streamed has the members of the recorded one."""
    async with FakeVllm() as vllm:
        answer = await ask(vllm, stream=False, **changes)
    assert shape(answer.json()) == shape(json.loads((TRANSCRIPTS / recording).read_bytes()))


async def test_the_same_text_streamed_or_not() -> None:
    """The text of a request does not change, its id does."""
    async with FakeVllm() as vllm:
        first, second = await stream(vllm), await stream(vllm)
        whole = (await ask(vllm, stream=False)).json()
    assert text(first) == text(second) == whole["choices"][0]["message"]["content"]
    assert first[0]["id"] != second[0]["id"]
    assert finish(first) == ["stop"]


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
async def test_the_limit_cuts_and_its_token_rides_on_the_finish_chunk(limit: str) -> None:
    """Three tokens: two chunks, and a finish chunk with the third."""
    async with FakeVllm() as vllm:
        chunks = await stream(vllm, **{limit: 3})
    assert len(chunks) == 4
    assert text(chunks) == "The sea keeps"
    assert chunks[-1]["choices"][0]["delta"] == {"content": " keeps"}
    assert finish(chunks) == ["length"]


async def test_ignore_eos_goes_on_to_the_limit() -> None:
    """A request for a longer answer gets it, beyond the default length."""
    async with FakeVllm(Script.generated(tokens=5)) as vllm:
        whole = (await ask(vllm, stream=False, ignore_eos=True, max_tokens=200)).json()
    assert whole["usage"]["completion_tokens"] == 200
    assert whole["choices"][0]["finish_reason"] == "length"


async def test_choices_interleave() -> None:
    """Each choice has its role, its text and its end; they come in turn."""
    async with FakeVllm() as vllm:
        chunks = await stream(vllm, n=2, stream_options={"include_usage": True})
        single = await stream(vllm)
    assert text(chunks, 0) == text(chunks, 1) == text(single)
    assert [chunk["choices"][0]["index"] for chunk in chunks[:6]] == [0, 1, 0, 1, 0, 1]
    assert chunks[-1]["usage"]["completion_tokens"] == 48


async def test_continuous_usage() -> None:
    """Each chunk counts its own choice so far; the last one counts all."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    async with FakeVllm(Script.generated(tokens=2)) as vllm:
        chunks = await stream(vllm, n=2, stream_options=options)
    prompt = chunks[0]["usage"]["prompt_tokens"]
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [0, 0, 1, 1, 2, 2, 2, 2, 4]
    assert chunks[2]["usage"] == {
        "prompt_tokens": prompt,
        "total_tokens": prompt + 1,
        "completion_tokens": 1,
        "completion_tokens_details": None,
    }


@pytest.mark.parametrize(("tool_choice", "reason"), [("required", "tool_calls"), (NAMED, "stop")])
async def test_a_call_that_the_request_insists_on(tool_choice: object, reason: str) -> None:
    """Its arguments hold what the schema requires; a named call ends with `stop`, as with vLLM."""
    async with FakeVllm() as vllm:
        chunks = await stream(vllm, tools=[WEATHER], tool_choice=tool_choice)
    assert json.loads("".join(arguments(chunks))) == ARGUMENTS
    assert len(arguments(chunks)) > 20
    assert finish(chunks) == [reason]


async def test_a_call_is_cut_by_the_limit() -> None:
    """The name and two fragments, the last on the finish chunk."""
    async with FakeVllm() as vllm:
        chunks = await stream(vllm, tools=[WEATHER], tool_choice="required", max_tokens=3)
        whole = (await ask(vllm, tools=[WEATHER], tool_choice="required", max_tokens=3, stream=False)).json()
    assert arguments(chunks) == ["{", '"']
    assert finish(chunks) == ["length"]
    assert whole["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == '{"'


async def test_a_call_as_long_as_asked() -> None:
    """For benchmarks: so many fragments, of one well-formed argument, without the request's asking."""
    async with FakeVllm(Script.generated(tokens=500, tool_call=True)) as vllm:
        chunks = await stream(vllm)
        named = await stream(vllm, tools=[WEATHER])
    assert len(arguments(chunks)) == 500
    assert list(json.loads("".join(arguments(chunks)))) == ["text"]
    assert named[1]["choices"][0]["delta"]["tool_calls"][0]["function"]["name"] == "get_weather"


async def test_the_callers_id() -> None:
    """The header comes before the body's member; both before a number."""
    async with FakeVllm() as vllm, http(vllm.base_url) as client:
        by_body = await client.post("/v1/chat/completions", json=ASK | {"request_id": "b"})
        headers = {"x-request-id": "h"}
        by_header = await client.post("/v1/chat/completions", json=ASK | {"request_id": "b"}, headers=headers)
    assert events(by_body.content)[0]["id"] == "chatcmpl-b"
    assert events(by_header.content)[0]["id"] == "chatcmpl-h"


async def test_paced_and_batched_answers_are_the_same() -> None:
    """Pace and batching change when bytes go out, not which."""
    async with FakeVllm() as vllm:
        plain = text(await stream(vllm))
        vllm.play(Script.generated(tokens_per_second=5000), Script.generated(chunks_per_write=7))
        assert text(await stream(vllm)) == plain
        assert text(await stream(vllm)) == plain
        vllm.play(Script.generated(tokens_per_second=5000))
        assert (await ask(vllm, stream=False)).json()["choices"][0]["message"]["content"] == plain
