"""Every field of a chat request, one by one: from the message to the member of vLLM's body that it becomes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.json_format import ParseDict

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire_server.upstream.extra_body import allowed_extra
from deltawire_server.upstream.vllm_request import chat_body, encode_body
from tests.support.turns import chat_request, encoded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.descriptor import Descriptor

Json = dict[str, Any]

HI: Json = {"user": {"content": [{"text": "hi"}]}}
BASE: Json = {"model": "asked", "messages": [HI]}
ALWAYS: Json = {
    "model": "served",
    "messages": [{"role": "user", "content": "hi"}],
    "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
}
TEXT = [{"text": "x"}]
SCHEMA = '{"type":"object","properties":{"a":{"type":"integer"}}}'
EMPTY = {"type": "object", "properties": {}}


def turn(**role: Json) -> Json:
    """A request whose only message is this one."""
    return {"messages": [role]}


def call(**fields: str) -> Json:
    """A request whose only message is the assistant's, with one call."""
    return turn(assistant={"tool_calls": [{"call_id": "c", "tool_name": "t", **fields}]})


def said(**members: object) -> Json:
    """The body's messages, when there is one."""
    return {"messages": [members]}


def called(call_id: str = "c", name: str = "t", arguments: str = "{}") -> Json:
    """The same, for the assistant's with one call."""
    function = {"name": name, "arguments": arguments}
    entry = {"id": call_id, "type": "function", "function": function}
    return said(role="assistant", content=None, tool_calls=[entry])


def tools(*names: str, **fields: object) -> Json:
    """A request with tools of these names and these fields."""
    return {"tools": [{"name": name, **fields} for name in names]}


def offered(*names: str, **members: object) -> Json:
    """The body's tools."""
    functions: list[Json] = [{"name": name, "parameters": EMPTY} | members for name in names]
    return {"tools": [{"type": "function", "function": function} for function in functions]}


def sampling(**fields: object) -> Json:
    """A request with this sampling."""
    return {"sampling": fields}


def form(**fields: object) -> Json:
    """A request with this response format."""
    return {"response_format": fields}


def json_form(**fields: object) -> Json:
    """A request for JSON that follows a schema."""
    return form(json_schema={"schema": "{}", **fields})


def schema_form(**members: object) -> Json:
    """The body's part for it."""
    described: Json = {"name": "response", "schema": {}} | members
    return {"response_format": {"type": "json_schema", "json_schema": described}}


