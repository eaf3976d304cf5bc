"""What operators see and do: lists of completions, and the completions of other callers, without their content."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from pydantic import SecretStr

from deltawire.v1 import chat_completion_pb2 as chat_pb
from deltawire.v1 import error_reason_pb2
from deltawire_server.fake_vllm import Chunks, FakeVllm, Script
from deltawire_server.registry import pages
from deltawire_server.rpc import completion_list
from deltawire_server.settings import AccessSettings
from tests.support.gateway import Lines, Running, ask, failure_of, read_badly, read_well, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.conftest import Certificates, StartGateway

CHUNKS = Chunks()
KEPT = chat_pb.StreamOptions(retention=Duration(seconds=60))
RUNNING, ENDED = chat_pb.COMPLETION_STATE_RUNNING, chat_pb.COMPLETION_STATE_COMPLETED
FAILED = chat_pb.COMPLETION_STATE_FAILED
KEYS = "ann call secret-of-ann-alone; bob call secret-of-bob-alone; ops call,operate secret-of-ops-alone"
SECRET = "what only its caller may read"


def bearer(name: str) -> tuple[tuple[str, str], ...]:
    """The metadata of a caller."""
    return (("authorization", f"Bearer secret-of-{name}-alone"),)


ANN, BOB, OPS = map(bearer, ("ann", "bob", "ops"))


def ids(response: chat_pb.ListChatCompletionsResponse) -> list[str]:
    """The ids in a list."""
    return [each.completion_id for each in response.completions]


@pytest.fixture
async def gateway(start_gateway: StartGateway) -> AsyncIterator[Running]:
    """A gateway with two callers and an operator."""
    async with start_gateway(access={"keys": KEYS}) as gateway:
        yield gateway


async def test_entries(gateway: Running, vllm: FakeVllm) -> None:
    """A running completion, a whole one, a failed one, and one whose model is not known, newest first; callers see their own."""
    gate = asyncio.Event()
    vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("a"), CHUNKS.text("b"), gate, CHUNKS.finish()]))
    stream = aiter(gateway.stream(ask(completion_id="running", soft_time_limit=Duration(seconds=60)), metadata=ANN))
    await anext(stream)
    await read_well(gateway.stream(ask(completion_id="whole"), options=KEPT, metadata=BOB))
    vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("a")], end="cut"))
    await read_badly(gateway.stream(ask(completion_id="cut"), metadata=ANN))
    await failure_of(gateway.create(ask(completion_id="absent", model="absent"), metadata=ANN))

    response = await gateway.list(metadata=OPS)
    assert ids(response) == ["absent", "cut", "whole", "running"]
    absent, cut, whole, running = response.completions
    assert (running.caller, running.state, running.time_limit.seconds) == ("ann", RUNNING, 60)
    assert (running.model, running.alias, running.provider_id) == ("vllm/fake", "fake", "vllm")
    assert (running.replica, running.worker, len(running.process)) == (f"{vllm.base_url}/v1", 0, 8)
    assert not running.HasField("end_time")
    assert (whole.caller, whole.state, list(whole.stop_reasons)) == ("bob", ENDED, [chat_pb.STOP_REASON_END_OF_TURN])
    found = await gateway.look_up("whole", metadata=BOB)
    assert whole.usage == found.usage
    assert whole.HasField("expire_time")
    assert (whole.expire_time, whole.error_code) == (found.expire_time, 0)
    assert whole.create_time.ToMicroseconds() <= whole.end_time.ToMicroseconds()
    assert abs(whole.create_time.ToMicroseconds() - found.started.create_time.ToMicroseconds()) <= 1
    assert (cut.state, cut.error_code) == (FAILED, grpc.StatusCode.ABORTED.value[0])
    assert cut.error_reason == error_reason_pb2.ERROR_REASON_UPSTREAM_INCOMPLETE
    assert (absent.state, absent.model, absent.HasField("time_limit")) == (FAILED, "", False)
    assert absent.error_reason == error_reason_pb2.ERROR_REASON_MODEL_NOT_FOUND
    assert (response.next_page_token, list(response.unreachable_workers)) == ("", [])

    own = await gateway.list(metadata=ANN)
    assert ids(own) == ["absent", "cut", "running"]
    assert {each.replica for each in own.completions} == {""}
    gate.set()
    async for _ in stream:
        pass
    assert {each.state for each in (await gateway.list(metadata=OPS)).completions} == {ENDED, FAILED}


async def test_filters(gateway: Running, vllm: FakeVllm) -> None:
    """By caller, model and alias, provider, states and time."""
    vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("a"), asyncio.Event()]))
    call = gateway.stream(ask(completion_id="a", model="vllm/fake"), metadata=ANN)
    await anext(aiter(call))
    await gateway.create(ask(completion_id="b"), metadata=BOB)
    await failure_of(gateway.create(ask(completion_id="c", model="absent"), metadata=BOB))
    between = (await gateway.list(metadata=OPS)).completions[1].create_time
    later = Timestamp()
    later.FromMicroseconds(between.ToMicroseconds() + 1)
    for filters, expected in (
        ({"caller": "ann"}, "a"),
        ({"caller": "unknown"}, ""),
        ({"model": "vllm/fake"}, "ba"),
        ({"model": "fake"}, "b"),
        ({"provider_id": "vllm"}, "ba"),
        ({"provider_id": "other"}, ""),
        ({"states": [RUNNING]}, "a"),
        ({"states": [ENDED, FAILED]}, "cb"),
        ({"create_time_from": between}, "cb"),
        ({"create_time_from": later}, "c"),
    ):
        assert "".join(ids(await gateway.list(metadata=OPS, **filters))) == expected, filters
    assert ids(await gateway.list(metadata=BOB, caller="bob")) == ["c", "b"]
    call.cancel()


async def test_pages_while_completions_come_and_go(gateway: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each completion is on one page, new ones are on none, and other calls run within a page."""
    monkeypatch.setattr(completion_list, "STEP", 1)
    for number in range(5):
        await gateway.create(ask(completion_id=str(number)), metadata=ANN)
    page = await gateway.list(metadata=OPS, page_size=2)
    seen = ids(page)
    while page.next_page_token:
        await gateway.create(ask(completion_id=f"new {len(seen)}".replace(" ", "-")), metadata=ANN)
        page = await gateway.list(metadata=OPS, page_size=2, page_token=page.next_page_token)
        seen += ids(page)
    assert seen == ["4", "3", "2", "1", "0"]
    monkeypatch.setattr(pages, "MAX_PAGE_BYTES", 1)
    page = await gateway.list(metadata=OPS)
    assert len(ids(page)) == 1
    assert page.next_page_token


