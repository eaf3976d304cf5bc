"""Lists of completions, look-ups and cancels by operators, at every worker."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire_server.fake_vllm import Chunks, FakeVllm, Script
from deltawire_server.processes import passing
from deltawire_server.registry import pages
from deltawire_server.rpc import completion_list
from tests.processes.test_passing import id_at
from tests.support.gateway import WAIT, Lines, Running, ask, failure_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from deltawire_server.worker import Worker
    from tests.processes.conftest import StartWorker

CHUNKS = Chunks()
RUNNING = chat_pb.COMPLETION_STATE_RUNNING
ACCESS: dict[str, Any] = {"access": {"keys": "ann call secret-of-ann-alone; ops call,operate secret-of-ops-alone"}}
ANN = (("authorization", "Bearer secret-of-ann-alone"),)
OPS = (("authorization", "Bearer secret-of-ops-alone"),)


def owner_of(worker: Running, name: str) -> str:
    """The owner of a caller's completions."""
    return next(each.owner for each in worker.gateway._settings.access.principals if each.name == name)


def ids(response: chat_pb.ListChatCompletionsResponse) -> list[str]:
    """The ids in a list."""
    return [each.completion_id for each in response.completions]


@pytest.fixture
async def workers_with_keys(start_worker: StartWorker) -> AsyncIterator[tuple[Running, Running]]:
    """Both workers of a gateway with a caller and an operator."""
    async with start_worker(0, **ACCESS) as one, start_worker(1, **ACCESS) as two:
        yield one, two


@pytest.mark.parametrize("page_size", [1, 2, 3, 100])
async def test_a_list_has_all_workers(start_worker: StartWorker, page_size: int) -> None:
    """In one order, at every worker, in pages of any size; other callers see their own."""
    async with start_worker(0, **ACCESS) as one, start_worker(1, **ACCESS) as two:
        made: list[str] = []
        for number in range(4):
            for metadata in (ANN, OPS):
                worker = (one, two, two)[number % 3]
                made.append((await worker.create(metadata=metadata)).started.completion_id)
        for worker in (one, two):
            for metadata, expected in ((OPS, made[::-1]), (ANN, made[-2::-2])):
                page = await worker.list(metadata=metadata, page_size=page_size)
                seen = ids(page)
                workers = {each.worker for each in page.completions}
                while page.next_page_token:
                    page = await worker.list(metadata=metadata, page_size=page_size, page_token=page.next_page_token)
                    seen += ids(page)
                    workers |= {each.worker for each in page.completions}
                assert seen == expected
                assert workers == {0, 1}
        failure = await failure_of(one.list(metadata=ANN, caller="ops"))
        assert failure.code is grpc.StatusCode.PERMISSION_DENIED


