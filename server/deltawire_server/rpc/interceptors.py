"""The interceptor of every call: authorization, drain, admission, receiving the request, error to status, and one log line.

The cheapest checks come first. A call is refused by its headers and certificate before its request is received, and its request
is parsed and validated only if there is a place for it.

Handlers raise `DeltawireError`, which the interceptor converts to a status. Nothing is sent before the handler sends it, not even
initial metadata, so that clients and proxies can retry a call that fails before its first event.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import random
import sys
import time
from typing import TYPE_CHECKING, Any, cast

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from deltawire_server.access import NO_TERMS, REVOKED, Access, Permission
from deltawire_server.admission import Admission
from deltawire_server.errors import (
    FOR_OPERATORS,
    CallerError,
    DeltawireError,
    GatewayError,
    Reason,
    Violation,
    internal_error,
    invalid_request,
)
from deltawire_server.limits import UNCOUNTED, Callers, Use
from deltawire_server.memory import Ledger
from deltawire_server.metrics.table import FAILED_CALLS, Rpc
from deltawire_server.rpc import reflection, wire
from deltawire_server.rpc.admitted import Admitted
from deltawire_server.rpc.caller import Origin, credentials, origin
from deltawire_server.rpc.latch import Latch
from deltawire_server.rpc.load import NO_LOAD, LoadReport
from deltawire_server.rpc.reception import Reception
from deltawire_server.rpc.resets import QUICK_SECONDS, Resets
from deltawire_server.rpc.status import MAX_MESSAGE, grpc_code, shorten, trailers_of
from deltawire_server.rpc.trace_context import trace_context
from deltawire_server.telemetry import get_logger
from deltawire_server.tracing import tracer
from deltawire_server.tracing.tracer import NO_CALL
from deltawire_server.upstream.base import CallContext

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping

    from deltawire_server.admission import Place

REQUEST_ID = "x-request-id"
PROVIDER_TOKEN = "x-vllm-api-token"  # noqa: S105 (the name of a header, not a token)
MAX_REQUEST_ID = 128
HOST = "deltawire-host"
"""The metadata with the key of a caller without a name, in a call that another worker passes on."""
OUR_METHODS = "/deltawire.v1."
STREAM_CHAT = "/deltawire.v1.ChatCompletion/StreamChatCompletion"
COUNT_TOKENS = "/deltawire.v1.ChatCompletion/CountTokens"
ADMITTED = frozenset(
    {
        "/deltawire.v1.ChatCompletion/CreateChatCompletion",
        STREAM_CHAT,
        COUNT_TOKENS,
    }
)
"""The methods that need a place: their requests contain a whole chat and use an engine."""

DEADLINE_SLACK = 0.1
"""Seconds: a caller's deadline passes first on its own clock, so its cancellation arrives before the deadline passes here."""

MAX_LOGGED = 4096
"""Bytes of an error in a log line: it may quote the request, and callers must not be able to fill the disk."""

LIMIT_REASONS = frozenset({Reason.TOO_MANY_STREAMS, Reason.CALLER_LIMIT_EXCEEDED})
"""The reasons of refusals that come in bursts."""

DRAINING_RETRY_SECONDS = 0.1
"""When to retry a call that is refused on shutdown: its client has to open a new connection first."""

RESET_TURNS = 2
"""Iterations of the event loop after which grpc has canceled the handler of a call that was reset before it began."""

UNREAD_SECONDS = 0.5
"""How long a failed call counts as active while its status is sent."""

_log = get_logger(__name__)

if TYPE_CHECKING:
    _Context = aio.ServicerContext[Any, Any]
    _Handler = grpc.RpcMethodHandler[Any, Any]
    _Behaviour = Callable[[object, _Context], Awaitable[object]]
    _Parser = Callable[[bytes], object]


