"""The limits of callers over gRPC: what is refused, how, and what others get meanwhile."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2
from grpc import aio
from pydantic import SecretStr

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import model_registry_pb2 as pb
from deltawire_server.access import Terms, parse_line
from deltawire_server.fake_vllm import Chunks, FakeVllm, Script
from deltawire_server.limits import Use
from deltawire_server.rpc.chat_completion import on_terms
from deltawire_server.settings import AccessSettings, LimitsSettings
from deltawire_server.upstream.request import ChatMessage, ChatRequest, Role
from deltawire_server.worker import Worker
from tests.support.gateway import ask, failure_of, kinds, read, read_badly, read_well, until

if TYPE_CHECKING:
    from tests.conftest import StartGateway
    from tests.support.gateway import Failure, Lines, Running

CHUNKS = Chunks()
A, B = "alice-alice-alice", "bob-bob-bob-bob-bob"
ALICE, BOB = ((("authorization", f"Bearer {key}"),) for key in (A, B))
RETAINED = chat_pb.StreamOptions(retention=duration_pb2.Duration(seconds=60))


def access(alice: str = "", bob: str = "") -> dict[str, Any]:
    """Access lines of two callers, with these words."""
    return {"keys": f"alice all {A} {alice}; bob all {B} {bob}"}


def held(vllm: FakeVllm, count: int) -> asyncio.Event:
    """Let the next answers begin, and end when the event is set."""
    gate = asyncio.Event()
    vllm.play(*[Script.chunks([CHUNKS.role(), gate, CHUNKS.text("whole"), CHUNKS.finish()])] * count)
    return gate


def quota(failure: Failure) -> str:
    """The subject of QuotaFailure."""
    for detail in failure.status.details:
        violation = error_details_pb2.QuotaFailure()
        if detail.Unpack(violation):
            return str(violation.violations[0].subject)
    raise AssertionError("there is no QuotaFailure")


async def begin(gateway: Running, **how: Any) -> Any:  # noqa: ANN401 (an iterator of messages)
    """Begin a stream."""
    messages = aiter(gateway.stream(**how))
    await anext(messages)
    return messages


async def test_streams(start_gateway: StartGateway, vllm: FakeVllm) -> None:
    """A caller at its limit is refused with everything that a client needs; another one is served, and it later too."""
    gate = held(vllm, 3)
    async with start_gateway(access=access("streams=2")) as gateway:
        running = [await begin(gateway, metadata=ALICE) for _ in range(2)]
        for failure in (
            (await read_badly(gateway.stream(metadata=ALICE)))[1],
            await failure_of(gateway.create(metadata=ALICE)),
        ):
            assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "CALLER_LIMIT_EXCEEDED")
            assert {"caller": "alice", "limit": "streams", "value": "2"}.items() <= failure.metadata.items()
            assert (failure.retry_seconds, failure.trailers["grpc-retry-pushback-ms"]) == (1, "1000")
            assert quota(failure) == "alice"
            assert not failure.initial
        running.append(await begin(gateway, metadata=BOB))
        gate.set()
        for messages in running:
            assert kinds([event async for event in messages])[-1] == "completed"
        await until(lambda: gateway.gateway._worker.active == 0)
        await read_well(gateway.stream(metadata=ALICE))


async def test_a_host_is_a_caller_without_access_lines(start_gateway: StartGateway, vllm: FakeVllm) -> None:
    """Whatever connection it uses."""
    gate = held(vllm, 1)
    async with start_gateway(limits={"streams": 1}) as gateway:
        running = await begin(gateway)
        options = (("grpc.use_local_subchannel_pool", 1),)
        async with aio.insecure_channel(gateway.address, options=options) as channel:
            other = type(gateway)(gateway.gateway, channel)
            failure = await failure_of(other.create())
        assert (failure.reason, quota(failure)) == ("CALLER_LIMIT_EXCEEDED", "this caller")
        gate.set()
        assert [event async for event in running]


async def test_retained_streams_leave_room(start_gateway: StartGateway, vllm: FakeVllm) -> None:
    """By default one caller may have half of the places for them: it hangs up, and others are served."""
    gate = held(vllm, 2)
    async with start_gateway(server={"max_streams": 4}, access=access()) as gateway:
        for _ in range(2):
            call = gateway.stream(options=RETAINED, metadata=ALICE)
            await anext(aiter(call))
            call.cancel()
        _, failure = await read_badly(gateway.stream(options=RETAINED, metadata=ALICE))
        assert failure.metadata["limit"] == "retained_streams"
        await read_well(gateway.stream(metadata=ALICE))
        await read_well(gateway.stream(options=RETAINED, metadata=BOB))
        gate.set()
        await until(lambda: gateway.gateway._worker.active == 0)
        await read_well(gateway.stream(options=RETAINED, metadata=ALICE))


async def test_a_refused_id_is_not_counted(start_gateway: StartGateway, vllm: FakeVllm) -> None:
    """An id in use costs no retained stream."""
    gate = held(vllm, 1)
    async with start_gateway(access=access("retained_streams=2")) as gateway:
        running = await begin(gateway, chat=ask(completion_id="a"), options=RETAINED, metadata=ALICE)
        for _ in range(3):
            other = gateway.stream(ask("other", completion_id="a"), options=RETAINED, metadata=ALICE)
            assert (await read_badly(other))[1].reason == "COMPLETION_ALREADY_EXISTS"
        await read_well(gateway.stream(options=RETAINED, metadata=ALICE))
        gate.set()
        assert [event async for event in running]


async def test_retained_bytes(start_gateway: StartGateway) -> None:
    """A caller above its limit loses its own streams, the oldest first; another caller keeps its own."""
    async with start_gateway(access=access("retained_bytes=5000")) as gateway:
        ids: dict[str, tuple[tuple[str, str], ...]] = {"b": BOB, "a1": ALICE, "a2": ALICE, "a3": ALICE}
        for completion_id, caller in ids.items():
            await read_well(gateway.stream(ask(completion_id=completion_id), options=RETAINED, metadata=caller))
        kept = [each for each, caller in ids.items() if await _is_kept(gateway, each, caller)]
        assert kept[0] == "b"
        assert kept[-1] == "a3"
        assert "a1" not in kept


async def _is_kept(gateway: Running, completion_id: str, caller: tuple[tuple[str, str], ...]) -> bool:
    _, failure = await read(gateway.resume(completion_id, metadata=caller))
    return failure is None


async def test_requests_per_minute(start_gateway: StartGateway) -> None:
    """The pushback is the time until the next request; other methods do not count."""
    async with start_gateway(access=access("requests_per_minute=2")) as gateway:
        await read_well(gateway.stream(metadata=ALICE))
        await gateway.create(metadata=ALICE)
        failure = await failure_of(gateway.create(metadata=ALICE))
        assert failure.metadata["limit"] == "requests_per_minute"
        assert failure.retry_seconds is not None
        assert 20 < failure.retry_seconds <= 30
        assert failure.trailers["grpc-retry-pushback-ms"] == str(round(failure.retry_seconds * 1000))
        await gateway.models.ListModels(pb.ListModelsRequest(), metadata=ALICE)
        await gateway.create(metadata=BOB)


async def test_tokens_per_minute(start_gateway: StartGateway) -> None:
    """An answer that exceeds the budget is whole; the next call is refused."""
    async with start_gateway(access=access("tokens_per_minute=2")) as gateway:
        await read_well(gateway.stream(metadata=ALICE))
        failure = await failure_of(gateway.create(metadata=ALICE))
        assert failure.metadata["limit"] == "tokens_per_minute"
        await gateway.create(metadata=BOB)


async def test_a_burst_of_refusals(start_gateway: StartGateway, lines: Lines) -> None:
    """All are refused; one line for the first, and one for all the others of its second."""
    async with start_gateway(access=access("requests_per_minute=1")) as gateway:
        await gateway.create(metadata=ALICE)
        failures = await asyncio.gather(*(failure_of(gateway.create(metadata=ALICE)) for _ in range(50)))
        assert {failure.reason for failure in failures} == {"CALLER_LIMIT_EXCEEDED"}
        assert (await lines.find("calls refused by limits"))["calls"] > 1
        own = [each for each in lines.entries if each.get("reason") == "CALLER_LIMIT_EXCEEDED"]
    assert 1 <= len(own) < 50
    assert own[0]["caller"] == "alice"


async def test_watches(start_gateway: StartGateway) -> None:
    """A watch that has ended makes room."""
    async with start_gateway(access=access("watches=1")) as gateway:
        first = gateway.models.WatchModels(pb.WatchModelsRequest(), metadata=ALICE)
        await anext(aiter(first))
        second = gateway.models.WatchModels(pb.WatchModelsRequest(), metadata=ALICE)
        failure = await failure_of(anext(aiter(second)))
        assert failure.metadata["limit"] == "watches"
        await anext(aiter(gateway.models.WatchModels(pb.WatchModelsRequest(), metadata=BOB)))
        first.cancel()
        share = gateway.gateway._callers
        await until(lambda: sum(row.total(Use.WATCHES) for row in share._rows.values()) == 1)
        await anext(aiter(gateway.models.WatchModels(pb.WatchModelsRequest(), metadata=ALICE)))


async def test_a_full_gateway_queues(start_gateway: StartGateway, vllm: FakeVllm) -> None:
    """Calls wait for their turn, and say how long they did; a canceled one leaves, and so does one whose deadline passes."""
    gate = held(vllm, 1)
    async with start_gateway(server={"max_streams": 1}, limits={"queue_size": 3}, access=access()) as gateway:
        admission = gateway.gateway._worker.admission
        running = await begin(gateway, metadata=ALICE)
        waiting = [asyncio.ensure_future(gateway.create(metadata=ALICE)) for _ in range(2)]
        await until(lambda: admission.queued == 2)
        late = await _code(gateway.stream(metadata=BOB, timeout=0.05))
        assert late is grpc.StatusCode.DEADLINE_EXCEEDED
        canceled = gateway.stream(metadata=BOB)
        await until(lambda: admission.queued == 3)
        _, refused = await read_badly(gateway.stream(metadata=ALICE))
        assert (refused.reason, quota(refused)) == ("TOO_MANY_STREAMS", "gateway")
        canceled.cancel()
        await until(lambda: admission.queued == 2)
        gate.set()
        assert [event async for event in running]
        for response in await asyncio.gather(*waiting):
            assert response.completed.timings.queue.ToNanoseconds() > 0
        await until(lambda: admission.active == admission.queued == 0)


async def _code(call: Any) -> grpc.StatusCode:  # noqa: ANN401 (a stream)
    try:
        async for _ in call:
            pass
    except aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def test_a_caller_that_is_revoked_in_the_queue(start_gateway: StartGateway, vllm: FakeVllm) -> None:
    """Its call fails at its turn; the engine is not asked, and the place is free again."""
    gate = held(vllm, 1)
    async with start_gateway(access=access(), server={"max_streams": 1}, limits={"queue_size": 3}) as gateway:
        admission = gateway.gateway._worker.admission
        running = await begin(gateway, metadata=ALICE)
        waiting = asyncio.ensure_future(read_badly(gateway.stream(metadata=BOB)))
        await until(lambda: admission.queued == 1)
        settings = gateway.gateway._settings
        only_alice = AccessSettings(keys=SecretStr(f"alice all {A}"))
        await gateway.gateway.reload(settings.model_copy(update={"access": only_alice}))
        gate.set()
        assert [event async for event in running]
        _, failure = await waiting
        assert failure.reason == "ACCESS_CHANGED"
        await until(lambda: admission.active == 0)
        assert len(vllm.chats) == 1


async def test_models_that_are_taken_away_in_the_queue(start_gateway: StartGateway, vllm: FakeVllm) -> None:
    """A call that waits has not begun: the terms at its turn apply."""
    gate = held(vllm, 1)
    async with start_gateway(access=access(), server={"max_streams": 1}, limits={"queue_size": 3}) as gateway:
        admission = gateway.gateway._worker.admission
        running = await begin(gateway, metadata=ALICE)
        waiting = asyncio.ensure_future(read_badly(gateway.stream(metadata=BOB)))
        await until(lambda: admission.queued == 1)
        settings = gateway.gateway._settings
        narrower = AccessSettings(**access(bob="models=team-b/*"))
        await gateway.gateway.reload(settings.model_copy(update={"access": narrower}))
        gate.set()
        assert [event async for event in running]
        _, failure = await waiting
        assert failure.reason == "MODEL_NOT_FOUND"
        assert len(vllm.chats) == 1


async def test_a_completion_that_ends_before_a_call_joins_it(
    start_gateway: StartGateway, vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call starts a new one, which has a place of its caller and counts against its limits."""
    gate = held(vllm, 2)
    async with start_gateway(access=access("streams=1")) as gateway:
        seen = Worker.is_current
        answers = iter([True])  # for the first look; the completion has ended by the second
        monkeypatch.setattr(Worker, "is_current", lambda self, *about: next(answers, False) or seen(self, *about))
        stream = await begin(gateway, chat=ask(completion_id="c"), options=RETAINED, metadata=ALICE)
        assert sum(row.total(Use.STREAMS) for row in gateway.gateway._callers._rows.values()) == 1
        _, failure = await read_badly(gateway.stream(metadata=ALICE))
        assert failure.metadata["limit"] == "streams"
        gate.set()
        assert [event async for event in stream]


