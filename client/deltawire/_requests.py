"""From keyword arguments to a `ChatRequest`. What is not given is not sent: the model's own defaults apply."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias, TypedDict, Unpack, cast

from deltawire._channel import CALL_OPTIONS, CallOptions
from deltawire._messages import MessageLike, RoleMessage, as_message, tool_from_openai
from deltawire.v1.chat_completion_pb2 import ChatRequest, Logprobs, ResponseFormat, Sampling
from deltawire.v1.message_pb2 import Message
from deltawire.v1.model_registry_pb2 import (
    ListModelsRequest,
    ListModelsResponse,
    Model,
    ModelType,
    RegisterModelRequest,
)
from deltawire.v1.tool_pb2 import Tool, ToolChoice

# A conversation as callers may give it; text alone is one turn of the user.
Messages: TypeAlias = MessageLike | Iterable[MessageLike]


class SamplingOptions(TypedDict, total=False):
    """How tokens are chosen and when to stop; see `Sampling` in the API. None is the same as not given."""

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


class ChatOptions(SamplingOptions, total=False):
    """What a chat request holds besides its messages. None is the same as not given.

    `tools` takes the API's `Tool`s and OpenAI's tool objects. `tool_choice` is "auto", "required", "none", the name of
    a tool, or a `ToolChoice` (which can also name a tool called "auto"). `sampling` is where the single sampling
    arguments are laid over. `response_format` is a `ResponseFormat`, see `json_schema`, or "json_object".
    `logprobs` True asks for the chosen tokens' log-probabilities, a number for that many alternatives as well.
    `choice_count` is how many answers to generate.
    """

    model: str | None
    tools: Iterable[Tool | Mapping[str, Any]] | None
    tool_choice: str | ToolChoice | None
    parallel_tool_calls: bool | None
    sampling: Sampling | None
    response_format: ResponseFormat | str | None
    logprobs: bool | int | Logprobs | None
    choice_count: int | None


class ChatArguments(ChatOptions, CallOptions, total=False):
    """Everything that `chat.create` and `chat.stream` take by name."""


class RegisterOptions(TypedDict, total=False):
    """What a registration says besides the id.

    `provider_id` may be left out if there is only one, `provider_model_id` if it is the same as the id. `model_type` is
    a `ModelType` or its name ("llm", "embedding", "rerank"). `model_metadata` are free notes.
    """

    provider_id: str
    provider_model_id: str
    model_type: ModelType.ValueType | str
    aliases: Iterable[str]
    model_metadata: Mapping[str, str]


class RegisterArguments(RegisterOptions, CallOptions, total=False):
    """Everything that `models.register` takes by name."""


REGISTER_OPTIONS = frozenset(RegisterOptions.__annotations__)
SAMPLING_OPTIONS = frozenset(SamplingOptions.__annotations__)
CHAT_OPTIONS = frozenset(ChatOptions.__annotations__)

_MODES = {
    "auto": ToolChoice.MODE_AUTO,
    "required": ToolChoice.MODE_REQUIRED,
    "none": ToolChoice.MODE_NONE,
}
_FORMATS = {
    "text": ResponseFormat(text=ResponseFormat.Text()),
    "json_object": ResponseFormat(json_object=ResponseFormat.JsonObject()),
}


def chat_request(messages: Messages, **options: Unpack[ChatOptions]) -> ChatRequest:
    """Put a request together.

    Args:
        messages: The conversation: text (one turn of the user), a message, or several of either.
        options: See `ChatOptions`.

    Raises:
        TypeError: An argument that does not exist, or of a type that cannot be used.
        ValueError: A value that the API's messages cannot hold.

    The gateway judges the rest. Hand it to `chat.create` or `chat.stream`, as often as you like.
    """
    if unknown := options.keys() - CHAT_OPTIONS:
        message = f"a chat request has no argument {', '.join(sorted(unknown))}"
        raise TypeError(message)
    return ChatRequest(
        model=options.get("model") or "",
        messages=_messages(messages),
        tools=[_tool(each) for each in options.get("tools") or ()],
        tool_choice=_tool_choice(options.get("tool_choice")),
        parallel_tool_calls=options.get("parallel_tool_calls"),
        sampling=_sampling(options),
        response_format=_response_format(options.get("response_format")),
        logprobs=_logprobs(options.get("logprobs")),
        choice_count=options.get("choice_count"),
    )


def split_arguments(messages: Messages | ChatRequest, arguments: ChatArguments) -> tuple[ChatRequest, CallOptions]:
    """Part the arguments of `create` and `stream` into what is asked and how the call is made.

    Raises:
        TypeError: A whole `ChatRequest` came with arguments of its own kind; set its fields instead.
    """
    options = {name: value for name, value in arguments.items() if name not in CALL_OPTIONS}
    call = cast("CallOptions", {name: value for name, value in arguments.items() if name in CALL_OPTIONS})
    if not isinstance(messages, ChatRequest):
        return chat_request(messages, **cast("ChatOptions", options)), call
    if options:
        message = f"a ChatRequest says everything itself: set {', '.join(sorted(options))} in it"
        raise TypeError(message)
    return messages, call


def split_registration(
    model: str | RegisterModelRequest, arguments: RegisterArguments
) -> tuple[RegisterModelRequest, CallOptions]:
    """Part the arguments of `register` into what is registered and how the call is made.

    Raises:
        TypeError: A whole request came with arguments of its own kind; set its fields instead.
        ValueError: There is no such type of model.
    """
    given = arguments.items()
    options = cast("RegisterOptions", {name: value for name, value in given if name in REGISTER_OPTIONS})
    call = cast("CallOptions", {name: value for name, value in given if name not in REGISTER_OPTIONS})
    if isinstance(model, RegisterModelRequest):
        if options:
            message = f"a RegisterModelRequest says everything itself: set {', '.join(sorted(options))} in it"
            raise TypeError(message)
        return model, call
    kind = options.get("model_type", ModelType.MODEL_TYPE_UNSPECIFIED)
    request = RegisterModelRequest(
        model_id=model,
        provider_id=options.get("provider_id", ""),
        provider_model_id=options.get("provider_model_id", ""),
        type=ModelType.Value(f"MODEL_TYPE_{kind.upper()}") if isinstance(kind, str) else kind,
        aliases=options.get("aliases", ()),
        metadata=options.get("model_metadata", {}),
    )
    return request, call


class ModelPages:
    """What both kinds of listing share: the models that have come, and whether more follow.

    `unreachable_provider_ids` are the providers that could not be listed, so that their models may be missing; complete once
    the listing has been read to its end.
    """

    def __init__(self, page_size: int) -> None:
        self.unreachable_provider_ids: list[str] = []
        self._request: ListModelsRequest | None = ListModelsRequest(page_size=page_size)
        self._models: deque[Model] = deque()

    def _receive(self, page: ListModelsResponse) -> None:
        """Take a page."""
        self._models.extend(page.models)
        new = (each for each in page.unreachable_provider_ids if each not in self.unreachable_provider_ids)
        self.unreachable_provider_ids.extend(new)
        if self._request is not None:
            size, token = self._request.page_size, page.next_page_token
            self._request = ListModelsRequest(page_size=size, page_token=token) if token else None


def _messages(messages: Messages) -> list[Message]:
    """The conversation as a list; what is one message stands alone."""
    if isinstance(messages, str | Message | RoleMessage):
        return [as_message(messages)]
    return [as_message(each) for each in messages]


def _tool(value: Tool | Mapping[str, Any]) -> Tool:
    """A tool, from whichever shape."""
    return value if isinstance(value, Tool) else tool_from_openai(value)


def _tool_choice(value: str | ToolChoice | None) -> ToolChoice | None:
    """A tool choice, from a word or a tool's name."""
    if value is None or isinstance(value, ToolChoice):
        return value
    mode = _MODES.get(value)
    return ToolChoice(tool_name=value) if mode is None else ToolChoice(mode=mode)


