"""Every id works at every worker: what a worker passes on, what callers receive, and the caller's identity."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import status_pb2
from grpc import aio

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire_server.access import Identity, NameKind
from deltawire_server.errors import CallerError, Code, DeltawireError, GatewayError, Reason, Violation
from deltawire_server.fake_vllm import Chunks, FakeVllm, Script
from deltawire_server.processes.passing import ASSERTION, CALLER, OWNER, _error_of
from deltawire_server.rpc.load import LoadReport
from deltawire_server.rpc.status import MAX_MESSAGE, grpc_code, shorten, trailers_of
from tests.support.gateway import (
    WAIT,
    Failure,
    Lines,
    Running,
    ask,
    failure_of,
    kinds,
    read_badly,
    read_well,
    settings_of,
    taken_apart,
    text_of,
    until,
)
from tests.support.mutual_tls import connected, mutual

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Certificates
    from tests.processes.conftest import StartWorker

CHUNKS = Chunks()
KEPT = chat_pb.StreamOptions(retention=Duration(seconds=60))
OWN = "c"
"""An id of the caller's; its worker is the other one of one of the two."""
RUNNING, ENDED = chat_pb.COMPLETION_STATE_RUNNING, chat_pb.COMPLETION_STATE_COMPLETED
KEYS = {"keys": "ann call secret-of-ann-alone; bob call secret-of-bob-alone"}


def bearer(name: str) -> tuple[tuple[str, str], ...]:
    """The metadata of a caller with a key."""
    return (("authorization", f"Bearer secret-of-{name}-alone"),)


def number_of(worker: Running, completion_id: str = OWN, owner: str = "") -> int:
    """The number of the worker that has a completion, which all workers know."""
    assert worker.gateway._process is not None
    return worker.gateway._process.number_for(owner, completion_id)


def id_at(number: int, worker: Running, owner: str = "") -> str:
    """An id that belongs to one of the workers."""
    return next(str(each) for each in range(100) if number_of(worker, str(each), owner) == number)


@pytest.mark.parametrize("own", [OWN, ""])
@pytest.mark.parametrize("first", [0, 1])
async def test_an_id_at_every_worker(workers: list[Running], vllm: FakeVllm, own: str, first: int) -> None:
    """Look-up, resume and cancel are the same at both, for streams of either worker, and for ids of the gateway and of callers."""
    gate = asyncio.Event()
    vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("a"), gate, CHUNKS.text("b"), asyncio.Event()]))
    stream = aiter(workers[first].stream(ask(completion_id=own), options=KEPT))
    events = [await anext(stream), await anext(stream)]
    completion_id = events[0].started.completion_id
    for worker in workers:
        assert (await worker.look_up(completion_id)).state == RUNNING
    resumed = [asyncio.create_task(read_well(worker.resume(completion_id))) for worker in workers]
    gate.set()
    events.append(await anext(stream))
    assert (await workers[1 - first].cancel(completion_id)).state == RUNNING
    events += [event async for event in stream]
    assert kinds(events)[-1] == "completed"
    assert text_of(events) == "ab"
    assert [await each for each in resumed] == [events, events]
    for worker in workers:
        assert (await worker.look_up(completion_id)).completed == events[-1].completed
        assert await read_well(worker.resume(completion_id, 1)) == events[2:]
        _, failure = await read_badly(worker.resume(completion_id, 99))
        assert (failure.code, failure.reason) == (grpc.StatusCode.OUT_OF_RANGE, "COMPLETION_GONE")
        assert failure.metadata["first_sequence"] == "0"


async def test_a_retry_at_another_worker_joins_the_completion(workers: list[Running], vllm: FakeVllm) -> None:
    """Streams and unary calls with an id of the caller's run once; a different request is refused, in the same words."""
    for worker in workers:
        assert text_of(await read_well(worker.stream(ask(completion_id=OWN), options=KEPT)))
    assert len(vllm.chats) == 1
    failures = [await failure_of(worker.create(ask("else", completion_id=OWN))) for worker in workers]
    assert {(each.code, each.reason, each.message) for each in failures} == {
        (grpc.StatusCode.ALREADY_EXISTS, "COMPLETION_ALREADY_EXISTS", failures[0].message)
    }
    gate = asyncio.Event()
    vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("a"), gate, CHUNKS.finish()]))
    answers = [asyncio.create_task(worker.create(ask(completion_id="d"))) for worker in workers]
    owner = workers[number_of(workers[0], "d")].gateway._worker
    await until(lambda: (found := owner._records.current("", "d")) is not None and len(found.stream._places) == 2)  # type: ignore[union-attr]
    gate.set()
    assert {(await each).started.completion_id for each in answers} == {"d"}
    assert len(vllm.chats) == 2


