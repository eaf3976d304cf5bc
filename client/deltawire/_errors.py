"""Every way in which a call can fail. Catch the group that says what to do, or the one that says what happened.

    DeltawireError
    ├── ProtocolError                        the gateway broke the API's own rules; the answer cannot be trusted
    └── CallError                            the call ended with a status that is not OK
        ├── RequestError                     the request has to change
        │   ├── InvalidRequestError
        │   ├── ContextLengthExceededError
        │   ├── UpstreamRejectedError
        │   ├── UpstreamUnauthenticatedError
        │   ├── ModelNotFoundError
        │   ├── ModelAlreadyExistsError
        │   ├── ModelWrongTypeError
        │   ├── ModelAmbiguousError
        │   ├── ModelNotServedError
        │   ├── ModelDiscoveredError
        │   ├── EtagMismatchError
        │   ├── RevisionGoneError
        │   ├── ImageUnavailableError
        │   ├── FieldNotSupportedError
        │   ├── NotSupportedByProviderError
        │   ├── CompletionAlreadyExistsError
        │   ├── CompletionNotFoundError
        │   ├── CompletionGoneError
        │   ├── WrongReplicaError            (this one may pass on another connection; the client has tried some)
        │   └── ProviderNotFoundError
        ├── ProviderError                    the provider did not do its part; most of it passes: ask again
        │   ├── ProviderMisconfiguredError   (this does not: the operator has to act)
        │   ├── UpstreamUnavailableError
        │   ├── UpstreamOverloadedError
        │   ├── UpstreamTimeoutError
        │   ├── UpstreamError
        │   ├── UpstreamMalformedError
        │   ├── UpstreamIncompleteError
        │   └── UpstreamAbortedError
        ├── GatewayError                     the gateway cannot do it now: full, draining, or defective
        │   ├── TooManyStreamsError
        │   ├── MemoryLimitExceededError
        │   ├── AnswerTooLargeError
        │   ├── SlowCallerError
        │   ├── SlowWatcherError
        │   ├── AccessChangedError
        │   ├── StoreUnavailableError
        │   ├── RegistryFullError            (this does not pass: unregister models, or the operator has to act)
        │   ├── DrainingError
        │   └── InternalError
        ├── StreamInterrupted                the stream broke off after it had begun: what came is in `answer`
        ├── CallCancelledError               the caller cancelled it
        │   └── ClientClosedError            the client was closed, before the call or during it
        ├── DeadlineExceededError            the caller's timeout passed
        │   └── DurationLimitExceededError   the gateway's own limit for calls without a timeout passed
        ├── UnavailableError                 the gateway cannot be reached, and gave no reason
        ├── UnauthenticatedError             the gateway does not know the caller: the token is missing or wrong
        └── PermissionDeniedError            the gateway knows the caller and says no

The reason that the gateway gives decides (`REASONS`); without one, the status code does (`CODES`); without either, the
class is `CallError` itself. Branch on the class or on `reason`, never on the message.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import grpc

from deltawire.v1.error_reason_pb2 import ErrorReason

if TYPE_CHECKING:
    from collections.abc import Mapping

    from deltawire._failure import Failure

PREFIX = "ERROR_REASON_"


class DeltawireError(Exception):
    """Whatever this package raises about a call. Arguments that make no sense are ValueError and TypeError."""


class ProtocolError(DeltawireError):
    """The gateway broke the API's own rules: an event is missing, or comes where it must not.

    The answer cannot be trusted, and the call was cancelled. Report it with the request id.
    """

    def __init__(self, message: str, request_id: str = "") -> None:
        super().__init__(message, request_id)
        self.message = message
        self.request_id = request_id

    def __str__(self) -> str:
        return self.message


class CallError(DeltawireError):
    """A call ended with a status that is not OK.

    Attributes:
        code: The gRPC status code.
        message: For people; it can change from version to version.
        reason: Why, in one word: a value of `ErrorReason` without its prefix, "" if the gateway gave none. A word that
            this version does not know is kept verbatim.
        metadata: The values that belong to the reason, for example `{"model": "gpt-5"}`.
        violations: Every field of the request that breaks a rule.
        retry_after: How long to wait before trying again, in seconds; None if nothing was said.
        request_id: What the call is known by in the gateway's log.
        initial_metadata: The headers; empty if the call failed before its first event.
        trailing_metadata: The trailers.
        status: The whole `google.rpc.Status`, with details that have no field here; None if none came.
        answer: What had come of the answer when the call failed; None if nothing had.

    The group says what to do next: see the tree at the top of `deltawire._errors`. The gRPC exception is `__cause__`.
    """

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.code = failure.code
        self.message = failure.message
        self.reason = failure.reason
        self.metadata = failure.metadata
        self.violations = failure.violations
        self.retry_after = failure.retry_after
        self.request_id = failure.request_id
        self.initial_metadata = failure.initial_metadata
        self.trailing_metadata = failure.trailing_metadata
        self.status = failure.status
        self.answer = failure.answer

    def __str__(self) -> str:
        reason = f" ({self.reason})" if self.reason else ""
        return f"{self.code.name}{reason}: {self.message}"


class RequestError(CallError):
    """The request has to change; sent again unchanged, it fails again."""


class InvalidRequestError(RequestError):
    """The request breaks a rule of the API; `violations` lists every field."""


class ContextLengthExceededError(RequestError):
    """Prompt and answer do not fit the model's context. Shorten the messages or lower `max_tokens`."""


