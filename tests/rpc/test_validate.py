"""Request messages: what is refused, by which field; and what they become."""

from __future__ import annotations

import math
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import message_pb2, tool_pb2
from deltawire_server.errors import CallerError, Reason, Violation
from deltawire_server.rpc.validate import MAX_CACHE_SALT, MAX_CHOICES, MAX_TOOLS
from deltawire_server.upstream.request import SAMPLING as SAMPLING_ROWS
from deltawire_server.upstream.request import (
    ChatMessage,
    ChatRequest,
    FormatKind,
    NamedTool,
    PastCall,
    Reasoning,
    Role,
    Sampling,
    TextFormat,
    ToolMode,
    ToolSpec,
)
from deltawire_server.upstream.vllm_request import request_body
from tests.support.gateway import ask, tool, user
from tests.support.turns import at_once, chat_request

FORMAT = "chat.response_format"
CALL = {"call_id": "c", "tool_name": "t", "arguments": "{}"}
BROKEN_JSON = ["{", "nope", "{} {}", '{"a":NaN}', '{"a":Infinity}', '{"a":"\\ud800"}', '{"a":' * 100_000]
NOT_OBJECTS = ["[]", "5", "null", '"{}"', "true"]


def violations(chat: chat_pb.ChatRequest) -> list[str]:
    """The fields that are refused, in order."""
    with pytest.raises(CallerError) as caught:
        chat_request(chat)
    assert caught.value.reason is Reason.INVALID_REQUEST
    assert all(violation.description for violation in caught.value.violations)
    return [violation.field for violation in caught.value.violations]


def message(**role: Any) -> message_pb2.ChatMessage:  # noqa: ANN401 (whatever the message takes)
    """A message."""
    return message_pb2.ChatMessage(**role)


def sampling(**fields: Any) -> chat_pb.ChatRequest:  # noqa: ANN401 (whatever the message takes)
    """A request with this sampling."""
    return ask(sampling=chat_pb.Sampling(**fields))


def form(**fields: Any) -> chat_pb.ChatRequest:  # noqa: ANN401 (whatever the message takes)
    """A request with this response format."""
    return ask(response_format=fields)


def choice(**fields: Any) -> tool_pb2.ToolChoice:  # noqa: ANN401 (whatever the message takes)
    """A tool choice."""
    return tool_pb2.ToolChoice(**fields)


def unknown_mode(number: int) -> tool_pb2.ToolChoice:
    """A tool choice with a mode of a later version."""
    return tool_pb2.ToolChoice.FromString(bytes([1 << 3, number]))


TEXT = message_pb2.ContentPart(text="x")

