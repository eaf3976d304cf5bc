"""What every call goes through: who calls, the drain gate, admission, receiving, a status for what failed, and a log line.

The order is by cost. A call is refused by its headers and certificate before its request is received, and its request is parsed
and validated only if there is a place for it.

Handlers raise `DeltawireError` and know nothing of statuses. Nothing is sent before a handler sends it: not even initial
metadata, so that a call that fails before its first event stays retriable for clients and proxies.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import secrets
import sys
import time
from typing import TYPE_CHECKING, Any, cast

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from deltawire_server.access import Access, Identity, NameKind, Permission, bearer_key
from deltawire_server.admission import Admission
from deltawire_server.errors import (
    CallerError,
    DeltawireError,
    GatewayError,
    Reason,
    Violation,
    internal_error,
    invalid_request,
)
from deltawire_server.memory import Ledger
from deltawire_server.rpc import reflection, wire
from deltawire_server.rpc.admitted import Admitted
from deltawire_server.rpc.latch import Latch
from deltawire_server.rpc.reception import Reception
from deltawire_server.rpc.resets import QUICK_SECONDS, Resets
from deltawire_server.rpc.status import MAX_MESSAGE, grpc_code, shorten, trailers_of
from deltawire_server.rpc.trace_context import trace_context
from deltawire_server.telemetry import get_logger
from deltawire_server.upstream.base import CallContext

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping

    from deltawire_server.admission import Place

REQUEST_ID = "x-request-id"
AUTHORIZATION = "authorization"
PROVIDER_TOKEN = "x-vllm-api-token"  # noqa: S105 (the name of a header, not a token)
MAX_REQUEST_ID = 128
OUR_METHODS = "/deltawire.v1."
STREAM_CHAT = "/deltawire.v1.ChatCompletion/StreamChatCompletion"
ADMITTED = frozenset(
    {
        "/deltawire.v1.ChatCompletion/CreateChatCompletion",
        STREAM_CHAT,
        "/deltawire.v1.ChatCompletion/CountTokens",
    }
)
"""The methods that need a place: each of their requests is as large as a chat, and costs an engine."""

DEADLINE_SLACK = 0.1
"""Seconds: the caller's clock runs out first, and then its cancel arrives before our own clock says the same."""

MAX_LOGGED = 4096
"""Bytes of an error in a log line: it may quote the request, and what a caller sends must not fill a disk."""

DRAINING_RETRY_SECONDS = 0.1
"""When to retry a call that met the end of this process: on a new connection, which its client has to make first."""

RESET_TURNS = 2
"""Turns of the event loop after which grpc has canceled the handler of a call that was reset before it began."""

UNREAD_SECONDS = 0.5
"""How long a call that has failed is under way until its caller has the status."""

_log = get_logger(__name__)

if TYPE_CHECKING:
    _Context = aio.ServicerContext[Any, Any]
    _Handler = grpc.RpcMethodHandler[Any, Any]
    _Behaviour = Callable[[object, _Context], Awaitable[object]]
    _Parser = Callable[[bytes], object]


class CallRecord:
    """One call's share of the log line, filled in on the way.

    Attributes:
        call: What of the caller's metadata goes on.
        caller: Who calls: the principal, or where anybody may call, the name in a verified certificate; empty if neither
            is known.
        owner: What marks the caller's completions; empty if callers cannot be distinguished. A later caller of the same name
            with another credential has another one.
        begun: Whether a message of a stream was sent.
        may_operate: Whether the caller may change models that others registered.
        latch: How it ends.
        values: What the handler adds to the log line: model, usage and the like.
        place: The call's in `Admission`, if its method needs one; taken already, unless the call may resume a completion.
        request_bytes: Of the request as it came.
    """

    def __init__(self, call: CallContext) -> None:
        self.call = call
        self.caller = ""
        self.owner = ""
        self.begun = False
        self.may_operate = True
        self.latch = Latch()
        self.values: dict[str, object] = {}
        self.place: Place | None = None
        self.request_bytes = 0


_record: contextvars.ContextVar[CallRecord] = contextvars.ContextVar("deltawire_call")


def call_record(context: _Context) -> CallRecord:
    """The record of the call that is being handled; one without a log line, made now, if no interceptor saw the call."""
    try:
        return _record.get()
    except LookupError:
        return CallRecord(_call_context(_metadata(context)))


