"""What one request may hold, and what it costs to find that it holds more: bytes, turns and steps are counted, no time."""

from __future__ import annotations

import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import message_pb2, tool_pb2
from deltawire_server.completions.info import CompletionInfo
from deltawire_server.errors import CallerError, Violation
from deltawire_server.rpc import convert, validate
from deltawire_server.rpc.status import shorten
from deltawire_server.schemas import MAX_SCHEMA_BYTES
from tests.support.gateway import ask, tool, user
from tests.support.turns import at_once, chat_request

if TYPE_CHECKING:
    from collections.abc import Callable

MESSAGE_LIMIT = 4 * 1024 * 1024
"""The default receive limit of gRPC clients."""


def refused(chat: chat_pb.ChatRequest) -> tuple[Violation, ...]:
    """What a request is refused for."""
    with pytest.raises(CallerError) as caught:
        chat_request(chat)
    return caught.value.violations


def past_call(arguments: str) -> chat_pb.ChatRequest:
    """A request with a tool call of an earlier turn."""
    call = tool_pb2.ToolCall(call_id="c", tool_name="t", arguments=arguments)
    return ask(messages=[message_pb2.ChatMessage(assistant=message_pb2.AssistantMessage(tool_calls=[call]))])


JSON_FIELDS: dict[str, tuple[Callable[[str], chat_pb.ChatRequest], int]] = {
    "chat.chat_template_kwargs": (lambda text: ask(chat_template_kwargs=text), validate.MAX_JSON_BYTES),
    "chat.extra_body": (lambda text: ask(extra_body=text), validate.MAX_JSON_BYTES),
    "chat.tools[0].input_schema": (lambda text: ask(tools=[tool(input_schema=text)]), MAX_SCHEMA_BYTES),
    "chat.tools[0].output_schema": (lambda text: ask(tools=[tool(output_schema=text)]), MAX_SCHEMA_BYTES),
    "chat.response_format.json_schema.schema": (
        lambda text: ask(response_format={"json_schema": {"schema": text}}),
        MAX_SCHEMA_BYTES,
    ),
    "chat.response_format.structural_tag": (
        lambda text: ask(response_format={"structural_tag": text}),
        MAX_SCHEMA_BYTES,
    ),
    "chat.messages[0].assistant.tool_calls[0].arguments": (past_call, validate.MAX_ARGUMENTS_BYTES),
}


def arrays(size: int) -> str:
    """The JSON text of an object with as many empty arrays as so many bytes hold."""
    count = (size - len('{"a":[[]]}')) // len("[],")
    return ('{"a":[' + "[]," * count + "[]]}").ljust(size)


