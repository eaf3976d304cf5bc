"""Watching models over gRPC: what comes, where it goes on, and how it ends."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc import aio

from deltawire.v1 import model_registry_pb2 as pb
from deltawire.v1 import model_registry_pb2_grpc as pb_grpc
from deltawire_server.registry.feed import Feed
from deltawire_server.rpc import interceptors, model_registry
from tests.rpc.support import failed, serving, shown, take
from tests.support.fake_provider import FakeProvider
from tests.support.gateway import WAIT

if TYPE_CHECKING:
    from tests.conftest import StartGateway
    from tests.rpc.support import Served
    from tests.support.gateway import Lines

WATCH = "deltawire.v1.ModelRegistry/WatchModels"
SMALL_WINDOW = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024))
"""A caller that takes in little before it reads."""
NOTES = {f"{number:03}": "x" * 4096 for number in range(15)}
"""More than such a caller takes in."""


@pytest.fixture
def alpha() -> FakeProvider:
    """Serves a model."""
    return FakeProvider("alpha", ["llama"])


def watch(served: Served, revision: str = "") -> aio.UnaryStreamCall[pb.WatchModelsRequest, pb.WatchModelsResponse]:
    """Begin a watch."""
    return served.stub.WatchModels(pb.WatchModelsRequest(revision=revision))


async def register(served: Served, model_id: str) -> pb.Model:
    """Register alpha's model."""
    request = pb.RegisterModelRequest(model_id=model_id, provider_id="alpha", provider_model_id="llama")
    return (await served.stub.RegisterModel(request)).model


async def change(served: Served, model_id: str, **metadata: str) -> pb.Model:
    """Change a registered model's notes."""
    request = pb.UpdateModelRequest(model=pb.Model(id=model_id, annotations=metadata))
    return (await served.stub.UpdateModel(request)).model


