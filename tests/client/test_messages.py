"""Messages and tools made by helpers are the API's own, and nothing is lost on the way."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from deltawire import (
    ChatMessage,
    ResponseFormat,
    Tool,
    ToolCall,
    assistant,
    choice,
    developer,
    grammar,
    image,
    json_schema,
    message_text,
    regex,
    structural_tag,
    system,
    tool,
    tool_definition,
    tool_from_openai,
    user,
)
from deltawire._messages import as_message
from deltawire.v1.message_pb2 import (
    AssistantMessage,
    ContentPart,
    DeveloperMessage,
    Image,
    SystemMessage,
    ToolMessage,
    UserMessage,
)

if TYPE_CHECKING:
    from pathlib import Path

CALL = ToolCall(call_id="call_1", tool_name="get_weather", arguments='{"city":"Oslo"}')
PART = ContentPart(text="hi")


def test_each_role() -> None:
    """Every helper gives its role, with the content as parts."""
    assert system("hi") == ChatMessage(system=SystemMessage(text="hi"))
    assert developer("hi") == ChatMessage(developer=DeveloperMessage(text="hi"))
    assert user("hi") == ChatMessage(user=UserMessage(text="hi"))
    assert assistant("hi", tool_calls=[CALL], reasoning="hm") == ChatMessage(
        assistant=AssistantMessage(text="hi", tool_calls=[CALL], reasoning="hm")
    )
    assert assistant(tool_calls=[CALL]).assistant.content == []


def test_content_of_several_parts() -> None:
    """Text and parts can be mixed, and their order stays."""
    assert user(["a", ContentPart(text="b"), "c"]) == user([ContentPart(text=each) for each in "abc"])
    assert user(PART) == user("hi")


@pytest.mark.parametrize("call", [CALL, "call_1"])
def test_a_tool_result_names_its_call(call: ToolCall | str) -> None:
    """By the call itself or by its id."""
    assert tool(call, "rain") == ChatMessage(tool=ToolMessage(call_id="call_1", text="rain"))


@pytest.mark.parametrize(
    "value",
    [
        SystemMessage(text="hi"),
        DeveloperMessage(text="hi"),
        UserMessage(text="hi"),
        AssistantMessage(text="hi"),
        ToolMessage(text="hi", call_id="call_1"),
    ],
)
def test_a_message_of_a_role_finds_its_place(
    value: SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage,
) -> None:
    """The API's own messages of a role are wrapped, whole."""
    wrapped = as_message(value)
    role = wrapped.WhichOneof("role")
    assert role is not None
    assert getattr(wrapped, role) == value
    assert message_text(value) == message_text(wrapped) == "hi"


def test_text_and_whole_messages() -> None:
    """Text is the user's; a whole message is passed on, not copied."""
    assert as_message("hi") == user("hi")
    message = system("hi")
    assert as_message(message) is message


def test_what_can_be_no_message() -> None:
    """The error names the type that came."""
    with pytest.raises(TypeError, match="not dict"):
        as_message({"role": "user"})  # type: ignore[arg-type]


def test_text_of_a_message() -> None:
    """The parts put together; a message without a role has no text."""
    assert message_text(user(["a", "b"])) == "ab"
    assert message_text(ChatMessage()) == ""


def test_a_schema_as_text_stays_to_the_letter() -> None:
    """Text is not parsed and written again: key order and spaces may matter to its author."""
    schema = '{ "type":"object" , "properties":{} }'
    made = tool_definition("f", "does", input_schema=schema, output_schema={"type": "string"}, strict=True)
    assert made == Tool(
        name="f", description="does", input_schema=schema, output_schema='{"type": "string"}', strict=True
    )
    assert json_schema(schema, name="n", strict=False).json_schema.schema == schema


def test_response_formats() -> None:
    """Each helper fills its own arm."""
    assert regex("a+") == ResponseFormat(regex="a+")
    assert choice(["yes", "no"]) == ResponseFormat(choice=ResponseFormat.Choice(values=["yes", "no"]))
    assert grammar('root ::= "a"') == ResponseFormat(grammar='root ::= "a"')
    assert structural_tag({"type": "structural_tag"}) == ResponseFormat(structural_tag='{"type": "structural_tag"}')
    assert structural_tag("{ }") == ResponseFormat(structural_tag="{ }")