REFUSED = {
    "a turn with text and parts": (
        ask(messages=[message(user={"text": "a", "content": [message_pb2.ContentPart(text="b")]})]),
        ["chat.messages[0].user"],
    ),
    "an earlier answer with text and parts": (
        ask(messages=[message(assistant={"text": "a", "content": [message_pb2.ContentPart(text="b")]})]),
        ["chat.messages[0].assistant"],
    ),
    "min_tokens below 0": (ask(sampling=chat_pb.Sampling(min_tokens=-1)), ["chat.sampling.min_tokens"]),
    "stop_token_ids below 0": (
        ask(sampling=chat_pb.Sampling(stop_token_ids=[1, -2])),
        ["chat.sampling.stop_token_ids[1]"],
    ),
    "a key of logit_bias below 0": (
        ask(sampling=chat_pb.Sampling(logit_bias={-1: 1})),
        ["chat.sampling.logit_bias[-1]"],
    ),
    "choice_count below 0": (ask(choice_count=-1), ["chat.choice_count"]),
    "top_k of logprobs below 0": (ask(logprobs=chat_pb.Logprobs(top_k=-1)), ["chat.logprobs.top_k"]),
    "token_budget below 0": (ask(reasoning=chat_pb.Reasoning(token_budget=-1)), ["chat.reasoning.token_budget"]),
    "no messages": (chat_pb.ChatRequest(model="m"), ["chat.messages"]),
    "no role": (ask(messages=[user("x"), message()]), ["chat.messages[1]"]),
    "user without content": (ask(messages=[user()]), ["chat.messages[0].user"]),
    "system without content": (ask(messages=[message(system={})]), ["chat.messages[0].system"]),
    "developer without content": (ask(messages=[message(developer={})]), ["chat.messages[0].developer"]),
    "tool without content": (ask(messages=[message(tool={"call_id": "c"})]), ["chat.messages[0].tool"]),
    "tool without call id": (
        ask(messages=[message(tool={"content": [TEXT]})]),
        ["chat.messages[0].tool.call_id"],
    ),
    "empty part": (
        ask(messages=[message(user={"content": [TEXT, message_pb2.ContentPart()]})]),
        ["chat.messages[0].user.content[1]"],
    ),
    "call without id": (
        ask(messages=[message(assistant={"tool_calls": [{**CALL, "call_id": ""}]})]),
        ["chat.messages[0].assistant.tool_calls[0].call_id"],
    ),
    "call without name": (
        ask(messages=[message(assistant={"tool_calls": [CALL, {**CALL, "tool_name": ""}]})]),
        ["chat.messages[0].assistant.tool_calls[1].tool_name"],
    ),
    "tool without name": (ask(tools=[tool("")]), ["chat.tools[0].name"]),
    "tools of one name": (ask(tools=[tool("a"), tool("b"), tool("a")]), ["chat.tools[2].name"]),
    "too many tools": (ask(tools=[tool(str(number)) for number in range(MAX_TOOLS + 1)]), ["chat.tools"]),
    "empty choice": (ask(tool_choice=choice()), ["chat.tool_choice"]),
    "unspecified mode": (ask(tool_choice=choice(mode=0)), ["chat.tool_choice"]),
    "unknown mode": (ask(tool_choice=unknown_mode(77)), ["chat.tool_choice"]),
    "required without tools": (
        ask(tool_choice=choice(mode=tool_pb2.ToolChoice.MODE_REQUIRED)),
        ["chat.tool_choice.mode"],
    ),
    "a tool that is not there": (
        ask(tools=[tool("a")], tool_choice=choice(tool_name="b")),
        ["chat.tool_choice.tool_name"],
    ),
    "a named tool without tools": (ask(tool_choice=choice(tool_name="b")), ["chat.tool_choice.tool_name"]),
    "an allowed tool that is not there": (ask(tools=[tool("a")], allowed_tools=["a", "b"]), ["chat.allowed_tools[1]"]),
    "allowed tools without tools": (ask(allowed_tools=["a"]), ["chat.allowed_tools[0]"]),
    "a named tool that is not allowed": (
        ask(tools=[tool("a"), tool("b")], allowed_tools=["a"], tool_choice=choice(tool_name="b")),
        ["chat.tool_choice.tool_name"],
    ),
    "required with no tool left": (
        ask(tools=[tool("a")], allowed_tools=["b"], tool_choice=choice(mode=tool_pb2.ToolChoice.MODE_REQUIRED)),
        ["chat.allowed_tools[0]", "chat.tool_choice.mode"],
    ),
    "long salt": (ask(cache_salt="ß" * (MAX_CACHE_SALT + 1)), ["chat.cache_salt"]),
    "unknown effort": (
        ask(reasoning=chat_pb.Reasoning.FromString(bytes([1 << 3, 77]))),
        ["chat.reasoning.effort"],
    ),
    "unknown streaming of calls": (
        ask(tool_call_policy=chat_pb.ToolCallPolicy.FromString(bytes([1 << 3, 77]))),
        ["chat.tool_call_policy.streaming"],
    ),
    "no time": (ask(soft_time_limit=Duration()), ["chat.soft_time_limit"]),
    "less than no time": (ask(soft_time_limit=Duration(seconds=-1)), ["chat.soft_time_limit"]),
    "more than a day": (ask(soft_time_limit=Duration(seconds=24 * 3600, nanos=1000)), ["chat.soft_time_limit"]),
    "no duration": (ask(soft_time_limit=Duration(seconds=1, nanos=-1)), ["chat.soft_time_limit"]),
    "no completion id": (ask(completion_id="a/b"), ["chat.completion_id"]),
    "long completion id": (ask(completion_id="a" * 129), ["chat.completion_id"]),
    "no choices": (ask(choice_count=0), ["chat.choice_count"]),
    "too many choices": (ask(choice_count=MAX_CHOICES + 1), ["chat.choice_count"]),
    "temperature": (sampling(temperature=-0.1), ["chat.sampling.temperature"]),
    "top_p 0": (sampling(top_p=0.0), ["chat.sampling.top_p"]),
    "top_p above 1": (sampling(top_p=1.01), ["chat.sampling.top_p"]),
    "top_k": (sampling(top_k=-2), ["chat.sampling.top_k"]),
    "min_p below": (sampling(min_p=-0.1), ["chat.sampling.min_p"]),
    "min_p above": (sampling(min_p=1.1), ["chat.sampling.min_p"]),
    "frequency_penalty": (sampling(frequency_penalty=2.1), ["chat.sampling.frequency_penalty"]),
    "presence_penalty": (sampling(presence_penalty=-2.1), ["chat.sampling.presence_penalty"]),
    "repetition_penalty": (sampling(repetition_penalty=0.0), ["chat.sampling.repetition_penalty"]),
    "max_tokens": (sampling(max_tokens=0), ["chat.sampling.max_tokens"]),
    "empty stop": (sampling(stop=["a", ""]), ["chat.sampling.stop[1]"]),
    "empty bad word": (sampling(bad_words=[""]), ["chat.sampling.bad_words[0]"]),
    "bias above": (sampling(logit_bias={5: 100.1}), ["chat.sampling.logit_bias[5]"]),
    "bias below": (sampling(logit_bias={5: -100.1}), ["chat.sampling.logit_bias[5]"]),
    "bias that is no number": (sampling(logit_bias={5: math.nan}), ["chat.sampling.logit_bias[5]"]),
    "empty format": (form(), [FORMAT]),
    "empty grammar": (form(grammar=""), [f"{FORMAT}.grammar"]),
    "empty regex": (form(regex=""), [f"{FORMAT}.regex"]),
    "empty choices": (form(choice={}), [f"{FORMAT}.choice.values"]),
    "no schema": (form(json_schema={}), [f"{FORMAT}.json_schema.schema"]),
    "no structural tag": (form(structural_tag=""), [f"{FORMAT}.structural_tag"]),
}