@pytest.mark.parametrize("field", JSON_FIELDS)
def test_json_is_bounded_in_bytes(field: str) -> None:
    """Each field by itself, in bytes of UTF-8; one that is longer is not read."""
    request, limit = JSON_FIELDS[field]
    chat_request(request(arrays(limit)))
    for text in (arrays(limit + 1), "ß" * (limit // 2 + 1)):
        (violation,) = refused(request(text))
        assert violation.field == field
        assert f"at most {limit} are allowed" in violation.description


@pytest.mark.parametrize("field", JSON_FIELDS)
def test_no_tree_is_built_of_json(field: str) -> None:
    """It is read where it stands: the peak is a few copies of the text, and not an object for each of its values."""
    request, limit = JSON_FIELDS[field]
    chat = request(arrays(limit))
    tracemalloc.start()
    try:
        chat_request(chat)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3.5 * limit


def test_names_of_fields_are_bounded() -> None:
    """Each of them is matched with what the operator allows, and repeated in errors."""
    (violation,) = refused(ask(extra_body='{"' + "x" * (validate.MAX_NAME_BYTES + 1) + '":1}'))
    assert violation.field.startswith("chat.extra_body.xxx")
    assert "at most 1024" in violation.description


LONG_NAME = "ß" * (validate.MAX_NAME_BYTES // 2)
NAMES: dict[str, Callable[[str], chat_pb.ChatRequest]] = {
    "chat.model": lambda name: ask(model=name),
    "chat.user": lambda name: ask(user=name),
    "chat.tools[0].name": lambda name: ask(tools=[tool(name)]),
    "chat.response_format.json_schema.name": lambda name: ask(
        response_format={"json_schema": {"name": name, "schema": "{}"}}
    ),
}


@pytest.mark.parametrize("field", NAMES)
def test_names_are_bounded_in_bytes(field: str) -> None:
    """Of models, of tools, and of users."""
    chat_request(NAMES[field](LONG_NAME))
    (violation,) = refused(NAMES[field](LONG_NAME + "x"))
    assert violation == Violation(field, "has 1025 bytes; at most 1024 are allowed")


@pytest.mark.parametrize("field", ["grammar", "regex", "choice.values"])
def test_forms_are_bounded_in_bytes(field: str) -> None:
    """Several texts together."""
    forms: dict[str, Callable[[int], Any]] = {
        "grammar": lambda size: {"grammar": "x" * size},
        "regex": lambda size: {"regex": "x" * size},
        "choice.values": lambda size: {"choice": {"values": ["x" * (size // 2), "x" * (size - size // 2)]}},
    }
    chat_request(ask(response_format=forms[field](validate.MAX_FORM_BYTES)))
    (violation,) = refused(ask(response_format=forms[field](validate.MAX_FORM_BYTES + 1)))
    assert violation.field == f"chat.response_format.{field}"
    assert "at most 1048576" in violation.description


def test_tools_are_bounded_together() -> None:
    """Their descriptions and schemas; 128 real ones are let through."""
    honest = [tool(f"tool_{number}", description="Does something. " * 100) for number in range(validate.MAX_TOOLS)]
    assert len(chat_request(ask(tools=honest)).tools) == validate.MAX_TOOLS
    (violation,) = refused(ask(tools=[tool("t", description="x" * validate.MAX_TOOLS_BYTES)]))
    assert violation.field == "chat.tools"
    assert "description and input_schema" in violation.description


def test_the_texts_of_sampling_are_bounded_together() -> None:
    """In bytes, however they are divided."""
    half = "ß" * (validate.MAX_SAMPLING_BYTES // 4)
    chat_request(ask(sampling=chat_pb.Sampling(stop=[half], bad_words=[half])))
    for sampling in (
        chat_pb.Sampling(stop=[half], bad_words=[half, "x"]),
        chat_pb.Sampling(stop=[half, half, "x"]),
        chat_pb.Sampling(bad_words=["x" * 33] * 2000),
    ):
        (violation,) = refused(ask(sampling=sampling))
        assert violation.field == "chat.sampling"
        assert "at most 65536" in violation.description


def test_started_fits_into_any_clients_message() -> None:
    """With all of the sampling that a request may have, and the longest names: a small part of what clients receive."""
    most = validate.MAX_SAMPLING_VALUES
    sampling = chat_pb.Sampling(
        stop=["x" * (validate.MAX_SAMPLING_BYTES // most // 2)] * most,
        bad_words=["x" * (validate.MAX_SAMPLING_BYTES // most // 2)] * most,
        stop_token_ids=[2**31 - 1] * most,
        logit_bias={2**31 - 1 - number: -0.1 for number in range(most)},
    )
    request = chat_request(ask(model=LONG_NAME, sampling=sampling))
    head = CompletionInfo("c" * 128, LONG_NAME, request.model, "p" * 64, 0.0, request.sampling)
    assert convert.started(head).ByteSize() < MESSAGE_LIMIT / 16


@pytest.mark.parametrize(
    "messages",
    [[user("hi")] * validate.MAX_MESSAGES, [user(*["hi"] * 100)] * 200],
    ids=["many messages", "many parts"],
)
def test_a_long_conversation_gives_other_calls_their_turn(messages: list[message_pb2.ChatMessage]) -> None:
    """After as many messages, parts and calls as a step has."""
    request, turns = at_once(validate.chat_request(ask(messages=messages)))
    assert len(request.messages) == len(messages)
    assert turns >= validate.MAX_ENTRIES // validate.STEP - 1


def test_the_names_of_tools_are_listed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many names are not among them."""
    cut: list[int] = []

    def counting(text: str, limit: int) -> str:
        cut.append(len(text))
        return shorten(text, limit)

    monkeypatch.setattr(validate, "shorten", counting)
    tools = [tool(f"{number:03}" + "x" * 1000) for number in range(validate.MAX_TOOLS)]
    violations = refused(ask(tools=tools, allowed_tools=[f"y{number}" * 1000 for number in range(63)]))
    assert len(violations) == 63
    assert len(cut) == 20 + 63


@pytest.mark.parametrize("field", ["allowed_tools", "tool_choice"])
def test_a_long_name_is_not_repeated(field: str) -> None:
    """Not even one that grows when it is quoted."""
    value: Any = {
        "allowed_tools": ["\x00" * 1_000_000],
        "tool_choice": tool_pb2.ToolChoice(tool_name="\x00" * 1_000_000),
    }
    tracemalloc.start()
    try:
        (violation,) = refused(ask(tools=[tool()], **{field: value[field]}))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "is not one of the tools: get_weather" in violation.description
    assert peak < 3_500_000
