"""Callers with faults: what each does at some event of its answer, and what must become of the answer then.

The upstream sends the events before that point and stops at a gate. The caller acts, the gate opens, and the state that the
gateway reports, the upstream's connection and, if the stream is retained, the rest of the answer are checked.
"""

from __future__ import annotations

import asyncio
import enum
import secrets
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from grpc import aio

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import chat_completion_pb2_grpc
from tests.faults.lab import CallKind, Result, Seen, chat_request, ending_of, received, stream_request
from tests.faults.script import CHUNKS, END, HEAD, PLACES, Phase, Said, Shape, event, events_of, framed, reasoning, text
from tests.faults.upstream import Flood, Gate, Plan, Send
from tests.support import fields
from tests.support.contract import ContractError, Ending, check_stream, check_whole

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from tests.faults.lab import Lab

LIMIT_SECONDS = 0.3
"""The deadline and the soft time limit of callers that have one."""

WAIT_SECONDS = 8.0
"""After which what must happen has not happened."""

POLL_SECONDS = 0.005
"""Between two questions about a completion's state."""

EVENTS = len(CHUNKS) + 1
"""Of an answer without a fault, `[DONE]` included."""


class Action(enum.Enum):
    """What a caller does."""

    VANISH = "closes its channel"
    CANCEL = "cancels the call"
    DEADLINE = "has a deadline that passes"
    SOFT_CANCEL = "calls CancelChatCompletion"
    TIME_LIMIT = "has a soft_time_limit that passes"


SOFT = (Action.SOFT_CANCEL, Action.TIME_LIMIT)
"""Those after which the answer ends normally."""


STOP_READING = "stops reading"
"""What the caller of `stop_reading` does."""


@dataclass(frozen=True)
class CallerCell:
    """An action, or no reading, after so many events, by the caller of one kind of call."""

    action: Action | None
    events: int
    kind: CallKind

    def __str__(self) -> str:
        return f"{self.what} / event {self.events} / {self.kind.value}"

    @property
    def what(self) -> str:
        """What the caller does."""
        return self.action.value if self.action else STOP_READING

    @property
    def place(self) -> str:
        """How much of the answer has come."""
        return f"{self.events} events"

    @property
    def ending(self) -> bool:
        """Whether a finish reason has come, so that the answer ends by itself soon."""
        return self.events >= PLACES[Phase.FINISHED]


def caller_cells() -> list[CallerCell]:
    """All of them."""
    return [CallerCell(action, number, kind) for action in Action for number in range(EVENTS + 1) for kind in CallKind]


def caller_sample() -> list[CallerCell]:
    """A fixed part: every action at every event, with the kinds of calls in turn."""
    kinds = list(CallKind)
    return [
        CallerCell(action, number, kinds[(place + number) % len(kinds)])
        for place, action in enumerate(Action)
        for number in range(EVENTS + 1)
    ]


async def run_caller(lab: Lab, cell: CallerCell) -> Result[CallerCell]:
    """Run a caller that acts."""
    shape = Shape.at(Phase.DONE)
    events = events_of()
    plan = Plan([*shape.begun[: cell.events + 1], Gate(), *map(Send, map(framed, events[cell.events :])), *shape.ended])
    seen = Seen()
    problems: list[str] = []
    try:
        async with _planned(lab, plan) as request_id, asyncio.timeout(WAIT_SECONDS):
            seen = await _act(lab, cell, plan, request_id)
            problems.extend(seen.broken)
            await _check_end(lab, cell, plan, request_id, seen, problems)
    except TimeoutError:
        problems.append(f"after {WAIT_SECONDS:g} seconds it has not ended")
    return Result(cell, seen.outcome, problems)