async def test_a_drain_empties_the_queue(start_gateway: StartGateway, vllm: FakeVllm) -> None:
    """With DRAINING, so that clients go elsewhere; what runs goes on."""
    gate = held(vllm, 1)
    async with start_gateway(server={"max_streams": 1}, limits={"queue_size": 3}) as gateway:
        running = await begin(gateway)
        waiting = asyncio.ensure_future(failure_of(gateway.create()))
        await until(lambda: gateway.gateway._worker.admission.queued == 1)
        drain = asyncio.create_task(gateway.gateway.drain())
        assert (await waiting).reason == "DRAINING"
        gate.set()
        assert [event async for event in running]
        await drain


async def test_models(start_gateway: StartGateway) -> None:
    """Others do not exist for the caller: in calls, look-ups, lists, watches and counts."""
    async with start_gateway(access=access("models=team-a/*")) as gateway:
        for name in ("team-a/x", "team-b/x"):
            await gateway.models.RegisterModel(
                pb.RegisterModelRequest(model_id=name, provider_model_id="fake", aliases=[f"{name}-alias"]),
                metadata=BOB,
            )
        for name in ("team-b/x", "team-b/x-alias", "no/such"):
            failures = [
                await failure_of(gateway.create(ask(model=name), metadata=ALICE)),
                await failure_of(gateway.models.GetModel(pb.GetModelRequest(model_id=name), metadata=ALICE)),
                await failure_of(
                    gateway.models.UnregisterModel(pb.UnregisterModelRequest(model_id=name), metadata=ALICE)
                ),
            ]
            for failure in failures:
                assert failure.reason == "MODEL_NOT_FOUND"
                assert "team-b" not in failure.message.replace(name, "")
        for name in ("team-a/x", "team-a/x-alias", ""):
            assert (await gateway.create(ask(model=name), metadata=ALICE)).started.model == "team-a/x"
        listed = await gateway.models.ListModels(pb.ListModelsRequest(page_size=1), metadata=ALICE)
        assert ([model.id for model in listed.models], listed.next_page_token) == (["team-a/x"], "")
        steps = aiter(gateway.models.WatchModels(pb.WatchModelsRequest(), metadata=ALICE))
        assert [(await anext(steps)).model.id for _ in range(2)] == ["team-a/x", ""]
        refreshed = await gateway.models.RefreshModels(pb.RefreshModelsRequest(), metadata=ALICE)
        assert refreshed.providers[0].model_count == 0


