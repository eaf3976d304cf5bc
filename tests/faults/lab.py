"""The lab: one gateway before one upstream with faults, calls of every kind, and checks of what is left behind.

A cell is a fault at a phase, seen by one kind of call. Many run at once on the same gateway. What a cell may leave behind is
checked for its own connection at once, and for the whole process when a group of cells has ended.
"""

from __future__ import annotations

import asyncio
import enum
import gc
import json
import secrets
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from grpc import aio

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire_server.settings import (
    ProviderSettings,
    RegistrySettings,
    ServerSettings,
    Settings,
    StreamSettings,
)
from tests.faults.fault import OK
from tests.faults.faults import FAULTS
from tests.faults.script import PLACES, WHOLE, Phase, Said, Shape, phase_after
from tests.faults.upstream import MODEL, Plan, Upstream
from tests.support import fields
from tests.support.contract import ContractError, Ending, check_stream, check_whole
from tests.support.gateway import Running, ask, running, tool, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping, Sequence

    from tests.faults.fault import Fault
    from tests.support.fields import Response

LONG_LIMIT_SECONDS = 60.0
"""The time limits of provider "lab": none of them passes unless the clock is moved."""

SHORT_LIMIT_SECONDS = 1.2
"""The time limits of provider "short". Long enough for a busy machine to send an answer's events in."""

TAIL_SECONDS = 0.3
"""How long the gateway waits for an answer's true end after the finish reason."""

SLOW_SECONDS = 0.6
"""How long a caller may take nothing."""

HANG_SECONDS = 8.0
"""After which a cell has not ended. The other providers' limits are far beyond it."""

AT_ONCE = 12
"""Cells that run at the same time."""

HEARTBEAT_SECONDS = 0.1
"""Of retained streams: the shortest interval that is allowed."""

RETENTION_SECONDS = 300
"""Beyond every other limit, so that none passes at the same time."""


class CallKind(enum.Enum):
    """How the answer is asked for."""

    STREAM = "Stream"
    INCREMENTAL = "INCREMENTAL"
    RETAINED = "retained"
    CREATE = "Create"


@dataclass(frozen=True)
class Cell:
    """A fault at a phase, or after so many events, seen by one kind of call."""

    fault: Fault
    phase: Phase
    kind: CallKind
    events: int | None = None

    def __str__(self) -> str:
        place = self.phase.name if self.events is None else f"event {self.events}"
        return f"{self.fault.name} / {place} / {self.kind.value}"


@dataclass
class Seen:
    """What a caller received.

    Attributes:
        responses: The messages of a stream.
        response: Of Create.
        ending: How the call ended; `None` if it did not.
        broken: The promises of the contract that were broken.
    """

    responses: list[Response] = field(default_factory=list)
    response: chat_pb.CreateChatCompletionResponse | None = None
    ending: Ending | None = None
    broken: list[str] = field(default_factory=list)

    @property
    def outcome(self) -> str:
        """Either "OK", code and reason, or "HANG"."""
        return "HANG" if self.ending is None else self.ending.outcome

    @property
    def stop_reasons(self) -> list[str]:
        """Of all choices."""
        if self.response is not None:
            return [each.end.stop_reason for each in fields.completed_of(self.response.completed).choices]
        ends = (fields.finished(each) for each in self.responses if fields.kind(each) == "choice_finished")
        return [end.stop_reason for end in ends]


AnyCell = TypeVar("AnyCell")


@dataclass
class Result(Generic[AnyCell]):
    """What came of a cell, here or of another table.

    Attributes:
        cell: Which.
        outcome: How the call ended.
        problems: What was wrong; empty if nothing was.
    """

    cell: AnyCell
    outcome: str
    problems: list[str]


def cells(names: Iterable[str] = FAULTS, kinds: Iterable[CallKind] = CallKind) -> list[Cell]:
    """All cells of some faults."""
    kinds = list(kinds)
    return [Cell(FAULTS[name], phase, kind) for name in names for phase in FAULTS[name].phases for kind in kinds]


def at_every_event(name: str) -> list[Cell]:
    """A fault after each event, as each kind of call sees it."""
    numbers = range(PLACES[Phase.DONE] + 1)
    return [Cell(FAULTS[name], phase_after(number), kind, number) for number in numbers for kind in CallKind]


