"""Two gateway processes behind a real Envoy with the shipped configuration are restarted in turn under load: nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from typing import TYPE_CHECKING

import pytest

from deltawire import Answer, AsyncClient, CallError
from deltawire.v1.chat_completion_pb2 import (
    COMPLETION_STATE_COMPLETED,
    COMPLETION_STATE_RUNNING,
    StopReason,
)
from deltawire_server.fake_vllm import FakeVllm, Script
from tests.polyglot.calls import MODEL, begun, one_attempt
from tests.polyglot.programs import LIMIT
from tests.polyglot.proxy import envoy
from tests.support.gateway_process import GatewayProcess
from tests.support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

pytestmark = pytest.mark.polyglot

CALLERS = int(os.environ.get("ROLLING_CALLERS", "40"))
"""Streams that run at any time; `make rolling` has more."""

TOKENS_PER_SECOND = 5
TOKENS = CALLERS // 5
"""Of an answer: 1.6 seconds, and longer for more callers, so that as many calls begin in a second."""

ENDLESS = Script.generated(tokens=1_000_000, tokens_per_second=TOKENS_PER_SECOND)
"""Of which each request limits its own answer, unless it is ended softly."""

LOST = 20
"""Completions that have ended before both gateways are restarted."""

DRAIN_DELAY = 3 + 2 * TOKENS / TOKENS_PER_SECOND
"""Seconds: more than answers need, as documented, so that all calls about those that run are answered meanwhile."""


class Callers:
    """Programs that use completions in every way, each one after the other, until they are stopped.

    Args:
        client: Through Envoy.
        expected: What is answered to each request that limits its answer.

    Attributes:
        stopped: Set to end each program after what it does now.
        problems: What was answered wrongly.
        uses: What they do.
        answered: How often each of these was answered rightly.
        ids: Those of completions that have ended.
    """

    def __init__(self, client: AsyncClient, expected: Answer) -> None:
        self._client = client
        self._expected = expected
        self._numbers = itertools.count()
        self.stopped = False
        self.problems: list[str] = []
        self.uses: list[Callable[[], Awaitable[None]]] = [
            self.read,
            self.resume,
            self.end_softly,
            self.look_up_by_a_chosen_id,
        ]
        self.answered = dict.fromkeys((use.__name__ for use in self.uses), 0)
        self.ids: list[str] = []

    async def run(self, number: int) -> None:
        """One program."""
        for use in itertools.cycle(self.uses[number % len(self.uses) :] + self.uses[: number % len(self.uses)]):
            if self.stopped:
                return
            try:
                await use()
                self.answered[use.__name__] += 1
            except (CallError, AssertionError) as error:
                self.problems.append(f"{use.__name__}: {error!r}")

    async def read(self) -> None:
        """A stream, to its end."""
        async with self._client.chat.stream("hi", model=MODEL, max_tokens=TOKENS) as stream:
            self.check(await stream.final())
        await self.check_ended(stream.completion_id)

    async def resume(self) -> None:
        """A stream whose reader leaves in the middle, and resumes it from the beginning."""
        async with self._client.chat.stream("hi", model=MODEL, max_tokens=TOKENS, retention=60) as stream:
            await begun(stream)
        async with self._client.chat.resume(stream.completion_id) as again:
            self.check(await again.final())
        await self.check_ended(stream.completion_id)

    async def end_softly(self) -> None:
        """A stream that is looked up and ended while it runs, by other calls."""
        async with self._client.chat.stream("hi", model=MODEL) as stream:
            await begun(stream)
            assert (await self._client.chat.get(stream.completion_id)).state == COMPLETION_STATE_RUNNING
            await asyncio.sleep(TOKENS / TOKENS_PER_SECOND)  # as long as other answers take
            await self._client.chat.cancel(stream.completion_id)
            answer = await stream.final()
        assert answer.stop_reason is StopReason.STOP_REASON_CANCELLED
        longer, shorter = sorted((answer.text, self._expected.text), key=len, reverse=True)
        assert shorter
        assert longer.startswith(shorter)
        await self.check_ended(stream.completion_id)

    async def look_up_by_a_chosen_id(self) -> None:
        """An answer without a stream."""
        chosen = f"mine-{next(self._numbers)}"
        self.check(await self._client.chat.create("hi", model=MODEL, max_tokens=TOKENS, completion_id=chosen))
        await self.check_ended(chosen)

    def check(self, answer: Answer) -> None:
        """Check that an answer is whole."""
        assert (answer.text, answer.stop_reason) == (self._expected.text, self._expected.stop_reason)
        assert answer.usage.completion_tokens == TOKENS

    async def check_ended(self, completion_id: str) -> None:
        """Look up an answer that was whole."""
        got = await self._client.chat.get(completion_id)
        assert got.state == COMPLETION_STATE_COMPLETED
        self.ids.append(completion_id)


@contextlib.asynccontextmanager
async def gateways(vllm: FakeVllm, folder: Path) -> AsyncIterator[list[GatewayProcess]]:
    """Two gateway processes that can be stopped and started again on their ports. The second one has two workers."""
    foreign = {name: "" for name in os.environ if name.startswith(("DELTAWIRE_", "VLLM_"))}
    processes = []
    for workers in ("1", "2"):
        flags = ["--vllm-url", vllm.base_url, "--listen", f"127.0.0.1:{free_port()}", "--metrics-listen", "off"]
        flags += ["--database-url", f"sqlite:///{folder}/{workers}.db", "--workers", workers]
        flags += ["--set", f"server.drain_delay={DRAIN_DELAY}"]
        processes.append(GatewayProcess(flags, foreign, folder / f"{workers}.log"))
    try:
        await asyncio.gather(*(asyncio.to_thread(process.start, LIMIT) for process in processes))
        yield processes
    finally:
        await asyncio.gather(*(asyncio.to_thread(process.stop, 0.0) for process in processes))


async def test_a_rolling_restart_loses_nothing(tmp_path: Path) -> None:
    """Every stream ends whole, and all calls about completions that run are answered; only ended ones die with their gateway."""
    async with (
        FakeVllm(ENDLESS) as vllm,
        gateways(vllm, tmp_path) as processes,
        envoy(tmp_path, *(process.address for process in processes)) as proxy,
        AsyncClient(proxy.target, timeout=LIMIT) as client,
    ):
        expected = await client.chat.create("hi", model=MODEL, max_tokens=TOKENS)
        assert expected.usage.completion_tokens == TOKENS
        callers = Callers(client, expected)
        async with asyncio.TaskGroup() as running:
            for number in range(CALLERS):
                running.create_task(callers.run(number))
            while len(callers.ids) < LOST:  # noqa: ASYNC110 -- it ends with the callers
                await asyncio.sleep(0.1)
            lost = callers.ids[:LOST]
            for process in processes:
                address = process.address
                assert await asyncio.to_thread(process.stop) == 0
                await asyncio.to_thread(process.start, LIMIT)
                await proxy.until(address, None)
            callers.stopped = True
        assert not callers.problems, "\n".join(callers.problems)
        assert min(callers.answered.values()) > CALLERS / 2
        async with one_attempt(proxy.target) as other:
            for completion_id in lost:
                reason = "WRONG_REPLICA" if completion_id.startswith("cmpl-") else "COMPLETION_NOT_FOUND"
                with pytest.raises(CallError) as failed:
                    await other.chat.get(completion_id)
                assert failed.value.reason == reason
                with pytest.raises(CallError) as failed:
                    await other.chat.resume(completion_id, retention=0.1).final()
                assert failed.value.reason == reason