async def test_a_worker_reports_its_own_load(workers: list[Running]) -> None:
    """In a call that it has passed on too: a load balancer sent the call to it."""
    loads = [LoadReport(), LoadReport()]
    for number, (worker, load) in enumerate(zip(workers, loads, strict=True)):
        load.measure(0.25 + number / 4)
        worker.gateway._calls.load = load
    for worker, load in zip(workers, loads, strict=True):
        stream = worker.stream(ask(completion_id=OWN))
        await read_well(stream)
        assert set(load.metadata) < set(await stream.initial_metadata())
        assert tuple(await stream.trailing_metadata()) == load.metadata


async def test_metadata_of_passed_calls(workers: list[Running], vllm: FakeVllm, lines: Lines) -> None:
    """The caller's request id, token and trace, to vLLM and back; one log line at each worker."""
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    metadata = (("x-request-id", "abc"), ("x-vllm-api-token", "hush"), ("traceparent", trace))
    for worker in workers:
        call = worker.stream(ask(completion_id=OWN), metadata=metadata)
        await read_well(call)
        assert dict(await call.initial_metadata())["x-request-id"] == "abc"
    for chat in vllm.chats:
        assert chat.headers["x-request-id"].startswith("abc-")
        assert chat.headers["authorization"] == "Bearer hush"
        assert trace[3:35] in chat.headers["traceparent"]
    assert len([entry for entry in lines.entries if entry["event"] == "call"]) == 3
    passed = await lines.find("call", passed_to=number_of(workers[0]))
    assert (passed["request_id"], passed["completion_id"]) == ("abc", OWN)


@pytest.mark.parametrize("end", ["cancel", "deadline"])
async def test_a_caller_that_disconnects(workers: list[Running], vllm: FakeVllm, end: str) -> None:
    """Its completion stops wherever it runs, and is known to have ended so at every worker."""
    vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("a"), asyncio.Event()]))
    away = workers[1 - number_of(workers[0])]
    call = away.stream(ask(completion_id=OWN), timeout=1 if end == "deadline" else None)
    assert kinds([await anext(aiter(call))]) == ["started"]
    if end == "cancel":
        call.cancel()
    await asyncio.wait_for(vllm.chats[0].closed_early.wait(), WAIT)
    expected = {"cancel": Code.CANCELLED, "deadline": Code.DEADLINE_EXCEEDED}[end]
    for worker in workers:
        async with asyncio.timeout(WAIT):
            while (found := await worker.look_up(OWN)).state == RUNNING:  # noqa: ASYNC110 (nothing announces it)
                await asyncio.sleep(0.01)
        assert found.error.code == expected


async def test_failures_of_passed_calls(workers: list[Running], vllm: FakeVllm) -> None:
    """Status, details and last message are those of the worker that has the completion."""
    for worker in workers:
        vllm.play(Script.error(429, "busy", headers={"retry-after": "7"}))
        _, failure = await read_badly(worker.stream(ask(completion_id=OWN)))
        assert (failure.code, failure.retry_seconds) == (grpc.StatusCode.RESOURCE_EXHAUSTED, 7)
        vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("a")], end="cut"))
        events, failure = await read_badly(worker.stream(ask(completion_id=OWN)))
        assert kinds(events)[-1] == "completed"
        assert failure.reason == "UPSTREAM_INCOMPLETE"
        failure = await failure_of(worker.create(ask(completion_id=OWN, messages=[])))
        assert failure.fields == ["chat.messages"]
        for unknown in ("no-such-id", f"cmpl-{'0' * 32}-ab120100", f"cmpl-{'0' * 32}-ab120000"):
            failure = await failure_of(worker.look_up(unknown))
            assert (failure.code, failure.reason) == (grpc.StatusCode.NOT_FOUND, "COMPLETION_NOT_FOUND")
        failure = await failure_of(worker.cancel(f"cmpl-{'0' * 32}-cd340000"))
        assert failure.reason == "WRONG_REPLICA"


