"""Typed, streaming access over gRPC to chat models served by vLLM.

    from deltawire import Client

    with Client("127.0.0.1:50051") as client, client.chat.stream("Why is the sky blue?") as stream:
        for piece in stream.text:
            print(piece, end="", flush=True)

`Client` blocks, `AsyncClient` is for asyncio; both take the same arguments and give the same `Answer`. The messages on the
wire are in `deltawire.v1`, the most used of them here too. Errors: the tree at the top of `deltawire._errors`.
"""

from deltawire._version import __version__

# mypy and pyright take any name TYPE_CHECKING for true. `typing` itself is not imported for it.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from deltawire._aio import AsyncChatStream, AsyncClient, AsyncModelWatch
    from deltawire._answer import Answer, Choice
    from deltawire._channel import CallOptions, ConnectOptions, tls_credentials
    from deltawire._client import ChatStream, Client, ModelWatch
    from deltawire._completion import Accumulator
    from deltawire._errors import (
        AccessChangedError,
        AnswerTooLargeError,
        CallCancelledError,
        CallerLimitExceededError,
        CallError,
        ClientClosedError,
        CompletionAlreadyExistsError,
        CompletionGoneError,
        CompletionNotFoundError,
        ContextLengthExceededError,
        DeadlineExceededError,
        DeltawireError,
        DrainingError,
        DurationLimitExceededError,
        EtagMismatchError,
        FieldNotSupportedError,
        GatewayError,
        ImageUnavailableError,
        InternalError,
        InvalidRequestError,
        MemoryLimitExceededError,
        ModelAlreadyExistsError,
        ModelAmbiguousError,
        ModelDiscoveredError,
        ModelNotFoundError,
        ModelNotServedError,
        ModelWrongTypeError,
        NotSupportedByProviderError,
        PermissionDeniedError,
        ProtocolError,
        ProviderError,
        ProviderMisconfiguredError,
        ProviderNotFoundError,
        RegistryFullError,
        RequestError,
        RevisionGoneError,
        SlowCallerError,
        SlowWatcherError,
        StoreUnavailableError,
        StreamInterrupted,
        TooManyStreamsError,
        UnauthenticatedError,
        UnavailableError,
        UpstreamAbortedError,
        UpstreamError,
        UpstreamIncompleteError,
        UpstreamMalformedError,
        UpstreamOverloadedError,
        UpstreamRejectedError,
        UpstreamTimeoutError,
        UpstreamUnauthenticatedError,
        UpstreamUnavailableError,
        WrongReplicaError,
    )
    from deltawire._failure import FieldViolation
    from deltawire._messages import (
        MessageLike,
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
    from deltawire._metadata import CallInfo
    from deltawire._requests import (
        ChatArguments,
        ChatOptions,
        SamplingOptions,
        StreamArguments,
        StreamingOptions,
        chat_request,
    )
    from deltawire._tools import (
        FunctionTool,
        ToolArgumentsError,
        ToolLike,
        ToolRoundsExceededError,
        ToolRun,
        function_tool,
    )
    from deltawire._watch import ModelChange, WatchBookmark, WatchEvent
    from deltawire.v1.chat_completion_pb2 import (
        CancelChatCompletionResponse,
        ChatRequest,
        CompletionState,
        CompletionSummary,
        CountTokensResponse,
        GetChatCompletionResponse,
        Notice,
        NoticeKind,
        Reasoning,
        ResponseFormat,
        Sampling,
        StopReason,
        StreamChatCompletionResponse,
        StreamOptions,
        Usage,
    )
    from deltawire.v1.error_reason_pb2 import ErrorReason
    from deltawire.v1.message_pb2 import ChatMessage, ContentPart
    from deltawire.v1.model_registry_pb2 import Model, ModelSource, ModelState, ModelType
    from deltawire.v1.tool_pb2 import Tool, ToolCall, ToolCallDelta, ToolChoice

__all__ = [
    "AccessChangedError",
    "Accumulator",
    "Answer",
    "AnswerTooLargeError",
    "AsyncChatStream",
    "AsyncClient",
    "AsyncModelWatch",
    "CallCancelledError",
    "CallError",
    "CallInfo",
    "CallOptions",
    "CallerLimitExceededError",
    "CancelChatCompletionResponse",
    "ChatArguments",
    "ChatMessage",
    "ChatOptions",
    "ChatRequest",
    "ChatStream",
    "Choice",
    "Client",
    "ClientClosedError",
    "CompletionAlreadyExistsError",
    "CompletionGoneError",
    "CompletionNotFoundError",
    "CompletionState",
    "CompletionSummary",
    "ConnectOptions",
    "ContentPart",
    "ContextLengthExceededError",
    "CountTokensResponse",
    "DeadlineExceededError",
    "DeltawireError",
    "DrainingError",
    "DurationLimitExceededError",
    "ErrorReason",
    "EtagMismatchError",
    "FieldNotSupportedError",
    "FieldViolation",
    "FunctionTool",
    "GatewayError",
    "GetChatCompletionResponse",
    "ImageUnavailableError",
    "InternalError",
    "InvalidRequestError",
    "MemoryLimitExceededError",
    "MessageLike",
    "Model",
    "ModelAlreadyExistsError",
    "ModelAmbiguousError",
    "ModelChange",
    "ModelDiscoveredError",
    "ModelNotFoundError",
    "ModelNotServedError",
    "ModelSource",
    "ModelState",
    "ModelType",
    "ModelWatch",
    "ModelWrongTypeError",
    "NotSupportedByProviderError",
    "Notice",
    "NoticeKind",
    "PermissionDeniedError",
    "ProtocolError",
    "ProviderError",
    "ProviderMisconfiguredError",
    "ProviderNotFoundError",
    "Reasoning",
    "RegistryFullError",
    "RequestError",
    "ResponseFormat",
    "RevisionGoneError",
    "Sampling",
    "SamplingOptions",
    "SlowCallerError",
    "SlowWatcherError",
    "StopReason",
    "StoreUnavailableError",
    "StreamArguments",
    "StreamChatCompletionResponse",
    "StreamInterrupted",
    "StreamOptions",
    "StreamingOptions",
    "TooManyStreamsError",
    "Tool",
    "ToolArgumentsError",
    "ToolCall",
    "ToolCallDelta",
    "ToolChoice",
    "ToolLike",
    "ToolRoundsExceededError",
    "ToolRun",
    "UnauthenticatedError",
    "UnavailableError",
    "UpstreamAbortedError",
    "UpstreamError",
    "UpstreamIncompleteError",
    "UpstreamMalformedError",
    "UpstreamOverloadedError",
    "UpstreamRejectedError",
    "UpstreamTimeoutError",
    "UpstreamUnauthenticatedError",
    "UpstreamUnavailableError",
    "Usage",
    "WatchBookmark",
    "WatchEvent",
    "WrongReplicaError",
    "__version__",
    "assistant",
    "chat_request",
    "choice",
    "developer",
    "function_tool",
    "grammar",
    "image",
    "json_schema",
    "message_text",
    "regex",
    "structural_tag",
    "system",
    "tls_credentials",
    "tool",
    "tool_definition",
    "tool_from_openai",
    "user",
]

# The module of each name in `__all__`; those that are not here are in `_errors`.
_MODULES = {
    "_aio": ("AsyncChatStream", "AsyncClient", "AsyncModelWatch"),
    "_channel": ("CallOptions", "ConnectOptions", "tls_credentials"),
    "_client": ("ChatStream", "Client", "ModelWatch"),
    "_answer": ("Answer", "Choice"),
    "_completion": ("Accumulator",),
    "_failure": ("FieldViolation",),
    "_metadata": ("CallInfo",),
    "_messages": (
        "MessageLike",
        "assistant",
        "choice",
        "developer",
        "grammar",
        "image",
        "json_schema",
        "message_text",
        "regex",
        "structural_tag",
        "system",
        "tool",
        "tool_definition",
        "tool_from_openai",
        "user",
    ),
    "_requests": (
        "ChatArguments",
        "ChatOptions",
        "SamplingOptions",
        "StreamArguments",
        "StreamingOptions",
        "chat_request",
    ),
    "_tools": ("FunctionTool", "ToolArgumentsError", "ToolLike", "ToolRoundsExceededError", "ToolRun", "function_tool"),
    "_watch": ("ModelChange", "WatchBookmark", "WatchEvent"),
    "v1.chat_completion_pb2": (
        "CancelChatCompletionResponse",
        "ChatRequest",
        "CompletionState",
        "CompletionSummary",
        "CountTokensResponse",
        "GetChatCompletionResponse",
        "Notice",
        "NoticeKind",
        "Reasoning",
        "ResponseFormat",
        "Sampling",
        "StopReason",
        "StreamChatCompletionResponse",
        "StreamOptions",
        "Usage",
    ),
    "v1.error_reason_pb2": ("ErrorReason",),
    "v1.message_pb2": ("ChatMessage", "ContentPart"),
    "v1.model_registry_pb2": ("Model", "ModelSource", "ModelState", "ModelType"),
    "v1.tool_pb2": ("Tool", "ToolCall", "ToolCallDelta", "ToolChoice"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __dir__() -> list[str]:
    """All names, also those that are not imported yet."""
    return sorted({*globals(), *__all__})


# Type checkers do not see this function: with it, they would accept any name.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import a name when it is first used: gRPC and the messages take ten times as long as the rest."""
        from importlib import import_module

        if name == "v1":
            return import_module("deltawire.v1")
        if name not in __all__:
            message = f"module {__name__!r} has no attribute {name!r}"
            raise AttributeError(message)
        value = getattr(import_module(f"deltawire.{_MODULE_OF.get(name, '_errors')}"), name)
        globals()[name] = value
        return value