class UpstreamRejectedError(RequestError):
    """The provider refused the request; the message is its own."""


class UpstreamUnauthenticatedError(RequestError):
    """The provider refused the `vllm_token` of this call."""


class ModelNotFoundError(RequestError):
    """No model has this id or alias; the message lists some that there are."""


class ModelAlreadyExistsError(RequestError):
    """The id or an alias belongs to another model."""


class ModelWrongTypeError(RequestError):
    """The model is of another type than this call needs."""


class ModelAmbiguousError(RequestError):
    """Several providers serve a model of this name. Call it "provider/model"."""


class ModelNotServedError(RequestError):
    """The provider does not serve the model that was to be registered."""


class ModelDiscoveredError(RequestError):
    """The model was discovered, not registered: it exists for as long as it is served."""


class EtagMismatchError(RequestError):
    """The model was changed since it had that etag. Read it again."""


class RevisionGoneError(RequestError):
    """A watch cannot go on from that revision: it is too old, or of another process. Watch again without one."""


class ImageUnavailableError(RequestError):
    """The gateway could not fetch an image from its address; `metadata` names the field. Send its bytes instead."""


class FieldNotSupportedError(RequestError):
    """The provider's version does not know a field of the request, which `metadata` names. Leave it out."""


class NotSupportedByProviderError(RequestError):
    """The provider does not offer what this call needs; `metadata` names the endpoint."""


class CompletionAlreadyExistsError(RequestError):
    """A completion with this completion_id is under way or retained. Choose another, or `chat.resume` that one."""


class CompletionNotFoundError(RequestError):
    """There is no completion of this id, or it is another caller's."""


class CompletionGoneError(RequestError):
    """There was such a completion, but what was asked for is no longer retained. Ask again from the top."""


class WrongReplicaError(RequestError):
    """Another gateway process made this completion id, and only that one has the completion.

    The client has tried several new connections and none reached that process, or it cannot make one because it was given
    a channel. Try later, or connect to that process without the balancer.
    """


class ProviderNotFoundError(RequestError):
    """No provider of this name is configured."""


class ProviderError(CallError):
    """The provider did not do its part. Most of it passes: ask again, after `retry_after` if that is set."""


class ProviderMisconfiguredError(ProviderError):
    """The gateway's operator has to act: a wrong address, or a token that the provider refuses."""


class UpstreamUnavailableError(ProviderError):
    """The provider could not be reached. It was tried again already; wait before doing more."""


class UpstreamOverloadedError(ProviderError):
    """The provider has no room. Wait `retry_after` seconds, then try again."""


class UpstreamTimeoutError(ProviderError):
    """The provider sent nothing for longer than the gateway waits; your own `timeout` has not passed.

    `code` is DEADLINE_EXCEEDED before the first event, and ABORTED after it. The provider may still be working on the
    request, so do not repeat it at once.
    """


class UpstreamError(ProviderError):
    """The provider reported an error of its own. The request may be what breaks it: do not repeat it blindly."""


class UpstreamMalformedError(ProviderError):
    """The provider sent what no vLLM sends."""


class UpstreamIncompleteError(ProviderError):
    """The provider broke off before every choice had ended. Start again from the top."""


class UpstreamAbortedError(ProviderError):
    """The provider aborted the request by itself. Start again from the top."""