def _sampling(options: SamplingOptions) -> Sampling | None:
    """The base given as `sampling`, if any, with the single arguments over it; None if there is neither."""
    given: dict[str, Any] = {
        name: value for name, value in options.items() if name in SAMPLING_OPTIONS and value is not None
    }
    base = cast("ChatOptions", options).get("sampling")
    if not given:
        return base
    if isinstance(stop := given.get("stop"), str):
        given["stop"] = [stop]
    sampling = Sampling()
    if base is not None:
        sampling.CopyFrom(base)
        for name in given:
            # Lists would be appended to; what is given here replaces.
            sampling.ClearField(cast("Any", name))
    sampling.MergeFrom(Sampling(**given))
    return sampling


def _response_format(value: ResponseFormat | str | None) -> ResponseFormat | None:
    """A response format, from its name if it needs no more than that.

    Raises:
        ValueError: There is no such name.
    """
    if value is None or isinstance(value, ResponseFormat):
        return value
    if value not in _FORMATS:
        message = f"response_format {value!r} is neither a ResponseFormat nor one of {', '.join(_FORMATS)}"
        raise ValueError(message)
    return _FORMATS[value]


def _logprobs(value: bool | int | Logprobs | None) -> Logprobs | None:
    """What to ask for, from yes, no or a number of alternatives."""
    if value is None or isinstance(value, Logprobs):
        return value
    if isinstance(value, bool):
        return Logprobs() if value else None
    return Logprobs(top_k=value)
