"""Keyword arguments become a ChatRequest: what is given is in it, and what is not given is absent."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask

from deltawire import (
    ChatRequest,
    MessageLike,
    Reasoning,
    ResponseFormat,
    Sampling,
    StreamOptions,
    Tool,
    ToolChoice,
    assistant,
    chat_request,
    choice,
    json_schema,
    system,
    tool_definition,
    user,
)
from deltawire._channel import CallOptions
from deltawire._requests import (
    CHAT_OPTIONS,
    SAMPLING_OPTIONS,
    STREAMING_OPTIONS,
    ModelPages,
    resume_request,
    split_arguments,
    split_listing,
    split_registration,
    split_streaming,
    split_update,
)
from deltawire.v1.chat_completion_pb2 import (
    REASONING_EFFORT_HIGH,
    TOOL_CALL_STREAMING_ASSEMBLED,
    TOOL_CALL_STREAMING_INCREMENTAL,
    Logprobs,
    ReasoningEffort,
    StreamChatCompletionRequest,
    ToolCallPolicy,
)
from deltawire.v1.message_pb2 import UserMessage
from deltawire.v1.model_registry_pb2 import (
    ListModelsRequest,
    ListModelsResponse,
    Model,
    ModelSource,
    ModelState,
    ModelType,
    RegisterModelRequest,
    UpdateModelRequest,
)

if TYPE_CHECKING:
    from google.protobuf.message import Message


def test_nothing_given_nothing_sent() -> None:
    """None counts as not given, for every option there is."""
    options: Any = dict.fromkeys(CHAT_OPTIONS)
    assert chat_request("hi", **options) == chat_request("hi") == ChatRequest(messages=[user("hi")])


def fields_of(kind: type[Message]) -> set[str]:
    """The names of a message's fields."""
    return {field.name for field in kind.DESCRIPTOR.fields}


def test_every_field_is_an_option() -> None:
    """What the API can say, a keyword can."""
    assert fields_of(Sampling) == SAMPLING_OPTIONS
    # Those whose fields are options of their own.
    spread = {"reasoning_token_budget", "include_reasoning", "incremental_tool_calls", "validate_schema"}
    assert fields_of(ChatRequest) - {"messages", "tool_call_policy"} == CHAT_OPTIONS - SAMPLING_OPTIONS - spread
    assert fields_of(Reasoning) == {"effort", "token_budget", "include"}
    assert fields_of(ToolCallPolicy) == {"streaming", "validate_schema"}
    assert fields_of(StreamOptions) == STREAMING_OPTIONS - {"stream_options"}


def test_zero_is_a_value() -> None:
    """0 and False are sent: they are not the same as nothing."""
    request = chat_request("hi", temperature=0, top_k=0, ignore_eos=False, parallel_tool_calls=False, choice_count=0)
    assert request.sampling.HasField("temperature")
    assert request.sampling.HasField("top_k")
    assert request.sampling.HasField("ignore_eos")
    assert request.HasField("parallel_tool_calls")
    assert request.HasField("choice_count")
    assert not request.sampling.HasField("seed")


def test_sampling() -> None:
    """Every option arrives in its field."""
    request = chat_request(
        "hi",
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.1,
        frequency_penalty=-1,
        presence_penalty=1,
        repetition_penalty=1.1,
        seed=7,
        max_tokens=9,
        min_tokens=2,
        stop="END",
        stop_token_ids=[1, 2],
        ignore_eos=True,
        logit_bias={5: -100},
        bad_words=["no"],
    )
    assert request.sampling == Sampling(
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.1,
        frequency_penalty=-1,
        presence_penalty=1,
        repetition_penalty=1.1,
        seed=7,
        max_tokens=9,
        min_tokens=2,
        stop=["END"],
        stop_token_ids=[1, 2],
        ignore_eos=True,
        logit_bias={5: -100},
        bad_words=["no"],
    )


