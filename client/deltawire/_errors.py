"""Every way in which a call can fail. Catch the group, which says what to do, or the class, which says what happened.

    DeltawireError
    ├── ProtocolError                        the gateway violated the API; the answer cannot be trusted
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
        │   ├── WrongReplicaError            (another connection may succeed; the client has tried some)
        │   └── ProviderNotFoundError
        ├── ProviderError                    the provider failed; mostly temporary: call again
        │   ├── ProviderMisconfiguredError   (not temporary: the operator has to act)
        │   ├── UpstreamUnavailableError
        │   ├── UpstreamOverloadedError
        │   ├── UpstreamTimeoutError
        │   ├── UpstreamError
        │   ├── UpstreamMalformedError
        │   ├── UpstreamIncompleteError
        │   └── UpstreamAbortedError
        ├── GatewayError                     the gateway is full, draining, or defective
        │   ├── TooManyStreamsError
        │   ├── CallerLimitExceededError
        │   ├── MemoryLimitExceededError
        │   ├── AnswerTooLargeError
        │   ├── SlowCallerError
        │   ├── SlowWatcherError
        │   ├── AccessChangedError
        │   ├── StoreUnavailableError
        │   ├── RegistryFullError            (not temporary: unregister models, or the operator has to act)
        │   ├── DrainingError
        │   └── InternalError
        ├── StreamInterrupted                the stream broke off after its first event; `answer` has what was received
        ├── CallCancelledError               the caller canceled it
        │   └── ClientClosedError            the client was closed, before the call or during it
        ├── DeadlineExceededError            the caller's timeout passed
        │   └── DurationLimitExceededError   the gateway's own limit for calls without a timeout passed
        ├── UnavailableError                 the gateway cannot be reached
        ├── UnauthenticatedError             the gateway does not know the caller: the token is missing or invalid
        └── PermissionDeniedError            the caller lacks a permission

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
    """The base of all errors about calls. Invalid arguments raise ValueError and TypeError instead."""


class ProtocolError(DeltawireError):
    """The gateway violated the API: an event is missing, or arrived where it must not.

    Attributes:
        message: The violation, in English.
        request_id: The call's id in the gateway's log.

    The answer cannot be trusted, and the call was canceled. Report it with the request id.
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
        reason: A name of `ErrorReason` without its prefix; "" if the gateway sent none. A reason that this version does
            not know is kept verbatim.
        metadata: The values that belong to the reason, for example `{"model": "gpt-5"}`.
        violations: Every field of the request that breaks a rule.
        retry_after: Seconds to wait before the next attempt; None if the gateway sent no delay.
        request_id: The call's id in the gateway's log.
        initial_metadata: The headers; empty if the call failed before its first event.
        trailing_metadata: The trailers.
        status: The whole `google.rpc.Status`, with details that have no field here; None if none was received.
        answer: What was received of the answer; None if nothing was.

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
    """The provider rejected the request; the message is its own. Change the request accordingly."""


class UpstreamUnauthenticatedError(RequestError):
    """The provider rejected the `vllm_token` of this call. Pass a valid one."""


class ModelNotFoundError(RequestError):
    """No model has this id or alias. Use one of those that the message or `models.list` has."""


class ModelAlreadyExistsError(RequestError):
    """The id or an alias belongs to another model. Choose another one."""


class ModelWrongTypeError(RequestError):
    """The model has another type than this call needs. Choose one by `models.list(model_type=...)`."""


class ModelAmbiguousError(RequestError):
    """Several providers serve a model of this name. Call it "provider/model"."""


class ModelNotServedError(RequestError):
    """The provider does not serve the model, or the operator does not allow it. `models.list` has those that can be used."""


class ModelDiscoveredError(RequestError):
    """The model was discovered, not registered, so it cannot be changed or unregistered. Register it under an id first."""


class EtagMismatchError(RequestError):
    """The model has changed since it had that etag. Read it again, and decide again."""


class RevisionGoneError(RequestError):
    """A watch cannot continue from that revision: it is too old, or of another process. Watch again without one."""


class ImageUnavailableError(RequestError):
    """The gateway could not fetch an image from its address; `metadata` names the field. Send its bytes instead."""


class FieldNotSupportedError(RequestError):
    """The provider's version does not know a field of the request, which `metadata` names. Omit it."""


class NotSupportedByProviderError(RequestError):
    """The provider lacks an endpoint that this call needs; `metadata` names it. Use another provider."""


class CompletionAlreadyExistsError(RequestError):
    """A completion with this completion_id is running or retained. Choose another id, or call `chat.resume` with this one."""


class CompletionNotFoundError(RequestError):
    """This caller has no completion with this id, or it ended too long ago. Send the request again."""


class CompletionGoneError(RequestError):
    """The gateway no longer retains what was requested of this completion. Send the request again."""