class CallRecord:
    """The state of one call, with the values for its log line.

    Attributes:
        call: The caller's metadata that is forwarded to the provider, within the call's span.
        origin: Where the call comes from.
        caller: The name of the principal or, if every caller may call, the name in a verified certificate or that a trusted proxy
            asserts; empty if there is neither.
        owner: The owner of the caller's completions; empty if callers cannot be distinguished. A later caller with the same
            name and another credential has another owner.
        assertion: From `access.Trust`, if a trusted proxy asserts who the caller is.
        begun: Whether a message of a stream was sent.
        may_operate: Whether the caller may change models that others registered.
        is_operator: Whether the caller may list, look up and cancel the completions of others.
        latch: Whether the call has succeeded or failed.
        values: Values that the handler adds to the log line, such as model and usage.
        place: The call's place in `Admission`, if its method needs one; it is taken, unless the call may resume a completion.
        share: What the caller uses, with its limits.
        terms: What the caller's access line says.
        request_bytes: Bytes of the serialized request.
        span: The call's span.
        waited: Called when the call has waited in the queue; raises if it is no longer admitted.
        load: What it reports to load balancers.
    """

    def __init__(self, call: CallContext) -> None:
        self.call = call
        self.origin = Origin("")
        self.caller = ""
        self.owner = ""
        self.assertion = ""
        self.begun = False
        self.may_operate = True
        self.is_operator = False
        self.latch = Latch()
        self.values: dict[str, object] = {}
        self.place: Place | None = None
        self.share = UNCOUNTED
        self.terms = NO_TERMS
        self.request_bytes = 0
        self.span = NO_CALL
        self.waited: Callable[[CallRecord, _Context], None] = lambda _, __: None
        self.load = NO_LOAD
        self._is_counted = False
        self._is_opening = False

    def open(self) -> None:
        """Count the call among what its caller's calls may join, until `opened`: its id is not known yet."""
        self.share.add(Use.KEPT, 1)
        self._is_opening = True

    def opened(self) -> None:
        """The stream of the call now counts itself, or no call can join it. Called at the end of each call too."""
        if self._is_opening:
            self._is_opening = False
            self.share.give_back(Use.KEPT)

    def count(self) -> None:
        """Count the call among the requests of its caller; no effect if it was counted, here or by the worker that passed it on.

        Raises:
            GatewayError: CALLER_LIMIT_EXCEEDED.
        """
        if not self._is_counted and passed_on.get() is None:
            self.share.admit()
        self._is_counted = True

    async def take_place(self, context: _Context) -> None:
        """Count the call, and take its place, now or in turn. No effect if it needs none, or has it.

        Raises:
            GatewayError: TOO_MANY_STREAMS, CALLER_LIMIT_EXCEEDED, DRAINING, or ACCESS_CHANGED while it waited.
        """
        if self.place is None or self.place.taken:
            return
        self.count()
        await self.place.wait(self.share, cast("float | None", context.time_remaining()))
        if self.place.waited:
            self.values["queue_seconds"] = round(self.place.waited, 6)
            self.waited(self, context)


passed_on: contextvars.ContextVar[tuple[str, str, str] | None] = contextvars.ContextVar(
    "deltawire_passed_on", default=None
)
"""The caller, the owner and the assertion, as in `CallRecord`, of a call that another worker authorized and passed on. Only the
private listener of `processes.passing` sets it."""

_record: contextvars.ContextVar[CallRecord] = contextvars.ContextVar("deltawire_call")


def call_record(context: _Context) -> CallRecord:
    """The record of the current call; a new one, which is not logged, if the call did not pass the interceptor."""
    try:
        return _record.get()
    except LookupError:
        return CallRecord(_call_context(_metadata(context)))


def call_context(context: _Context) -> CallContext:
    """The caller's metadata that is forwarded to the provider."""
    return call_record(context).call