@pytest.mark.parametrize(("chat", "fields"), REFUSED.values(), ids=REFUSED)
def test_each_rule(chat: chat_pb.ChatRequest, fields: list[str]) -> None:
    """A request that breaks just one rule is refused for just that field."""
    assert violations(chat) == fields


def test_sampling_has_a_row_for_each_field() -> None:
    """The table and the message have the same names."""
    assert [*SAMPLING_ROWS] == [field.name for field in chat_pb.Sampling.DESCRIPTOR.fields]


@pytest.mark.parametrize(
    "name", ["temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"]
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number(name: str, value: float) -> None:
    """JSON has no word for it."""
    assert violations(sampling(**{name: value})) == [f"chat.sampling.{name}"]


@pytest.mark.parametrize("text", [*BROKEN_JSON, *NOT_OBJECTS], ids=lambda text: text[:16])
def test_json_that_is_none(text: str) -> None:
    """Wherever JSON text goes, broken JSON and what is no object are refused, and nothing is raised but that."""
    call = {**CALL, "arguments": text}
    chat = ask(
        messages=[message(assistant={"tool_calls": [call]})],
        tools=[tool("a", input_schema=text), tool("b", output_schema=text)],
        response_format={"json_schema": {"schema": text}},
        chat_template_kwargs=text,
        extra_body=text,
    )
    assert violations(chat) == [
        "chat.messages[0].assistant.tool_calls[0].arguments",
        "chat.tools[0].input_schema",
        "chat.tools[1].output_schema",
        f"{FORMAT}.json_schema.schema",
        "chat.chat_template_kwargs",
        "chat.extra_body",
    ]
    assert violations(form(structural_tag=text)) == [f"{FORMAT}.structural_tag"]


def test_all_that_is_wrong_is_told_at_once() -> None:
    """First of the messages, then of the rest."""
    chat = chat_pb.ChatRequest(
        messages=[user(), message(), message(tool={})],
        tools=[tool(""), tool("a", input_schema="{")],
        tool_choice=choice(tool_name="b"),
        choice_count=1000,
        sampling=chat_pb.Sampling(temperature=-1, max_tokens=0, stop=[""], logit_bias={1: 500}),
        response_format=chat_pb.ResponseFormat(regex=""),
    )
    assert violations(chat) == [
        "chat.messages[0].user",
        "chat.messages[1]",
        "chat.messages[2].tool.call_id",
        "chat.messages[2].tool",
        "chat.choice_count",
        "chat.tools[0].name",
        "chat.tools[1].input_schema",
        "chat.tool_choice.tool_name",
        "chat.sampling.temperature",
        "chat.sampling.max_tokens",
        "chat.sampling.stop[0]",
        "chat.sampling.logit_bias[1]",
        f"{FORMAT}.regex",
    ]


def test_the_least_request() -> None:
    """What is absent stays absent."""
    assert chat_request(ask()) == ChatRequest("fake", (ChatMessage(Role.USER, ("hi",)),))


@pytest.mark.parametrize(
    ("given", "value"),
    [
        (user("a", ""), ChatMessage(Role.USER, ("a", ""))),
        (message(system={"content": [TEXT]}), ChatMessage(Role.SYSTEM, ("x",))),
        (message(developer={"content": [TEXT]}), ChatMessage(Role.DEVELOPER, ("x",))),
        (message(tool={"call_id": "c", "content": [TEXT]}), ChatMessage(Role.TOOL, ("x",), call_id="c")),
        (message(assistant={"content": [TEXT]}), ChatMessage(Role.ASSISTANT, ("x",))),
        (message(assistant={}), ChatMessage(Role.ASSISTANT)),
        (message(assistant={"reasoning": "r"}), ChatMessage(Role.ASSISTANT, reasoning="r")),
        (
            message(assistant={"tool_calls": [CALL, {**CALL, "arguments": '{"a":  1}'}, {**CALL, "arguments": ""}]}),
            ChatMessage(
                Role.ASSISTANT,
                tool_calls=(PastCall("c", "t", "{}"), PastCall("c", "t", '{"a":  1}'), PastCall("c", "t", "{}")),
            ),
        ),
    ],
)
def test_messages(given: message_pb2.ChatMessage, value: ChatMessage) -> None:
    """Each role; a call's arguments to the letter, and none as an empty object. A turn of the model's may be empty."""
    assert chat_request(ask(messages=[given])).messages == (value,)


def test_arguments_of_only_white_space_are_none() -> None:
    """What vLLM gets is JSON."""
    (turn,) = chat_request(ask(messages=[message(assistant={"tool_calls": [{**CALL, "arguments": " \n"}]})])).messages
    assert turn.tool_calls[0].arguments == "{}"


@pytest.mark.parametrize(
    ("given", "value"),
    [
        (
            tool("mcp.server/name"),
            ToolSpec("mcp.server/name", input_schema=tool("mcp.server/name").input_schema),
        ),
        (tool("a", input_schema=""), ToolSpec("a")),
        (tool("a", input_schema=" {} "), ToolSpec("a")),
        (
            tool("a", input_schema='{"x":1}', description="d", strict=False, output_schema="{}"),
            ToolSpec("a", "d", '{"x":1}', strict=False),
        ),
        (tool("a", input_schema=f'{{"maximum":{2**80}}}'), ToolSpec("a", input_schema=f'{{"maximum":{2**80}}}')),
    ],
)
def test_tools(given: tool_pb2.Tool, value: ToolSpec) -> None:
    """Any name; an empty schema is none; the output schema goes nowhere."""
    assert chat_request(ask(tools=[given])).tools == (value,)


def test_the_most_tools_and_choices() -> None:
    """As many as allowed are allowed."""
    request = chat_request(ask(tools=[tool(str(number)) for number in range(MAX_TOOLS)], choice_count=MAX_CHOICES))
    assert (len(request.tools), request.choice_count) == (MAX_TOOLS, MAX_CHOICES)


@pytest.mark.parametrize(
    ("given", "value"),
    [
        (choice(mode=tool_pb2.ToolChoice.MODE_AUTO), ToolMode.AUTO),
        (choice(mode=tool_pb2.ToolChoice.MODE_REQUIRED), ToolMode.REQUIRED),
        (choice(mode=tool_pb2.ToolChoice.MODE_NONE), ToolMode.NONE),
        (choice(tool_name="get_weather"), NamedTool("get_weather")),
    ],
)
def test_tool_choices(given: tool_pb2.ToolChoice, value: ToolMode | NamedTool) -> None:
    """Each of them."""
    assert chat_request(ask(tools=[tool()], tool_choice=given)).tool_choice == value


def test_every_mode_is_known() -> None:
    """A mode that the protos get later has to be thought of."""
    for name, number in tool_pb2.ToolChoice.Mode.items():
        if number:
            chat = ask(tools=[tool()], tool_choice=choice(mode=number))
            assert chat_request(chat).tool_choice == ToolMode[name.removeprefix("MODE_")]


SAMPLING: dict[str, Any] = {
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "frequency_penalty": -2.0,
    "presence_penalty": 2.0,
    "repetition_penalty": 0.5,
    "seed": -1,
    "max_tokens": 1,
    "min_tokens": 0,
    "stop": ("a",),
    "stop_token_ids": (0,),
    "ignore_eos": False,
    "logit_bias": {1: -100.0, 2: 100.0},
    "bad_words": ("b",),
}


def test_every_field_of_sampling_is_read() -> None:
    """A field that the protos get later has to be thought of."""
    assert SAMPLING.keys() == {field.name for field in chat_pb.Sampling.DESCRIPTOR.fields}
    assert chat_request(sampling(**SAMPLING)).sampling == Sampling(**SAMPLING)


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "allowed tools": (
        {"tools": [tool("a"), tool("b")], "allowed_tools": ["b", "b"]},
        {"allowed_tools": frozenset({"b"})},
    ),
    "a named tool that is allowed": (
        {"tools": [tool("a"), tool("b")], "allowed_tools": ["b"], "tool_choice": choice(tool_name="b")},
        {"tool_choice": NamedTool("b")},
    ),
    "effort": ({"reasoning": {"effort": chat_pb.REASONING_EFFORT_NONE}}, {"reasoning": Reasoning("none")}),
    "no effort": ({"reasoning": {}}, {"reasoning": Reasoning()}),
    "budget": ({"reasoning": {"token_budget": 0}}, {"reasoning": Reasoning(token_budget=0)}),
    "left out": ({"reasoning": {"include": False}}, {"reasoning": Reasoning(include=False)}),
    "incremental": (
        {"tool_call_policy": {"streaming": chat_pb.TOOL_CALL_STREAMING_INCREMENTAL}},
        {"incremental_tool_calls": True},
    ),
    "assembled": (
        {"tool_call_policy": {"streaming": chat_pb.TOOL_CALL_STREAMING_ASSEMBLED}},
        {"incremental_tool_calls": False},
    ),
    "the least time": ({"soft_time_limit": Duration(nanos=1)}, {"soft_time_limit": 1e-9}),
    "the most time": ({"soft_time_limit": Duration(seconds=24 * 3600)}, {"soft_time_limit": 86400.0}),
    "an id": ({"completion_id": "A-z_0.9:" * 16}, {"completion_id": "A-z_0.9:" * 16}),
    "no id": ({"completion_id": ""}, {"completion_id": ""}),
    "priority": ({"priority": 0}, {"priority": 0}),
    "the longest salt": ({"cache_salt": "ß" * MAX_CACHE_SALT}, {"cache_salt": "ß" * MAX_CACHE_SALT}),
    "template arguments": ({"chat_template_kwargs": '{"a": 1.0}'}, {"chat_template_kwargs": '{"a": 1.0}'}),
    "no template arguments": ({"chat_template_kwargs": " {}"}, {"chat_template_kwargs": ""}),
    "extra fields": ({"extra_body": '{"a": 1.0}'}, {"extra_body": '{"a": 1.0}'}),
    "no extra fields": ({"extra_body": "{ }"}, {"extra_body": ""}),
    "the end user": ({"user": "me"}, {"user": "me"}),
}