class WrongReplicaError(RequestError):
    """Another gateway process generated this completion id, and only that one has the completion.

    The client has tried several new connections and none reached that process, or it cannot make one because it was given
    a channel. Try later, or connect to that process without the load balancer.
    """


class ProviderNotFoundError(RequestError):
    """No provider with this id is configured. `providers.list` has those that are."""


class ProviderError(CallError):
    """The provider failed. Most causes are temporary: call again, after `retry_after` if that is set."""


class ProviderMisconfiguredError(ProviderError):
    """The gateway's operator has to act: a wrong address, or a token that the provider refuses."""


class UpstreamUnavailableError(ProviderError):
    """The provider could not be reached, by several attempts. Wait before you call again."""


class UpstreamOverloadedError(ProviderError):
    """The provider's queue is full. Wait `retry_after` seconds, then call again."""


class UpstreamTimeoutError(ProviderError):
    """The provider sent nothing for longer than the gateway waits; your own `timeout` has not passed.

    `code` is DEADLINE_EXCEEDED before the first event, and ABORTED after it. The provider may still be working on the
    request, so do not repeat it at once.
    """


class UpstreamError(ProviderError):
    """The provider reported an internal error. The request may be its cause: do not repeat it in a loop."""


class UpstreamMalformedError(ProviderError):
    """The provider's response is malformed: it may not be a vLLM. Have the operator check the provider."""


class UpstreamIncompleteError(ProviderError):
    """The provider's response ended before every choice had ended. Send the request again."""


class UpstreamAbortedError(ProviderError):
    """The provider aborted the request. Send the request again."""


class GatewayError(CallError):
    """The gateway cannot serve the call now: it is full, draining, or defective. Each subclass says what to do."""


class TooManyStreamsError(GatewayError):
    """The gateway runs its maximum number of completions. Wait `retry_after` seconds, then call again."""


class CallerLimitExceededError(GatewayError):
    """This caller has reached one of its own limits; `metadata` names it. Wait `retry_after` seconds, then call again."""


class MemoryLimitExceededError(GatewayError):
    """The running calls use all of the gateway's memory limit. Wait `retry_after` seconds, then call again."""


class AnswerTooLargeError(GatewayError):
    """The answer exceeds the gateway's limit, or the limit of one message. Use `chat.stream`, or request less."""


class SlowCallerError(GatewayError):
    """This program read its stream too slowly. Read events as they arrive, and process them in another thread or task."""


class SlowWatcherError(GatewayError):
    """This program read its watch too slowly. Watch again from the last revision, and read changes as they arrive."""


class AccessChangedError(GatewayError):
    """The access list has changed since the call began. Call again; a watch does so automatically."""


class RegistryFullError(GatewayError):
    """The registry is full. Unregister models, or have the operator raise the limit in the message."""


class StoreUnavailableError(GatewayError):
    """The registry's database cannot be used now. Call again later; models that are known can still be called.

    For a chat: the gateway must record its usage and cannot. Call again later.
    """


class DrainingError(GatewayError):
    """This gateway is shutting down. Call again at once: another one serves."""


class InternalError(GatewayError):
    """A defect of the gateway. Report it with the request id."""


class StreamInterrupted(CallError):  # noqa: N818 -- it says what happened better without the suffix
    """The stream ended without its last event, after it had begun: the gateway, or a proxy on the way, closed the connection.

    `code` may be any; it is UNKNOWN if the status was OK. `answer` has what was received, with the latest usage. Send the
    request again. A stream with `retention` has tried to resume: `reason` has the reason why it could not.
    """


class CallCancelledError(CallError):
    """The caller canceled the call: by `cancel()`, by leaving the `with` block, or by closing the client."""


class ClientClosedError(CallCancelledError):
    """The client, or the channel that it was given, was closed: before the call or during it. Make another client."""


class DeadlineExceededError(CallError):
    """The call's `timeout` passed. `answer` has what was received of a stream. Call again with a longer one."""


class DurationLimitExceededError(DeadlineExceededError):
    """A call without a `timeout` reached the gateway's limit. Pass a `timeout` that suits the work."""


class UnavailableError(CallError):
    """The gateway could not be reached, in several attempts. Check the target, or try again later."""


class UnauthenticatedError(CallError):
    """The gateway does not know the caller. Pass a valid `token`, or `credentials` with a client certificate."""


class PermissionDeniedError(CallError):
    """The caller lacks the permission that `metadata` names. Have the operator grant it."""


# A test checks that every value of the enum but the unspecified one is here, and no class twice.
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
        ErrorReason.ERROR_REASON_CALLER_LIMIT_EXCEEDED: CallerLimitExceededError,
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
    """A status code from its number; UNKNOWN for a number without one."""
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