def test_images(tmp_path: Path) -> None:
    """Bytes as they are, a path's bytes, and URLs of both kinds as they were written."""
    path = tmp_path / "cat.png"
    path.write_bytes(b"png")
    assert image(b"png") == image(path) == ContentPart(image=Image(data=b"png"))
    for url in ("https://example.com/cat.png", "Data:image/png;base64,AAAA"):
        assert image(url) == ContentPart(image=Image(url=url))
    assert user(["What?", image(b"png")]).user.content[1].image.data == b"png"


def test_a_name_of_a_file_is_no_url() -> None:
    """It is neither read nor sent: a caller that means a file says so."""
    with pytest.raises(ValueError, match=r"a pathlib\.Path, and 'cat\.png' is not a URL"):
        image("cat.png")
    with pytest.raises(TypeError, match=r"an image is a URL, bytes, or a pathlib\.Path, not int"):
        image(5)  # type: ignore[arg-type]


def test_what_is_no_content() -> None:
    """The message says what is taken; a text that cannot be sent names its field."""
    for given in 5, b"x", [5]:
        with pytest.raises(
            TypeError, match=r"^content is text, a ContentPart or an object of OpenAI's, not (int|bytes)$"
        ):
            user(given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^text: 'a\\udcff' is not text that can be sent as UTF-8$"):
        user("a\udcff")
    with pytest.raises(TypeError, match=r"^tool_calls: 5 is not a ToolCall$"):
        assistant("a", tool_calls=[5])  # type: ignore[list-item]


def test_content_as_openai_writes_it() -> None:
    """One object or several, beside the API's own parts."""
    seen = {"type": "image_url", "image_url": {"url": "https://example.com/cat.png", "detail": "low"}}
    made = user([{"type": "text", "text": "What is this?"}, seen, "And this?", image(b"png")])
    assert made == user(["What is this?", image("https://example.com/cat.png"), "And this?", image(b"png")])
    assert user({"type": "text", "text": "hi"}) == user("hi")
    assert user({"type": "image_url", "image_url": "data:,"}) == user(image("data:,"))


@pytest.mark.parametrize(
    ("part", "what"),
    [
        ({"type": "input_audio"}, "\"type\" is 'input_audio'"),
        ({"text": "hi"}, '"type" is None'),
        ({"type": "text", "text": 3}, '"text" is not a string'),
        ({"type": "image_url", "image_url": 3}, '"image_url" is not an object'),
        ({"type": "image_url", "image_url": {"url": 3}}, '"url" is not a string'),
    ],
)
def test_content_that_is_none(part: dict[str, object], what: str) -> None:
    """The message says which member is wrong."""
    with pytest.raises(ValueError, match=what):
        user(part)


def test_a_tool_without_arguments_says_nothing_of_them() -> None:
    """And `strict` stays absent, which is not the same as false."""
    made = tool_definition("f")
    assert made == Tool(name="f")
    assert not made.HasField("strict")


def test_openai_tools() -> None:
    """OpenAI's object, whole or the inner one alone."""
    function = {
        "name": "get_weather",
        "description": "Wetter für eine Stadt",
        "parameters": {"type": "object", "properties": {"Ort": {"const": "Köln"}}},
        "strict": True,
    }
    made = tool_from_openai({"type": "function", "function": function})
    assert made == tool_from_openai(function)
    assert (made.name, made.description, made.strict) == ("get_weather", "Wetter für eine Stadt", True)
    assert json.loads(made.input_schema) == function["parameters"]
    assert "Köln" in made.input_schema


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ({"type": "web_search"}, "'web_search'"),
        ({"function": "get_weather"}, '"function" is not an object'),
        ({"function": {}}, 'no "name"'),
        ({"name": 3}, '"name" is not a string'),
        ({"name": "f", "parameters": "{}"}, '"parameters" is not an object'),
        ({"name": "f", "strict": "yes"}, '"strict" is not true or false'),
    ],
)
def test_openai_tools_that_are_none(value: dict[str, object], what: str) -> None:
    """The message says which member is wrong."""
    with pytest.raises(ValueError, match=what):
        tool_from_openai(value)
