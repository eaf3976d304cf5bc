"""Typed, streaming access over gRPC to chat models served by vLLM.

    from deltawire import Client

    with Client("127.0.0.1:50051") as client, client.chat.stream("Why is the sky blue?", model="llama") as stream:
        for piece in stream.text:
            print(piece, end="", flush=True)

`Client` blocks, `AsyncClient` is for asyncio; both take the same arguments and give the same `Answer`. The messages on the
wire are in `deltawire.v1`, the most used of them here too. Errors: the tree at the top of `deltawire._errors`.
"""

from deltawire._aio import AsyncChatStream, AsyncClient
from deltawire._channel import CallInfo, CallOptions, ConnectOptions, tls_credentials
from deltawire._client import ChatStream, Client
from deltawire._completion import Accumulator, Answer, Choice
from deltawire._errors import (
    CallCancelledError,
    CallError,
    ContextLengthExceededError,
    DeadlineExceededError,
    DeltawireError,
    DrainingError,
    DurationLimitExceededError,
    GatewayError,
    InternalError,
    InvalidRequestError,
    ModelAlreadyExistsError,
    ModelAmbiguousError,
    ModelDiscoveredError,
    ModelNotFoundError,
    ModelNotServedError,
    ModelWrongTypeError,
    PermissionDeniedError,
    ProtocolError,
    ProviderError,
    ProviderMisconfiguredError,
    ProviderNotFoundError,
    RequestError,
    SlowCallerError,
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
)
from deltawire._failure import FieldViolation
from deltawire._messages import (
    MessageLike,
    assistant,
    developer,
    json_schema,
    message_text,
    system,
    tool,
    tool_definition,
    tool_from_openai,
    user,
)
from deltawire._requests import ChatArguments, ChatOptions, SamplingOptions, chat_request
from deltawire._version import __version__
from deltawire.v1.chat_completion_pb2 import (
    ChatRequest,
    ResponseFormat,
    Sampling,
    StopReason,
    StreamChatCompletionResponse,
)
from deltawire.v1.error_reason_pb2 import ErrorReason
from deltawire.v1.message_pb2 import Message
from deltawire.v1.model_registry_pb2 import Model, ModelType
from deltawire.v1.tool_pb2 import Tool, ToolCall, ToolCallDelta, ToolChoice

__all__ = [
    "Accumulator",
    "Answer",
    "AsyncChatStream",
    "AsyncClient",
    "CallCancelledError",
    "CallError",
    "CallInfo",
    "CallOptions",
    "ChatArguments",
    "ChatOptions",
    "ChatRequest",
    "ChatStream",
    "Choice",
    "Client",
    "ConnectOptions",
    "ContextLengthExceededError",
    "DeadlineExceededError",
    "DeltawireError",
    "DrainingError",
    "DurationLimitExceededError",
    "ErrorReason",
    "FieldViolation",
    "GatewayError",
    "InternalError",
    "InvalidRequestError",
    "Message",
    "MessageLike",
    "Model",
    "ModelAlreadyExistsError",
    "ModelAmbiguousError",
    "ModelDiscoveredError",
    "ModelNotFoundError",
    "ModelNotServedError",
    "ModelType",
    "ModelWrongTypeError",
    "PermissionDeniedError",
    "ProtocolError",
    "ProviderError",
    "ProviderMisconfiguredError",
    "ProviderNotFoundError",
    "RequestError",
    "ResponseFormat",
    "Sampling",
    "SamplingOptions",
    "SlowCallerError",
    "StopReason",
    "StoreUnavailableError",
    "StreamChatCompletionResponse",
    "StreamInterrupted",
    "TooManyStreamsError",
    "Tool",
    "ToolCall",
    "ToolCallDelta",
    "ToolChoice",
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
    "__version__",
    "assistant",
    "chat_request",
    "developer",
    "json_schema",
    "message_text",
    "system",
    "tls_credentials",
    "tool",
    "tool_definition",
    "tool_from_openai",
    "user",
]