def sample() -> list[Cell]:
    """A fixed part of all cells: every fault at every phase, with the kinds of calls in turn."""
    kinds = list(CallKind)
    return [
        Cell(fault, phase, kinds[(number + place) % len(kinds)])
        for number, fault in enumerate(FAULTS.values())
        for place, phase in enumerate(fault.phases)
    ]


@dataclass(frozen=True)
class Baseline:
    """What the process holds when nothing is under way.

    Attributes:
        tasks: asyncio tasks.
        descriptors: File descriptors, sockets among them, without those of idle connections to the upstream.
    """

    tasks: int
    descriptors: int

    @classmethod
    def now(cls, upstream: Upstream) -> Baseline:
        """Measure."""
        # Both ends of a connection are in this process, and each one has a task here.
        connections = len(upstream.connections)
        return cls(len(asyncio.all_tasks()) - connections, len(list(Path("/proc/self/fd").iterdir())) - 2 * connections)


@dataclass
class Lab:
    """A gateway, its upstream, and a channel to it.

    Attributes:
        gateway: With three providers: "lab" and "short" before `upstream`, "gone" before a port that refuses.
        upstream: Answers by plan.
        hang_seconds: Seconds on the loop's clock after which a call is said to hang.
        retention: Seconds for which retained streams are kept.
        baseline: Of a lab that is up, with nothing under way.
    """

    gateway: Running
    upstream: Upstream
    hang_seconds: float = HANG_SECONDS
    retention: int = RETENTION_SECONDS
    baseline: Baseline = Baseline(0, 0)

    async def warm_up(self) -> None:
        """Have everything made that stays: what is measured later must not grow by it."""
        for kind in CallKind:
            seen = await self.call(Plan(WHOLE), kind)
            assert seen.outcome == "OK", seen
            assert not seen.broken, seen.broken
        # Ended tasks are removed after a few iterations. Connections stay open meanwhile.
        measured = []
        for _ in range(50):
            await asyncio.sleep(0)
            measured.append(Baseline.now(self.upstream))
        self.baseline = Baseline(min(each.tasks for each in measured), measured[-1].descriptors)

    async def run(self, cell: Cell) -> Result[Cell]:
        """Run a cell."""
        plan = Plan(cell.fault.change(Shape.at(cell.phase if cell.events is None else cell.events)))
        seen = await self.call(plan, cell.kind, provider=cell.fault.provider)
        plan.gate.set()
        result = Result(cell, seen.outcome, problems_of(cell, seen))
        if plan.requests > 1:
            result.problems.append(f"the engine was asked {plan.requests} times")
        if plan.sent > cell.fault.most_bytes:
            result.problems.append(f"{plan.sent} bytes were read of the upstream")
        if plan.requests:
            try:
                async with asyncio.timeout(HANG_SECONDS):
                    await plan.settled.wait()
            except TimeoutError:
                result.problems.append("the connection to the upstream stays open")
        return result

    async def run_all(self, some: Sequence[Cell]) -> list[Result[Cell]]:
        """Run cells that do no harm to each other."""
        slots = asyncio.Semaphore(AT_ONCE)

        async def one(cell: Cell) -> Result[Cell]:
            async with slots:
                return await self.run(cell)

        return await asyncio.gather(*map(one, some))

    async def call(self, plan: Plan, kind: CallKind, *, provider: str = "lab", **chat: Any) -> Seen:  # noqa: ANN401
        """Make a call that the upstream answers by a plan, to its end, and check it against the contract.

        The caller of a retained stream then resumes it, from the start and from the middle, and must receive the same.
        """
        request_id = secrets.token_hex(8)
        self.upstream.plans[request_id] = plan
        try:
            async with asyncio.timeout(self.hang_seconds):
                if kind is CallKind.CREATE:
                    return await self._create(request_id, provider, chat)
                if kind is CallKind.RETAINED:
                    chat["completion_id"] = request_id
                request = stream_request(kind, provider, self.retention, **chat)
                seen = await self.stream(request, request_id)
                if kind is CallKind.RETAINED and seen.responses:
                    await self._resume(seen)
                return seen
        except TimeoutError:
            if kind is CallKind.RETAINED:
                # Nothing else ends it: neither the provider's limits nor the caller's leaving.
                await self.gateway.cancel(request_id)
            return Seen()
        finally:
            del self.upstream.plans[request_id]

    async def _create(self, request_id: str, provider: str, chat: Mapping[str, Any]) -> Seen:
        request = chat_pb.CreateChatCompletionRequest(chat=chat_request(CallKind.CREATE, provider, **chat))
        call = self.gateway.chat.CreateChatCompletion(request, metadata=((fields.REQUEST_ID, request_id),))
        seen = Seen()
        try:
            seen.response = await call
            seen.ending = Ending()
        except aio.AioRpcError as error:
            seen.ending = ending_of(error)
        try:
            check_whole(request, seen.response, seen.ending)
        except ContractError as broken:
            seen.broken.append(str(broken))
        return seen

    async def stream(self, request: chat_pb.StreamChatCompletionRequest, request_id: str) -> Seen:
        """Make a streamed call, to its end."""
        call = self.gateway.chat.StreamChatCompletion(request, metadata=((fields.REQUEST_ID, request_id),))
        seen = Seen()
        try:
            async for response in call:
                seen.responses.append(response)
            seen.ending = Ending()
        except aio.AioRpcError as error:
            seen.ending = ending_of(error)
        finally:
            call.cancel()
        try:
            check_stream(request, seen.responses, seen.ending)
        except ContractError as broken:
            seen.broken.append(str(broken))
        return seen

    async def _resume(self, first: Seen) -> None:
        completion_id = fields.completion_id(first.responses)
        for place in (None, len(first.responses) // 2, len(first.responses) - 1):
            resume = chat_pb.ResumePoint(completion_id=completion_id, last_sequence=place)
            request = chat_pb.StreamChatCompletionRequest(resume=resume)
            again = await self.stream(request, secrets.token_hex(8))
            first.broken.extend(f"resumed after {place}: {each}" for each in again.broken)
            if (
                again.responses != first.responses[0 if place is None else place + 1 :]
                or again.outcome != first.outcome
            ):
                first.broken.append(f"resumed after {place}, the stream is another one and ends {again.outcome}")


@asynccontextmanager
async def lab(folder: Path, **stream: Any) -> AsyncIterator[Lab]:  # noqa: ANN401 (the stream section's keys)
    """Run a lab.

    Args:
        folder: For the registry's database.
        stream: Keys of the settings' section `stream`.
    """
    async with Upstream() as upstream, Upstream() as gone:
        long: dict[str, Any] = {"first_event_timeout": LONG_LIMIT_SECONDS, "silence_timeout": LONG_LIMIT_SECONDS}
        short: dict[str, Any] = {"first_event_timeout": SHORT_LIMIT_SECONDS, "silence_timeout": SHORT_LIMIT_SECONDS}
        settings = Settings(
            server=ServerSettings(listen=("127.0.0.1:0",), drain_delay=0),
            stream=StreamSettings(**{"slow_caller_timeout": 600.0, "tail_timeout": TAIL_SECONDS, **stream}),
            providers={
                name: ProviderSettings(base_url=(base_url,), tls_verify=False, refresh_interval=3600.0, **limits)
                for name, base_url, limits in (
                    ("lab", upstream.base_url, long),
                    ("short", upstream.base_url, short),
                    ("gone", gone.base_url, long),
                )
            },
            registry=RegistrySettings(database_url=f"sqlite:///{folder}/{secrets.token_hex(4)}.db"),
        )
        # Messages of any size are received here, so that their size can be checked.
        async with running(settings, options=(("grpc.max_receive_message_length", -1),)) as gateway:
            await until(lambda: gone.paths.get("/v1/models", 0) > 0)
            await gone.refuse()
            for writer in list(gone.connections):
                writer.close()
            made = Lab(gateway, upstream)
            await made.warm_up()
            yield made


def chat_request(kind: CallKind, provider: str = "lab", **chat: Any) -> chat_pb.ChatRequest:  # noqa: ANN401
    """A request with a tool, for one of the lab's providers."""
    policy = chat_pb.ToolCallPolicy()
    if kind is CallKind.INCREMENTAL:
        policy.streaming = chat_pb.ToolCallStreaming.TOOL_CALL_STREAMING_INCREMENTAL
    return ask(model=f"{provider}/{MODEL}", tools=[tool()], tool_call_policy=policy, **chat)


def stream_request(
    kind: CallKind,
    provider: str = "lab",
    retention: int = RETENTION_SECONDS,
    **chat: Any,  # noqa: ANN401
) -> chat_pb.StreamChatCompletionRequest:
    """A streamed request; retained ones have heartbeats, INCREMENTAL ones usage updates, so that these meet faults, too."""
    request = chat_pb.StreamChatCompletionRequest(chat=chat_request(kind, provider, **chat))
    if kind is CallKind.RETAINED:
        request.options.retention.FromSeconds(retention)
        request.options.heartbeat_interval.FromMilliseconds(round(HEARTBEAT_SECONDS * 1000))
    elif kind is CallKind.INCREMENTAL:
        request.options.usage_updates = True
    return request


def ending_of(error: aio.AioRpcError, *, by_caller: bool = False) -> Ending:
    """How a call failed."""
    return Ending(
        error.code().name,
        error.details() or "",
        tuple(error.trailing_metadata() or ()),
        tuple(error.initial_metadata() or ()),
        by_caller,
    )


def problems_of(cell: Cell, seen: Seen) -> list[str]:
    """What is wrong with what a caller received in a cell."""
    fault, problems = cell.fault, list(seen.broken)
    allowed = fault.allowed.at(cell.phase, create=cell.kind is CallKind.CREATE)
    if seen.outcome not in allowed:
        problems.append(f"it ended {seen.outcome}, allowed is {' or '.join(sorted(allowed))}")
    if seen.ending is None:
        return problems
    if fault.says and seen.outcome != "OK" and fault.says not in seen.ending.message:
        problems.append(f"the message does not say what the upstream said: {seen.ending.message[:200]!r}")
    differences = [_differences(said, received(seen), whole=seen.outcome in OK) for said in fault.said]
    if differences and all(differences):
        problems.extend(differences[0])
    return problems


def received(seen: Seen) -> Said:
    """What a caller received of choice 0."""
    if seen.response is not None:
        completed = fields.completed_of(seen.response.completed)
        said = [
            Said(each.text, each.reasoning, tuple(call[1:] for call in each.calls), each.end.executable)
            for each in completed.choices
        ]
        return said[0] if said else Said("", "", (), False)
    calls, executable = [], False
    for response in seen.responses:
        kind = fields.kind(response)
        if kind == "tool_call_delta" and (call := fields.call(response)).status == "SUCCEEDED":
            calls.append((call.name, call.arguments))
        elif kind == "choice_finished":
            executable = fields.finished(response).executable
    return Said(
        "".join(map(fields.text, seen.responses)),
        "".join(map(fields.reasoning, seen.responses)),
        tuple(calls),
        executable,
    )


def _differences(expected: Said, actual: Said, *, whole: bool) -> list[str]:
    """How an answer differs from what the upstream said; of one that failed, only what was not said at all."""
    problems = []
    for name in ("text", "reasoning"):
        said, came = getattr(expected, name), getattr(actual, name)
        if not (came == said if whole else said.startswith(came)):
            problems.append(f"the {name} is {came[:200]!r}, not {said[:200]!r}")
    if whole:
        if [(name, json.loads(text)) for name, text in actual.calls] != [
            (name, json.loads(text)) for name, text in expected.calls
        ]:
            problems.append(f"the calls are {actual.calls}, not {expected.calls}")
        if actual.executable != expected.executable:
            problems.append(f"tool_calls_executable is {actual.executable}, not {expected.executable}")
    return problems


@asynccontextmanager
async def nothing_left(lab: Lab) -> AsyncIterator[None]:
    """Check that what runs inside leaves no task, descriptor or busy connection behind.

    Raises:
        AssertionError: Something stays.
    """
    yield
    before = after = lab.baseline

    def back() -> bool:
        nonlocal after
        after = Baseline.now(lab.upstream)
        return not lab.upstream.busy and after.tasks <= before.tasks and after.descriptors <= before.descriptors

    if back():
        return
    # Cycles may keep what nothing else does.
    gc.collect()
    try:
        async with asyncio.timeout(HANG_SECONDS):
            await until(back)
    except TimeoutError:
        raise AssertionError(f"left behind: {after}, before it was {before}; {_tasks()}") from None


def _tasks() -> str:
    """What the process's tasks run, with counts."""
    return str(dict(Counter(getattr(task.get_coro(), "__qualname__", "?") for task in asyncio.all_tasks())))


async def run_alone(folder: Path, cell: Cell) -> Result[Cell]:
    """Run a cell that may harm others on a lab of its own; then a second call must receive its own answer."""
    async with lab(folder) as own:
        result = await own.run(cell)
        second = await own.call(Plan(WHOLE), CallKind.STREAM)
        result.problems.extend(second.broken)
        if second.outcome != "OK" or received(second) != Said():
            result.problems.append(f"the next call ended {second.outcome} with {received(second)}")
        return result
