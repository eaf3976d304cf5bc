"""What is asked of vLLM: the request's body, member for member."""

from __future__ import annotations

import base64
import gc
import json
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from deltawire_server.upstream.request import (
    ChatMessage,
    ChatRequest,
    FormatKind,
    ImageData,
    ImageUrl,
    NamedTool,
    PastCall,
    Reasoning,
    Role,
    Sampling,
    TextFormat,
    ToolMode,
    ToolSpec,
)
from deltawire_server.upstream.vllm_request import _PLACE, STEP_BYTES, count_body, encode_body, request_body
from deltawire_server.upstream.web_address import web_address
from tests.support.turns import at_once, encoded

Json = dict[str, Any]

HI = ChatMessage(Role.USER, ("hi",))
ALWAYS: Json = {
    "model": "served",
    "messages": [{"role": "user", "content": "hi"}],
    "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
}
SCHEMA: Json = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = ToolSpec("get_weather", input_schema=json.dumps(SCHEMA))
WEATHER_SENT: Json = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}


def sent(request: ChatRequest) -> bytes:
    """The text of a request's body."""
    return at_once(request_body(request, "served"))[0]


def body_of(*messages: ChatMessage, **fields: Any) -> Json:  # noqa: ANN401 (whatever the request takes)
    """The body of a request with these messages and fields."""
    body: Json = json.loads(sent(ChatRequest("asked", messages or (HI,), **fields)))
    return body


def message_of(message: ChatMessage) -> Json:
    """How a message is sent."""
    sent: Json = body_of(message)["messages"][0]
    return sent


def tool_of(tool: ToolSpec) -> Json:
    """How a tool's function is sent."""
    sent: Json = body_of(tools=(tool,))["tools"][0]["function"]
    return sent


def test_absent_is_not_sent() -> None:
    """A bare request has nothing but the provider's model name, the messages, and how to stream: with running usage."""
    assert body_of() == ALWAYS