def call_context(context: _Context) -> CallContext:
    """What of a caller's metadata goes on to the provider."""
    return call_record(context).call


class CallInterceptor(aio.ServerInterceptor):
    """Wraps every call. Health and reflection answer to the end and wait for no place; their log lines are at level debug.

    Args:
        end_calls: Ends the calls under way that can be ended with a word to the caller.
        end_watches: Ends those that would go on for ever.
        access: Who may call; by default everybody.
        admission: The places of completions; by default without a bound.
        memory: What all calls hold; large requests are parsed in turn.
        reception: Receives the requests.
    """

    def __init__(
        self,
        end_calls: Callable[[], None] = lambda: None,
        end_watches: Callable[[], None] = lambda: None,
        access: Access | None = None,
        *,
        admission: Admission | None = None,
        memory: Ledger | None = None,
        reception: Reception | None = None,
    ) -> None:
        self._end_calls = end_calls
        self._end_watches = end_watches
        self._access = Access() if access is None else access
        self._admission = Admission(sys.maxsize) if admission is None else admission
        self._memory = memory or Ledger(sys.maxsize)
        self._reception = reception or Reception()
        self._resets = Resets()
        self._reflection = reflection.Reflection(self._is_known)
        self._admitted = Admitted()
        self._active = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    def refuse_new_calls(self) -> None:
        """From now on new calls fail with UNAVAILABLE (DRAINING); those under way go on, but watches. Then `wait_idle`."""
        self._draining = True
        self._end_watches()

    def end_calls(self) -> None:
        """End what is under way, now, and tell its callers. Then `wait_idle` for a moment."""
        self._end_calls()

    async def end_revoked(self) -> None:
        """End the calls whose callers are no longer admitted, with ACCESS_CHANGED, but streams that have begun."""
        await self._admitted.end(self._access.admits)

    async def wait_idle(self) -> None:
        """Wait until no call is under way."""
        await self._idle.wait()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler:
        """Find the handler and wrap it in one that receives nothing before the call is let in."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None:
            return cast("_Handler", handler)  # grpc takes None for an unknown method; its types do not say so
        streams = handler.response_streaming
        names = {True: "stream", False: "unary"}
        # As grpc.RpcMethodHandler names what it holds, by what it takes and what it answers.
        behaviour = cast("_Behaviour", getattr(handler, f"{names[handler.request_streaming]}_{names[streams]}"))
        parse = cast("_Parser", handler.request_deserializer or bytes)
        if method.startswith(reflection.SERVICES):
            behaviour = functools.partial(self._reflect, behaviour, parse)

        async def wrapped(messages: object, context: _Context) -> object:
            return await self._run(method, behaviour, parse, messages, context)

        make = grpc.stream_stream_rpc_method_handler if streams else grpc.stream_unary_rpc_method_handler
        return cast("_Handler", cast("Any", make)(wrapped, None, handler.response_serializer))

    async def _run(
        self, method: str, behaviour: _Behaviour, parse: _Parser, messages: object, context: _Context
    ) -> object:
        ours = method.startswith(OUR_METHODS)
        metadata = _metadata(context)
        record = CallRecord(_call_context(metadata))
        with contextlib.ExitStack() as counted:
            if ours:
                counted.enter_context(self._counted())
            with (
                _entered(record),
                self._logged(method, record, context, metadata) as outcome,
                self._admission.place() as place,
            ):
                try:
                    request = messages
                    with contextlib.ExitStack() as admitted:
                        if ours:
                            await self._let_in(method, record, context, place)
                            admitted.enter_context(self._admitted.entered(record.owner, method, lambda: record.begun))
                            data = await self._reception.receive(
                                context, functools.partial(wire.check, method=method), record.owner or context.peer()
                            )
                            record.request_bytes = len(data)
                            async with self._memory.turn(len(data)):
                                request = _parsed(parse, data)
                            del data
                        admitted.enter_context(_gone_is_cancelled())
                        running = behaviour(request, context)
                        del request  # the handler has it, and lets go of it when it is sent
                        response = await running
                        if response is not None:  # a stream has sent its id with its first message
                            await context.send_initial_metadata(((REQUEST_ID, record.call.request_id),))
                            record.latch.succeed()
                        record.latch.check_succeeded()
                        return response
                except DeltawireError as failure:
                    error = failure
                except Exception as defect:  # noqa: BLE001 (the caller gets a status and the log the cause)
                    error = internal_error(cause=defect)
                outcome.fail(error)
                if record.latch.succeeded:
                    return None  # the caller has the whole answer; what failed after it is for the log
                record.latch.fail()
            # The failure's traceback and the exception that `abort` raises refer to this frame, in circles: what it has of the
            # request would be freed when the garbage collector finds them, which may be never.
            data = b""
            request = None  # noqa: F841 (see above)
            error.__traceback__ = error.__cause__ = error.__context__ = outcome.defect = None
            message = shorten(error.message, MAX_MESSAGE)
            # Until the status is out. It waits behind what the caller does not read, which a drain must not wait for.
            unread = asyncio.get_running_loop().call_later(UNREAD_SECONDS, counted.close)
            try:
                with _gone_is_cancelled():
                    trailers = trailers_of(error, record.call.request_id)
                    return await context.abort(grpc_code(error.code), message, trailers)
            finally:
                unread.cancel()

    async def _let_in(self, method: str, record: CallRecord, context: _Context, place: Place) -> None:
        """Check access, the drain gate and admission, or raise."""
        try:
            self._authorize(method, record, context)
            _check_token(record.call)
            self._admit(method, record, place)
        except GatewayError:
            # A refusal with its status and log line costs more than to see whether the caller has reset the call already.
            for _ in range(RESET_TURNS):
                await asyncio.sleep(0)
            raise

    def _admit(self, method: str, record: CallRecord, place: Place) -> None:
        """Refuse the call if this process ends, or if its method needs a place and there is none."""
        if self._draining:
            message = "this process is shutting down; another one serves"
            raise GatewayError(Reason.DRAINING, message, retry_after=DRAINING_RETRY_SECONDS)
        if method not in ADMITTED:
            return
        record.place = place
        try:
            place.take()
        except GatewayError:
            # It may resume a completion that has a place, which only its request says.
            if method != STREAM_CHAT:
                raise

    async def _reflect(self, library: Any, parse: _Parser, messages: Any, context: _Context) -> None:  # noqa: ANN401
        """A call of reflection, in the place of the library's own handler."""
        await self._reflection.answer(library, functools.partial(_parsed, parse), messages, context)
        call_record(context).latch.succeed()

    def _is_known(self, context: _Context) -> bool:
        return self._access.is_principal(_keys(context), _identities(context))

    def _authorize(self, method: str, record: CallRecord, context: _Context) -> None:
        """Let the call in or raise; the log line gets the caller's name, and of one who may not, what is missing."""
        if self._access.open:
            identity = next(iter(_identities(context)), None)
            if identity is not None:
                record.caller, record.owner = identity.name, identity.owner
            return  # also those whose authorization header is for somebody else on the way
        key = bearer_key(_keys(context))
        try:
            principal = self._access.authorize(method, key, _identities(context))
            if principal is not None:
                record.caller, record.owner = principal.name, principal.owner
                record.may_operate = Permission.OPERATE in principal.permissions
            record.values["caller"] = record.caller
        except GatewayError as refused:
            record.values.update(refused.metadata)
            raise

    @contextlib.contextmanager
    def _logged(
        self, method: str, record: CallRecord, context: _Context, metadata: Mapping[str, str]
    ) -> Iterator[_Outcome]:
        """Log the call when it has ended, however that was."""
        begin = time.monotonic()
        outcome = _Outcome()
        # Until something better is known: a caller's cancel and deadline both arrive as a cancelled task.
        outcome.code = "CANCELLED"
        try:
            yield outcome
            if outcome.code == "CANCELLED":
                outcome.code = "OK"
        finally:
            if outcome.code == "CANCELLED" and deadline_passed(context):
                outcome.code = "DEADLINE_EXCEEDED"
            seconds = time.monotonic() - begin
            if outcome.code != "CANCELLED" or seconds >= QUICK_SECONDS or self._resets.first(context.peer()):
                ours = method.startswith(OUR_METHODS)
                log = _log.error if outcome.defect is not None else _log.info if ours else _log.debug
                log(
                    "call",
                    method=method.removeprefix("/"),
                    code=outcome.code,
                    request_id=record.call.request_id,
                    peer=context.peer(),
                    user_agent=metadata.get("user-agent", ""),
                    seconds=round(seconds, 6),
                    **record.values,
                    **outcome.values,
                    exc_info=outcome.defect,
                )

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self._active += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._active -= 1
            if not self._active:
                self._idle.set()


