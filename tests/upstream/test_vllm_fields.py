"""Which fields a vLLM lists in its document, and what becomes of a request then."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from deltawire_server.errors import CallerError, Code, Reason
from deltawire_server.fake_vllm.described import CHAT_FIELDS, openapi
from deltawire_server.sansio.events import NoticeKind
from deltawire_server.upstream.engine import Engine, EngineKind, check_fields
from deltawire_server.upstream.request import (
    ChatMessage,
    ChatRequest,
    FormatKind,
    Reasoning,
    Role,
    Sampling,
    TextFormat,
    ToolMode,
    ToolSpec,
)
from deltawire_server.upstream.vllm_fields import (
    CORE,
    FIELDS,
    STRICT,
    field_names,
    fields_to_check,
    format_field,
)
from deltawire_server.upstream.vllm_request import chat_body

HI = ChatMessage(Role.USER, ("hi",))


def to_check(**fields: Any) -> dict[str, str]:  # noqa: ANN401 (whatever a request takes)
    """What is to be checked of a request with these fields."""
    request = ChatRequest("m", (HI,), **fields)
    return fields_to_check(chat_body(request, "m"), request)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({}, {}),
        ({"sampling": Sampling(temperature=1.0, top_k=1, min_tokens=2, logit_bias={1: 1.0}, stop=("x",))}, {}),
        ({"choice_count": 2, "top_logprobs": 1, "user": "me"}, {}),
        ({"tools": (ToolSpec("t"),), "tool_choice": ToolMode.REQUIRED}, {}),
        ({"response_format": TextFormat(FormatKind.JSON_SCHEMA, "{}")}, {}),
        ({"sampling": Sampling(bad_words=("x",))}, {"bad_words": "chat.sampling.bad_words"}),
        (
            {"response_format": TextFormat(FormatKind.REGEX, "x")},
            {"structured_outputs": "chat.response_format"},
        ),
        (
            {"reasoning": Reasoning("low", 0, include=False)},
            {
                "reasoning_effort": "chat.reasoning.effort",
                "thinking_token_budget": "chat.reasoning.token_budget",
                "include_reasoning": "chat.reasoning.include",
            },
        ),
        (
            {"priority": 0, "cache_salt": "s", "chat_template_kwargs": '{"a":1}'},
            {
                "priority": "chat.priority",
                "cache_salt": "chat.cache_salt",
                "chat_template_kwargs": "chat.chat_template_kwargs",
            },
        ),
        (
            {"tools": (ToolSpec("t"), ToolSpec("u", strict=False), ToolSpec("v", strict=True))},
            {STRICT: "chat.tools[1].strict"},
        ),
        ({"tools": (ToolSpec("t", strict=True),), "tool_choice": ToolMode.NONE}, {}),
    ],
    ids=repr,
)
def test_what_is_checked(fields: dict[str, Any], found: dict[str, str]) -> None:
    """What not every vLLM knows, under the caller's own name for it."""
    assert to_check(**fields) == found


def test_an_extra_field_is_checked_under_its_own_name() -> None:
    """As the caller wrote it."""
    assert fields_to_check({"model": "m", "echo": True}, ChatRequest("m", (HI,))) == {"echo": "chat.extra_body.echo"}


@pytest.mark.parametrize(
    ("form", "tools", "field"),
    [
        (None, (), ""),
        (TextFormat(FormatKind.JSON_OBJECT), (), ""),
        (None, (ToolSpec("t"),), "chat.tools"),
        (TextFormat(FormatKind.JSON_OBJECT), (ToolSpec("t"),), "chat.tools"),
        (TextFormat(FormatKind.JSON_SCHEMA, "{}"), (), "chat.response_format.json_schema.schema"),
        (TextFormat(FormatKind.JSON_SCHEMA, "{}"), (ToolSpec("t"),), ""),
        (TextFormat(FormatKind.GRAMMAR, "x"), (ToolSpec("t"),), "chat.response_format.grammar"),
        (TextFormat(FormatKind.REGEX, "x"), (), "chat.response_format.regex"),
        (TextFormat(FormatKind.CHOICE, ("x",)), (), "chat.response_format.choice.values"),
        (TextFormat(FormatKind.STRUCTURAL_TAG, "{}"), (), "chat.response_format.structural_tag"),
    ],
)
def test_the_field_of_a_response_format(form: TextFormat | None, tools: tuple[ToolSpec, ...], field: str) -> None:
    """Errors about a format name this field."""
    assert format_field(ChatRequest("m", (HI,), tools=tools, response_format=form)) == field


