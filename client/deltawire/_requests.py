"""From keyword arguments to a `ChatRequest`. What is not given is not sent: the model's own defaults apply."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, TypeAlias, TypedDict, Unpack, cast

from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp

from deltawire._channel import CALL_OPTIONS, CallOptions
from deltawire._fields import made
from deltawire._messages import MessageLike, RoleMessage, as_message, tool_from_openai
from deltawire._values import (
    JsonObject,
    Seconds,
    duration,
    json_text,
    laid_over,
    logprobs,
    reasoning,
    response_format,
    tool_call_policy,
    tool_choice,
)
from deltawire.v1.chat_completion_pb2 import (
    ChatRequest,
    CompletionState,
    CompletionSummary,
    ListChatCompletionsRequest,
    ListChatCompletionsResponse,
    Logprobs,
    Reasoning,
    ResponseFormat,
    ResumePoint,
    Sampling,
    StreamChatCompletionRequest,
    StreamOptions,
)
from deltawire.v1.message_pb2 import ChatMessage
from deltawire.v1.model_registry_pb2 import (
    ListModelsRequest,
    ListModelsResponse,
    ListProvidersRequest,
    ListProvidersResponse,
    Model,
    ModelSource,
    ModelState,
    ModelType,
    Provider,
    RegisterModelRequest,
    UpdateModelRequest,
)
from deltawire.v1.tool_pb2 import Tool, ToolChoice

# A conversation as callers may give it; text alone is one turn of the user.
Messages: TypeAlias = MessageLike | Iterable[MessageLike]


class SamplingOptions(TypedDict, total=False):
    """How tokens are chosen and when to stop; None is the same as not given.

    The gateway checks the ranges: `temperature` 0 or above; `top_p` above 0 and at most 1; `top_k` 1 or above, or 0 or -1
    for all tokens; `min_p` 0 to 1; `frequency_penalty` and `presence_penalty` -2 to 2; `repetition_penalty` above 0;
    `max_tokens` 1 or above; `stop` one text or several; `stop_token_ids` 0 or above; `logit_bias` -100 to 100 by token id.
    `Sampling` in the API describes each.
    """

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    repetition_penalty: float | None
    seed: int | None
    max_tokens: int | None
    min_tokens: int | None
    stop: str | Iterable[str] | None
    stop_token_ids: Iterable[int] | None
    ignore_eos: bool | None
    logit_bias: Mapping[int, float] | None
    bad_words: Iterable[str] | None


class PlainChatOptions(SamplingOptions, total=False):
    """The fields of a chat request besides its messages and tools. None is the same as not given.

    `model` may be omitted if the gateway serves exactly one chat model. `tool_choice` is "auto", "required", "none", the
    name of a tool, or a `ToolChoice` (which can also name a tool called "auto"). The single sampling arguments replace the
    fields of `sampling`. `response_format` is a `ResponseFormat`, see `json_schema`, `regex`, `choice`, `grammar` and
    `structural_tag`, or "json_object". `logprobs` True requests the log-probabilities of the chosen tokens, a number also
    that many alternatives for each. `choice_count` is the number of answers to generate.

    `allowed_tools` are the names of those `tools` that the model receives in this request. `incremental_tool_calls` sends
    calls while they are written; `validate_schema` validates their arguments against the tools' schemas. `reasoning` is the
    effort, "none", "minimal", "low", "medium", "high", "xhigh" or "max", or a `Reasoning`; `reasoning_token_budget` is the
    maximum number of reasoning tokens; `include_reasoning` False omits the reasoning from the answer.

    `soft_time_limit` (seconds above 0, or a `timedelta`) ends generation normally, with the text so far. `completion_id`
    is an id of your own to cancel, look up and resume by; make it unguessable. `priority`: a lower number is served
    earlier. `chat_template_kwargs` and `extra_body` are JSON objects, as mappings or as text. `cache_salt`, `user`: see
    `ChatRequest` in the API.
    """

    model: str | None
    tool_choice: str | ToolChoice | None
    allowed_tools: Iterable[str] | None
    parallel_tool_calls: bool | None
    incremental_tool_calls: bool | None
    validate_schema: bool | None
    sampling: Sampling | None
    response_format: ResponseFormat | str | None
    logprobs: bool | int | Logprobs | None
    choice_count: int | None
    reasoning: Reasoning | str | None
    reasoning_token_budget: int | None
    include_reasoning: bool | None
    soft_time_limit: Seconds | None
    completion_id: str | None
    priority: int | None
    cache_salt: str | None
    chat_template_kwargs: JsonObject | None
    extra_body: JsonObject | None
    user: str | None


class StreamingOptions(TypedDict, total=False):
    """How a stream is sent; see `StreamOptions` in the API. None is the same as not given.

    Times are in seconds, or a `timedelta`. `usage_updates` sends the usage while the answer is generated: `stream.usage`.
    `max_coalesce_delay` (0 or above) lets the gateway hold deltas for that long and merge them. `heartbeat_interval` (above
    0) sends an event at least that often, with `early_heartbeats` also before the answer begins; gRPC then cannot retry the
    call. `retention` retains the stream, so that it survives a lost connection: see `Chat.stream`. These replace the fields
    of `stream_options`.
    """

    usage_updates: bool | None
    max_coalesce_delay: Seconds | None
    heartbeat_interval: Seconds | None
    early_heartbeats: bool | None
    retention: Seconds | None
    stream_options: StreamOptions | None


class ChatOptions(PlainChatOptions, total=False):
    """The fields of a chat request besides its messages. `tools` are `Tool` messages or OpenAI's tool objects."""

    tools: Iterable[Tool | Mapping[str, Any]] | None