async def test_a_worker_that_has_ended(start_worker: StartWorker, vllm: FakeVllm) -> None:
    """Its sibling reports its completions as lost, and new ones of its ids as worth a retry; a replacement does both truthfully."""
    vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("a"), asyncio.Event()]))
    async with start_worker(0) as here:
        own = id_at(1, here)
        async with start_worker(1) as away:
            stream = aiter(away.stream(ask(), options=KEPT))
            made = (await anext(stream)).started.completion_id
            passed = aiter(here.resume(made))
            await anext(passed)
        with pytest.raises(aio.AioRpcError) as caught:
            async for _ in passed:
                pass
        assert caught.value.code() is grpc.StatusCode.ABORTED
        for completion_id in (made, own):
            failure = await failure_of(here.look_up(completion_id))
            assert (failure.code, failure.reason) == (grpc.StatusCode.OUT_OF_RANGE, "COMPLETION_GONE")
        failure = await failure_of(here.create(ask(completion_id=own)))
        assert (failure.code, failure.retry_seconds) == (grpc.StatusCode.UNAVAILABLE, 1)
        async with start_worker(1, incarnation=1) as again:
            vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("b"), CHUNKS.finish()]))
            for worker in (here, again):
                failure = await failure_of(worker.look_up(made))
                assert failure.reason == "COMPLETION_GONE"
                assert "has ended" in failure.message
                assert (await failure_of(worker.look_up(own))).reason == "COMPLETION_NOT_FOUND"
            assert (await here.create(ask(completion_id=own))).started.completion_id == own


async def test_a_public_caller_cannot_name_another_caller(start_worker: StartWorker, vllm: FakeVllm) -> None:
    """Public listeners ignore the metadata of siblings; each caller has only its own completions, at every worker."""
    async with start_worker(0, access=KEYS) as one, start_worker(1, access=KEYS) as two:
        principals = {each.name: each for each in one.gateway._settings.access.principals}
        claim = ((CALLER, b"ann"), (OWNER, principals["ann"].owner.encode()), (ASSERTION, b""))
        for worker in (one, two):
            await read_well(worker.stream(ask(completion_id=OWN), options=KEPT, metadata=bearer("ann")))
        assert len(vllm.chats) == 1
        for worker in (one, two):
            assert (await worker.look_up(OWN, metadata=bearer("ann"))).state == ENDED
            failure = await failure_of(worker.look_up(OWN, metadata=claim))  # type: ignore[arg-type]
            assert failure.code is grpc.StatusCode.UNAUTHENTICATED
            failure = await failure_of(worker.look_up(OWN, metadata=(*bearer("bob"), *claim)))  # type: ignore[arg-type]
            assert failure.code is grpc.StatusCode.NOT_FOUND


async def test_limits_of_memory_are_for_all_workers(start_worker: StartWorker) -> None:
    """Each worker gets an equal part; the number of completions is each worker's own."""
    limits: dict[str, Any] = {
        "server": {"max_memory_bytes": 2**30, "max_streams": 7},
        "retention": {"max_bytes": 2**20},
    }
    async with start_worker(0, **limits) as worker:
        runs = worker.gateway._worker
        assert (runs.memory.limit, runs._retention._limits.max_bytes, runs.admission._limit) == (2**29, 2**19, 7)


async def test_a_passed_call_takes_a_place_where_it_runs(start_worker: StartWorker, vllm: FakeVllm) -> None:
    """The worker that passes it on has room for others; a full worker's refusal is passed back."""
    vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("a"), asyncio.Event()]))
    limits: dict[str, Any] = {"server": {"max_streams": 1}}
    async with start_worker(0, **limits) as here, start_worker(1, **limits) as away:
        ids = [id_at(1, here), id_at(0, here)]
        call = here.stream(ask(completion_id=ids[0]))
        assert kinds([await anext(aiter(call))]) == ["started"]
        assert [worker.gateway._worker.active for worker in (here, away)] == [0, 1]
        failure = await failure_of(here.create(ask(completion_id=ids[0])))
        assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS")
        assert failure.quota
        vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("a"), CHUNKS.finish()]))
        await here.create(ask(completion_id=ids[1]))
        call.cancel()


async def test_a_draining_worker_answers_for_its_completions(workers: list[Running], vllm: FakeVllm) -> None:
    """What a sibling passes on is served until the end; others are refused."""
    gate = asyncio.Event()
    vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("a"), gate, CHUNKS.finish()]))
    here, away = workers
    stream = aiter(away.stream(options=KEPT))
    made = (await anext(stream)).started.completion_id
    away.gateway._calls.refuse_new_calls()
    assert (await here.look_up(made)).state == RUNNING
    assert (await failure_of(away.look_up(made))).reason == "DRAINING"
    gate.set()
    assert kinds([event async for event in stream])[-1] == "completed"