def test_single_arguments_are_laid_over_a_sampling() -> None:
    """They replace, lists too, and the caller's own message is left as it was."""
    base = Sampling(temperature=0.5, seed=7, stop=["a"])
    request = chat_request("hi", sampling=base, temperature=0.9, stop=["b", "c"])
    assert request.sampling == Sampling(temperature=0.9, seed=7, stop=["b", "c"])
    assert base == Sampling(temperature=0.5, seed=7, stop=["a"])
    assert chat_request("hi", sampling=base).sampling == base


def test_messages_of_every_shape() -> None:
    """Helpers, text and raw messages mix; one message needs no list."""
    history: list[MessageLike] = [
        system("be kind"),
        "hi",
        UserMessage(text="you"),
        assistant("yes"),
    ]
    request = chat_request(history)
    assert list(request.messages) == [system("be kind"), user("hi"), user("you"), assistant("yes")]
    assert list(chat_request(user("hi")).messages) == [user("hi")]
    assert list(chat_request(user("hi").user).messages) == [user("hi")]


def test_tools_of_both_shapes() -> None:
    """The API's tools and OpenAI's objects mix."""
    request = chat_request("hi", tools=[tool_definition("a"), {"type": "function", "function": {"name": "b"}}])
    assert list(request.tools) == [Tool(name="a"), Tool(name="b")]


@pytest.mark.parametrize(
    ("given", "choice"),
    [
        ("auto", ToolChoice(mode=ToolChoice.MODE_AUTO)),
        ("required", ToolChoice(mode=ToolChoice.MODE_REQUIRED)),
        ("none", ToolChoice(mode=ToolChoice.MODE_NONE)),
        ("get_weather", ToolChoice(tool_name="get_weather")),
        (ToolChoice(tool_name="auto"), ToolChoice(tool_name="auto")),
    ],
)
def test_tool_choice(given: str | ToolChoice, choice: ToolChoice) -> None:
    """Three words, any other is a tool's name, and a raw ToolChoice is passed on."""
    assert chat_request("hi", tool_choice=given).tool_choice == choice


def test_response_formats() -> None:
    """Two by name, the rest as messages."""

    def made(value: ResponseFormat | str) -> ResponseFormat:
        return chat_request("hi", response_format=value).response_format

    assert made("json_object").WhichOneof("format") == "json_object"
    assert made("text").WhichOneof("format") == "text"
    form = json_schema({"type": "object"}, name="thing", strict=True)
    assert made(form) == form
    with pytest.raises(ValueError, match="'xml' is neither"):
        made("xml")


@pytest.mark.parametrize(
    ("given", "asked"),
    [(True, Logprobs()), (3, Logprobs(top_k=3)), (0, Logprobs(top_k=0)), (Logprobs(top_k=2), Logprobs(top_k=2))],
)
def test_logprobs(given: bool | int | Logprobs, asked: Logprobs) -> None:
    """Asked for by yes, by a number, or raw."""
    request = chat_request("hi", logprobs=given)
    assert request.HasField("logprobs")
    assert request.logprobs == asked


def test_no_logprobs() -> None:
    """No is the same as not asking."""
    assert not chat_request("hi", logprobs=False).HasField("logprobs")


def test_all_the_rest_of_a_request() -> None:
    """Every option arrives in its field."""
    request = chat_request(
        "hi",
        allowed_tools=["a", "b"],
        incremental_tool_calls=True,
        validate_schema=True,
        reasoning="high",
        reasoning_token_budget=0,
        include_reasoning=False,
        soft_time_limit=1.5,
        completion_id="mine",
        priority=-1,
        cache_salt="salt",
        chat_template_kwargs={"enable_thinking": False},
        extra_body='{"a" : 1}',
        user="somebody",
    )
    assert request == ChatRequest(
        messages=[user("hi")],
        allowed_tools=["a", "b"],
        tool_call_policy=ToolCallPolicy(streaming=TOOL_CALL_STREAMING_INCREMENTAL, validate_schema=True),
        reasoning=Reasoning(effort=REASONING_EFFORT_HIGH, token_budget=0, include=False),
        soft_time_limit=Duration(seconds=1, nanos=500_000_000),
        completion_id="mine",
        priority=-1,
        cache_salt="salt",
        chat_template_kwargs='{"enable_thinking": false}',
        extra_body='{"a" : 1}',
        user="somebody",
    )


