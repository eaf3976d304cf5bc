"""Requests that are wrong in very many places: told as far as anybody reads, and read no further."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import message_pb2, model_registry_pb2, tool_pb2
from deltawire_server.errors import CallerError, Violation
from deltawire_server.rpc import validate
from deltawire_server.rpc.model_registry import changes_of
from deltawire_server.rpc.status import MAX_MESSAGE
from deltawire_server.rpc.violations import MAX_FIELD, MAX_VIOLATIONS, Violations
from tests.support.gateway import ask, user
from tests.support.turns import chat_request


def refused(chat: chat_pb.ChatRequest) -> tuple[Violation, ...]:
    """What a request is refused for."""
    with pytest.raises(CallerError) as caught:
        chat_request(chat)
    return caught.value.violations


def test_violations_are_raised_together() -> None:
    """Once all have been collected; without any, nothing happens."""
    violations = Violations()
    violations.raise_any()
    violations.add("a", "is wrong")
    violations.add("b", "is wrong too")
    with pytest.raises(CallerError) as caught:
        violations.raise_any()
    assert caught.value.violations == (Violation("a", "is wrong"), Violation("b", "is wrong too"))


def test_violations_are_bounded() -> None:
    """In number, where reading ends, and each in length."""
    violations = Violations()
    for number in range(MAX_VIOLATIONS - 1):
        violations.add(f"{number}" * 1000, "x" * 10_000)
    with pytest.raises(CallerError) as caught:
        violations.add("last", "")
    assert len(caught.value.violations) == MAX_VIOLATIONS
    assert all(len(each.field.encode()) <= MAX_FIELD for each in caught.value.violations)
    assert all(len(each.description.encode()) <= MAX_MESSAGE for each in caught.value.violations)
    assert len(caught.value.message) < MAX_VIOLATIONS * (MAX_FIELD + MAX_MESSAGE + 4)


def test_a_violation_does_not_repeat_all_that_there_is() -> None:
    """Names of tools are listed up to twenty, and cut: each violation has them."""
    tools = [tool_pb2.Tool(name=f"{number}" + "n" * 1000) for number in range(25)]
    violations = refused(ask(tools=tools, allowed_tools=["x"] * 100))
    assert len(violations) == MAX_VIOLATIONS
    assert violations[0].description.startswith("'x' is not one of the tools: 0nnn")
    assert violations[0].description.endswith(" and 5 more") or violations[0].description.endswith("…")
    short = [tool_pb2.Tool(name=f"t{number}") for number in range(22)]
    (violation,) = refused(ask(tools=short, allowed_tools=["x"]))
    assert violation.description.endswith("t18, t19 and 2 more")


EMPTY = message_pb2.ContentPart(text="")
TOO_LONG: dict[str, tuple[chat_pb.ChatRequest, str]] = {
    "messages": (ask(messages=[user("x")] * (validate.MAX_MESSAGES + 1)), "chat.messages"),
    "parts": (
        ask(
            messages=[
                message_pb2.ChatMessage(user=message_pb2.UserMessage(content=[EMPTY] * (validate.MAX_ENTRIES + 1)))
            ]
        ),
        "chat.messages",
    ),
    "parts of one message": (ask(messages=[user("x"), user(*["x"] * (validate.MAX_PARTS + 1))]), "chat.messages[1]"),
    "calls": (
        ask(
            messages=[
                message_pb2.ChatMessage(
                    assistant=message_pb2.AssistantMessage(tool_calls=[tool_pb2.ToolCall()] * validate.MAX_ENTRIES)
                ),
                user("x"),
                message_pb2.ChatMessage(),
            ]
        ),
        "chat.messages",
    ),
    "extra fields": (
        ask(extra_body=json.dumps(dict.fromkeys(map(str, range(validate.MAX_EXTRA_FIELDS + 1))))),
        "chat.extra_body",
    ),
    "tools": (ask(tools=[tool_pb2.Tool()] * (validate.MAX_TOOLS + 1)), "chat.tools"),
    "allowed tools": (ask(allowed_tools=["x"] * (validate.MAX_TOOLS + 1)), "chat.allowed_tools"),
    **{
        name: (ask(sampling=chat_pb.Sampling(**{name: values})), f"chat.sampling.{name}")  # type: ignore[arg-type]
        for name, values in {
            "stop": ["x"] * (validate.MAX_SAMPLING_VALUES + 1),
            "stop_token_ids": [1] * (validate.MAX_SAMPLING_VALUES + 1),
            "bad_words": ["x"] * (validate.MAX_SAMPLING_VALUES + 1),
            "logit_bias": dict.fromkeys(range(validate.MAX_SAMPLING_VALUES + 1), 1.0),
        }.items()
    },
    "choice": (
        ask(
            response_format=chat_pb.ResponseFormat(
                choice=chat_pb.ResponseFormat.Choice(values=["x"] * (validate.MAX_CHOICE_VALUES + 1))
            )
        ),
        "chat.response_format.choice.values",
    ),
}


@pytest.mark.parametrize("name", TOO_LONG)
def test_what_is_too_long_to_be_read(name: str) -> None:
    """It is refused for that alone, with its number and the limit."""
    chat, field = TOO_LONG[name]
    (violation,) = refused(chat)
    assert violation.field == field
    assert "at most" in violation.description


def test_schemas_that_are_too_much_together() -> None:
    """It is said once, however many tools there are."""
    schema = '{"type": "object", "description": "' + "x" * 200_000 + '"}'
    tools = [tool_pb2.Tool(name=f"t{number}", input_schema=schema) for number in range(100)]
    (violation,) = refused(ask(tools=tools))
    assert violation.field == "chat.tools"
    assert len(chat_request(ask(tools=tools[:5])).tools) == 5


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "": ({"schema": ""}, "is required: the JSON text of an object"),
}
if sys.version_info < (3, 14):  # later ones read every depth that fits into the limit of bytes
    WRONG["deep"] = ({"schema": '{"a":' + "[" * 5000 + "]" * 5000 + "}"}, "is nested too deeply to be read")


@pytest.mark.parametrize("name", WRONG)
def test_json_that_cannot_be_read(name: str) -> None:
    """It says why in the words of the rule, not of the reader."""
    fields, words = WRONG[name]
    form = chat_pb.ResponseFormat(json_schema=chat_pb.ResponseFormat.JsonSchema(**fields))
    (violation,) = refused(ask(response_format=form))
    assert violation.description.startswith(words)


def test_a_mode_of_a_later_version() -> None:
    """Names the number that is not known."""
    choice = tool_pb2.ToolChoice()
    choice.mode = 50  # type: ignore[assignment]
    (violation,) = refused(ask(tools=[tool_pb2.Tool(name="t")], tool_choice=choice))
    assert violation.description.endswith("mode 50 is not supported")


def test_the_violations_of_an_update_mask_are_bounded() -> None:
    """However many paths it has that cannot be changed."""
    mask = FieldMask(paths=["x" * 1000] * 20_000)
    with pytest.raises(CallerError) as caught:
        changes_of(model_registry_pb2.UpdateModelRequest(update_mask=mask))
    assert len(caught.value.violations) == MAX_VIOLATIONS