class ToolRunArguments(PlainChatOptions, CallOptions, total=False):
    """Everything that `chat.run_tools` takes by name besides its own arguments."""


class ChatArguments(ChatOptions, CallOptions, total=False):
    """Everything that `chat.create` and `chat.count_tokens` take by name."""


class StreamArguments(ChatArguments, StreamingOptions, total=False):
    """Everything that `chat.stream` takes by name."""


class ListOptions(TypedDict, total=False):
    """Which models to list; a filter that is not given admits all of them.

    `page_size` is the number of models per call, 1 to 1000; 0 leaves it to the gateway. `model_type`, `state` and `source`
    are a `ModelType`, `ModelState` and `ModelSource`, or their names ("llm", "serving", "registered").
    """

    page_size: int
    provider_id: str
    model_type: ModelType.ValueType | str
    state: ModelState.ValueType | str
    source: ModelSource.ValueType | str


class ListArguments(ListOptions, CallOptions, total=False):
    """Everything that `models.list` takes by name."""


class CompletionListOptions(TypedDict, total=False):
    """Which completions to list; a filter that is not given admits all of them.

    `page_size` is the number of completions per call, 1 to 1000; 0 leaves it to the gateway. `caller` is a name in the gateway's
    access list. `states` are `CompletionState`s or their names ("running", "completed", "failed"). `create_time_from` is the
    time, with a time zone, from which on completions are listed.
    """

    page_size: int
    caller: str
    model: str
    provider_id: str
    states: Iterable[CompletionState.ValueType | str]
    create_time_from: datetime


class CompletionListArguments(CompletionListOptions, CallOptions, total=False):
    """Everything that `chat.list` takes by name."""


class RegisterOptions(TypedDict, total=False):
    """The fields of a registration besides the id.

    `provider_id` may be omitted if there is only one, `provider_model_id` if it equals the id. `model_type` is a
    `ModelType` or its name ("llm", "embedding", "rerank"). `annotations` are free notes, at most 64 KiB in all.
    `embedding_dimension` is the length of a vector, 1 or above: required for embedding models, refused for others.
    """

    provider_id: str
    provider_model_id: str
    model_type: ModelType.ValueType | str
    aliases: Iterable[str]
    annotations: Mapping[str, str]
    embedding_dimension: int | None


class RegisterArguments(RegisterOptions, CallOptions, total=False):
    """Everything that `models.register` takes by name."""


class UpdateOptions(RegisterOptions, total=False):
    """Which fields of a registered model to change; a field that is not given is kept.

    A list or mapping replaces the whole field; an empty one clears it, as None does for `embedding_dimension`. With an
    `etag` the change is made only if the model still has it. The default is the `etag` of the `Model` that is passed; ""
    makes the change in any case.
    """

    etag: str


class UpdateArguments(UpdateOptions, CallOptions, total=False):
    """Everything that `models.update` takes by name."""