@pytest.mark.parametrize(
    ("options", "policy"),
    [
        ({"incremental_tool_calls": True}, ToolCallPolicy(streaming=TOOL_CALL_STREAMING_INCREMENTAL)),
        ({"incremental_tool_calls": False}, ToolCallPolicy(streaming=TOOL_CALL_STREAMING_ASSEMBLED)),
        ({"validate_schema": True}, ToolCallPolicy(validate_schema=True)),
    ],
)
def test_how_calls_are_told(options: Any, policy: ToolCallPolicy) -> None:  # noqa: ANN401
    """What is not said of it stays the gateway's own."""
    assert chat_request("hi", **options).tool_call_policy == policy


def test_every_effort_has_its_word() -> None:
    """All words of the API, and nothing else; a `Reasoning` is laid under the rest, and stays as it was."""
    words = ["none", "minimal", "low", "medium", "high", "xhigh", "max"]
    efforts = [chat_request("hi", reasoning=word).reasoning.effort for word in words]
    assert efforts == ReasoningEffort.values()[1:]
    base = Reasoning(effort=REASONING_EFFORT_HIGH, token_budget=5)
    over = chat_request("hi", reasoning=base, reasoning_token_budget=9).reasoning
    assert (over, base.token_budget) == (Reasoning(effort=REASONING_EFFORT_HIGH, token_budget=9), 5)
    assert not chat_request("hi", reasoning_token_budget=9).reasoning.effort
    with pytest.raises(ValueError, match="'hgih' is neither a Reasoning nor one of none, minimal"):
        chat_request("hi", reasoning="hgih")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_times_that_are_none(value: float) -> None:
    """The message names the option; everything else is for the gateway to judge."""
    with pytest.raises(ValueError, match="soft_time_limit is not a length of time"):
        chat_request("hi", soft_time_limit=value)
    assert chat_request("hi", soft_time_limit=-1).soft_time_limit == Duration(seconds=-1)


def test_one_name_is_no_list_of_names() -> None:
    """It would be taken for its letters."""
    with pytest.raises(TypeError, match=r"^allowed_tools: 'ab' is not a list$"):
        chat_request("hi", allowed_tools="ab")
    with pytest.raises(TypeError, match=r"^choice: 'ab' is not a list$"):
        choice("ab")
    assert chat_request("hi", allowed_tools=iter("ab")).allowed_tools == ["a", "b"]