async def _act(lab: Lab, cell: CallerCell, plan: Plan, request_id: str) -> Seen:
    """Call, act when the upstream has stopped, and return what was received."""
    chat: dict[str, Any] = {"completion_id": request_id}
    if cell.action is Action.TIME_LIMIT:
        chat["soft_time_limit"] = {"nanos": round(LIMIT_SECONDS * 1e9)}
    timeout = LIMIT_SECONDS if cell.action is Action.DEADLINE else None
    create = chat_pb.CreateChatCompletionRequest(chat=chat_request(cell.kind, **chat))
    stream = stream_request(cell.kind, retention=lab.retention, **chat)
    seen = Seen()
    # A channel of its own, since it may be closed.
    async with aio.insecure_channel(lab.gateway.address, options=(("grpc.use_local_subchannel_pool", 1),)) as channel:
        stub, metadata = chat_completion_pb2_grpc.ChatCompletionStub(channel), ((fields.REQUEST_ID, request_id),)
        call: Any
        if cell.kind is CallKind.CREATE:
            call = stub.CreateChatCompletion(create, metadata=metadata, timeout=timeout)
        else:
            call = stub.StreamChatCompletion(stream, metadata=metadata, timeout=timeout)
        reading = asyncio.create_task(_read(call, seen))
        gated = asyncio.create_task(plan.at_gate.wait())
        # On a busy machine a deadline can pass before.
        await asyncio.wait([gated, reading], return_when=asyncio.FIRST_COMPLETED)
        gated.cancel()
        if cell.action is Action.VANISH:
            await channel.close()
        elif cell.action is Action.CANCEL:
            call.cancel()
        elif cell.action is Action.SOFT_CANCEL:
            await lab.gateway.cancel(request_id)
        await reading
    ending = seen.ending = seen.ending or Ending()
    # A status without a reason is the caller's own, not the gateway's.
    if cell.action not in SOFT and ending.code != "OK" and not ending.details.reason:
        seen.ending = ending = replace(ending, by_caller=True)
    try:
        if cell.kind is CallKind.CREATE:
            check_whole(create, seen.response, ending)
        else:
            check_stream(stream, seen.responses, ending)
    except ContractError as broken:
        seen.broken.append(str(broken))
    return seen


async def _read(call: Any, seen: Seen) -> None:  # noqa: ANN401 (grpc's types of calls are generic in what is not needed)
    """Read a call to its end."""
    try:
        if isinstance(call, aio.UnaryUnaryCall):
            seen.response = await call
        else:
            async for response in call:
                seen.responses.append(response)
        seen.ending = Ending()
    except aio.AioRpcError as error:
        seen.ending = ending_of(error)
    except asyncio.CancelledError:
        seen.ending = Ending("CANCELLED", by_caller=True)


async def _check_end(lab: Lab, cell: CallerCell, plan: Plan, request_id: str, seen: Seen, problems: list[str]) -> None:
    """Check what has become of the answer, with the upstream and in the gateway."""
    soft = cell.action in SOFT
    goes_on = cell.kind is CallKind.RETAINED and not soft
    if soft:
        problems.extend(_not_soft(cell, seen))
    if plan.requests and not (goes_on or cell.ending):
        await plan.settled.wait()
        if not plan.peer_closed:
            problems.append("the connection to the upstream was not closed")
    plan.gate.set()
    if plan.requests:
        await plan.settled.wait()
    while (state := await _state(lab, request_id)) == "RUNNING":  # noqa: ASYNC110 (nothing announces it)
        await asyncio.sleep(POLL_SECONDS)
    expected = {"COMPLETED"} if goes_on or soft else {"COMPLETED", "FAILED"} if cell.ending else {"FAILED"}
    if cell.action is Action.DEADLINE and not plan.requests:
        # On a busy machine a deadline can pass before the gateway knows the call.
        return
    if state not in expected:
        problems.append(f"GetChatCompletion says {state}")
    if goes_on:
        problems.extend(await _not_retained(lab, request_id, seen))


def _not_soft(cell: CallerCell, seen: Seen) -> list[str]:
    """What is wrong with an answer that was ended softly."""
    problems = [] if seen.outcome == "OK" else [f"a soft end is {seen.outcome}"]
    expected = {"CANCELLED" if cell.action is Action.SOFT_CANCEL else "TIME_LIMIT"}
    if cell.ending:
        expected.add("END_OF_MESSAGE")
    if not set(seen.stop_reasons) <= expected:
        problems.append(f"the choices' stop reasons are {seen.stop_reasons}")
    return problems


async def _not_retained(lab: Lab, completion_id: str, seen: Seen) -> list[str]:
    """What is wrong with a retained stream that went on without its caller."""
    resume = chat_pb.StreamChatCompletionRequest(resume=chat_pb.ResumePoint(completion_id=completion_id))
    again = await lab.stream(resume, secrets.token_hex(8))
    problems = [f"resumed: {each}" for each in again.broken]
    if again.outcome != "OK" or received(again) != Said():
        problems.append(f"the retained stream ended {again.outcome} with {received(again)}")
    if again.responses[: len(seen.responses)] != seen.responses:
        problems.append("what was received before is not what is retained")
    return problems


async def _state(lab: Lab, completion_id: str) -> str:
    try:
        found = await lab.gateway.look_up(completion_id)
    except aio.AioRpcError as error:
        return error.code().name
    return chat_pb.CompletionState.Name(found.state).removeprefix("COMPLETION_STATE_")


@asynccontextmanager
async def _small_window(lab: Lab) -> AsyncIterator[chat_completion_pb2_grpc.ChatCompletionAsyncStub]:
    """A stub whose channel takes 64 KiB that are not read, and not more and more."""
    options = (
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.max_receive_message_length", -1),
    )
    async with aio.insecure_channel(lab.gateway.address, options=options) as channel:
        yield chat_completion_pb2_grpc.ChatCompletionStub(channel)