@pytest.mark.parametrize(
    ("fields", "added"),
    [
        ({"sampling": Sampling(temperature=0.0)}, {"temperature": 0.0}),
        ({"sampling": Sampling(top_p=0.5)}, {"top_p": 0.5}),
        ({"sampling": Sampling(top_k=-1)}, {"top_k": -1}),
        ({"sampling": Sampling(top_k=0)}, {"top_k": 0}),
        ({"sampling": Sampling(min_p=0.0)}, {"min_p": 0.0}),
        ({"sampling": Sampling(frequency_penalty=-2.0)}, {"frequency_penalty": -2.0}),
        ({"sampling": Sampling(presence_penalty=2.0)}, {"presence_penalty": 2.0}),
        ({"sampling": Sampling(repetition_penalty=1.1)}, {"repetition_penalty": 1.1}),
        ({"sampling": Sampling(seed=0)}, {"seed": 0}),
        ({"sampling": Sampling(max_tokens=7)}, {"max_tokens": 7}),
        ({"sampling": Sampling(min_tokens=0)}, {"min_tokens": 0}),
        ({"sampling": Sampling(ignore_eos=False)}, {"ignore_eos": False}),
        ({"sampling": Sampling(stop=("a", "\n"))}, {"stop": ["a", "\n"]}),
        ({"sampling": Sampling(stop_token_ids=(0, 5))}, {"stop_token_ids": [0, 5]}),
        ({"sampling": Sampling(bad_words=("no",))}, {"bad_words": ["no"]}),
        ({"sampling": Sampling(logit_bias={5: -100.0, 7: 0.0})}, {"logit_bias": {"5": -100.0, "7": 0.0}}),
        ({"top_logprobs": 0}, {"logprobs": True, "top_logprobs": 0}),
        ({"top_logprobs": 3}, {"logprobs": True, "top_logprobs": 3}),
        ({"choice_count": 2}, {"n": 2}),
        ({"choice_count": 1}, {}),
        ({"tools": (WEATHER,)}, {"tools": [WEATHER_SENT]}),
        ({"tools": (WEATHER,), "tool_choice": ToolMode.AUTO}, {"tools": [WEATHER_SENT], "tool_choice": "auto"}),
        ({"tools": (WEATHER,), "tool_choice": ToolMode.REQUIRED}, {"tools": [WEATHER_SENT], "tool_choice": "required"}),
        (
            {"tools": (WEATHER,), "tool_choice": NamedTool("get_weather")},
            {"tools": [WEATHER_SENT], "tool_choice": {"type": "function", "function": {"name": "get_weather"}}},
        ),
        (
            {"tools": (WEATHER,), "parallel_tool_calls": False},
            {"tools": [WEATHER_SENT], "parallel_tool_calls": False},
        ),
        ({"response_format": TextFormat(FormatKind.JSON_OBJECT)}, {"response_format": {"type": "json_object"}}),
        (
            {"response_format": TextFormat(FormatKind.JSON_SCHEMA, json.dumps(SCHEMA), "response")},
            {"response_format": {"type": "json_schema", "json_schema": {"name": "response", "schema": SCHEMA}}},
        ),
        (
            {"response_format": TextFormat(FormatKind.JSON_SCHEMA, "{}", "n", strict=False)},
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {}, "strict": False},
                }
            },
        ),
        (
            {"response_format": TextFormat(FormatKind.GRAMMAR, 'root ::= "a"')},
            {"structured_outputs": {"grammar": 'root ::= "a"'}},
        ),
        ({"response_format": TextFormat(FormatKind.REGEX, "a+")}, {"structured_outputs": {"regex": "a+"}}),
        (
            {"response_format": TextFormat(FormatKind.CHOICE, ("a", "b"))},
            {"structured_outputs": {"choice": ["a", "b"]}},
        ),
        (
            {"response_format": TextFormat(FormatKind.STRUCTURAL_TAG, '{"type":"x"}')},
            {"structured_outputs": {"structural_tag": '{"type":"x"}'}},
        ),
    ],
    ids=repr,
)
def test_each_field_alone(fields: Json, added: Json) -> None:
    """Each field adds its members and touches no other; zero and false are values like any other."""
    assert body_of(**fields) == ALWAYS | added


def test_none_keeps_the_tools_from_the_model() -> None:
    """NONE sends neither tools nor tool_choice: vLLM's own leaves the tools in the prompt."""
    body = body_of(tools=(WEATHER,), tool_choice=ToolMode.NONE, parallel_tool_calls=True)
    assert body == ALWAYS


def test_old_vllm_tool_choice() -> None:
    """No tools: no tool_choice either, which old versions refuse."""
    assert body_of(tool_choice=ToolMode.AUTO, parallel_tool_calls=True) == ALWAYS


def test_get_params_empty_tools() -> None:
    """An empty list of tools is not sent: it is refused."""
    assert "tools" not in body_of(tools=())


@pytest.mark.parametrize(
    ("message", "sent"),
    [
        (ChatMessage(Role.SYSTEM, ("s",)), {"role": "system", "content": "s"}),
        (ChatMessage(Role.DEVELOPER, ("d",)), {"role": "developer", "content": "d"}),
        (ChatMessage(Role.USER, ("Hello, world!",)), {"role": "user", "content": "Hello, world!"}),
        (ChatMessage(Role.USER, ("",)), {"role": "user", "content": ""}),
        (
            ChatMessage(Role.USER, ("a", "b")),
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ),
        (ChatMessage(Role.TOOL, ("5",), call_id="foo"), {"role": "tool", "content": "5", "tool_call_id": "foo"}),
        (
            ChatMessage(Role.ASSISTANT, ("a",), reasoning="r"),
            {"role": "assistant", "content": "a", "reasoning": "r"},
        ),
        (ChatMessage(Role.ASSISTANT, reasoning="r"), {"role": "assistant", "content": "", "reasoning": "r"}),
    ],
    ids=repr,
)
def test_messages(message: ChatMessage, sent: Json) -> None:
    """One text is a plain string, which many templates concatenate; several are a list; the call id is sent."""
    assert message_of(message) == sent