COMPLETION_LIST_OPTIONS = frozenset(CompletionListOptions.__annotations__)
LIST_OPTIONS = frozenset(ListOptions.__annotations__)
REGISTER_OPTIONS = frozenset(RegisterOptions.__annotations__)
UPDATE_OPTIONS = frozenset(UpdateOptions.__annotations__)
SAMPLING_OPTIONS = frozenset(SamplingOptions.__annotations__)
CHAT_OPTIONS = frozenset(ChatOptions.__annotations__)
STREAMING_OPTIONS = frozenset(StreamingOptions.__annotations__)

# Where an option has another name than the API's field: `type` alone says too little beside other arguments.
_FIELDS = {"model_type": "type"}
_NAMES = {field: option for option, field in _FIELDS.items()}


def chat_request(messages: Messages, **options: Unpack[ChatOptions]) -> ChatRequest:
    """Build a `ChatRequest` from keyword arguments.

    Args:
        messages: The conversation: text (one turn of the user), a message, or several of either.
        options: See `ChatOptions`.

    Raises:
        TypeError: An argument does not exist or has a wrong type; the message names it.
        ValueError: A request cannot hold the value of an argument, which the message names.

    The gateway checks everything else. Pass the request to `chat.create` or `chat.stream`, any number of times.
    """
    if unknown := options.keys() - CHAT_OPTIONS:
        message = f"a chat request has no argument {', '.join(sorted(unknown))}"
        raise TypeError(message)
    given = {
        "model": options.get("model"),
        "messages": _messages(messages),
        "tools": _tools(options.get("tools")),
        "tool_choice": tool_choice(options.get("tool_choice")),
        "allowed_tools": options.get("allowed_tools"),
        "parallel_tool_calls": options.get("parallel_tool_calls"),
        "sampling": _sampling(options),
        "response_format": response_format(options.get("response_format")),
        "logprobs": logprobs(options.get("logprobs")),
        "choice_count": options.get("choice_count"),
        "reasoning": reasoning(
            options.get("reasoning"), options.get("reasoning_token_budget"), options.get("include_reasoning")
        ),
        "tool_call_policy": tool_call_policy(options.get("incremental_tool_calls"), options.get("validate_schema")),
        "soft_time_limit": duration("soft_time_limit", options.get("soft_time_limit")),
        "completion_id": options.get("completion_id"),
        "priority": options.get("priority"),
        "cache_salt": options.get("cache_salt"),
        "chat_template_kwargs": json_text("chat_template_kwargs", options.get("chat_template_kwargs")),
        "extra_body": json_text("extra_body", options.get("extra_body")),
        "user": options.get("user"),
    }
    return made(ChatRequest, given)


def split_arguments(messages: Messages | ChatRequest, arguments: ChatArguments) -> tuple[ChatRequest, CallOptions]:
    """Split the arguments of `create`, `count_tokens` and `run_tools` into the request and the options of the call.

    Raises:
        TypeError: A whole `ChatRequest` was given with fields of its own; set them in it.
    """
    call, options = _split(arguments, CALL_OPTIONS)
    if not isinstance(messages, ChatRequest):
        return chat_request(messages, **options), call
    _require_no_fields(options, "a ChatRequest")
    return messages, call


def split_streaming(
    messages: Messages | ChatRequest, arguments: StreamArguments
) -> tuple[StreamChatCompletionRequest, CallOptions]:
    """Split the arguments of `stream` into the request, which has the stream's options, and the options of the call.

    Raises:
        TypeError: A whole `ChatRequest` was given with fields of its own; set them in it.
        ValueError: A length of time that cannot be sent.

    The request is a copy: it may be changed.
    """
    streaming, rest = _split(arguments, STREAMING_OPTIONS)
    chat, call = split_arguments(messages, rest)
    return StreamChatCompletionRequest(chat=chat, options=_stream_options(streaming)), call


def resume_request(
    completion_id: str, last_sequence: int | None, retention: Seconds
) -> tuple[StreamChatCompletionRequest, float]:
    """The request for a retained stream, and for how many seconds without a new event it resumes automatically.

    Raises:
        ValueError: A length of time or a sequence that cannot be sent.
        TypeError: An argument of another type.
    """
    resume_for = duration("retention", retention) or Duration()
    resume = made(ResumePoint, {"completion_id": completion_id, "last_sequence": last_sequence})
    return StreamChatCompletionRequest(resume=resume), resume_for.ToTimedelta().total_seconds()