def unread_cells(numbers: Iterable[int] = range(PLACES[Phase.FINISHED])) -> list[CallerCell]:
    """Callers that stop reading after so many events; after the finish reason nothing much is left to read."""
    return [CallerCell(None, number, kind) for number in numbers for kind in CallKind if kind is not CallKind.CREATE]


async def run_unread(lab: Lab, cell: CallerCell) -> Result[CallerCell]:
    """Run a caller that stops reading; the gateway must give it up."""
    seen = await stop_reading(lab, cell.events, cell.kind)
    problems = list(seen.broken)
    if seen.outcome != "RESOURCE_EXHAUSTED/SLOW_CALLER":
        problems.append(f"it ended {seen.outcome}")
    return Result(cell, seen.outcome, problems)


async def stop_reading(lab: Lab, number: int, kind: CallKind) -> Seen:
    """A caller that takes nothing from some event on, until the gateway gives it up; then it reads on.

    What is generated is endless; of a retained stream, which goes on without its caller, it is less than what is retained,
    and the caller then resumes it to its end.
    """
    shape = Shape.at(Phase.DONE)
    piece = framed(event(text("x" * 16384)))
    rest = map(framed, events_of()[number:])
    more = [*[Send(piece)] * 256, *map(Send, rest), *shape.ended] if kind is CallKind.RETAINED else [Flood(piece)]
    plan = Plan([*shape.begun[: number + 1], Gate(), *more])
    seen = Seen()
    async with _planned(lab, plan) as request_id, _small_window(lab) as stub:
        request = stream_request(kind, completion_id=request_id)
        call = stub.StreamChatCompletion(request, metadata=((fields.REQUEST_ID, request_id),))
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                await plan.at_gate.wait()
                plan.gate.set()
                await plan.settled.wait()
                if kind is CallKind.RETAINED:
                    await _until_unread(lab, request_id)
                await _read(call, seen)
                assert seen.ending is not None
                check_stream(request, seen.responses, seen.ending)
                if kind is CallKind.RETAINED:
                    await _check_rest(lab, request_id, seen)
        except ContractError as broken:
            seen.broken.append(str(broken))
        except TimeoutError:
            seen.ending = None
        finally:
            call.cancel()
    return seen


async def _until_unread(lab: Lab, completion_id: str) -> None:
    """Wait until a retained stream has no reader."""
    while not (await lab.gateway.look_up(completion_id)).HasField("expire_time"):  # noqa: ASYNC110 (nothing announces it)
        await asyncio.sleep(POLL_SECONDS)


async def _check_rest(lab: Lab, completion_id: str, seen: Seen) -> None:
    resume = chat_pb.ResumePoint(completion_id=completion_id, last_sequence=len(seen.responses) - 1)
    rest = await lab.stream(chat_pb.StreamChatCompletionRequest(resume=resume), secrets.token_hex(8))
    seen.broken.extend(f"resumed: {each}" for each in rest.broken)
    if rest.outcome != "OK":
        seen.broken.append(f"resumed, it ended {rest.outcome}")


async def read_steadily(lab: Lab, kind: CallKind, *, messages: int, pause: float) -> Seen:
    """A caller that takes one message after the other, each after a pause; they come all at once and cannot be merged."""
    chunks = [piece for _ in range(messages // 2) for piece in (text("x" * 32768), reasoning("y" * 32768))]
    plan = Plan([Send(data) for data in (HEAD, *map(framed, events_of([*chunks, *CHUNKS])), END)])
    seen = Seen()
    async with _planned(lab, plan) as request_id, _small_window(lab) as stub:
        request = stream_request(kind)
        call = stub.StreamChatCompletion(request, metadata=((fields.REQUEST_ID, request_id),))
        try:
            while isinstance(response := await call.read(), fields.Response):
                seen.responses.append(response)
                await asyncio.sleep(pause)
            seen.ending = Ending()
        except aio.AioRpcError as error:
            seen.ending = ending_of(error)
        try:
            check_stream(request, seen.responses, seen.ending)
        except ContractError as broken:
            seen.broken.append(str(broken))
    return seen


@asynccontextmanager
async def _planned(lab: Lab, plan: Plan) -> AsyncIterator[str]:
    """Have a request answered by a plan, as long as this lasts; gives the request's id."""
    request_id = secrets.token_hex(8)
    lab.upstream.plans[request_id] = plan
    try:
        yield request_id
    finally:
        plan.gate.set()
        del lab.upstream.plans[request_id]