async def test_registrations_are_limited_to_the_models(start_gateway: StartGateway) -> None:
    """Names, aliases and targets must match."""
    async with start_gateway(access=access("models=team-a/*")) as gateway:
        await gateway.models.RegisterModel(
            pb.RegisterModelRequest(model_id="team-a/x", provider_model_id="fake"), metadata=BOB
        )

        async def denied(**fields: Any) -> str:  # noqa: ANN401 (of the request)
            request = pb.RegisterModelRequest(**{"provider_model_id": "fake", **fields})
            failure = await failure_of(gateway.models.RegisterModel(request, metadata=ALICE))
            assert failure.reason == "PERMISSION_DENIED"
            return failure.metadata["model"]

        assert await denied(model_id="team-b/y") == "team-b/y"
        assert await denied(model_id="team-a/y", aliases=["y"]) == "y"
        assert await denied(model_id="team-a/y", provider_model_id="secret") == "vllm/secret"
        await gateway.models.RegisterModel(
            pb.RegisterModelRequest(model_id="team-a/y", provider_model_id="fake"), metadata=ALICE
        )
        change = pb.UpdateModelRequest(model=pb.Model(id="team-a/y", aliases=["z"]))
        assert (await failure_of(gateway.models.UpdateModel(change, metadata=ALICE))).reason == "PERMISSION_DENIED"
        await gateway.models.UnregisterModel(pb.UnregisterModelRequest(model_id="team-a/y"), metadata=ALICE)