async def test_a_snapshot_in_batches(alpha: FakeProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    """On request, several models share a message, up to a number or a size; changes are sent as without it."""
    monkeypatch.setattr(model_registry, "BATCH", 3)
    monkeypatch.setattr(model_registry, "BATCH_BYTES", 3000)
    names = [f"m{number}" for number in range(8)]
    alpha.served = ["llama", *names]
    async with serving(alpha) as served:
        await register(served, "alpha-large")
        await change(served, "alpha-large", k="x" * 4000)
        call = served.stub.WatchModels(pb.WatchModelsRequest(batch_snapshot=True))
        messages = aiter(call)
        batches = [await anext(messages) for _ in range(4)]
        assert [[model.id for model in batch.models] for batch in batches] == [
            ["alpha-large"],
            ["alpha/m0", "alpha/m1", "alpha/m2"],
            ["alpha/m3", "alpha/m4", "alpha/m5"],
            ["alpha/m6", "alpha/m7"],
        ]
        assert all(batch.change == batch.CHANGE_ADDED and not batch.HasField("model") for batch in batches)
        assert not any(batch.revision or batch.bookmark for batch in batches)
        assert (await anext(messages)).bookmark
        await register(served, "alpha-new")
        added = await anext(messages)
        assert (added.model.id, list(added.models)) == ("alpha-new", [])


async def test_a_snapshot_then_what_others_do(alpha: FakeProvider) -> None:
    """All models by id, a bookmark, then each change of each kind, with the model as the caller who made it saw it."""
    alpha.served = ["llama", "mistral"]
    async with serving(alpha) as served:
        mine = await register(served, "mine")
        call = watch(served)
        snapshot = await take(call, 3)
        assert shown(snapshot) == ["ADDED alpha/mistral SERVING", "ADDED mine SERVING", "bookmark"]
        assert snapshot[1].model == mine
        assert [bool(message.revision) for message in snapshot] == [False, False, True]
        assert not snapshot[2].HasField("model")
        async with aio.insecure_channel(served.address) as channel:
            other = pb_grpc.ModelRegistryStub(channel)
            update = pb.UpdateModelRequest(model=pb.Model(id="mine", annotations={"k": "v"}))
            updated = (await other.UpdateModel(update)).model
            await other.UnregisterModel(pb.UnregisterModelRequest(model_id="mine"))
        alpha.served = ["mistral", "new"]
        await served.stub.RefreshModels(pb.RefreshModelsRequest())
        alpha.go_down()
        await served.stub.RefreshModels(pb.RefreshModelsRequest())
        changes = await take(call, 7)
        assert shown(changes) == [
            "MODIFIED mine SERVING",
            "REMOVED mine SERVING",
            "ADDED alpha/llama SERVING",
            "REMOVED alpha/llama SERVING",
            "ADDED alpha/new SERVING",
            "MODIFIED alpha/mistral UNAVAILABLE",
            "MODIFIED alpha/new UNAVAILABLE",
        ]
        assert changes[0].model == changes[1].model == updated
        assert len({message.revision for message in (*snapshot[2:], *changes)}) == 8
        call.cancel()


async def test_an_empty_registry(alpha: FakeProvider) -> None:
    """Is told at once, by a bookmark; initial metadata come with it, and say the request id."""
    async with serving(alpha) as served:
        request = pb.WatchModelsRequest()
        call = served.stub.WatchModels(request, metadata=(("x-request-id", "mine"),))
        assert shown(await take(call, 1)) == ["bookmark"]
        assert dict(await call.initial_metadata())["x-request-id"] == "mine"
        call.cancel()


async def test_going_on(alpha: FakeProvider) -> None:
    """After any step: what came since, each once, then a bookmark, then what comes; no snapshot."""
    async with serving(alpha) as served:
        await register(served, "base")
        first = watch(served)
        _, bookmark = await take(first, 2)
        await register(served, "mine")
        await register(served, "yours")
        steps = [bookmark, *(await take(first, 2))]
        first.cancel()
        await change(served, "mine", k="v")
        missed = ["ADDED mine SERVING", "ADDED yours SERVING", "MODIFIED mine SERVING"]
        for place, step in enumerate(steps):
            call = watch(served, step.revision)
            messages = await take(call, 4 - place)
            assert shown(messages) == [*missed[place:], "bookmark"]
            assert dict(await call.initial_metadata())["x-request-id"]
            call.cancel()
        last = watch(served, steps[-1].revision)
        assert shown(await take(last, 2)) == ["MODIFIED mine SERVING", "bookmark"]
        await served.stub.UnregisterModel(pb.UnregisterModelRequest(model_id="mine"))
        assert shown(await take(last, 1)) == ["REMOVED mine SERVING"]
        last.cancel()


@pytest.mark.parametrize("revision", ["nonsense", "0123abcd-0", "-", "x" * 10_000])
async def test_a_revision_that_leads_nowhere(alpha: FakeProvider, revision: str) -> None:
    """Is refused before anything is sent, even initial metadata; the message says what to do instead."""
    async with serving(alpha) as served:
        messages, failure = await failed(watch(served, revision))
        assert messages == []
        assert (failure.code, failure.reason) == (grpc.StatusCode.OUT_OF_RANGE, "REVISION_GONE")
        assert failure.initial == {}
        assert failure.metadata.keys() == {"request_id"}
        assert "watch again without a revision" in failure.message


async def test_a_revision_of_another_process(alpha: FakeProvider) -> None:
    """Also where both have seen as many changes."""
    async with serving(alpha) as one, serving(FakeProvider("alpha", ["llama"])) as other:
        for served in (one, other):
            await register(served, "mine")
        call = watch(one)
        _, bookmark = await take(call, 2)
        call.cancel()
        _, failure = await failed(watch(other, bookmark.revision))
        assert failure.reason == "REVISION_GONE"


async def test_a_revision_that_is_too_old(alpha: FakeProvider) -> None:
    """One from before what is forgotten is; one from after it is not."""
    async with serving(alpha, feed=Feed(removed_bytes=1)) as served:
        for model_id in ("mine", "yours", "base"):
            await register(served, model_id)
        call = watch(served)
        *_, bookmark = await take(call, 4)
        for model_id in ("mine", "yours"):
            await served.stub.UnregisterModel(pb.UnregisterModelRequest(model_id=model_id))
        first, *_ = await take(call, 2)
        assert shown(await take(watch(served, first.revision), 2)) == ["REMOVED yours SERVING", "bookmark"]
        _, failure = await failed(watch(served, bookmark.revision))
        assert failure.reason == "REVISION_GONE"
        call.cancel()


async def test_silence(alpha: FakeProvider) -> None:
    """Is told again and again, each time with where to go on."""
    async with serving(alpha, feed=Feed(bookmark_seconds=0.001)) as served:
        call = watch(served)
        messages = await take(call, 4)
        assert shown(messages) == ["bookmark"] * 4
        assert len({message.revision for message in messages}) == 1
        call.cancel()


async def test_a_watcher_that_does_not_read(alpha: FakeProvider, lines: Lines) -> None:
    """Is cut, and told why when it reads at last; others lose nothing by it, and it goes on where it was."""
    async with serving(alpha, slow_watcher_seconds=0.2, options=SMALL_WINDOW) as served:
        await register(served, "mine")
        slow = watch(served)
        await take(slow, 2)
        async with aio.insecure_channel(served.address) as channel:
            quick = pb_grpc.ModelRegistryStub(channel).WatchModels(pb.WatchModelsRequest())
            await take(quick, 2)
            told = []
            for turn in range(4):
                await change(served, "mine", **{**NOTES, "000": str(turn)})
                told += await take(quick, 1)
            entry = await lines.find("call", method=WATCH, reason="SLOW_WATCHER")
            assert entry["code"] == "RESOURCE_EXHAUSTED"
            await change(served, "mine", last="1")
            told += await take(quick, 1)
            assert [message.model.annotations["000"] for message in told[:4]] == ["0", "1", "2", "3"]
            quick.cancel()
        messages, failure = await failed(slow)
        assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SLOW_WATCHER")
        assert failure.metadata["limit_seconds"] == "0.2"
        assert "watch again from the last revision" in failure.message
        assert messages == told[: len(messages)]
        again = watch(served, messages[-1].revision)
        assert await take(again, 5 - len(messages)) == told[len(messages) :]
        again.cancel()


async def test_a_watcher_that_is_overtaken(alpha: FakeProvider) -> None:
    """More was removed than is kept: the error says so, and only a snapshot helps."""
    async with serving(alpha, feed=Feed(removed_bytes=1), options=SMALL_WINDOW) as served:
        names = [f"model-{number}" for number in range(6)]
        for name in names:
            await register(served, name)
            await change(served, name, **NOTES)
        slow = watch(served)
        for name in names:
            await served.stub.UnregisterModel(pb.UnregisterModelRequest(model_id=name))
        messages, failure = await failed(slow)
        assert len(messages) == len(names) + 1
        assert (failure.code, failure.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SLOW_WATCHER")
        assert failure.metadata["limit_bytes"] == "1"
        assert "without a revision" in failure.message
        _, failure = await failed(watch(served, messages[-1].revision))
        assert failure.reason == "REVISION_GONE"


async def test_a_caller_that_leaves_frees_everything(
    alpha: FakeProvider, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it waits, while it is not read, and by its deadline; nothing of it is under way afterwards."""
    monkeypatch.setattr(interceptors, "QUICK_SECONDS", 0.0)  # each call has a log line, however soon it is canceled
    async with serving(alpha, options=SMALL_WINDOW) as served:
        await register(served, "mine")
        waiting, stuck = watch(served), watch(served)
        await take(waiting, 2)
        await take(stuck, 2)
        timed = served.stub.WatchModels(pb.WatchModelsRequest(), timeout=0.1)
        await take(timed, 2)
        assert await timed.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await lines.find("call", method=WATCH, code="DEADLINE_EXCEEDED")
        waiting.cancel()
        await lines.find("call", method=WATCH, code="CANCELLED")
        await change(served, "mine", **NOTES)
        stuck.cancel()
        async with asyncio.timeout(WAIT):
            await served.calls.wait_idle()
        assert len([entry for entry in lines.entries if entry.get("code") == "CANCELLED"]) == 2
        assert not [entry for entry in lines.entries if entry["level"] == "error"]


async def test_a_caller_that_was_cut_and_leaves(alpha: FakeProvider, lines: Lines) -> None:
    """Without having read why: that is nobody's defect, and nothing is left of it."""
    async with serving(alpha, slow_watcher_seconds=0.05, options=SMALL_WINDOW) as served:
        await register(served, "mine")
        call = watch(served)
        await take(call, 2)
        await change(served, "mine", **NOTES)
        await lines.find("call", method=WATCH, reason="SLOW_WATCHER")
        call.cancel()
        async with asyncio.timeout(WAIT):
            await served.calls.wait_idle()
    assert not [entry for entry in lines.entries if entry["level"] in ("error", "warning")]


async def test_draining_ends_watches_at_once(start_gateway: StartGateway, lines: Lines) -> None:
    """Although active calls may use the whole grace: a watcher can watch another process."""
    async with start_gateway(server={"drain_grace": 3600}) as gateway:
        calls = [gateway.models.WatchModels(pb.WatchModelsRequest()) for _ in range(3)]
        for call in calls:
            await take(call, 2)
        drained = asyncio.create_task(gateway.gateway.drain())
        for call in calls:
            messages, failure = await failed(call)
            assert messages == []
            assert (failure.code, failure.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
            assert failure.retry_seconds == 0.0
        async with asyncio.timeout(WAIT):
            await drained
    assert not any(entry["event"] == "active calls are ended" for entry in lines.entries)


async def test_a_watcher_that_does_not_read_holds_up_no_drain(start_gateway: StartGateway, lines: Lines) -> None:
    """It cannot be told that its watch has ended, and is not waited for."""
    async with start_gateway(server={"drain_grace": 3600}, options=SMALL_WINDOW) as gateway:
        call = gateway.models.WatchModels(pb.WatchModelsRequest())
        await take(call, 2)
        register = pb.RegisterModelRequest(model_id="mine", provider_model_id="fake", annotations=NOTES)
        await gateway.models.RegisterModel(register)
        async with asyncio.timeout(WAIT):
            await gateway.gateway.drain()
        entry = await lines.find("call", method=WATCH)
        assert (entry["code"], entry["reason"]) == ("UNAVAILABLE", "DRAINING")
    assert not any(entry["event"] == "active calls are ended" for entry in lines.entries)


async def test_during_the_delay_watches_go_on(start_gateway: StartGateway) -> None:
    """And new ones begin, as long as balancers have not noticed; then they are refused."""
    async with start_gateway(server={"drain_delay": 3600}) as gateway:
        drained = asyncio.create_task(gateway.gateway.drain())
        call = gateway.models.WatchModels(pb.WatchModelsRequest())
        await take(call, 2)
        await gateway.models.RegisterModel(pb.RegisterModelRequest(model_id="mine", provider_model_id="fake"))
        assert shown(await take(call, 2)) == ["ADDED mine SERVING", "REMOVED vllm/fake SERVING"]
        call.cancel()
        await gateway.gateway.stop()
        await asyncio.wait([drained])


async def test_draining_refuses_new_watches(alpha: FakeProvider) -> None:
    """Before anything is sent."""
    async with serving(alpha) as served:
        served.calls.refuse_new_calls()
        messages, failure = await failed(watch(served))
        assert (messages, failure.reason, failure.initial) == ([], "DRAINING", {})