@pytest.mark.parametrize(("content", "sent"), [((), None), (("a",), "a")])
def test_assistant_calls_keep_their_arguments_to_the_letter(content: tuple[str, ...], sent: str | None) -> None:
    """The arguments' text is not encoded again, not even its spaces; without text beside calls the content is null."""
    calls = (PastCall("123", "test_tool", '{"foo":  "bär"}'), PastCall("4", "brave_search", "{}"))
    assert message_of(ChatMessage(Role.ASSISTANT, content, tool_calls=calls)) == {
        "role": "assistant",
        "content": sent,
        "tool_calls": [
            {"id": "123", "type": "function", "function": {"name": "test_tool", "arguments": '{"foo":  "bär"}'}},
            {"id": "4", "type": "function", "function": {"name": "brave_search", "arguments": "{}"}},
        ],
    }


def test_tool_call_response() -> None:
    """A history with a call and its result goes out whole: exactly one call, with its arguments, and the result's id."""
    sent = body_of(
        ChatMessage(Role.SYSTEM, ("You are a helpful assistant",)),
        ChatMessage(Role.USER, ("How many?",)),
        ChatMessage(Role.ASSISTANT, ("",), tool_calls=(PastCall("foo", "knowledge_search", '{"query": "How many?"}'),)),
        ChatMessage(Role.TOOL, ("knowledge_search found 5....",), call_id="foo"),
    )["messages"]
    function = {"name": "knowledge_search", "arguments": '{"query": "How many?"}'}
    assert sent[2]["tool_calls"] == [{"id": "foo", "type": "function", "function": function}]
    assert sent[3] == {"role": "tool", "content": "knowledge_search found 5....", "tool_call_id": "foo"}
    assert len(sent) == 4


def test_name_description_and_strict_pass_through() -> None:
    """All that a tool has is sent, under vLLM's names."""
    tool = ToolSpec("t", "does it", json.dumps(SCHEMA), strict=True)
    assert tool_of(tool) == {"name": "t", "description": "does it", "parameters": SCHEMA, "strict": True}


def test_no_description_key_when_absent() -> None:
    """Neither null nor empty: not there. Nor is strict."""
    assert tool_of(WEATHER).keys() == {"name", "parameters"}


def test_a_tool_without_arguments_has_an_empty_object_schema() -> None:
    """For vLLM wants a schema."""
    assert tool_of(ToolSpec("t"))["parameters"] == {"type": "object", "properties": {}}


RICH_SCHEMAS: dict[str, Json] = {
    "refs_and_defs": {
        "type": "object",
        "properties": {
            "flight": {"$ref": "#/$defs/FlightInfo"},
            "passengers": {"type": "array", "items": {"$ref": "#/$defs/Passenger"}},
        },
        "required": ["flight"],
        "$defs": {
            "FlightInfo": {"type": "object", "properties": {"day": {"type": "string", "format": "date"}}},
            "Passenger": {
                "type": "object",
                "properties": {"age": {"type": "integer", "minimum": 0}, "seat": {"enum": ["aisle", "window"]}},
            },
        },
    },
    "any_of": {
        "type": "object",
        "properties": {
            "contact": {
                "anyOf": [{"type": "string", "format": "email"}, {"type": "string", "pattern": "^\\+?[0-9]{10}$"}]
            }
        },
    },
    "nested_to_an_enum": {
        "type": "object",
        "properties": {
            "a": {
                "type": "object",
                "properties": {"b": {"type": "object", "properties": {"c": {"enum": ["x", None, 1.5, True]}}}},
            }
        },
    },
    "array_constraints": {
        "type": "object",
        "properties": {
            "rows": {"type": "array", "items": {"type": "object"}, "minItems": 1, "maxItems": 100, "uniqueItems": True}
        },
    },
    "additional_properties": {
        "type": "object",
        "additionalProperties": True,
        "patternProperties": {"^x-": {"type": "string"}},
    },
}