async def test_priority_and_salt_reach_the_engine(start_gateway: StartGateway, vllm: FakeVllm) -> None:
    """The line's instead of the caller's; the caller's own salts stay apart."""
    async with start_gateway(access=access("priority=5 cache_salt=team-a")) as gateway:
        await gateway.create(metadata=ALICE)
        await gateway.create(ask(priority=-9, cache_salt="mine"), metadata=ALICE)
        await gateway.create(ask(priority=-9, cache_salt="mine"), metadata=BOB)
    plain, salted, other = (request.body for request in vllm.chats)
    assert (plain["priority"], plain["cache_salt"]) == (5, "team-a")
    assert salted["priority"] == 5
    assert (other["priority"], other["cache_salt"]) == (-9, "mine")
    assert len({each["cache_salt"] for each in (plain, salted, other)}) == 3


def test_salts_do_not_collide() -> None:
    """Whatever a caller sends: not with another line's, and not with itself."""
    request = ChatRequest("m", (ChatMessage(Role.USER, ("hi",)),))
    salts = {
        on_terms(ChatRequest("m", request.messages, cache_salt=own), Terms(cache_salt=line)).cache_salt
        for line in ("a", "b", "ab")
        for own in ("", "a", "b", "c")
    }
    assert len(salts) == 12
    assert all(len(salt) <= 64 for salt in salts)
    assert on_terms(request, Terms()) is request


