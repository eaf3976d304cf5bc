"""The life of a completion: every state meets every cause, and every way out is walked with a real completion."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING

import pytest

from deltawire_server.completions.completion import DRAIN_BYTES
from deltawire_server.completions.state import TRANSITIONS, Cause, IllegalTransitionError, State, advance
from deltawire_server.errors import DeltawireError, Reason
from deltawire_server.fake_vllm import Chunks, FakeVllm, Script
from deltawire_server.sansio.events import Completed, Fault, StopReason
from tests.support.fake_provider import FakeProvider
from tests.support.gateway import until
from tests.support.workers import CALLER, MakeWorker, ask

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from deltawire_server.completions.completion import Completion
    from deltawire_server.worker import Worker

CHUNKS = Chunks()
ENDS = (Cause.ANSWER, Cause.FAULT, Cause.SOFT_END, Cause.CALLER)


@pytest.mark.parametrize(("state", "cause"), [*itertools.product(State, Cause)])
def test_transitions(state: State, cause: Cause) -> None:
    """Each pair has the next state of the table, or raises an error that names the pair."""
    if (state, cause) in TRANSITIONS:
        after = advance(state, cause)
        assert (after is State.ENDED) == (cause in ENDS)
    else:
        with pytest.raises(IllegalTransitionError, match=f"^{cause.name} is impossible in state {state.name}$"):
            advance(state, cause)


def test_ended_is_final() -> None:
    """ENDED has no transition, and a fault and the caller lead from every state to it."""
    assert not [state for state, _ in TRANSITIONS if state is State.ENDED]
    for state in (State.QUEUED, State.ASKING, State.STREAMING, State.TAIL):
        assert {Cause.FAULT, Cause.CALLER} <= {cause for each, cause in TRANSITIONS if each is state}


SENT = {
    State.QUEUED: [],
    State.ASKING: [],
    State.STREAMING: [CHUNKS.role(), CHUNKS.text("a")],
    State.TAIL: [CHUNKS.role(), CHUNKS.text("a"), CHUNKS.finish()],
}
"""What an engine sends before it falls silent, to bring a completion into a state and keep it there."""

FAULT = Fault(Reason.DRAINING, "the process stops")
CAUSES: dict[Cause, Callable[[Completion], None]] = {
    Cause.FAULT: lambda completion: completion.end(FAULT),
    Cause.SOFT_END: lambda completion: completion.stop(StopReason.CANCELLED),
}


async def drained(completion: Completion) -> list[object]:
    """The types of a completion's events, then the reason of its failure or None."""
    seen: list[object] = []
    try:
        async for batch in completion.batches():
            seen += map(type, batch)
    except DeltawireError as error:
        seen.append(error.reason)
    else:
        seen.append(None)
    return seen


@pytest.mark.parametrize("cause", [Cause.FAULT, Cause.SOFT_END, Cause.CALLER])
@pytest.mark.parametrize("state", [*SENT])
async def test_every_end_of_every_state(make_worker: MakeWorker, vllm: FakeVllm, state: State, cause: Cause) -> None:
    """From each state, each cause leads to one end; the first cause counts, and the provider stops.

    In TAIL the answer is whole: a soft end or a fault of our own ends it as the answer that it is.
    """
    vllm.play(Script.chunks([*SENT[state], asyncio.Event()]))
    async with make_worker() as worker, worker.completion(ask(completion_id="c"), CALLER) as completion:
        if state is State.QUEUED:
            if cause is not Cause.CALLER:
                CAUSES[cause](completion)
                assert completion.state is State.ENDED
                assert (await drained(completion))[-1] is (Reason.DRAINING if cause is Cause.FAULT else None)
            assert not vllm.chats
            return
        draining = asyncio.create_task(drained(completion))
        await until(lambda: completion.state is state)
        if cause is Cause.CALLER:
            draining.cancel()
            await asyncio.wait([draining])
            await completion.close()
        else:
            CAUSES[cause](completion)
            assert completion.state is State.ENDED
            # What comes after the end changes nothing.
            completion.stop(StopReason.TIME_LIMIT)
            completion.end(Fault(Reason.SLOW_CALLER, "late"))
            seen = await draining
            failed = cause is Cause.FAULT and state is not State.TAIL
            assert seen[-1] is (Reason.DRAINING if failed else None)
            assert (Completed in seen) == (not failed or state is not State.ASKING)
            assert (completion.failure is None) == (not failed)
        assert completion.state is State.ENDED
        await vllm.chats[0].closed_early.wait()


async def test_the_tail_timeout_ends_the_answer(make_worker: MakeWorker, vllm: FakeVllm) -> None:
    """An answer without a true end is complete after the tail timeout, with the usage so far."""
    vllm.play(Script.chunks([*SENT[State.TAIL], asyncio.Event()]))
    async with make_worker(tail=0.05) as worker, worker.completion(ask(), CALLER) as completion:
        seen = await drained(completion)
        assert seen[-2:] == [Completed, None]
        assert completion.usage.provenance.name == "ESTIMATED"


async def test_the_tail_timeout_applies_after_a_full_queue(make_worker: MakeWorker, vllm: FakeVllm) -> None:
    """When the caller has taken the queued events, the timeout is that of the tail, and not the long one between events."""
    last = b'data: {"choices":[{"index":0,"delta":{"content":"end"},"finish_reason":"stop"}]}\n\n'
    vllm.play(Script.chunks([last, asyncio.Event()]))
    async with make_worker(tail=0.05, queue_bytes=1) as worker, worker.completion(ask(), CALLER) as completion:
        async with asyncio.timeout(10):
            seen = await drained(completion)
        assert seen[-2:] == [Completed, None]


async def test_a_time_limit_and_a_refusal_at_once(make_worker: MakeWorker, vllm: FakeVllm) -> None:
    """Whichever is processed first, the call fails."""
    for number in range(40):
        vllm.play(Script.error(500, "failed", headers_delay=0.02))
        async with make_worker() as worker:
            reasons = await failures(worker, soft_time_limit=0.02 + number * 0.0002)
        # A soft limit that comes first ends an empty answer normally, and says so in its choice.
        assert reasons <= {Reason.UPSTREAM_ERROR, StopReason.TIME_LIMIT}


async def failures(worker: Worker, **fields: float) -> set[object]:
    """How completions of this request end: the reasons of failures, and the stop reasons of complete answers."""
    seen: set[object] = set()
    async with worker.completion(ask(**fields), CALLER) as completion:
        try:
            events = [event async for batch in completion.batches() for event in batch]
        except DeltawireError as error:
            return {error.reason}
        last = events[-1]
        assert isinstance(last, Completed)
        seen.update(choice.stop_reason for choice in last.choices)
    return seen


async def test_an_endless_body_after_the_end(make_worker: MakeWorker) -> None:
    """An answer whose body does not end is complete, and its connection is closed."""
    taken = 0

    class Endless(FakeProvider):
        async def _body(self) -> AsyncIterator[bytes]:
            nonlocal taken
            yield b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
            while True:
                taken += 16 * 1024
                yield b": more\n" + b"x" * (16 * 1024 - 7)

    async with make_worker(provider=Endless(served=["fake"])) as worker, worker.completion(ask(), CALLER) as completion:
        seen = await drained(completion)
    assert seen[-2:] == [Completed, None]
    assert DRAIN_BYTES < taken <= DRAIN_BYTES + 6 * 16 * 1024  # the task leaves a few iterations later