@pytest.mark.parametrize(("given", "values"), OPTIONS.values(), ids=OPTIONS)
def test_options(given: dict[str, Any], values: dict[str, Any]) -> None:
    """What else a request may say; what is not set is not false or zero."""
    request = chat_request(ask(**given))
    assert {name: getattr(request, name) for name in values} == values


def test_only_allowed_tools_are_offered() -> None:
    """In the order of the tools, and all of them if none is named."""
    given = [tool("a"), tool("b"), tool("c")]
    offered = chat_request(ask(tools=given, allowed_tools=["c", "a"])).offered_tools
    assert [each.name for each in offered] == ["a", "c"]
    assert len(chat_request(ask(tools=given)).offered_tools) == 3


@pytest.mark.parametrize(
    ("fields", "value"),
    [
        ({"text": {}}, None),
        ({"json_object": {}}, TextFormat(FormatKind.JSON_OBJECT)),
        ({"json_schema": {"schema": "{}"}}, TextFormat(FormatKind.JSON_SCHEMA, "{}", "response")),
        (
            {"json_schema": {"schema": '{"a":1}', "name": "n", "strict": True}},
            TextFormat(FormatKind.JSON_SCHEMA, '{"a":1}', "n", strict=True),
        ),
        ({"grammar": "g"}, TextFormat(FormatKind.GRAMMAR, "g")),
        ({"regex": "r"}, TextFormat(FormatKind.REGEX, "r")),
        ({"choice": {"values": ["a", ""]}}, TextFormat(FormatKind.CHOICE, ("a", ""))),
        ({"structural_tag": '{"type": "x"}'}, TextFormat(FormatKind.STRUCTURAL_TAG, '{"type": "x"}')),
    ],
)
def test_formats(fields: dict[str, Any], value: TextFormat | None) -> None:
    """Each form; free text is the same as none."""
    assert chat_request(form(**fields)).response_format == value