async def test_pages_with_few_bytes(start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that one worker cuts for its size loses nothing of the others."""
    async with start_worker(0, **ACCESS) as one, start_worker(1, **ACCESS) as two:
        made = [(await worker.create(metadata=ANN)).started.completion_id for worker in (one, one, two, one, two)]
        monkeypatch.setattr(pages, "MAX_PAGE_BYTES", 1)
        page = await two.list(metadata=OPS)
        seen = ids(page)
        while page.next_page_token:
            page = await two.list(metadata=OPS, page_token=page.next_page_token)
            seen += ids(page)
        assert seen == made[::-1]


async def test_a_worker_that_does_not_answer(start_worker: StartWorker) -> None:
    """The list names it, and has the completions of the others."""
    async with start_worker(0, **ACCESS) as one:
        async with start_worker(1, **ACCESS) as two:
            await two.create(metadata=ANN)
            made = (await one.create(metadata=ANN)).started.completion_id
        page = await one.list(metadata=OPS)
        assert (ids(page), list(page.unreachable_workers)) == ([made], [1])
        async with start_worker(1, incarnation=1, **ACCESS):
            page = await one.list(metadata=OPS, page_size=1)
            assert (ids(page), list(page.unreachable_workers)) == ([made], [])


async def test_a_worker_that_hangs(start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for only for some time, and its call ends with that of the caller."""
    page_of, entered, ended = completion_list.page_of, asyncio.Event(), asyncio.Event()

    async def hang(query: completion_list.Query, worker: Worker, number: int) -> chat_pb.ListChatCompletionsResponse:
        if number == 0:
            return await page_of(query, worker, number)
        entered.set()
        try:
            return await asyncio.Event().wait()  # type: ignore[return-value]
        finally:
            ended.set()

    monkeypatch.setattr(completion_list, "page_of", hang)
    async with start_worker(0, **ACCESS) as one, start_worker(1, **ACCESS):
        call = one.chat.ListChatCompletions(chat_pb.ListChatCompletionsRequest(), metadata=OPS)
        await asyncio.wait_for(entered.wait(), WAIT)
        call.cancel()
        await asyncio.wait_for(ended.wait(), WAIT)
        monkeypatch.setattr(passing, "LIST_SECONDS", 0.1)
        assert list((await one.list(metadata=OPS)).unreachable_workers) == [1]


@pytest.mark.parametrize("place", [0, 1])
async def test_an_operator_cancels_at_any_worker(
    start_worker: StartWorker, vllm: FakeVllm, lines: Lines, place: int
) -> None:
    """Wherever the completion runs, and with the caller's name too; the worker that has it logs who canceled it."""
    async with start_worker(0, **ACCESS) as one, start_worker(1, **ACCESS) as two:
        for own in ("", id_at(place, one, owner_of(one, "ann"))):
            for worker in (one, two):
                vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("a"), asyncio.Event()]))
                stream = aiter((one, two)[place].stream(ask(completion_id=own), metadata=ANN))
                completion_id = (await anext(stream)).started.completion_id
                callers = ["ann"] if own else ["", "ann"]
                for caller in callers:
                    assert (await worker.look_up(completion_id, caller, metadata=OPS)).state == RUNNING
                assert (await worker.look_up(completion_id, "ann", metadata=ANN)).state == RUNNING
                assert (await worker.cancel(completion_id, callers[-1], metadata=OPS)).state == RUNNING
                assert [event async for event in stream][-1].HasField("completed")
                await lines.find("an operator canceled a completion", operator="ops", completion_id=completion_id)


async def test_the_caller_of_a_completion_that_was_passed_on(start_worker: StartWorker, lines: Lines) -> None:
    """Is in the lines of the worker that runs it, beside the usage."""
    async with start_worker(0, **ACCESS) as one, start_worker(1, **ACCESS):
        own = id_at(1, one, owner_of(one, "ann"))
        await one.create(ask(completion_id=own), metadata=ANN)
        for event in ("call", "completion ended"):
            entry = await lines.find(event, completion_id=own, usage="EXACT")
            assert entry["caller"] == "ann"


async def test_a_completion_that_no_worker_has(start_worker: StartWorker) -> None:
    """Is unknown if all workers answer, and may be lost otherwise; invalid requests are refused by the first."""
    async with start_worker(0, **ACCESS) as one:
        async with start_worker(1, **ACCESS):
            failure = await failure_of(one.look_up("c", "ann", metadata=OPS))
            assert (failure.code, failure.reason) == (grpc.StatusCode.NOT_FOUND, "COMPLETION_NOT_FOUND")
            assert "ann has no completion 'c' here" in failure.message
            assert (await failure_of(one.look_up("a b", "ann", metadata=OPS))).reason == "INVALID_REQUEST"
        assert (await failure_of(one.look_up("c", "ann", metadata=OPS))).reason == "COMPLETION_GONE"
        assert (await failure_of(one.look_up("c", "ops", metadata=ANN))).reason == "PERMISSION_DENIED"


async def test_a_caller_that_names_itself(workers_with_keys: tuple[Running, Running]) -> None:
    """Finds its own completion at every worker."""
    one, two = workers_with_keys
    await one.create(ask(completion_id="c"), metadata=ANN)
    for worker in (one, two):
        assert (await worker.look_up("c", "ann", metadata=ANN)).completion_id == "c"