INT32 = "a whole number from -2147483648 to 2147483647"
INT64 = "a whole number from -9223372036854775808 to 9223372036854775807"
TEXT = "text that can be sent as UTF-8"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"priority": 2**40}, f"priority: 1099511627776 is not {INT32}"),
        ({"choice_count": 2**33}, f"choice_count: 8589934592 is not {INT32}"),
        ({"reasoning_token_budget": 2**31}, f"reasoning_token_budget: 2147483648 is not {INT32}"),
        ({"logprobs": 2**31}, f"logprobs: 2147483648 is not {INT32}"),
        ({"seed": 10**20}, f"seed: 100000000000000000000 is not {INT64}"),
        ({"seed": 1, "stop_token_ids": [1, 2**31]}, f"stop_token_ids: 2147483648 is not {INT32}"),
        ({"logit_bias": {1: 1, 2**31: 1}}, f"logit_bias: {{2147483648: 1}} does not give a finite number for {INT32}"),
        ({"user": "\udcff"}, f"user: '\\udcff' is not {TEXT}"),
        ({"stop": "a\udcff"}, f"stop: 'a\\udcff' is not {TEXT}"),
        ({"tool_choice": "\udcff"}, f"tool_choice: '\\udcff' is not {TEXT}"),
        ({"extra_body": {"a": "\udcff"}}, f'extra_body: \'{{"a": "\\udcff"}}\' is not {TEXT}'),
        ({"temperature": 10**400}, f"temperature: 1{'0' * 79}… is not a finite number"),
        ({"temperature": float("nan")}, "temperature: nan is not a finite number"),
        ({"logit_bias": {1: 1, 2: float("inf")}}, f"logit_bias: {{2: inf}} does not give a finite number for {INT32}"),
    ],
)
def test_values_that_do_not_fit_are_named(options: Any, message: str) -> None:  # noqa: ANN401
    """The field, the value, and what it may be; everything else is for the gateway to judge."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        chat_request("hi", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"priority": "x"}, f"priority: 'x' is not {INT32}"),
        ({"temperature": "x"}, "temperature: 'x' is not a finite number"),
        ({"parallel_tool_calls": "x"}, "parallel_tool_calls: 'x' is not True or False"),
        ({"cache_salt": b"x"}, f"cache_salt: b'x' is not {TEXT}"),
        ({"bad_words": [b"x"]}, f"bad_words: b'x' is not {TEXT}"),
        ({"bad_words": 5}, "bad_words: 5 is not a list"),
        ({"logit_bias": 5}, "logit_bias: 5 is not a mapping"),
        ({"logit_bias": {1: "x"}}, f"logit_bias: {{1: 'x'}} does not give a finite number for {INT32}"),
        ({"include_reasoning": "x"}, "include_reasoning: 'x' is not True or False"),
        ({"reasoning": 5}, "reasoning: a Reasoning is needed, not int"),
        ({"sampling": 5, "seed": 1}, "sampling: a Sampling is needed, not int"),
        ({"response_format": 5}, "response_format: a ResponseFormat or text is needed, not int"),
        ({"tool_choice": 5}, f"tool_choice: 5 is not {TEXT}"),
        ({"tools": {"name": "a"}}, "tools: a list is needed, not dict"),
        ({"tools": [5]}, "a tool is a Tool or an object of OpenAI's, not int"),
        ({"tools": 5}, "tools: a list is needed, not int"),
        ({"soft_time_limit": "x"}, "soft_time_limit: a number of seconds or a timedelta is needed, not str"),
        ({"extra_body": 5}, "extra_body: a mapping or JSON text is needed, not int"),
        ({"extra_body": {"a": {1}}}, "extra_body: Object of type set is not JSON serializable"),
    ],
)
def test_values_of_another_type_are_named(options: Any, message: str) -> None:  # noqa: ANN401
    """The field, the value, and what it takes; also bytes, which protobuf would take for text."""
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        chat_request("hi", **options)


def test_a_mapping_that_holds_itself() -> None:
    """It has no JSON, and the message says whose it is."""
    endless: dict[str, Any] = {}
    endless["a"] = endless
    with pytest.raises(ValueError, match=r"^extra_body: Circular"):
        chat_request("hi", extra_body=endless)


def test_where_to_resume_is_named() -> None:
    """Its two values too."""
    with pytest.raises(ValueError, match=r"^last_sequence: 9223372036854775808 is not a whole number from"):
        resume_request("x", 2**63, 1)
    with pytest.raises(TypeError, match=r"^completion_id: 5 is not text"):
        resume_request(5, None, 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^usage_updates: 'x' is not True or False$"):
        split_streaming("hi", {"usage_updates": "x"})  # type: ignore[typeddict-item]


def test_messages_of_another_type() -> None:
    """What can be no conversation says what one is made of."""
    for given in 5, [5], b"x":
        with pytest.raises(TypeError, match=r"^a message is text or one of"):
            chat_request(given)  # type: ignore[arg-type]


def test_how_a_stream_is_told() -> None:
    """Times as seconds or as Python's own; single arguments over a whole StreamOptions, which stays as it was."""
    request, call = split_streaming(
        "hi",
        {
            "model": "llama",
            "usage_updates": True,
            "max_coalesce_delay": 0.05,
            "heartbeat_interval": timedelta(seconds=20),
            "early_heartbeats": True,
            "retention": 60,
            "timeout": 5,
        },
    )
    options = StreamOptions(
        usage_updates=True,
        max_coalesce_delay=Duration(nanos=50_000_000),
        heartbeat_interval=Duration(seconds=20),
        early_heartbeats=True,
        retention=Duration(seconds=60),
    )
    assert request == StreamChatCompletionRequest(chat=chat_request("hi", model="llama"), options=options)
    assert call == {"timeout": 5}
    over, _ = split_streaming("hi", {"stream_options": options, "usage_updates": False, "retention": None})
    assert (over.options.usage_updates, over.options.retention.seconds, options.usage_updates) == (False, 60, True)
    assert not split_streaming("hi", {"retention": None})[0].HasField("options")