@pytest.mark.parametrize("schema", RICH_SCHEMAS.values(), ids=RICH_SCHEMAS)
def test_schemas_are_equal_to_what_was_given(schema: Json) -> None:
    """Whatever JSON Schema has goes through unchanged."""
    assert tool_of(ToolSpec("t", input_schema=json.dumps(schema)))["parameters"] == schema


def test_a_schema_goes_through_to_the_letter() -> None:
    """What decoding and encoding would lose stays: order, equal keys, numbers of any size, and depth."""
    text = '{"b": 1.0, "a": 100000000000000000000000000000001, "b": 2, "deep": ' + "[" * 990 + "]" * 990 + "}"
    body = sent(ChatRequest("m", (HI,), tools=(ToolSpec("t", input_schema=text),)))
    assert text.encode() in body


def test_two_tools_with_defs_of_the_same_name_stay_independent() -> None:
    """Each has its own."""
    schemas = [{"type": "object", "$defs": {"D": {"type": kind}}} for kind in ("string", "integer")]
    tools = tuple(ToolSpec(f"t{i}", input_schema=json.dumps(schema)) for i, schema in enumerate(schemas))
    assert [tool["function"]["parameters"] for tool in body_of(tools=tools)["tools"]] == schemas


def test_offered_tools() -> None:
    """A model that is shown no tools can call none that would be known."""
    assert ChatRequest("m", (HI,), tools=(WEATHER,)).offered_tools == (WEATHER,)
    assert ChatRequest("m", (HI,), tools=(WEATHER,), tool_choice=ToolMode.NONE).offered_tools == ()


def test_images() -> None:
    """An address as it is; bytes as a data URL of what they are. Also alone they are a list."""
    url, data = ImageUrl(web_address("https://h/a.png"), "f"), ImageData(b"\xff\x00", "image/webp")
    assert message_of(ChatMessage(Role.USER, (url,)))["content"] == [
        {"type": "image_url", "image_url": {"url": "https://h/a.png"}}
    ]
    assert message_of(ChatMessage(Role.TOOL, ("a", data), call_id="c"))["content"] == [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": {"url": "data:image/webp;base64,/wA="}},
    ]


BARE = ChatRequest("asked", (HI,))
COUNTED: Json = {"model": "served", "messages": ALWAYS["messages"]}


@pytest.mark.parametrize(
    ("fields", "extra", "added"),
    [
        ({}, {}, {}),
        ({"tools": (WEATHER,)}, {}, {"tools": [WEATHER_SENT]}),
        ({"tools": (WEATHER,), "tool_choice": NamedTool("get_weather")}, {}, {"tools": [WEATHER_SENT]}),
        ({"tools": (WEATHER,), "tool_choice": ToolMode.NONE}, {}, {}),
        (
            {"tools": (WEATHER, ToolSpec("other")), "allowed_tools": frozenset({"get_weather"})},
            {},
            {"tools": [WEATHER_SENT]},
        ),
        ({"chat_template_kwargs": '{"a": 1}'}, {}, {"chat_template_kwargs": {"a": 1}}),
        (
            {"reasoning": Reasoning("none")},
            {},
            {"chat_template_kwargs": {"enable_thinking": False, "reasoning_effort": "none"}},
        ),
        (
            {"reasoning": Reasoning("low"), "chat_template_kwargs": '{"enable_thinking": 5, "reasoning_effort": "x"}'},
            {},
            {"chat_template_kwargs": {"enable_thinking": 5, "reasoning_effort": "low"}},
        ),
        ({}, {"documents": "[1]"}, {"chat_template_kwargs": {"documents": [1]}}),
        ({}, {"add_generation_prompt": "false", "echo": "true"}, {"add_generation_prompt": False}),
        (
            {"sampling": Sampling(max_tokens=5), "choice_count": 2, "user": "me", "priority": 1, "cache_salt": "s"},
            {},
            {},
        ),
    ],
    ids=repr,
)
def test_what_is_counted(fields: Json, extra: dict[str, str], added: Json) -> None:
    """All that a chat request would put into the prompt, and nothing else of it."""
    raw = {name: msgspec.Raw(value.encode()) for name, value in extra.items()}
    body = encoded(encode_body(count_body(replace(BARE, **fields), "served", raw), BARE.messages))
    assert json.loads(body) == COUNTED | added