def split_listing(arguments: ListArguments) -> tuple[ListModelsRequest, CallOptions]:
    """Split the arguments of `list` into the request and the options of its calls.

    Raises:
        ValueError: There is no such type, state or source.
    """
    options, call = _split(arguments, LIST_OPTIONS)
    request = ListModelsRequest(
        page_size=options.get("page_size", 0),
        provider_id=options.get("provider_id", ""),
        type=_value(ModelType, "MODEL_TYPE_", options.get("model_type", ModelType.MODEL_TYPE_UNSPECIFIED)),
        state=_value(ModelState, "MODEL_STATE_", options.get("state", ModelState.MODEL_STATE_UNSPECIFIED)),
        source=_value(ModelSource, "MODEL_SOURCE_", options.get("source", ModelSource.MODEL_SOURCE_UNSPECIFIED)),
    )
    return request, call


def split_completion_listing(
    arguments: CompletionListArguments,
) -> tuple[ListChatCompletionsRequest, CallOptions]:
    """Split the arguments of `chat.list` into the request and the options of its calls.

    Raises:
        ValueError: There is no such state, or the time has no time zone.
        TypeError: A value of another type.
    """
    options, call = _split(arguments, COMPLETION_LIST_OPTIONS)
    if "states" in options:
        options["states"] = [_value(CompletionState, "COMPLETION_STATE_", each) for each in options["states"]]
    if (time := options.get("create_time_from")) is not None:
        if not isinstance(time, datetime):
            message = f"create_time_from: a datetime is needed, not {type(time).__name__}"
            raise TypeError(message)
        if time.tzinfo is None:
            message = "create_time_from must have a time zone, such as datetime.UTC"
            raise ValueError(message)
        options["create_time_from"] = Timestamp()
        options["create_time_from"].FromDatetime(time)
    return made(ListChatCompletionsRequest, options), call


def split_registration(
    model: str | RegisterModelRequest, arguments: RegisterArguments
) -> tuple[RegisterModelRequest, CallOptions]:
    """Split the arguments of `register` into the request and the options of the call.

    Raises:
        TypeError: A whole request was given with fields of its own; set them in it. Or a value of another type.
        ValueError: There is no such type of model, or a value that its field cannot hold.
    """
    options, call = _split(arguments, REGISTER_OPTIONS)
    if isinstance(model, RegisterModelRequest):
        _require_no_fields(options, "a RegisterModelRequest")
        return model, call
    return made(RegisterModelRequest, {"model_id": model, **_registration(options)}, _NAMES), call


def split_update(
    model: str | Model | UpdateModelRequest, arguments: UpdateArguments
) -> tuple[UpdateModelRequest, CallOptions]:
    """Split the arguments of `update` into the request and the options of the call.

    Raises:
        TypeError: There is nothing to change, or a whole request was given with fields of its own; set them in it. Or a
            value of another type.
        ValueError: There is no such type of model, or a value that its field cannot hold.
    """
    options, call = _split(arguments, UPDATE_OPTIONS)
    if isinstance(model, UpdateModelRequest):
        _require_no_fields(options, "an UpdateModelRequest")
        return model, call
    fields = _registration(options)
    if not fields:
        # Without a mask, the gateway would change all fields that are set.
        message = f"nothing to change: give one of {', '.join(sorted(REGISTER_OPTIONS))}"
        raise TypeError(message)
    model_id, etag = (model.id, model.etag) if isinstance(model, Model) else (model, "")
    changed = made(Model, {"id": model_id, "etag": options.get("etag", etag), **fields}, _NAMES)
    return UpdateModelRequest(model=changed, update_mask=FieldMask(paths=sorted(fields))), call


def _split(arguments: Mapping[str, Any], names: frozenset[str]) -> tuple[Any, Any]:
    """The arguments with these names, and the others."""
    named = {name: value for name, value in arguments.items() if name in names}
    return named, {name: value for name, value in arguments.items() if name not in names}


def _require_no_fields(options: Mapping[str, Any], request: str) -> None:
    """Check that a whole request was given alone.

    Raises:
        TypeError: There are fields beside it.
    """
    if options:
        message = f"{request} has all fields itself: set {', '.join(sorted(options))} in it"
        raise TypeError(message)