FIELDS: dict[str, tuple[Json, Json]] = {
    "chat.model": ({"model": "another"}, {}),
    "chat.messages.system.text": (turn(system={"text": "x"}), said(role="system", content="x")),
    "chat.messages.developer.text": (turn(developer={"text": "x"}), said(role="developer", content="x")),
    "chat.messages.user.text": (turn(user={"text": "x"}), said(role="user", content="x")),
    "chat.messages.assistant.text": (turn(assistant={"text": "x"}), said(role="assistant", content="x")),
    "chat.messages.tool.text": (
        turn(tool={"call_id": "c", "text": ""}),
        said(role="tool", content="", tool_call_id="c"),
    ),
    "chat.messages.system.content.text": (turn(system={"content": TEXT}), said(role="system", content="x")),
    "chat.messages.developer.content.text": (turn(developer={"content": TEXT}), said(role="developer", content="x")),
    "chat.messages.user.content.text": (
        turn(user={"content": [{"text": "a"}, {"text": ""}]}),
        said(role="user", content=[{"type": "text", "text": "a"}, {"type": "text", "text": ""}]),
    ),
    "chat.messages.assistant.content.text": (turn(assistant={"content": TEXT}), said(role="assistant", content="x")),
    "chat.messages.assistant.reasoning": (
        turn(assistant={"reasoning": "hm"}),
        said(role="assistant", content="", reasoning="hm"),
    ),
    "chat.messages.assistant.tool_calls.call_id": (call(call_id="other"), called(call_id="other")),
    "chat.messages.assistant.tool_calls.tool_name": (call(tool_name="other"), called(name="other")),
    "chat.messages.assistant.tool_calls.arguments": (call(arguments='{"a":  1}'), called(arguments='{"a":  1}')),
    "chat.messages.tool.call_id": (
        turn(tool={"call_id": "other", "content": TEXT}),
        said(role="tool", content="x", tool_call_id="other"),
    ),
    "chat.messages.tool.content.text": (
        turn(tool={"call_id": "c", "content": [{"text": "y"}]}),
        said(role="tool", content="y", tool_call_id="c"),
    ),
    "chat.tools.name": (tools("mcp/one.two"), offered("mcp/one.two")),
    "chat.tools.description": (tools("t", description="does"), offered("t", description="does")),
    "chat.tools.input_schema": (tools("t", input_schema=SCHEMA), offered("t", parameters=json.loads(SCHEMA))),
    "chat.tools.output_schema": (tools("t", output_schema=SCHEMA), offered("t")),
    "chat.tools.strict": (tools("t", strict=False), offered("t", strict=False)),
    "chat.tool_choice.mode": (
        tools("t") | {"tool_choice": {"mode": "MODE_REQUIRED"}},
        offered("t") | {"tool_choice": "required"},
    ),
    "chat.tool_choice.tool_name": (
        tools("t", "u") | {"tool_choice": {"tool_name": "u"}},
        offered("t", "u") | {"tool_choice": {"type": "function", "function": {"name": "u"}}},
    ),
    "chat.allowed_tools": (tools("t", "u", "v") | {"allowed_tools": ["v", "t"]}, offered("t", "v")),
    "chat.parallel_tool_calls": (
        tools("t") | {"parallel_tool_calls": False},
        offered("t") | {"parallel_tool_calls": False},
    ),
    "chat.sampling.temperature": (sampling(temperature=0.0), {"temperature": 0.0}),
    "chat.sampling.top_p": (sampling(top_p=0.5), {"top_p": 0.5}),
    "chat.sampling.top_k": (sampling(top_k=-1), {"top_k": -1}),
    "chat.sampling.min_p": (sampling(min_p=0.0), {"min_p": 0.0}),
    "chat.sampling.frequency_penalty": (sampling(frequency_penalty=-2.0), {"frequency_penalty": -2.0}),
    "chat.sampling.presence_penalty": (sampling(presence_penalty=2.0), {"presence_penalty": 2.0}),
    "chat.sampling.repetition_penalty": (sampling(repetition_penalty=1.1), {"repetition_penalty": 1.1}),
    "chat.sampling.seed": (sampling(seed=2**63 - 1), {"seed": 2**63 - 1}),
    "chat.sampling.max_tokens": (sampling(max_tokens=1), {"max_tokens": 1}),
    "chat.sampling.min_tokens": (sampling(min_tokens=0), {"min_tokens": 0}),
    "chat.sampling.stop": (sampling(stop=["a", "\n"]), {"stop": ["a", "\n"]}),
    "chat.sampling.stop_token_ids": (sampling(stop_token_ids=[0, 5]), {"stop_token_ids": [0, 5]}),
    "chat.sampling.ignore_eos": (sampling(ignore_eos=False), {"ignore_eos": False}),
    "chat.sampling.logit_bias": (sampling(logit_bias={5: -100.0}), {"logit_bias": {"5": -100.0}}),
    "chat.sampling.bad_words": (sampling(bad_words=["no"]), {"bad_words": ["no"]}),
    "chat.response_format.text": (form(text={}), {}),
    "chat.response_format.json_object": (form(json_object={}), {"response_format": {"type": "json_object"}}),
    "chat.response_format.json_schema.name": (json_form(name="n"), schema_form(name="n")),
    "chat.response_format.json_schema.schema": (json_form(schema=SCHEMA), schema_form(schema=json.loads(SCHEMA))),
    "chat.response_format.json_schema.strict": (json_form(strict=False), schema_form(strict=False)),
    "chat.response_format.grammar": (form(grammar="g"), {"structured_outputs": {"grammar": "g"}}),
    "chat.response_format.regex": (form(regex="r+"), {"structured_outputs": {"regex": "r+"}}),
    "chat.response_format.choice.values": (
        form(choice={"values": ["a", ""]}),
        {"structured_outputs": {"choice": ["a", ""]}},
    ),
    "chat.response_format.structural_tag": (
        form(structural_tag='{"type":"x"}'),
        {"structured_outputs": {"structural_tag": '{"type":"x"}'}},
    ),
    "chat.logprobs.top_k": ({"logprobs": {"top_k": 3}}, {"logprobs": True, "top_logprobs": 3}),
    "chat.choice_count": ({"choice_count": 2}, {"n": 2}),
    "chat.reasoning.effort": (
        {"reasoning": {"effort": "REASONING_EFFORT_XHIGH"}},
        {"reasoning_effort": "xhigh"},
    ),
    "chat.reasoning.token_budget": ({"reasoning": {"token_budget": 0}}, {"thinking_token_budget": 0}),
    "chat.reasoning.include": ({"reasoning": {"include": False}}, {"include_reasoning": False}),
    "chat.tool_call_policy.streaming": (
        {"tool_call_policy": {"streaming": "TOOL_CALL_STREAMING_INCREMENTAL"}},
        {},
    ),
    "chat.tool_call_policy.validate_schema": ({"tool_call_policy": {"validate_schema": True}}, {}),
    "chat.soft_time_limit": ({"soft_time_limit": "1.5s"}, {}),
    "chat.completion_id": ({"completion_id": "my-1"}, {}),
    "chat.priority": ({"priority": -5}, {"priority": -5}),
    "chat.cache_salt": ({"cache_salt": "salt"}, {"cache_salt": "salt"}),
    "chat.chat_template_kwargs": (
        {"chat_template_kwargs": '{"enable_thinking":false}'},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ),
    "chat.extra_body": ({"extra_body": '{"x_one":[1.50],"x_two":null}'}, {"x_one": [1.5], "x_two": None}),
    "chat.user": ({"user": "me"}, {"user": "me"}),
}
"""By the field's path: what is set, and what it adds to the body, or puts in the place of what is always there.

Nothing is added for what is the gateway's own affair. An image's fields are in `test_vllm_request`.
"""