async def test_a_reload_applies_to_new_calls(start_gateway: StartGateway, vllm: FakeVllm) -> None:
    """Limits of the section and of the lines, in both directions."""
    gate = held(vllm, 2)
    async with start_gateway(access=access()) as gateway:
        running = [await begin(gateway, metadata=ALICE)]
        settings = gateway.gateway._settings

        async def reload(limits: dict[str, Any], words: str = "") -> None:
            update = {"limits": LimitsSettings(**limits), "access": AccessSettings(**access(words))}
            await gateway.gateway.reload(settings.model_copy(update=update))

        await reload({"streams": 1})
        assert (await failure_of(gateway.create(metadata=ALICE))).metadata["value"] == "1"
        await reload({"streams": 1, "queue_size": 7, "queue_timeout": 3}, "streams=2")
        running.append(await begin(gateway, metadata=ALICE))
        assert (await failure_of(gateway.create(metadata=ALICE))).metadata["value"] == "2"
        admission = gateway.gateway._worker.admission
        assert (admission.queue_size, admission.queue_timeout) == (7, 3)
        gate.set()
        for messages in running:
            assert kinds([event async for event in messages])[-1] == "completed"


async def test_a_watch_follows_the_models_of_the_line(start_gateway: StartGateway) -> None:
    """When they change, it ends, and cannot resume: the next one begins with a snapshot of the new ones."""
    async with start_gateway(access=access("models=vllm/*")) as gateway:
        settings = gateway.gateway._settings
        # So that the provider's models are in the first snapshot.
        await gateway.models.RefreshModels(pb.RefreshModelsRequest(), metadata=ALICE)

        async def watch(revision: str = "") -> Any:  # noqa: ANN401 (an iterator of steps)
            steps = aiter(gateway.models.WatchModels(pb.WatchModelsRequest(revision=revision), metadata=ALICE))
            return steps, await anext(steps)

        steps, first = await watch()
        bookmark = await anext(steps)
        assert (first.model.id, bookmark.bookmark) == ("vllm/fake", True)
        assert (await watch(bookmark.revision))[1].bookmark
        update = {"access": AccessSettings(**access("models=team-a/*"))}
        await gateway.gateway.reload(settings.model_copy(update=update))
        assert (await failure_of(anext(steps))).reason == "ACCESS_CHANGED"
        assert (await failure_of(watch(bookmark.revision))).reason == "REVISION_GONE"
        assert (await watch())[1].bookmark