class GatewayError(CallError):
    """The gateway cannot do it now."""


class TooManyStreamsError(GatewayError):
    """The gateway serves as many completions as it may. Wait `retry_after` seconds, then try again."""


class MemoryLimitExceededError(GatewayError):
    """The gateway holds as much as it may for the calls under way. Wait `retry_after` seconds, then try again."""


class AnswerTooLargeError(GatewayError):
    """The answer is larger than the gateway holds, or than fits into one message. Stream it, or ask for less of it."""


class SlowCallerError(GatewayError):
    """This program did not read its stream for too long. Read events as they come, and work on them elsewhere."""


class SlowWatcherError(GatewayError):
    """This program did not read its watch for too long. Watch again from the last revision, and read as changes come."""


class AccessChangedError(GatewayError):
    """Who may call has changed since the watch began. Watch again from the last revision; a watch does so by itself."""


class RegistryFullError(GatewayError):
    """There is no room for what would be registered. Unregister models, or have the operator raise the limit in the message."""


class StoreUnavailableError(GatewayError):
    """The registry's database cannot be used now; models known already can still be called."""


class DrainingError(GatewayError):
    """This gateway is shutting down. Try again at once: another one serves."""


class InternalError(GatewayError):
    """A defect of the gateway. Report it with the request id."""


class StreamInterrupted(CallError):  # noqa: N818 -- it says what happened better without the suffix
    """The stream ended without its last event, after it had begun: the gateway, or a proxy on the way, closed the connection.

    `code` may be anything; it is UNKNOWN if the status said OK. What came is in `answer`, with the latest usage received.
    Start again from the top. A stream that was asked with `retention` has tried to go on: `reason` says why it could not.
    """


class CallCancelledError(CallError):
    """The caller cancelled the call: by `cancel()`, by leaving the `with` block, or by closing the client."""


class ClientClosedError(CallCancelledError):
    """The client, or the channel that it was given, was closed: before the call or during it. Make another client."""


class DeadlineExceededError(CallError):
    """The call's `timeout` passed. What had come of a stream is in `answer`."""


class DurationLimitExceededError(DeadlineExceededError):
    """A call without `timeout` ran for as long as the gateway allows. Give a `timeout` that suits the work."""


class UnavailableError(CallError):
    """The gateway could not be reached, in several attempts. Check the target, or try again later."""


class UnauthenticatedError(CallError):
    """The gateway does not know the caller. Give the right `token`, or `credentials` with a client certificate."""


class PermissionDeniedError(CallError):
    """The gateway knows the caller and does not let it do this. `metadata` says what the call needs."""