class _Outcome:
    """How a call ended, for its log line."""

    def __init__(self) -> None:
        self.code = "OK"
        self.values: dict[str, object] = {}
        self.defect: BaseException | None = None

    def fail(self, error: DeltawireError) -> None:
        self.code = error.code.name
        self.values = {"reason": error.reason.name, "error": shorten(error.message, MAX_LOGGED)}
        if error.reason is Reason.INTERNAL:
            self.defect = error.__cause__


@contextlib.contextmanager
def _gone_is_cancelled() -> Iterator[None]:
    """Where grpc cannot write any more the caller has gone: no defect, and its cancel is on the way."""
    try:
        yield
    except aio.InternalError as gone:
        raise asyncio.CancelledError from gone


@contextlib.contextmanager
def _entered(record: CallRecord) -> Iterator[None]:
    mark = _record.set(record)
    try:
        yield
    finally:
        _record.reset(mark)


def _parsed(parse: _Parser, data: bytes) -> object:
    """The request's message. Not left to gRPC, which calls a message that cannot be parsed UNKNOWN and logs a traceback.

    Raises:
        CallerError: INVALID_REQUEST.
    """
    try:
        return parse(data)
    except DecodeError as error:
        raise CallerError(Reason.INVALID_REQUEST, wire.NOT_A_MESSAGE) from error