def test_template_arguments_are_counted_to_the_letter() -> None:
    """As they are sent to the model."""
    request = replace(BARE, chat_template_kwargs='{"a": {"big": 100000000000000000000000000000001, "exact": 1.10}}')
    body = encoded(encode_body(count_body(request, "m"), request.messages))
    assert b'{"big": 100000000000000000000000000000001, "exact": 1.10}' in body


AWKWARD = '\0"\\\n\u2028é漢😀/' * 7
LARGE = AWKWARD * (STEP_BYTES // 20)
IMAGE = ImageData(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * (STEP_BYTES // 100), "image/png")
CALLS = tuple(PastCall(f"c{number}", "t", json.dumps({"a": AWKWARD * 100})) for number in range(500))


@pytest.mark.parametrize(
    "messages",
    [
        [ChatMessage(Role.USER, (LARGE,))],
        [ChatMessage(Role.USER, (AWKWARD, IMAGE, LARGE, IMAGE, AWKWARD))],
        [ChatMessage(Role.USER, (AWKWARD,) * 4000)],
        [ChatMessage(Role.ASSISTANT, (LARGE, "x"), reasoning=LARGE, tool_calls=CALLS), HI],
        [ChatMessage(Role.TOOL, (LARGE, AWKWARD), call_id="c"), HI, ChatMessage(Role.SYSTEM, (LARGE,))],
        [HI] * 3000,
        [ChatMessage(Role.USER, (AWKWARD * 10,))] * 2000,
    ],
    ids=["text", "images", "parts", "calls", "messages", "short messages", "messages together"],
)
def test_a_large_body_is_encoded_in_steps(messages: list[ChatMessage]) -> None:
    """It is the same JSON, character by character, and other calls get their turn after about each step."""
    body, turns = at_once(request_body(ChatRequest("m", tuple(messages)), "served"))
    assert turns >= len(body) // (7 * STEP_BYTES)
    assert turns >= 1
    read = json.loads(body)["messages"]
    assert len(read) == len(messages)
    for got, message in zip(read, messages, strict=True):
        assert got["role"] == message.role.value
        contents = got["content"] if isinstance(got["content"], list) else [{"type": "text", "text": got["content"]}]
        for part, content in zip(contents, message.content, strict=True):
            if isinstance(content, ImageData):
                encoded = base64.b64encode(content.data).decode()
                assert part["image_url"]["url"] == f"data:{content.media_type};base64,{encoded}"
            else:
                assert part["text"] == content
        assert got.get("reasoning", "") == message.reasoning
        arguments = [call["function"]["arguments"] for call in got.get("tool_calls", ())]
        assert arguments == [call.arguments for call in message.tool_calls]


async def test_the_size_of_a_body_is_known_before_it_is_encoded() -> None:
    """It is the bytes of its text, in each attempt; cleared, a body refers to nothing of the request any more."""
    body = await encode_body({"messages": _PLACE}, [ChatMessage(Role.USER, (AWKWARD, IMAGE, LARGE, IMAGE))])
    first, second = [b"".join([piece async for piece in body]) for _ in range(2)]
    assert first == second
    assert body.size == len(first)
    assert IMAGE in gc.get_referents(*gc.get_referents(body))
    body.clear()
    assert IMAGE not in gc.get_referents(*gc.get_referents(body))