async def test_a_caller_that_does_not_read(start_worker: StartWorker, vllm: FakeVllm) -> None:
    """Fails with SLOW_CALLER at the worker that it called."""
    vllm.play(Script.generated(tokens=100_000_000, chunks_per_write=50))
    limits: dict[str, Any] = {"stream": {"queue_bytes": 1024, "slow_caller_timeout": 0.2}}
    async with start_worker(0, **limits) as here, start_worker(1, **limits):
        call = here.stream(ask(completion_id=id_at(1, here)))
        await asyncio.wait_for((await vllm.received()).closed_early.wait(), WAIT)
        events, failure = await read_badly(call)
        assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SLOW_CALLER")
        assert [event.sequence for event in events] == list(range(len(events)))


async def test_access_that_the_other_worker_has_revoked(start_worker: StartWorker) -> None:
    """Workers reload one after the other: the stricter one decides."""
    only_bob = {"keys": "bob call secret-of-bob-alone"}
    async with start_worker(0, access=KEYS) as one, start_worker(1, access=only_bob):
        ann = next(each.owner for each in one.gateway._settings.access.principals if each.name == "ann")
        own = id_at(1, one, ann)
        failure = await failure_of(one.create(ask(completion_id=own), metadata=bearer("ann")))
        assert (failure.code, failure.reason) == (grpc.StatusCode.ABORTED, "ACCESS_CHANGED")


async def test_the_other_worker_ends_its_trust_in_a_proxy(
    start_worker: StartWorker, vllm: FakeVllm, certificates: Certificates, tmp_path: Path
) -> None:
    """It knows who asserted the caller: what runs there ends, and what is passed on afterwards is refused."""
    vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("a"), asyncio.Event()]))
    proxy = "spiffe://mesh/ns/envoy"
    sections: dict[str, Any] = {"server": mutual(certificates), "access": {"trusted_proxies": f"mtls:uri:{proxy}"}}
    asserted = (("x-forwarded-client-cert", "URI=spiffe://mesh/ann"),)
    ann = Identity(NameKind.URI, "spiffe://mesh/ann").owner
    async with (
        start_worker(0, **sections) as here,
        start_worker(1, **sections) as away,
        connected(here, certificates, "envoy", f"URI:{proxy}") as envoy,
    ):
        own = id_at(1, here, ann)
        stream = envoy.stream(ask(completion_id=own), metadata=asserted)
        assert kinds([await anext(aiter(stream))]) == ["started"]
        assert away.gateway._worker.active == 1
        await away.gateway.reload(settings_of(vllm.base_url, tmp_path, server=mutual(certificates)))
        _, failure = await read_badly(stream)
        assert (failure.code, failure.reason) == (grpc.StatusCode.ABORTED, "ACCESS_CHANGED")
        refused = await failure_of(envoy.look_up(own, metadata=asserted))
        assert (refused.code, refused.reason) == (grpc.StatusCode.ABORTED, "ACCESS_CHANGED")


def seen(error: DeltawireError) -> tuple[aio.AioRpcError, Failure]:
    """How a client receives an error, and what is in it besides the order of the details' metadata."""
    trailers = trailers_of(error, "id")
    received = aio.AioRpcError(
        grpc_code(error.code), aio.Metadata(), aio.Metadata(*trailers), shorten(error.message, MAX_MESSAGE)
    )
    return received, replace(taken_apart(received), status=status_pb2.Status(), trailers=dict(trailers[:-1]))


def test_an_error_survives_being_passed_on() -> None:
    """Its status, details and trailers are the same."""
    violations = [Violation("a.b", "is wrong" * 20), Violation("c", "too")]
    errors: list[DeltawireError] = [
        *(GatewayError(reason, f"because of {reason.name}", metadata={"model": "m"}) for reason in Reason),
        CallerError(Reason.INVALID_REQUEST, "x" * 2000, violations=violations),
        GatewayError(Reason.DRAINING, "é" * 2000, code=Code.ABORTED, retry_after=0.25, metadata={"a": "b" * 200}),
    ]
    for error in errors:
        received, failure = seen(error)
        passed_on = _error_of(received)
        assert passed_on is not None
        assert seen(passed_on)[1] == failure