async def test_an_id_that_is_used_again_is_listed_once(gateway: Running) -> None:
    """The later completion replaces the earlier one."""
    for text in ("one", "two"):
        await gateway.create(ask(text, completion_id="c"), metadata=ANN)
    assert ids(await gateway.list(metadata=OPS)) == ["c"]


async def test_invalid_requests(gateway: Running) -> None:
    """A page size, a state, and tokens: of nothing, of other filters, and with a forged place."""
    await gateway.create(metadata=ANN)
    await gateway.create(metadata=ANN)
    token = (await gateway.list(metadata=OPS, page_size=1)).next_page_token
    query = chat_pb.ListChatCompletionsRequest().SerializeToString().hex()
    forged = pages.asked_for(0, "", query).token_after("soon")
    for fields, field in (
        ({"page_size": -1}, "page_size"),
        ({"states": [0]}, "states"),
        ({"states": [99]}, "states"),
        ({"page_token": "!"}, "page_token"),
        ({"page_token": token, "model": "m"}, "page_token"),
        ({"page_token": forged}, "page_token"),
    ):
        failure = await failure_of(gateway.list(metadata=OPS, **fields))
        assert (failure.reason, failure.fields) == ("INVALID_REQUEST", [field])


async def test_other_callers_are_not_operators(gateway: Running) -> None:
    """They may name themselves, and no other; without a name, another caller's completion is unknown."""
    await gateway.create(ask(completion_id="c"), metadata=ANN)
    for call in (
        gateway.list(metadata=BOB, caller="ann"),
        gateway.look_up("c", "ann", metadata=BOB),
        gateway.cancel("c", "ann", metadata=BOB),
    ):
        failure = await failure_of(call)
        assert (failure.code, failure.reason) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
        assert failure.metadata.items() >= {"caller": "bob", "needs": "operate"}.items()
    assert (await failure_of(gateway.look_up("c", metadata=BOB))).reason == "COMPLETION_NOT_FOUND"
    assert (await gateway.look_up("c", "ann", metadata=ANN)).state == ENDED