def test_the_core_is_made_of_fields() -> None:
    """Of this API's and of what the gateway says itself, and vLLM knows them all."""
    assert CORE - FIELDS.keys() == {"stream", "stream_options"}
    assert {*FIELDS} | CORE <= {*CHAT_FIELDS}


ALL = Engine(EngineKind.VLLM, "0.32.0", fields=frozenset({*CHAT_FIELDS, STRICT}))


def test_what_is_known_passes() -> None:
    """Without a word."""
    assert check_fields({"priority": "chat.priority", STRICT: "chat.tools[0].strict"}, ALL, "p") == ()
    assert check_fields({}, Engine(EngineKind.UNKNOWN), "p") == ()


@pytest.mark.parametrize(("version", "said"), [("0.8.5", "vLLM 0.8.5"), ("", "a vLLM")])
def test_what_is_not_known_is_refused(version: str, said: str) -> None:
    """All of it at once, each by the caller's name and vLLM's, with what to do."""
    asked = {"priority": "chat.priority", "cache_salt": "chat.cache_salt", "echo": "chat.extra_body.echo"}
    with pytest.raises(CallerError) as caught:
        check_fields(asked, Engine(EngineKind.VLLM, version, fields=frozenset({"echo"})), "p")
    error = caught.value
    assert (error.reason, error.code) == (Reason.FIELD_NOT_SUPPORTED, Code.INVALID_ARGUMENT)
    assert error.message == (
        f"provider 'p' is {said}, which does not support cache_salt, priority and would ignore it: leave out chat.cache_salt,"
        " chat.priority"
    )
    assert [violation.field for violation in error.violations] == ["chat.cache_salt", "chat.priority"]
    assert error.metadata == {"field": "chat.cache_salt", "provider": "p", "version": version}


def test_what_cannot_be_checked_is_told() -> None:
    """A notice for each field."""
    engine = Engine(EngineKind.PROXY, detail="it is a router")
    notices = check_fields({"priority": "chat.priority", "cache_salt": "chat.cache_salt"}, engine, "p")
    assert all("it is a router" in notice.message for notice in notices)
    assert [(notice.kind, notice.field) for notice in notices] == [
        (NoticeKind.FIELDS_NOT_CHECKED, "chat.cache_salt"),
        (NoticeKind.FIELDS_NOT_CHECKED, "chat.priority"),
    ]


def names_of(document: object) -> frozenset[str]:
    """The fields that a document tells."""
    return field_names(json.dumps(document).encode())


def test_a_document_is_read_along_its_references() -> None:
    """From the path to the request's schema, whatever that is called, and on to a tool's function."""
    assert names_of(openapi("1")) == {*CHAT_FIELDS, STRICT}
    assert names_of(openapi("1", ("priority", "strict"))) == {*CHAT_FIELDS} - {"priority"}


def changed(*path: str, to: object) -> dict[str, Any]:
    """A document with one place changed."""
    document = copy.deepcopy(openapi("1"))
    place = document
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = to
    return document


SCHEMAS = ("components", "schemas")


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        {},
        changed("paths", to={"/v1/completions": {}}),
        changed("paths", "/v1/chat/completions", to={"get": {}}),
        changed(*SCHEMAS, to={}),
        changed(*SCHEMAS, "ChatCompletionRequest", "properties", to={"prompt": {}}),
        changed(*SCHEMAS, "ChatCompletionRequest", to={"$ref": "#/components/schemas/ChatCompletionRequest"}),
        changed(*SCHEMAS, "ChatCompletionRequest", to={"$ref": 5}),
        changed(*SCHEMAS, "ChatCompletionRequest", to="text"),
        changed(*SCHEMAS, "ChatCompletionRequest", to={"anyOf": 5}),
        changed(
            *SCHEMAS,
            "ChatCompletionRequest",
            to={"anyOf": [{"$ref": "#/components/schemas/ChatCompletionRequest"}] * 50},
        ),
    ],
)
def test_a_document_that_does_not_say(document: object) -> None:
    """Nothing is known then; a reference to itself ends too."""
    assert names_of(document) == frozenset()


@pytest.mark.parametrize("text", [None, b"", b"<html>", b'"\xff"', b"[" * 100_000], ids=repr)
def test_what_is_no_document(text: bytes | None) -> None:
    """Whatever stands there."""
    assert field_names(text) == frozenset()


def test_a_document_that_does_not_tell_of_functions() -> None:
    """Then a tool's fields are not held against it."""
    assert STRICT in names_of(changed(*SCHEMAS, "FunctionDefinition", to={"type": "object"}))