class CallInterceptor(aio.ServerInterceptor):
    """Wraps every call. Health and reflection are served until shutdown, need no place, and are logged at level debug.

    Args:
        end_calls: Ends the active calls that can send a last message to the caller.
        end_watches: Ends the calls that would otherwise never end.
        access: Authorizes calls; by default every caller may do everything.
        admission: The places of completions; by default without a limit.
        callers: What each caller uses; by default without limits.
        memory: The memory of all calls; large requests are parsed one at a time.
        reception: Receives the requests.

    Attributes:
        load: What calls report to load balancers; nothing until its first `measure`.
    """

    def __init__(
        self,
        end_calls: Callable[[], None] = lambda: None,
        end_watches: Callable[[], None] = lambda: None,
        access: Access | None = None,
        *,
        admission: Admission | None = None,
        callers: Callers | None = None,
        memory: Ledger | None = None,
        reception: Reception | None = None,
    ) -> None:
        self._end_calls = end_calls
        self._end_watches = end_watches
        self._access = Access() if access is None else access
        self._admission = Admission(sys.maxsize) if admission is None else admission
        self._callers = callers or Callers()
        self._memory = memory or Ledger(sys.maxsize)
        self._reception = reception or Reception()
        self.load = LoadReport()
        self._resets = Resets()
        self._refusals = Resets("calls refused by limits")
        self._reflection = reflection.Reflection(self._is_known)
        self._admitted = Admitted()
        self._active = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    def refuse_new_calls(self) -> None:
        """Refuse new calls with UNAVAILABLE (DRAINING) from now on, and end watches. Other calls continue: see `wait_idle`."""
        self._draining = True
        self._admission.close(_draining())
        self._end_watches()

    def end_calls(self) -> None:
        """End active calls now, with a last message to their callers. Call `wait_idle` with a short timeout afterwards."""
        self._end_calls()

    async def end_revoked(self) -> None:
        """End the calls of callers that are no longer admitted with ACCESS_CHANGED, except streams that have begun."""
        await self._admitted.end(self._access.admits)

    async def wait_idle(self) -> None:
        """Wait until no call is active."""
        await self._idle.wait()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler:
        """Wrap the handler in one that receives nothing before the call is admitted."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None:
            return cast("_Handler", handler)  # grpc accepts None for an unknown method, unlike its types
        streams = handler.response_streaming
        names = {True: "stream", False: "unary"}
        # The attributes of grpc.RpcMethodHandler are named by the arity of requests and responses.
        behaviour = cast("_Behaviour", getattr(handler, f"{names[handler.request_streaming]}_{names[streams]}"))
        parse = cast("_Parser", handler.request_deserializer or bytes)
        if method.startswith(reflection.SERVICES):
            behaviour = functools.partial(self._reflect, behaviour, parse)
        # Handlers of unary requests take streams too, which is not visible on the wire; only reflection's requests are streams.
        rpc = _rpc(method, method.startswith(reflection.SERVICES), streams)

        async def wrapped(messages: object, context: _Context) -> object:
            return await self._run(method, rpc, behaviour, parse, messages, context)

        make = grpc.stream_stream_rpc_method_handler if streams else grpc.stream_unary_rpc_method_handler
        return cast("_Handler", cast("Any", make)(wrapped, None, handler.response_serializer))

    async def _run(
        self, method: str, rpc: Rpc, behaviour: _Behaviour, parse: _Parser, messages: object, context: _Context
    ) -> object:
        ours = method.startswith(OUR_METHODS)
        metadata = _metadata(context)
        record = CallRecord(_call_context(metadata))
        record.origin = origin(context, self._access.trust)
        _record.set(record)  # for the task of this call, so it is never reset
        with contextlib.ExitStack() as counted:
            if ours:
                counted.enter_context(self._counted())
                self.load.calls += 1
                record.load = self.load
            with self._logged(method, rpc, record, context, metadata) as outcome, self._admission.place() as place:
                try:
                    if not ours:
                        return await self._handle(behaviour(messages, context), record, context)
                    await self._let_in(method, record, context, place)
                    with self._admitted.entered(record.owner, method, lambda: record.begun, record.assertion):
                        # The handler alone holds the request, and drops it when it is sent to the provider.
                        running = behaviour(await self._receive(method, parse, record, context), context)
                        return await self._handle(running, record, context)
                except DeltawireError as failure:
                    error = failure
                except Exception as defect:  # noqa: BLE001 (the caller gets a status and the log the cause)
                    error = internal_error(cause=defect)
                finally:
                    record.opened()
                outcome.fail(error)
                if error.reason in FOR_OPERATORS:
                    self.load.failed += 1
                if record.latch.succeeded:
                    return None  # the caller has the whole answer; a later failure is only logged
                record.latch.fail()
            # The traceback of the error and the exception that `abort` raises form reference cycles with this frame. They would
            # keep the request until the garbage collector runs, which may be never.
            error.__traceback__ = error.__cause__ = error.__context__ = outcome.defect = None
            message = shorten(error.message, MAX_MESSAGE)
            # The call counts as active until its status is sent. If the caller does not read, the status is queued, and a drain
            # must not wait for it.
            unread = asyncio.get_running_loop().call_later(UNREAD_SECONDS, counted.close)
            try:
                with _disconnect_is_cancellation():
                    trailers = trailers_of(error, record.call.request_id)
                    return await context.abort(grpc_code(error.code), message, trailers + record.load.metadata)
            finally:
                unread.cancel()

    async def _receive(self, method: str, parse: _Parser, record: CallRecord, context: _Context) -> object:
        """The request of an admitted call."""
        data = await self._reception.receive(context, functools.partial(wire.check, method=method), record.share.key)
        record.request_bytes = len(data)
        async with self._memory.turn(len(data)):
            try:
                return parse(data)
            except DecodeError:
                raise await wire.unparsed(data, method) from None

    @staticmethod
    async def _handle(running: Awaitable[object], record: CallRecord, context: _Context) -> object:
        """Wait for the handler, and return the response of a unary call."""
        with _disconnect_is_cancellation():
            response = await running
            if response is not None:  # a stream sends the request id with its first message
                await context.send_initial_metadata(((REQUEST_ID, record.call.request_id), *record.load.metadata))
                record.latch.succeed()
            record.latch.check_succeeded()
            if record.load.metadata:
                context.set_trailing_metadata(record.load.metadata)
            return response

    async def _let_in(self, method: str, record: CallRecord, context: _Context, place: Place) -> None:
        """Check access, the drain gate and admission, or raise."""
        try:
            self._authorize(method, record, context)
            _check_token(record.call)
            await self._admit(method, record, context, place)
        except GatewayError:
            # Sending and logging a refusal costs more than checking whether the caller has already reset the call.
            for _ in range(RESET_TURNS):
                await asyncio.sleep(0)
            raise

    async def _admit(self, method: str, record: CallRecord, context: _Context, place: Place) -> None:
        """Refuse the call if this process shuts down, or if its method needs a place and there is none in time."""
        # Only this process has the completion of a passed-on call.
        if self._draining and passed_on.get() is None:
            raise _draining()
        self._set_terms(record, context)
        if method not in ADMITTED:
            return
        record.place = place
        record.waited = functools.partial(
            self._admit_again, method
        )  # without the record, which would be a reference cycle
        # Such a call may resume or join a completion that already has a place. This is known only after the request is received.
        if method != STREAM_CHAT or not record.share.used(Use.KEPT):
            await record.take_place(context)
        if method != COUNT_TOKENS:
            record.open()

    def _set_terms(self, record: CallRecord, context: _Context) -> None:
        record.terms = self._access.terms(record.owner)
        record.share = self._callers.share(_key(record, context), record.caller, dict(record.terms.limits))

    def _admit_again(self, method: str, record: CallRecord, context: _Context) -> None:
        """Apply the current settings to a call that has waited in the queue: it has not begun."""
        if not self._access.admits(record.owner, method, record.assertion):
            raise GatewayError(Reason.ACCESS_CHANGED, REVOKED)
        self._set_terms(record, context)

    async def _reflect(self, library: Any, parse: _Parser, messages: Any, context: _Context) -> None:  # noqa: ANN401
        """Serve a call of reflection in place of the library's own handler."""
        await self._reflection.answer(library, functools.partial(_parsed, parse), messages, context)
        call_record(context).latch.succeed()

    def _is_known(self, context: _Context) -> bool:
        try:
            shown = credentials(context, self._access, call_record(context).origin.assertion)
        except GatewayError:
            return False
        return self._access.is_principal(shown.key, shown.names)

    def _authorize(self, method: str, record: CallRecord, context: _Context) -> None:
        """Authorize the call or raise. The log line gets the caller's name and, on a refusal, the missing permission."""
        passed = passed_on.get()
        if passed is not None:
            record.caller, record.owner, record.assertion = passed
            if not self._access.admits(record.owner, method, record.assertion):
                raise GatewayError(Reason.ACCESS_CHANGED, REVOKED)
            record.is_operator = self._access.operates(record.owner)
            if record.caller:
                record.values["caller"] = record.caller
            return
        try:
            shown = credentials(context, self._access, record.origin.assertion)
            record.assertion = shown.assertion
            if self._access.open:
                for name in shown.names[:1]:
                    record.values["caller"] = record.caller = name.name
                    record.owner = name.owner
                return
            principal = self._access.authorize(method, shown.key, shown.names)
            if principal is not None:
                record.caller, record.owner = principal.name, principal.owner
                record.may_operate = record.is_operator = Permission.OPERATE in principal.permissions
            record.values["caller"] = record.caller
        except GatewayError as refused:
            record.values.update(refused.metadata)
            raise

    @contextlib.contextmanager
    def _logged(
        self, method: str, rpc: Rpc, record: CallRecord, context: _Context, metadata: Mapping[str, str]
    ) -> Iterator[_Outcome]:
        """Log, count and trace the call when it ends, whatever the outcome."""
        begin = time.monotonic()
        rpc.start()
        ours, name = method.startswith(OUR_METHODS), method.removeprefix("/")
        if ours:
            record.span = tracer.current.start_call(name, record.call.traceparent, record.call.tracestate)
            record.call = record.call.within(record.span.context)
        outcome = _Outcome()
        # The default: a caller's cancellation and deadline both arrive as cancellation of the task.
        outcome.code = "CANCELLED"
        try:
            yield outcome
            if outcome.code == "CANCELLED":
                outcome.code = "OK"
        finally:
            if outcome.code == "CANCELLED" and deadline_passed(context):
                outcome.code = "DEADLINE_EXCEEDED"
            seconds = time.monotonic() - begin
            rpc.end(outcome.code, seconds)
            values = {"request_id": record.call.request_id, **record.values}
            record.span.end(outcome.code, "" if outcome.reason is None else outcome.reason.name, values)
            if outcome.reason in LIMIT_REASONS:
                bursts: Resets | None = self._refusals
            else:
                bursts = self._resets if outcome.code == "CANCELLED" and seconds < QUICK_SECONDS else None
            if bursts is None or bursts.first(record.origin.peer):
                log = _log.info if ours else _log.debug
                if outcome.defect is not None:
                    log = _log.error
                elif outcome.reason in FOR_OPERATORS:
                    log = _log.warning
                log(
                    "call",
                    method=name,
                    code=outcome.code,
                    trace_id=record.call.trace_id,
                    peer=record.origin.peer,
                    user_agent=metadata.get("user-agent", ""),
                    seconds=round(seconds, 6),
                    **({"via": record.origin.via} if record.origin.via else {}),
                    **values,
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
        self.reason: Reason | None = None
        self.values: dict[str, object] = {}
        self.defect: BaseException | None = None

    def fail(self, error: DeltawireError) -> None:
        FAILED_CALLS.labels(error.reason.name).inc()
        self.code = error.code.name
        self.reason = error.reason
        self.values = {"reason": error.reason.name, "error": shorten(error.message, MAX_LOGGED)}
        if error.reason is Reason.INTERNAL:
            self.defect = error.__cause__


@contextlib.contextmanager
def _disconnect_is_cancellation() -> Iterator[None]:
    """Treat a failed write as cancellation: the caller has disconnected, and grpc will cancel the task."""
    try:
        yield
    except aio.InternalError as disconnected:
        raise asyncio.CancelledError from disconnected


@functools.cache
def _rpc(method: str, request_streams: bool, response_streams: bool) -> Rpc:
    """The metrics of a method."""
    return Rpc(method, request_streams=request_streams, response_streams=response_streams)


def _parsed(parse: _Parser, data: bytes) -> object:
    """Parse the request. gRPC itself would fail with UNKNOWN and log a traceback if it cannot be parsed.

    Raises:
        CallerError: INVALID_REQUEST.
    """
    try:
        return parse(data)
    except DecodeError as error:
        raise CallerError(Reason.INVALID_REQUEST, wire.NOT_A_MESSAGE) from error


def deadline_passed(context: _Context) -> bool:
    """Whether the call's own deadline has passed or is less than `DEADLINE_SLACK` away."""
    remaining = cast("float | None", context.time_remaining())  # None without a deadline, unlike grpc's types
    return remaining is not None and remaining <= DEADLINE_SLACK


def _draining() -> GatewayError:
    message = "this gateway process is shutting down: retry on a new connection"
    return GatewayError(Reason.DRAINING, message, retry_after=DRAINING_RETRY_SECONDS)


def _key(record: CallRecord, context: _Context) -> str:
    """The key of the caller's share: its owner or, if callers cannot be distinguished, the host that it calls from."""
    if record.owner:
        return record.owner
    host = _metadata(context).get(HOST, "") if passed_on.get() is not None else ""
    return host or record.origin.host


def _metadata(context: _Context) -> dict[str, str]:
    return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}


def _call_context(metadata: Mapping[str, str]) -> CallContext:
    given = metadata.get(REQUEST_ID, "")
    request_id = given
    if not given or len(given) > MAX_REQUEST_ID or not (given.isascii() and given.isprintable()):
        request_id = f"{random.getrandbits(128):032x}"
        if given:
            _log.warning("request id replaced", given=given[:MAX_REQUEST_ID], request_id=request_id)
    traceparent, tracestate = trace_context(metadata.get("traceparent", ""), metadata.get("tracestate", ""))
    return CallContext(request_id, metadata.get(PROVIDER_TOKEN) or None, traceparent, tracestate)


def _check_token(call: CallContext) -> None:
    """Refuse a provider token that is not valid in a header. If it were dropped, the operator's token would be sent instead.

    Raises:
        CallerError: INVALID_REQUEST.
    """
    if call.token is not None and not all("!" <= character <= "~" for character in call.token):
        raise invalid_request(
            [Violation(PROVIDER_TOKEN, "must be printable ASCII without spaces: send the token alone")]
        )