async def test_an_operator_cancels(gateway: Running, vllm: FakeVllm, lines: Lines) -> None:
    """By a generated id, and by another id with the caller's name; the caller gets a normal end, and the log says who did it."""
    for completion_id in ("", "own"):
        vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text("a"), asyncio.Event()]))
        stream = aiter(gateway.stream(ask(completion_id=completion_id), metadata=ANN))
        started = (await anext(stream)).started
        response = await gateway.cancel(started.completion_id, "ann" if completion_id else "", metadata=OPS)
        assert response.state == RUNNING
        *_, last = [event async for event in stream]
        assert last.completed.choices[0].stop_reason == chat_pb.STOP_REASON_CANCELLED
        entry = await lines.find("an operator canceled a completion", completion_id=started.completion_id)
        assert (entry["operator"], entry["caller"]) == ("ops", "ann")
        await lines.find("call", completion_id=started.completion_id, completion_of="ann", caller="ops")


async def test_which_completion_an_operator_means(gateway: Running, vllm: FakeVllm) -> None:
    """The operator's own first; an id that a caller chose only together with the caller's name."""
    for caller, text in ((ANN, "a"), (BOB, "b"), (OPS, "c")):
        vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text(text), CHUNKS.finish()]))
        await read_well(gateway.stream(ask(text, completion_id="c"), options=KEPT, metadata=caller))
    own = await gateway.look_up("c", metadata=OPS)
    assert own.completed.choices[0].message.text == "c"
    await gateway.create(ask(completion_id="anns"), metadata=ANN)
    failure = await failure_of(gateway.look_up("anns", metadata=OPS))
    assert (failure.code, failure.reason) == (grpc.StatusCode.NOT_FOUND, "COMPLETION_NOT_FOUND")
    assert "set caller" in failure.message
    failure = await failure_of(gateway.look_up("anns", "bob", metadata=OPS))
    assert "bob has no completion 'anns' here" in failure.message
    assert (await gateway.look_up("anns", "ann", metadata=OPS)).state == ENDED
    failure = await failure_of(gateway.look_up(f"cmpl-{'0' * 32}-00000000", metadata=OPS))
    assert failure.reason == "WRONG_REPLICA"


async def test_an_operator_sees_no_content(gateway: Running, vllm: FakeVllm) -> None:
    """Neither in lists nor in look-ups of others, however it ended, also if the error quotes the request; nor by resuming."""
    vllm.play(Script.chunks([CHUNKS.role(), CHUNKS.text(SECRET), CHUNKS.finish()]))
    chat = ask(SECRET, sampling=chat_pb.Sampling(stop=[SECRET + "?"]), user=SECRET)
    events = await read_well(gateway.stream(chat, options=KEPT, metadata=ANN))
    vllm.play(Script.error(400, SECRET))
    await failure_of(gateway.create(ask(completion_id="bad"), metadata=ANN))
    kept = events[0].started.completion_id
    found = [await gateway.look_up(kept, metadata=OPS), await gateway.look_up("bad", "ann", metadata=OPS)]
    for message in (*found, await gateway.list(metadata=OPS)):
        assert SECRET.encode() not in message.SerializeToString()
    assert (found[0].state, found[0].HasField("completed"), found[0].started.model) == (ENDED, False, "vllm/fake")
    assert (found[0].HasField("last_sequence"), found[0].HasField("error")) == (True, False)
    assert not found[1].HasField("started")
    assert found[1].error.reason == error_reason_pb2.ERROR_REASON_UPSTREAM_REJECTED
    own = await gateway.look_up("bad", metadata=ANN)
    assert SECRET in own.error.message
    _, failure = await read_badly(gateway.resume(kept, metadata=OPS))
    assert failure.reason == "COMPLETION_NOT_FOUND"