def body_text(fields: Json) -> bytes:
    """The body that a request with these fields becomes."""
    request = chat_request(ParseDict(BASE | fields, chat_pb.ChatRequest()))
    body = chat_body(request, "served", allowed_extra(request.extra_body, ["x_*"], "p"))
    return encoded(encode_body(body, request.messages))


@pytest.mark.parametrize("path", FIELDS)
def test_field(path: str) -> None:
    """The field becomes its member, and no other changes; zero, false and null are values like any other."""
    fields, part = FIELDS[path]
    assert json.loads(body_text(fields)) == ALWAYS | part


@pytest.mark.parametrize(
    ("effort", "word"),
    [
        (name, name.removeprefix("REASONING_EFFORT_").lower())
        for name, number in chat_pb.ReasoningEffort.items()
        if number
    ],
)
def test_every_effort(effort: str, word: str) -> None:
    """Each has vLLM's word, and not being set has none."""
    assert json.loads(body_text({"reasoning": {"effort": effort}})) == ALWAYS | {"reasoning_effort": word}
    assert json.loads(body_text({"reasoning": {"effort": "REASONING_EFFORT_UNSPECIFIED"}})) == ALWAYS


@pytest.mark.parametrize("name", ["chat_template_kwargs", "extra_body"])
def test_json_goes_through_to_the_letter(name: str) -> None:
    """What decoding and encoding would lose stays: numbers of any size and form."""
    value = '{"big": 100000000000000000000000000000001, "exact": 1.10, "twice": 1, "twice": 2}'
    text = body_text({name: f'{{"x_a": {value}}}'})
    assert value.encode() in text


def test_empty_json_is_none() -> None:
    """An object without members is not sent."""
    assert json.loads(body_text({"chat_template_kwargs": " {} ", "extra_body": "{}"})) == ALWAYS


def leaves(descriptor: Descriptor, path: str) -> Iterator[str]:
    """The paths of all fields that hold no message of this API with fields of its own."""
    for field in descriptor.fields:
        here = f"{path}.{field.name}"
        message = field.message_type
        own = message and message.file.package == "deltawire.v1" and not message.GetOptions().map_entry
        if message and own and message.fields:
            yield from leaves(message, here)
        else:
            yield here


def test_every_field_is_here() -> None:
    """A field that the protos get later has to be thought of."""
    found = set(leaves(chat_pb.ChatRequest.DESCRIPTOR, "chat"))
    images = {path for path in found if ".image." in path}
    assert len(images) == 2 * 5
    assert found - images == FIELDS.keys()