# A test holds this whole: every value of the enum but the unspecified one, and no class twice.
REASONS: Mapping[ErrorReason.ValueType, type[CallError]] = MappingProxyType(
    {
        ErrorReason.ERROR_REASON_INVALID_REQUEST: InvalidRequestError,
        ErrorReason.ERROR_REASON_CONTEXT_LENGTH_EXCEEDED: ContextLengthExceededError,
        ErrorReason.ERROR_REASON_MODEL_NOT_FOUND: ModelNotFoundError,
        ErrorReason.ERROR_REASON_MODEL_ALREADY_EXISTS: ModelAlreadyExistsError,
        ErrorReason.ERROR_REASON_MODEL_WRONG_TYPE: ModelWrongTypeError,
        ErrorReason.ERROR_REASON_PROVIDER_NOT_FOUND: ProviderNotFoundError,
        ErrorReason.ERROR_REASON_PROVIDER_MISCONFIGURED: ProviderMisconfiguredError,
        ErrorReason.ERROR_REASON_UPSTREAM_UNAUTHENTICATED: UpstreamUnauthenticatedError,
        ErrorReason.ERROR_REASON_UPSTREAM_REJECTED: UpstreamRejectedError,
        ErrorReason.ERROR_REASON_UPSTREAM_UNAVAILABLE: UpstreamUnavailableError,
        ErrorReason.ERROR_REASON_UPSTREAM_OVERLOADED: UpstreamOverloadedError,
        ErrorReason.ERROR_REASON_UPSTREAM_TIMEOUT: UpstreamTimeoutError,
        ErrorReason.ERROR_REASON_UPSTREAM_ERROR: UpstreamError,
        ErrorReason.ERROR_REASON_UPSTREAM_MALFORMED: UpstreamMalformedError,
        ErrorReason.ERROR_REASON_UPSTREAM_INCOMPLETE: UpstreamIncompleteError,
        ErrorReason.ERROR_REASON_UPSTREAM_ABORTED: UpstreamAbortedError,
        ErrorReason.ERROR_REASON_TOO_MANY_STREAMS: TooManyStreamsError,
        ErrorReason.ERROR_REASON_SLOW_CALLER: SlowCallerError,
        ErrorReason.ERROR_REASON_STORE_UNAVAILABLE: StoreUnavailableError,
        ErrorReason.ERROR_REASON_DRAINING: DrainingError,
        ErrorReason.ERROR_REASON_INTERNAL: InternalError,
        ErrorReason.ERROR_REASON_DURATION_LIMIT_EXCEEDED: DurationLimitExceededError,
        ErrorReason.ERROR_REASON_MODEL_AMBIGUOUS: ModelAmbiguousError,
        ErrorReason.ERROR_REASON_MODEL_NOT_SERVED: ModelNotServedError,
        ErrorReason.ERROR_REASON_MODEL_DISCOVERED: ModelDiscoveredError,
        ErrorReason.ERROR_REASON_UNAUTHENTICATED: UnauthenticatedError,
        ErrorReason.ERROR_REASON_PERMISSION_DENIED: PermissionDeniedError,
        ErrorReason.ERROR_REASON_ETAG_MISMATCH: EtagMismatchError,
        ErrorReason.ERROR_REASON_REVISION_GONE: RevisionGoneError,
        ErrorReason.ERROR_REASON_SLOW_WATCHER: SlowWatcherError,
        ErrorReason.ERROR_REASON_ACCESS_CHANGED: AccessChangedError,
        ErrorReason.ERROR_REASON_IMAGE_UNAVAILABLE: ImageUnavailableError,
        ErrorReason.ERROR_REASON_FIELD_NOT_SUPPORTED: FieldNotSupportedError,
        ErrorReason.ERROR_REASON_ENDPOINT_NOT_SUPPORTED: NotSupportedByProviderError,
        ErrorReason.ERROR_REASON_COMPLETION_ALREADY_EXISTS: CompletionAlreadyExistsError,
        ErrorReason.ERROR_REASON_COMPLETION_NOT_FOUND: CompletionNotFoundError,
        ErrorReason.ERROR_REASON_COMPLETION_GONE: CompletionGoneError,
        ErrorReason.ERROR_REASON_WRONG_REPLICA: WrongReplicaError,
        ErrorReason.ERROR_REASON_ANSWER_TOO_LARGE: AnswerTooLargeError,
        ErrorReason.ERROR_REASON_MEMORY_LIMIT_EXCEEDED: MemoryLimitExceededError,
        ErrorReason.ERROR_REASON_REGISTRY_FULL: RegistryFullError,
    }
)

CODES: Mapping[grpc.StatusCode, type[CallError]] = MappingProxyType(
    {
        grpc.StatusCode.CANCELLED: CallCancelledError,
        grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
        grpc.StatusCode.UNAVAILABLE: UnavailableError,
        grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
        grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    }
)

_STATUS_CODES: Mapping[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def error_for(failure: Failure) -> CallError:
    """The error to raise for this failure: by its reason, else by its code."""
    if failure.is_closed:
        return ClientClosedError(failure)
    reason = PREFIX + failure.reason
    if reason in ErrorReason.keys():  # noqa: SIM118 -- the enum's wrapper is no mapping
        by_reason = REASONS.get(ErrorReason.Value(reason))
        if by_reason is not None:
            return by_reason(failure)
    return CODES.get(failure.code, CallError)(failure)


def status_code(number: int) -> grpc.StatusCode:
    """A status code from its number; UNKNOWN for one that there is not."""
    return _STATUS_CODES.get(number, grpc.StatusCode.UNKNOWN)


def with_fault(failure: Failure, code: int, reason: ErrorReason.ValueType, message: str) -> Failure:
    """The failure with the fault of `Completed.error`, for when a proxy lost the status that should have said so.

    The number of a reason that this version does not know has no name here: the code alone decides then.
    """
    return replace(
        failure,
        code=status_code(code),
        reason=ErrorReason.Name(reason).removeprefix(PREFIX) if reason in REASONS else "",
        message=message,
    )