def test_a_whole_request_is_told_as_asked_for() -> None:
    """How it is told is no part of it; it is copied, so that it can be used again."""
    whole = ChatRequest(model="llama")
    request, _ = split_streaming(whole, {"usage_updates": True})
    assert (request.chat, request.options) == (whole, StreamOptions(usage_updates=True))
    assert request.chat is not whole
    with pytest.raises(TypeError, match="set seed in it"):
        split_streaming(whole, {"usage_updates": True, "seed": 7})


def test_misspelt_options_are_refused() -> None:
    """They would otherwise be lost in silence."""
    with pytest.raises(TypeError, match="no argument temprature"):
        chat_request("hi", temprature=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="no argument timout"):
        split_arguments("hi", {"timout": 1})  # type: ignore[typeddict-unknown-key]


def test_arguments_of_a_call_are_parted() -> None:
    """What is asked, and how the call is made."""
    request, call = split_arguments("hi", {"model": "llama", "timeout": 3, "request_id": "r"})
    assert request == chat_request("hi", model="llama")
    assert call == CallOptions(timeout=3, request_id="r")


def test_a_whole_request_is_taken_as_it_is() -> None:
    """It cannot be mixed with arguments of its own kind."""
    whole = ChatRequest(model="llama")
    assert split_arguments(whole, {"timeout": 3}) == (whole, {"timeout": 3})
    with pytest.raises(TypeError, match="set model, seed in it"):
        split_arguments(whole, {"seed": 3, "model": "other"})


def test_registrations() -> None:
    """Every option arrives in its field."""
    request, call = split_registration(
        "llama",
        {
            "provider_id": "vllm",
            "provider_model_id": "meta/llama",
            "model_type": "embedding",
            "aliases": ["l"],
            "annotations": {"owner": "me"},
            "embedding_dimension": 1024,
            "timeout": 3,
        },
    )
    assert request == RegisterModelRequest(
        model_id="llama",
        provider_id="vllm",
        provider_model_id="meta/llama",
        type=ModelType.MODEL_TYPE_EMBEDDING,
        aliases=["l"],
        annotations={"owner": "me"},
        embedding_dimension=1024,
    )
    assert call == {"timeout": 3}
    assert split_registration("llama", {})[0] == RegisterModelRequest(model_id="llama")
    assert split_registration("m", {"model_type": ModelType.MODEL_TYPE_RERANK})[0].type == ModelType.MODEL_TYPE_RERANK


def test_whole_registrations_are_taken_as_they_are() -> None:
    """They cannot be mixed with arguments of their own kind."""
    whole = RegisterModelRequest(model_id="llama")
    assert split_registration(whole, {"timeout": 3}) == (whole, {"timeout": 3})
    with pytest.raises(TypeError, match="set aliases in it"):
        split_registration(whole, {"aliases": ["l"]})
    with pytest.raises(ValueError, match="MODEL_TYPE_VISION"):
        split_registration("llama", {"model_type": "vision"})


def test_listings() -> None:
    """Every filter arrives in its field, from its name or its value."""
    by_name, call = split_listing(
        {
            "page_size": 5,
            "provider_id": "vllm",
            "model_type": "rerank",
            "state": "serving",
            "source": "discovered",
            "timeout": 3,
        }
    )
    assert by_name == ListModelsRequest(
        page_size=5,
        provider_id="vllm",
        type=ModelType.MODEL_TYPE_RERANK,
        state=ModelState.MODEL_STATE_SERVING,
        source=ModelSource.MODEL_SOURCE_DISCOVERED,
    )
    assert call == {"timeout": 3}
    assert split_listing({"state": ModelState.MODEL_STATE_UNKNOWN})[0].state == ModelState.MODEL_STATE_UNKNOWN
    assert split_listing({})[0] == ListModelsRequest()
    with pytest.raises(ValueError, match="MODEL_STATE_ASLEEP"):
        split_listing({"state": "asleep"})