def deadline_passed(context: _Context) -> bool:
    """Whether the call's own deadline has passed, or is about to."""
    remaining = cast("float | None", context.time_remaining())  # None without a deadline; grpc's types do not say so
    return remaining is not None and remaining <= DEADLINE_SLACK


def _metadata(context: _Context) -> dict[str, str]:
    return dict(_pairs(context))


def _pairs(context: _Context) -> Iterator[tuple[str, str]]:
    return ((key, value) for key, value in context.invocation_metadata() or () if isinstance(value, str))


def _keys(context: _Context) -> list[str]:
    """The values of the call's authorization headers."""
    return [value for name, value in _pairs(context) if name == AUTHORIZATION]


def _identities(context: _Context) -> list[Identity]:
    """The names in the client certificate that the listener verified, URIs first; none without one.

    The common name only where there is no alternative name of any kind, as in RFC 6125 and grpc: an authority that verifies
    the alternative names may let the client choose the common name.
    """
    authenticated = context.auth_context()
    properties = {NameKind.URI: "peer_uri", NameKind.DNS: "peer_dns"}
    if not authenticated.get("x509_subject_alternative_name"):
        properties = {NameKind.COMMON_NAME: "x509_common_name"}
    return [
        Identity(kind, name.decode(errors="backslashreplace"))
        for kind, key in properties.items()
        for name in authenticated.get(key, ())
    ]


def _call_context(metadata: Mapping[str, str]) -> CallContext:
    given = metadata.get(REQUEST_ID, "")
    request_id = given
    if not given or len(given) > MAX_REQUEST_ID or not (given.isascii() and given.isprintable()):
        request_id = secrets.token_hex(16)
        if given:
            _log.warning("request id replaced", given=given[:MAX_REQUEST_ID], request_id=request_id)
    traceparent, tracestate = trace_context(metadata.get("traceparent", ""), metadata.get("tracestate", ""))
    return CallContext(request_id, metadata.get(PROVIDER_TOKEN) or None, traceparent, tracestate)


def _check_token(call: CallContext) -> None:
    """Refuse a provider's token that cannot be in a header. If it were dropped, the operator's token would be sent instead.

    Raises:
        CallerError: INVALID_REQUEST.
    """
    if call.token is not None and not all("!" <= character <= "~" for character in call.token):
        raise invalid_request(
            [Violation(PROVIDER_TOKEN, "must be printable ASCII without spaces: send the token alone")]
        )