@pytest.mark.parametrize(
    "words",
    [
        "streams=20 retained_streams=0 requests_per_minute=600",
        "models=team-a/*,shared/*",
        "priority=-5 cache_salt=team-a",
        "",
    ],
)
def test_words_of_a_line(words: str) -> None:
    """They are read back as they were."""
    principal = parse_line(f"ci all {A} {words}  # a comment")
    assert principal is not None
    assert parse_line(principal.line()) == principal
    assert principal.line().endswith(words)
    assert "team-a" not in principal.line(masked=True) or "models" in words


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("geheim", "must be of the form name=value"),
        ("geheim=1", "must be of the form name=value"),
        ("streams=geheim", "streams= must be followed by a whole number"),
        ("streams=-1", "streams= must be followed by a whole number"),
        ("streams=1 streams=2", "streams= is there twice"),
        ("models=", "models= must be followed by ids or patterns"),
        ("models=a,,b", "models= must be followed by ids or patterns"),
        ("priority=high", "priority= must be followed by"),
        ("priority=9999999999", "priority= must be followed by"),
        ("cache_salt=***", "cache_salt= must be followed by"),
        ("cache_salt=a/b", "cache_salt= must be followed by"),
    ],
)
def test_words_that_are_wrong(words: str, problem: str) -> None:
    """The message names the word and the remedy, and quotes nothing that may be a key."""
    with pytest.raises(ValueError, match=r".") as caught:
        parse_line(f"ci all {A} {words}")
    assert problem in str(caught.value)
    assert "geheim" not in str(caught.value)


async def test_fifty_callers_and_a_noisy_one(start_gateway: StartGateway) -> None:
    """One keeps ten times as many calls going as each of the others, and gets no more than they do."""
    callers = [f"caller-{number:02}" for number in range(50)]
    lines = "; ".join(f"{name} call key-of-{name}" for name in callers)
    ended = Counter[str]()
    seen = set[str]()
    enough = asyncio.Event()

    async def call(gateway: Running, name: str) -> None:
        metadata = (("authorization", f"Bearer key-of-{name}"),)
        while not enough.is_set():
            await gateway.create(metadata=metadata)
            seen.add(name)
            # From when all have called, and not while the queue empties at the end.
            ended[name] += len(seen) == len(callers) and not enough.is_set()
            if ended.total() >= 8 * len(callers):
                enough.set()

    async with start_gateway(
        access={"keys": lines}, server={"max_streams": 4}, limits={"queue_size": 200, "queue_timeout": 60.0}
    ) as gateway:
        noisy, *others = callers
        async with asyncio.TaskGroup() as running:
            for name in (*[noisy] * 10, *others):
                running.create_task(call(gateway, name))
    counts = [ended[name] for name in others]
    jain = sum(counts) ** 2 / (len(counts) * sum(count**2 for count in counts))
    assert jain >= 0.98
    assert ended[noisy] <= sum(counts) / len(counts) + 2