def test_updates_name_what_is_given() -> None:
    """All that was given is in the mask and nothing else is, so that the rest stays as it is."""
    request, call = split_update(
        "llama",
        {
            "provider_id": "vllm",
            "provider_model_id": "meta/llama",
            "model_type": "embedding",
            "aliases": ["l"],
            "annotations": {"owner": "me"},
            "embedding_dimension": 1024,
            "etag": "r1",
            "timeout": 3,
        },
    )
    changed = Model(
        id="llama",
        provider_id="vllm",
        provider_model_id="meta/llama",
        type=ModelType.MODEL_TYPE_EMBEDDING,
        aliases=["l"],
        annotations={"owner": "me"},
        embedding_dimension=1024,
        etag="r1",
    )
    assert request.model == changed
    assert list(request.update_mask.paths) == [
        "aliases", "annotations", "embedding_dimension", "provider_id", "provider_model_id", "type",
    ]  # fmt: skip
    assert call == {"timeout": 3}


def test_updates_can_take_away() -> None:
    """What is given empty is in the mask too: that is how it goes."""
    request, _ = split_update("llama", {"aliases": [], "annotations": {}, "embedding_dimension": None})
    assert request.model == Model(id="llama")
    assert list(request.update_mask.paths) == ["aliases", "annotations", "embedding_dimension"]


def test_updates_of_what_was_read() -> None:
    """A model brings its etag, which can be overruled; the rest of it is not sent."""
    read = Model(id="llama", etag="r7", provider_id="vllm", aliases=["old"])
    request, _ = split_update(read, {"aliases": ["new"]})
    assert request == UpdateModelRequest(
        model=Model(id="llama", etag="r7", aliases=["new"]), update_mask=FieldMask(paths=["aliases"])
    )
    assert split_update(read, {"aliases": [], "etag": "r8"})[0].model.etag == "r8"
    assert split_update(read, {"aliases": [], "etag": ""})[0].model.etag == ""
    assert split_update("llama", {"aliases": []})[0].model.etag == ""


def test_whole_updates_are_taken_as_they_are() -> None:
    """They cannot be mixed with arguments of their own kind, and an update of nothing is none."""
    whole = UpdateModelRequest(model=Model(id="llama", aliases=["l"]))
    assert split_update(whole, {"timeout": 3}) == (whole, {"timeout": 3})
    with pytest.raises(TypeError, match="set aliases, etag in it"):
        split_update(whole, {"aliases": ["l"], "etag": "r1"})
    for model in "llama", Model(id="llama", aliases=["l"]):
        with pytest.raises(TypeError, match="nothing to change"):
            split_update(model, {"etag": "r1"})


def test_pages_name_a_silent_provider_once() -> None:
    """A page that comes although the listing was at its end changes nothing about that."""
    pages = ModelPages(ListModelsRequest(page_size=10))
    pages._receive(ListModelsResponse(unreachable_provider_ids=["a", "b"], next_page_token="2"))
    pages._receive(ListModelsResponse(unreachable_provider_ids=["b"]))
    pages._receive(ListModelsResponse(next_page_token="3"))
    assert pages.unreachable_provider_ids == ["a", "b"]
    assert pages._request is None


def test_values_of_a_registration_that_do_not_fit_are_named() -> None:
    """As in a chat request; a text is not a list of its letters."""
    with pytest.raises(TypeError, match=r"^aliases: 'ab' is not a list$"):
        split_registration("a", {"aliases": "ab"})
    with pytest.raises(TypeError, match=r"^annotations: 5 is not a mapping$"):
        split_update("a", {"annotations": 5})  # type: ignore[typeddict-item]
    with pytest.raises(ValueError, match=rf"^embedding_dimension: 4294967296 is not {INT32}$"):
        split_update("a", {"embedding_dimension": 2**32})
    with pytest.raises(ValueError, match=r"^model_type: 1099511627776 is not one of the API's values$"):
        split_registration("a", {"model_type": 2**40})  # type: ignore[typeddict-item]