class ModelPages:
    """The part that both kinds of listing share: the received models, and whether there are more.

    Attributes:
        unreachable_provider_ids: The providers that did not answer, so that their models may be out of date; complete after
            the last model.
    """

    def __init__(self, request: ListModelsRequest) -> None:
        self.unreachable_provider_ids: list[str] = []
        self._request: ListModelsRequest | None = request
        self._models: deque[Model] = deque()

    def _receive(self, page: ListModelsResponse) -> None:
        """Take a page."""
        self._models.extend(page.models)
        new = (each for each in page.unreachable_provider_ids if each not in self.unreachable_provider_ids)
        self.unreachable_provider_ids.extend(new)
        if self._request is not None:
            self._request.page_token = page.next_page_token
            if not page.next_page_token:
                self._request = None


class CompletionPages:
    """The part that both kinds of listing share: the received completions, and whether there are more.

    Attributes:
        unreachable_workers: The gateway's worker processes that did not answer, whose completions may be missing; complete
            after the last completion.
    """

    def __init__(self, request: ListChatCompletionsRequest) -> None:
        self.unreachable_workers: list[int] = []
        self._request: ListChatCompletionsRequest | None = request
        self._completions: deque[CompletionSummary] = deque()

    def _receive(self, page: ListChatCompletionsResponse) -> None:
        """Take a page."""
        self._completions.extend(page.completions)
        new = (each for each in page.unreachable_workers if each not in self.unreachable_workers)
        self.unreachable_workers.extend(new)
        if self._request is not None:
            self._request.page_token = page.next_page_token
            if not page.next_page_token:
                self._request = None


class ProviderPages:
    """The part that both kinds of listing of providers share; `request` is for the next page, and None after the last."""

    def __init__(self) -> None:
        self.request: ListProvidersRequest | None = ListProvidersRequest()
        self.providers: list[Provider] = []

    def receive(self, page: ListProvidersResponse) -> None:
        """Take a page."""
        self.providers.extend(page.providers)
        self.request = ListProvidersRequest(page_token=page.next_page_token) if page.next_page_token else None


def _registration(options: RegisterOptions) -> dict[str, Any]:
    """What was given of a registration, by the names of the API's fields; they are the same in all of its messages."""
    fields: dict[str, Any] = {
        _FIELDS.get(name, name): value for name, value in options.items() if name in REGISTER_OPTIONS
    }
    if "type" in fields:
        fields["type"] = _value(ModelType, "MODEL_TYPE_", fields["type"])
    return fields


def _value(enum: Any, prefix: str, value: int | str) -> Any:  # noqa: ANN401 -- any enum of the API
    """An enum's value, from its name without the prefix if it is given so.

    Raises:
        ValueError: There is no such name.
    """
    return enum.Value(prefix + value.upper()) if isinstance(value, str) else value


def _messages(messages: Messages) -> list[ChatMessage]:
    """The conversation as a list; what is one message stands alone."""
    if isinstance(messages, str | ChatMessage | RoleMessage) or not isinstance(messages, Iterable):
        return [as_message(messages)]
    return [as_message(each) for each in messages]


def _tools(values: Iterable[Tool | Mapping[str, Any]] | None) -> list[Tool]:
    """Tools, each from whichever shape.

    Raises:
        TypeError: Something that is no tool, or one alone.
    """
    if values is None:
        return []
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        message = f"tools: a list is needed, not {type(values).__name__}"
        raise TypeError(message)
    return [each if isinstance(each, Tool) else tool_from_openai(each) for each in values]


def _sampling(options: SamplingOptions) -> Sampling | None:
    """The base given as `sampling`, if any, with the single arguments over it; None if there is neither."""
    given: dict[str, Any] = {name: value for name, value in options.items() if name in SAMPLING_OPTIONS}
    if isinstance(stop := given.get("stop"), str):
        given["stop"] = [stop]
    return laid_over("sampling", cast("ChatOptions", options).get("sampling"), Sampling, given)


def _stream_options(options: StreamingOptions) -> StreamOptions | None:
    """The base given as `stream_options`, if any, with the single arguments over it; None if there is neither."""
    given: dict[str, Any] = {
        "usage_updates": options.get("usage_updates"),
        "max_coalesce_delay": duration("max_coalesce_delay", options.get("max_coalesce_delay")),
        "heartbeat_interval": duration("heartbeat_interval", options.get("heartbeat_interval")),
        "early_heartbeats": options.get("early_heartbeats"),
        "retention": duration("retention", options.get("retention")),
    }
    return laid_over("stream_options", options.get("stream_options"), StreamOptions, given)