async def test_a_name_with_a_new_key(start_gateway: StartGateway) -> None:
    """Has other completions than before, and operators see both; the operator's own old ones too, without content."""
    async with start_gateway(access={"keys": KEYS, "revoke": "finish"}) as gateway:
        await gateway.create(ask(completion_id="old"), metadata=ANN)
        await gateway.create(ask(completion_id="ops"), metadata=OPS)
        keys = KEYS.replace("secret-of-ann-alone", "secret-of-anna-alone").replace("of-ops-", "of-opsi-")
        settings = gateway.gateway._settings
        access = AccessSettings(keys=SecretStr(keys))
        await gateway.gateway.reload(settings.model_copy(update={"access": access}))
        anna, opsi = bearer("anna"), bearer("opsi")
        await gateway.create(ask(completion_id="new"), metadata=anna)
        assert ids(await gateway.list(metadata=anna)) == ["new"]
        assert ids(await gateway.list(metadata=opsi, caller="ann")) == ["new", "old"]
        assert (await gateway.look_up("old", "ann", metadata=opsi)).state == ENDED
        assert not (await gateway.look_up("ops", "ops", metadata=opsi)).HasField("completed")


async def test_an_open_gateway_lists_no_ids(served: Running) -> None:
    """There the id is what protects a completion. Every caller is the same, and none is an operator."""
    await served.create(ask(completion_id="c"))
    [entry] = (await served.list()).completions
    assert (entry.completion_id, entry.caller, entry.replica, entry.state) == ("", "", "", ENDED)
    page = await served.list(page_size=1)
    assert b"c" not in page.next_page_token.encode()
    assert (await failure_of(served.list(caller="ann"))).reason == "PERMISSION_DENIED"


async def test_names_of_certificates(start_gateway: StartGateway, certificates: Certificates) -> None:
    """Without access lines, callers with certificates see their own completions only."""
    mutual = {
        "tls_cert_file": certificates.server,
        "tls_key_file": certificates.server_key,
        "tls_client_ca_file": certificates.authority,
    }
    async with start_gateway(server=mutual) as gateway:
        for name in ("one", "two"):
            certificate, key = certificates.sign(name, "")
            credentials = grpc.ssl_channel_credentials(
                certificates.authority.read_bytes(), key.read_bytes(), certificate.read_bytes()
            )
            async with grpc.aio.secure_channel(gateway.address, credentials) as channel:
                caller = Running(gateway.gateway, channel)
                await caller.create(ask(completion_id="c"))
                [entry] = (await caller.list()).completions
                assert (entry.completion_id, entry.caller) == ("c", name)


async def test_replicas_of_providers(start_gateway: StartGateway, vllm: FakeVllm) -> None:
    """Streams, and after a failure the reason, the time and the end of the ejection."""
    from deltawire.v1 import model_registry_pb2 as models_pb

    addresses = [f"{vllm.base_url}/v1", "http://127.0.0.1:9/v1"]
    async with start_gateway(provider={"base_url": addresses}) as gateway:

        async def replicas() -> list[models_pb.Replica]:
            response = await gateway.models.ListProviders(models_pb.ListProvidersRequest())
            return list(response.providers[0].replicas)

        before = await replicas()
        assert [each.base_url for each in before] == addresses
        assert {each.state for each in before} == {models_pb.Replica.STATE_AVAILABLE}
        assert not any(each.HasField("ejected_until") or each.last_failure_reason for each in before)
        vllm.play(*[Script.chunks([CHUNKS.role(), CHUNKS.text("a"), asyncio.Event()])] * 2)
        calls = [gateway.stream() for _ in range(2)]
        for call in calls:
            await anext(aiter(call))
        good, bad = await replicas()
        assert (good.state, good.active_streams) == (models_pb.Replica.STATE_AVAILABLE, 2)
        assert (bad.state, bad.active_streams) == (models_pb.Replica.STATE_EJECTED, 0)
        assert bad.last_failure_reason == error_reason_pb2.ERROR_REASON_UPSTREAM_UNAVAILABLE
        assert 0 < bad.ejected_until.ToMilliseconds() - bad.last_failure_time.ToMilliseconds() <= 6000
        for call in calls:
            call.cancel()
        await until(lambda: gateway.gateway._worker.active == 0)