def test_every_format_is_known() -> None:
    """A form that the protos get later has to be thought of."""
    forms = {field.name for field in chat_pb.ResponseFormat.DESCRIPTOR.oneofs_by_name["format"].fields}
    assert forms == {kind.value for kind in FormatKind} | {"text"}


@pytest.mark.parametrize(
    ("given", "value"),
    [(None, None), (chat_pb.Logprobs(), 0), (chat_pb.Logprobs(top_k=0), 0), (chat_pb.Logprobs(top_k=9), 9)],
)
def test_logprobs(given: chat_pb.Logprobs | None, value: int | None) -> None:
    """Asked for without a number means none but the chosen token's."""
    assert chat_request(ask(logprobs=given)).top_logprobs == value


@pytest.mark.parametrize("value", [None, False, True])
def test_parallel_tool_calls(value: bool | None) -> None:
    """Absent is not false."""
    assert chat_request(ask(parallel_tool_calls=value)).parallel_tool_calls is value


texts = st.text(max_size=5) | st.sampled_from(
    ["", "m", "t", "{}", "[]", '{"a":1}', '{"a":"\\udc00"}', '{"a":1e400}', f"{2**90}"]
)
maybe = st.none() | texts
contents = st.fixed_dictionaries(
    {"content": st.lists(st.builds(message_pb2.ContentPart, text=maybe), max_size=2)}, optional={"text": texts}
)
calls = st.lists(st.builds(tool_pb2.ToolCall, call_id=texts, tool_name=texts, arguments=texts), max_size=2)
messages = st.one_of(
    st.just(message_pb2.ChatMessage()),
    st.builds(lambda content: message(user=content), contents),
    st.builds(lambda content: message(system=content), contents),
    st.builds(lambda content: message(developer=content), contents),
    st.builds(lambda content, call_id: message(tool={**content, "call_id": call_id}), contents, texts),
    st.builds(
        lambda content, tool_calls, reasoning: message(
            assistant={**content, "tool_calls": tool_calls, "reasoning": reasoning}
        ),
        contents,
        calls,
        texts,
    ),
)
doubles = st.none() | st.floats()
int32 = st.integers(-(2**31), 2**31 - 1)
samplings = st.builds(
    chat_pb.Sampling,
    temperature=doubles,
    top_p=doubles,
    min_p=doubles,
    frequency_penalty=doubles,
    presence_penalty=doubles,
    repetition_penalty=doubles,
    top_k=st.none() | int32,
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    max_tokens=st.none() | int32,
    min_tokens=st.none() | int32,
    stop=st.lists(texts, max_size=2),
    stop_token_ids=st.lists(int32, max_size=2),
    ignore_eos=st.none() | st.booleans(),
    logit_bias=st.dictionaries(int32, st.floats(), max_size=2),
    bad_words=st.lists(texts, max_size=2),
)
formats = st.one_of(
    st.just(chat_pb.ResponseFormat()),
    st.builds(chat_pb.ResponseFormat, grammar=maybe),
    st.builds(chat_pb.ResponseFormat, regex=maybe),
    st.builds(chat_pb.ResponseFormat, structural_tag=maybe),
    st.builds(lambda schema, name: {"json_schema": {"schema": schema, "name": name}}, texts, texts),
    st.builds(lambda values: {"choice": {"values": values}}, st.lists(texts, max_size=2)),
)
choices = st.one_of(
    st.just(tool_pb2.ToolChoice()),
    st.builds(tool_pb2.ToolChoice, tool_name=texts),
    st.builds(unknown_mode, st.integers(0, 100)),
)
requests = st.builds(
    chat_pb.ChatRequest,
    model=texts,
    messages=st.lists(messages, max_size=3),
    tools=st.lists(st.builds(tool_pb2.Tool, name=texts, input_schema=texts, output_schema=texts), max_size=2),
    tool_choice=st.none() | choices,
    parallel_tool_calls=st.none() | st.booleans(),
    sampling=st.none() | samplings,
    response_format=st.none() | formats,
    logprobs=st.none() | st.builds(chat_pb.Logprobs, top_k=st.none() | int32),
    choice_count=st.none() | int32,
    allowed_tools=st.lists(texts, max_size=2),
    reasoning=st.none()
    | st.builds(chat_pb.Reasoning, token_budget=st.none() | int32, include=st.none() | st.booleans()),
    soft_time_limit=st.none()
    | st.builds(Duration, seconds=st.integers(-5, 100_000), nanos=st.integers(-(2**31), 2**31 - 1)),
    completion_id=texts,
    priority=st.none() | st.integers(-(2**31), 2**31 - 1),
    cache_salt=texts,
    chat_template_kwargs=texts,
    extra_body=texts,
    user=texts,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(requests)
def test_any_request_is_refused_or_can_be_sent(chat: chat_pb.ChatRequest) -> None:
    """Whatever comes over the wire: a `CallerError` that names fields, or a body for vLLM. Nothing else is raised."""
    refused: tuple[Violation, ...] = ()
    try:
        assert at_once(request_body(chat_request(chat), "m"))[0].startswith(b"{")
    except CallerError as error:
        refused = error.violations
        assert refused
    assert all(violation.field.startswith("chat.") for violation in refused)
